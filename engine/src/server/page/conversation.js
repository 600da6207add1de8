// The messages of the open conversation, drawn.

import { byId, copyButton, h, iconButton } from "./dom.js";
import { renderInto } from "./render.js";

/** Pixels from the end within which the view follows a growing answer. */
const NEAR_END = 80;

export class Conversation {
  #messages = byId("messages");
  #scroll = byId("scroll");
  #latest = byId("latest");
  /** message → its element, for those shown. */
  #elements = new Map();
  #waiting = null;
  #follows = true;

  constructor(actions) {
    this.actions = actions;
    this.#scroll.addEventListener("scroll", () => this.#scrolled());
    this.#latest.addEventListener("click", () => this.toEnd());
  }

  show(conversation, answer) {
    const isSame = this.conversation === conversation;
    this.conversation = conversation;
    this.writing = answer?.message ?? null;
    this.#elements.clear();
    const elements = conversation.messages.map((message) => this.#element(message));
    this.#messages.replaceChildren(...elements);
    if (!isSame) this.toEnd();
  }

  /** The answer has more text; it is drawn with the next frame. */
  grown(message) {
    if (this.#waiting) return;
    this.#waiting = requestAnimationFrame(() => {
      this.#waiting = null;
      const element = this.#elements.get(message);
      if (element) this.#fill(element, message);
      if (this.#follows) this.#toBottom();
    });
  }

  ended(message) {
    this.writing = null;
    // Of every answer but this one, what can be done has changed as well.
    for (const [shown, element] of this.#elements) {
      if (shown !== message) this.#fillFooter(element, shown);
    }
    const element = this.#elements.get(message);
    if (element) this.#fill(element, message);
    if (this.#follows) this.#toBottom();
  }

  toEnd() {
    this.#follows = true;
    this.#toBottom();
    this.#latest.hidden = true;
  }

  #toBottom() {
    this.#scroll.scrollTop = this.#scroll.scrollHeight;
  }

  #scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroll;
    this.#follows = scrollHeight - scrollTop - clientHeight < NEAR_END;
    this.#latest.hidden = this.#follows;
  }

  #element(message) {
    const who = message.role === "user" ? "You" : "Assistant";
    const element = h("article", { class: `message ${message.role}`, "aria-label": who });
    // Headings let screen readers go from message to message.
    element.append(h("h2", { class: "unseen" }, who), h("div", { class: "body" }), h("footer"));
    this.#elements.set(message, element);
    this.#fill(element, message);
    return element;
  }

  #fill(element, message) {
    const body = element.querySelector(".body");
    if (message.role === "user") body.textContent = message.content;
    else this.#fillAnswer(body, message);
    const isWriting = message === this.writing;
    element.setAttribute("aria-busy", isWriting);
    element.classList.toggle("writing", isWriting);
    this.#fillFooter(element, message);
  }

  #fillAnswer(body, message) {
    if (!body.firstChild) {
      body.append(h("div", { class: "reasoning-place" }), h("div", { class: "text" }));
    }
    const [place, text] = body.children;
    if (message.reasoning) {
      if (!place.firstChild) {
        const summary = h("summary", {}, "Reasoning");
        place.append(h("details", { class: "reasoning" }, summary, h("div", { class: "text" })));
      }
      renderInto(place.querySelector(".text"), message.reasoning);
    }
    renderInto(text, message.content);
  }

  #fillFooter(element, message) {
    const footer = element.querySelector("footer");
    if (message === this.writing) return footer.replaceChildren();
    const parts = message.role === "user" ? this.#userParts(message) : this.#answerParts(message);
    footer.replaceChildren(...parts);
  }

  #userParts(message) {
    const parts = [copyButton("Copy the message", () => message.content)];
    if (!this.writing) {
      parts.push(iconButton("edit", "Edit and send again", () => this.#edit(message)));
    }
    return parts;
  }

  #answerParts(message) {
    const parts = [];
    const broken = message.pending ? "Broken off when the page was left." : null;
    const note = message.note ?? broken;
    if (note) parts.push(h("p", { class: "note" }, note));
    if (message.content) parts.push(copyButton("Copy the answer", () => message.content));
    if (message === this.conversation.messages.at(-1) && !this.writing) {
      parts.push(iconButton("again", "Answer again", () => this.actions.regenerate()));
    }
    const stats = describe(message.stats);
    if (stats) parts.push(h("p", { class: "stats" }, stats));
    return parts;
  }

  #edit(message) {
    const element = this.#elements.get(message);
    const body = element.querySelector(".body");
    const area = h("textarea", { "aria-label": "Edit the message", value: message.content });
    const leave = () => {
      element.classList.remove("editing");
      this.#fill(element, message);
      element.querySelector("[aria-label^=Edit]")?.focus();
    };
    const send = () => area.value.trim() && this.actions.edit(message, area.value);
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    element.classList.add("editing");
    body.replaceChildren(area);
    element.querySelector("footer").replaceChildren(
      h("button", { type: "button", class: "plain", onclick: leave }, "Cancel"),
      h("button", { type: "button", class: "primary", onclick: send }, "Send"),
    );
    area.style.height = `${area.scrollHeight + 2}px`;
    area.focus();
  }
}

/** `{first_ms, …}` of an answer as a line of text. */
export function describe(stats) {
  if (!stats) return "";
  const parts = [];
  const decode_ms = stats.total_ms - stats.first_ms;
  if (stats.output > 1 && decode_ms > 0) {
    const rate = ((stats.output - 1) * 1000) / decode_ms;
    parts.push(`${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`);
  }
  if (stats.first_ms > 0) parts.push(`first after ${duration(stats.first_ms)}`);
  if (stats.output > 0) parts.push(`${stats.output} token${stats.output === 1 ? "" : "s"}`);
  if (stats.cached > 0) parts.push(`${stats.cached} of ${stats.prompt} prompt tokens cached`);
  return parts.join(" · ");
}

function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}
