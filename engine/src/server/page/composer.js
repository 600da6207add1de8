// The field that messages are written in.

import { byId } from "./dom.js";

export class Composer {
  #prompt = byId("prompt");
  #send = byId("send");
  #stop = byId("stop");
  #isBusy = false;

  constructor({ send, stop }) {
    this.#prompt.addEventListener("input", () => this.#changed());
    this.#prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.#submit(send);
      }
    });
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit(send);
    });
    this.#stop.addEventListener("click", () => {
      stop();
      this.focus();
    });
  }

  focus() {
    this.#prompt.focus({ preventScroll: true });
  }

  setModel(name) {
    this.#prompt.placeholder = `Message ${name}`;
  }

  /** While an answer is written, the button stops it; what is typed meanwhile stays. */
  setBusy(isBusy) {
    const hadFocus = [this.#send, this.#stop].includes(document.activeElement);
    this.#isBusy = isBusy;
    this.#stop.hidden = !isBusy;
    this.#send.hidden = isBusy;
    this.#changed();
    if (hadFocus) this.focus();
  }

  #submit(send) {
    if (!this.#isBusy && send(this.#prompt.value)) {
      this.#prompt.value = "";
      this.#changed();
    }
  }

  #changed() {
    this.#send.disabled = this.#prompt.value.trim() === "";
    this.#prompt.style.height = "auto";
    this.#prompt.style.height = `${this.#prompt.scrollHeight}px`;
  }
}
