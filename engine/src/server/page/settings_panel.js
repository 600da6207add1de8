// The settings, drawn.

import { json } from "./client.js";
import { askForKey, confirmDelete } from "./dialogs.js";
import { byId, h, iconButton } from "./dom.js";
import { FIELDS, initialSettings, problemOf, saveSettings } from "./settings.js";

const FILE_BYTES_MAX = 64 << 20;

/** `page`: what the panel reads and tells: `{store, settings, changed, imported, keyChanged}`. */
export function wireSettings(page) {
  byId("fields").replaceChildren(...FIELDS.map(fieldRow));
  const form = byId("settings-form");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => read(page));
  byId("settings-open").addEventListener("click", openSettings);
  byId("settings").addEventListener("beforetoggle", () => show(page.settings()));
  byId("settings-reset").addEventListener("click", () => {
    show(initialSettings());
    read(page);
  });
  byId("export").addEventListener("click", () => exportTo(page.store));
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", (event) => importFrom(event.target, page));
  byId("key-change").addEventListener("click", async () => {
    byId("settings").close();
    if (await askForKey()) page.keyChanged();
  });
  show(page.settings());
}

export function openSettings() {
  byId("settings").showModal();
  byId("transfer-result").textContent = "";
  showSessions();
}

function fieldRow({ name, label, hint, min, max, step }) {
  const id = `field-${name}`;
  return h(
    "div",
    { class: "field" },
    h("label", { for: id }, label),
    h("input", {
      id, type: "number", min, max, step, placeholder: "server's", inputmode: "decimal",
      "aria-describedby": `${id}-hint`,
    }),
    h("p", { id: `${id}-hint`, class: "fine" }, hint),
  );
}

function show(settings) {
  for (const { name } of FIELDS) {
    const input = byId(`field-${name}`);
    input.value = settings[name] ?? "";
    input.removeAttribute("aria-invalid");
  }
  byId("system").value = settings.system;
  byId("json").checked = settings.json;
  byId("settings-problem").textContent = "";
}

/** Takes over what is right; a field that is wrong says so and keeps its last value. */
function read(page) {
  const settings = { ...page.settings(), system: byId("system").value, json: byId("json").checked };
  const problems = [];
  for (const field of FIELDS) {
    const input = byId(`field-${field.name}`);
    const isEmpty = input.value === "" && !input.validity.badInput;
    const problem = isEmpty ? null : problemOf(field, input.valueAsNumber);
    if (problem) problems.push(`${problem}.`);
    else settings[field.name] = isEmpty ? null : input.valueAsNumber;
    if (problem) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  }
  if (!saveSettings(localStorage, settings)) {
    problems.push("The browser's storage is full: the settings last until the page is left.");
  }
  byId("settings-problem").textContent = problems.join(" ");
  page.changed(settings);
}

function exportTo(store) {
  const address = URL.createObjectURL(new Blob([store.exported()], { type: "application/json" }));
  const day = new Date().toISOString().slice(0, 10);
  h("a", { href: address, download: `bespoke-conversations-${day}.json` }).click();
  // The download has to begin before its source goes.
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

async function importFrom(input, { store, imported }) {
  const [file] = input.files;
  const result = byId("transfer-result");
  input.value = "";
  if (!file) return;
  try {
    if (file.size > FILE_BYTES_MAX) throw new Error("The file has more than 64 MiB.");
    const count = store.addExported(await file.text());
    result.textContent = `${count} conversation${count === 1 ? "" : "s"} imported.`;
  } catch (error) {
    result.textContent = error.message;
  }
  imported();
}

/** The sessions that clients of the API keep on the server under this key. */
async function showSessions() {
  const [list, note] = [byId("sessions"), byId("sessions-note")];
  list.replaceChildren();
  note.textContent = "Asking the server …";
  try {
    const { data } = await json("GET", "/v1/sessions");
    list.replaceChildren(...data.map(sessionRow));
    note.textContent = data.length > 0 ? "" : "None.";
  } catch (error) {
    note.textContent = error.message;
  }
}

function sessionRow(session) {
  const name = String(session.id ?? session.session_id);
  const size = session.num_tokens ?? session.tokens;
  const remove = async () => {
    const text = `The server forgets session ${name}.`;
    if (!(await confirmDelete("Delete the session?", text))) return;
    await json("DELETE", `/v1/sessions/${encodeURIComponent(name)}`).catch((error) => {
      byId("sessions-note").textContent = error.message;
    });
    await showSessions();
  };
  return h(
    "li",
    {},
    h("code", {}, name),
    h("span", { class: "fine" }, size === undefined ? "" : `${size} tokens`),
    iconButton("trash", `Delete session ${name}`, remove),
  );
}
