// The list of conversations.

import { confirmDelete } from "./dialogs.js";
import { byId, h, iconButton } from "./dom.js";
import { matches } from "./store.js";

const DAY_MS = 86_400_000;

export class Sidebar {
  #element = byId("sidebar");
  #list = byId("list");
  #search = byId("search");
  #openButton = byId("sidebar-open");
  #backdrop = byId("backdrop");
  #narrow = matchMedia("(max-width: 800px)");
  #shown = [[], "", new Set()];

  constructor(actions) {
    this.actions = actions;
    byId("new").addEventListener("click", () => {
      this.#setOpen(false);
      actions.create();
    });
    this.#search.addEventListener("input", () => this.#draw());
    this.#openButton.addEventListener("click", () => this.#setOpen(true));
    byId("sidebar-close").addEventListener("click", () => this.#setOpen(false));
    this.#backdrop.addEventListener("click", () => this.#setOpen(false));
    this.#element.addEventListener("keydown", (event) => this.#onKey(event));
    this.#narrow.addEventListener("change", () => this.#setOpen(false));
    this.#setOpen(false);
  }

  /** Draws the conversations; `open` is the id of the one in view, `writing` are ids. */
  show(conversations, open, writing) {
    this.#shown = [conversations, open, writing];
    // A name that is being changed is not drawn over.
    if (!this.#list.querySelector("input")) this.#draw();
  }

  search() {
    if (this.#narrow.matches) this.#setOpen(true);
    this.#search.focus();
  }

  /** On narrow screens the list lies over the page, and only one of them can be reached. */
  #setOpen(isOpen) {
    const covers = isOpen && this.#narrow.matches;
    const hadFocus = this.#element.contains(document.activeElement);
    this.#element.classList.toggle("open", covers);
    this.#element.inert = this.#narrow.matches && !isOpen;
    document.querySelector("main").inert = covers;
    this.#backdrop.hidden = !covers;
    this.#openButton.setAttribute("aria-expanded", covers);
    if (covers) byId("new").focus();
    else if (hadFocus && this.#narrow.matches) this.#openButton.focus();
  }

  #onKey(event) {
    if (event.key === "Escape" && this.#backdrop.hidden === false) this.#setOpen(false);
    if (!["ArrowDown", "ArrowUp"].includes(event.key)) return;
    const items = [...this.#list.querySelectorAll(".conversation")];
    const at = items.indexOf(document.activeElement);
    const from = event.target === this.#search ? -1 : at;
    if (from === -1 && event.target !== this.#search) return;
    event.preventDefault();
    const next = from + (event.key === "ArrowDown" ? 1 : -1);
    (items[next] ?? (next < 0 ? this.#search : null))?.focus();
  }

  #draw() {
    const [conversations, open, writing] = this.#shown;
    const focused = document.activeElement?.closest("#list li")?.dataset.id;
    const query = this.#search.value;
    const found = conversations.filter((conversation) => matches(conversation, query));
    const rows = [];
    let heading = null;
    for (const conversation of found) {
      const when = age(conversation.updated);
      if (when !== heading) rows.push(h("li", { class: "when" }, when));
      heading = when;
      rows.push(this.#row(conversation, open, writing));
    }
    this.#list.replaceChildren(...rows);
    const empty = byId("list-empty");
    empty.hidden = found.length > 0;
    empty.textContent = query ? "Nothing found." : "No conversations yet.";
    if (focused) this.#rowOf(focused)?.querySelector(".conversation").focus();
  }

  #rowOf(id) {
    return [...this.#list.children].find((row) => row.dataset.id === id);
  }

  #row(conversation, open, writing) {
    const { id, title } = conversation;
    const isOpen = id === open;
    const select = () => {
      this.#setOpen(false);
      this.actions.select(id);
    };
    const props = {
      type: "button",
      class: "conversation",
      "aria-current": isOpen ? "page" : null,
      title,
      onclick: select,
    };
    const row = h("li", { class: isOpen ? "open" : "", "data-id": id });
    const dot = { class: "dot", role: "img", "aria-label": "is being answered" };
    const state = writing.has(id) ? h("span", dot) : null;
    row.append(
      h("button", props, h("span", {}, title || "Untitled"), state),
      iconButton("edit", `Rename ${title}`, () => this.#rename(row, conversation)),
      iconButton("trash", `Delete ${title}`, () => this.#remove(row, conversation)),
    );
    return row;
  }

  #rename(row, { id, title }) {
    const input = h("input", { value: title, "aria-label": "New name" });
    let isOver = false;
    const leave = (isChanged) => {
      if (isOver) return;
      isOver = true;
      const name = input.value.trim();
      input.remove();
      if (isChanged && name) this.actions.rename(id, name);
      this.#draw();
      this.#rowOf(id)?.querySelector(".conversation").focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter") leave(true);
      if (event.key === "Escape") leave(false);
      event.stopPropagation();
    });
    input.addEventListener("blur", () => leave(true));
    row.replaceChildren(input);
    input.focus();
    input.select();
  }

  async #remove(row, { id, title }) {
    const next = (row.nextElementSibling ?? row.previousElementSibling)?.dataset.id;
    const text = `“${title || "Untitled"}” is deleted from this browser. There is no way back.`;
    if (!(await confirmDelete("Delete the conversation?", text))) return;
    this.actions.remove(id);
    const nextRow = next && this.#rowOf(next);
    (nextRow ? nextRow.querySelector(".conversation") : this.#search).focus();
  }
}

function age(updated) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (updated >= today) return "Today";
  if (updated >= today - DAY_MS) return "Yesterday";
  if (updated >= today - 7 * DAY_MS) return "Last seven days";
  return "Older";
}
