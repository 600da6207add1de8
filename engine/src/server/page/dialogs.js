// Dialogs: what has to be answered before the page goes on.

import { key, setKey } from "./client.js";
import { byId } from "./dom.js";

/** Close buttons close, and a click beside a dialog does, too. */
export function wireDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => {
      const isBeside = event.target === dialog && !isInside(dialog, event);
      if (isBeside || event.target.closest("[data-close]")) dialog.close();
    });
  }
}

function isInside(dialog, { clientX, clientY }) {
  const { left, right, top, bottom } = dialog.getBoundingClientRect();
  return clientX >= left && clientX <= right && clientY >= top && clientY <= bottom;
}

/** Whether a key was given. It is tried by whoever asked. */
export function askForKey() {
  const dialog = byId("key-dialog");
  const input = byId("key");
  // A key that is there has just been refused, unless the person wants to change it.
  byId("key-problem").textContent = "";
  input.value = key();
  input.select();
  return new Promise((resolve) => {
    let isGiven = false;
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      // A header holds no other characters.
      if (!/^[\x21-\x7e]+$/.test(input.value.trim())) {
        byId("key-problem").textContent = "A key has letters, digits and signs only, no spaces.";
        return;
      }
      setKey(input.value.trim());
      isGiven = true;
      dialog.close();
    };
    dialog.onclose = () => resolve(isGiven);
    if (!dialog.open) dialog.showModal();
  });
}

/** Whether the person wants it. */
export function confirmDelete(title, text) {
  const dialog = byId("confirm");
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  return new Promise((resolve) => {
    let isWanted = false;
    byId("confirm-yes").onclick = () => {
      isWanted = true;
      dialog.close();
    };
    dialog.onclose = () => resolve(isWanted);
    dialog.showModal();
  });
}
