// The chat: which conversation is open, and the answers that are being written.

import { Answer } from "./answer.js";
import { ClientError, json, shortName } from "./client.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { askForKey, wireDialogs } from "./dialogs.js";
import { announce, byId, h, placeIcons, wireThemeButton } from "./dom.js";
import { loadSettings, toRequest } from "./settings.js";
import { openSettings, wireSettings } from "./settings_panel.js";
import { Sidebar } from "./sidebar.js";
import { isConversation, newConversation, Store, titleOf } from "./store.js";

const SUGGESTIONS = [
  "Explain how a sewing machine makes a stitch",
  "Write a short poem about the first snow",
  "What is a page table, in three sentences?",
  "List three ideas for a quick dinner with eggs",
];

const store = new Store(localStorage);
let settings = loadSettings(localStorage);
let model = null;
let open = newConversation();
/** Conversation id → the answer that is being written there; it goes on while another is open. */
const answers = new Map();

const sidebar = new Sidebar({ select, rename, remove, create: startNew });
const view = new Conversation({ regenerate, edit });
const composer = new Composer({ send: submit, stop });

function start() {
  placeIcons();
  wireThemeButton(byId("theme"));
  wireDialogs();
  wireSettings({
    store,
    settings: () => settings,
    changed: (value) => (settings = value),
    imported: refreshList,
    keyChanged: connect,
  });
  wireKeys();
  showSuggestions();
  addEventListener("hashchange", openFromAddress);
  addEventListener("storage", (event) => isConversation(event.key) && storedElsewhere());
  addEventListener("pagehide", () => answers.forEach((answer) => answer.save()));
  addEventListener("online", connect);
  addEventListener("offline", () => notice("This machine is offline."));
  openFromAddress();
  composer.focus();
  connect();
}

/** Learns which model is served; asks for a key where one is needed. */
async function connect() {
  try {
    const { data } = await json("GET", "/v1/models");
    model = data[0]?.id ?? null;
    if (!model) throw new ClientError("The server serves no model.", 0);
    notice(null);
    byId("model").textContent = shortName(model);
    byId("model").title = model;
    composer.setModel(shortName(model));
  } catch (error) {
    await failed(error, connect);
  }
}

/** Tells of an error; where a key helps, `again` runs once there is one. */
async function failed(error, again) {
  notice(error.message, again);
  if (error.status === 401 && (await askForKey())) await again();
}

function notice(text, again) {
  const element = byId("notice");
  element.hidden = !text;
  const props = { type: "button", class: "plain", onclick: again };
  const retry = again ? h("button", props, "Try again") : "";
  element.replaceChildren(...(text ? [h("span", {}, text), retry] : []));
}

function openFromAddress() {
  const id = location.hash.slice(1);
  const found = id ? (answers.get(id)?.conversation ?? store.get(id)) : null;
  show(found ?? newConversation());
}

function show(conversation) {
  open = conversation;
  byId("welcome").hidden = open.messages.length > 0;
  const title = open.title || "New chat";
  byId("title").textContent = title;
  document.title = `${title} · Bespoke`;
  view.show(open, answers.get(open.id));
  composer.setBusy(answers.has(open.id));
  refreshList();
}

function refreshList() {
  sidebar.show(store.list(), open.id, new Set(answers.keys()));
}

/** Another tab has written. */
function storedElsewhere() {
  if (!answers.has(open.id)) {
    const stored = store.get(open.id);
    if (stored && JSON.stringify(stored) !== JSON.stringify(open)) show(stored);
  }
  refreshList();
}

function select(id) {
  if (location.hash.slice(1) === id) openFromAddress();
  else location.hash = id;
  composer.focus();
}

function startNew() {
  history.pushState(null, "", location.pathname);
  show(newConversation());
  announce("New chat");
  composer.focus();
}

function rename(id, title) {
  const conversation = id === open.id ? open : store.get(id);
  if (!conversation) return;
  conversation.title = titleOf(title) || conversation.title;
  save(conversation);
  if (id === open.id) show(open);
  else refreshList();
}

function remove(id) {
  answers.get(id)?.stop();
  answers.delete(id);
  store.remove(id);
  announce("Conversation deleted");
  if (id === open.id) startNew();
  else refreshList();
}

function save(conversation) {
  if (!store.put(conversation)) {
    notice("The browser's storage is full: this conversation is not kept. Export and delete some.");
  }
}

/** Takes a message of the person; whether it was taken. */
function submit(text) {
  if (answers.has(open.id) || text.trim() === "") return false;
  open.messages.push({ role: "user", content: text });
  open.title ||= titleOf(text);
  answer(open);
  return true;
}

/** Answers the last message of the person anew. */
function regenerate() {
  if (answers.has(open.id)) return;
  while (open.messages.at(-1)?.role === "assistant") open.messages.pop();
  if (open.messages.length > 0) answer(open);
}

/** Puts another text in the place of a message; what followed it falls away. */
function edit(message, text) {
  const idx = open.messages.indexOf(message);
  if (idx < 0 || answers.has(open.id)) return;
  open.messages.splice(idx);
  submit(text);
}

async function answer(conversation) {
  conversation.updated = Date.now();
  const answer = new Answer(conversation, {
    save: () => save(conversation),
    grown: (message) => open === conversation && view.grown(message),
  });
  answers.set(conversation.id, answer);
  if (location.hash.slice(1) !== conversation.id) {
    history.pushState(null, "", `#${conversation.id}`);
  }
  save(conversation);
  show(conversation);
  view.toEnd();
  announce("The answer is being written");
  if (!model) await connect();
  const error = await answer.run(toRequest(model ?? "", settings, conversation.messages));
  if (answers.get(conversation.id) !== answer) return; // deleted meanwhile
  answers.delete(conversation.id);
  save(conversation);
  ended(conversation, answer.message, error);
}

function ended(conversation, message, error) {
  if (open === conversation) {
    view.ended(message);
    composer.setBusy(false);
  }
  refreshList();
  if (error) {
    announce(`The answer failed: ${error.message}`);
    if (error.status === 401) failed(error, async () => {
      await connect();
      if (open === conversation) regenerate();
    });
  } else {
    notice(null);
    announce(`${message.note ?? "The answer is complete."} ${message.content}`);
  }
}

function stop() {
  answers.get(open.id)?.stop();
}

function showSuggestions() {
  const button = (text) => {
    const onclick = () => submit(text) && composer.focus();
    return h("li", {}, h("button", { type: "button", class: "suggestion", onclick }, text));
  };
  byId("suggestions").replaceChildren(...SUGGESTIONS.map(button));
}

function wireKeys() {
  const alt = { KeyN: startNew, KeyK: () => sidebar.search(), KeyS: openSettings };
  addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const isTyping = event.target.closest?.("input, textarea");
    if (event.altKey && !event.ctrlKey && !event.metaKey && alt[event.code]) {
      event.preventDefault();
      alt[event.code]();
    } else if (event.key === "Escape" && answers.has(open.id)) {
      stop();
    } else if (event.key === "/" && !isTyping) {
      event.preventDefault();
      composer.focus();
    }
  });
}

start();
