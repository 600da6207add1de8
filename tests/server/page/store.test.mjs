// Conversations and settings, over a storage that can be full or hold nonsense.

import assert from "node:assert/strict";
import { test } from "node:test";

import {
  FIELDS, initialSettings, loadSettings, problemOf, saveSettings, toRequest,
} from "../../../engine/src/server/page/settings.js";
import {
  IMPORT_MAX, matches, newConversation, Store, titleOf,
} from "../../../engine/src/server/page/store.js";

/** localStorage with room for so many characters. */
class Storage {
  #items = new Map();

  constructor(chars_max = Infinity) {
    this.chars_max = chars_max;
  }

  get length() {
    return this.#items.size;
  }

  key(idx) {
    return [...this.#items.keys()][idx] ?? null;
  }

  getItem(name) {
    return this.#items.get(name) ?? null;
  }

  setItem(name, value) {
    if (value.length > this.chars_max) throw new Error("QuotaExceededError");
    this.#items.set(name, value);
  }

  removeItem(name) {
    this.#items.delete(name);
  }
}

function conversation(title, updated, ...contents) {
  const roles = ["user", "assistant"];
  const messages = contents.map((content, idx) => ({ role: roles[idx % 2], content }));
  return { ...newConversation(), title, updated, messages };
}

test("conversations are found again, last used first", () => {
  const store = new Store(new Storage());
  const old = conversation("old", 1, "a");
  const recent = conversation("recent", 2, "b", "c");
  recent.messages[1].pending = true;
  recent.messages[1].stats = { first_ms: 1.5, output: 3 };
  assert.ok(store.put(old) && store.put(recent));
  assert.deepEqual(store.list(), [recent, old]);
  assert.deepEqual(store.get(old.id), old);
  store.remove(old.id);
  assert.deepEqual(store.list(), [recent]);
  assert.equal(store.get(old.id), null);
});

test("what else is stored, or is damaged, is passed over", () => {
  const storage = new Storage();
  const store = new Store(storage);
  storage.setItem("bespoke.theme", "dark");
  for (const [idx, text] of ["", "null", "{", "[]", "{}", '{"messages":[{"role":"system"}]}',
    '{"messages":[{"role":"user","content":1}]}', '{"messages":"x"}'].entries()) {
    storage.setItem(`bespoke.chat.${idx}`, text);
  }
  assert.deepEqual(store.list(), []);
});

test("a full storage is told", () => {
  const store = new Store(new Storage(200));
  assert.ok(store.put(conversation("small", 1, "a")));
  assert.ok(!store.put(conversation("large", 1, "a".repeat(200))));
});

test("what is exported can be imported, under new names", () => {
  const store = new Store(new Storage());
  store.put(conversation("one", 1, "question", "answer"));
  assert.equal(store.addExported(store.exported()), 1);
  const [left, right] = store.list();
  assert.notEqual(left.id, right.id);
  assert.match(left.id, /^[0-9a-f]{32}$/);
  assert.deepEqual({ ...left, id: "" }, { ...right, id: "" });
});

test("files that hold something else are refused, and nothing is changed", () => {
  const store = new Store(new Storage());
  const file = (conversations) =>
    JSON.stringify({ format: "bespoke-conversations", version: 1, conversations });
  const good = { title: "t", updated: 1, messages: [{ role: "user", content: "a" }] };
  const long = "x".repeat(IMPORT_MAX.chars + 1);
  const refused = [
    ["{", /not JSON/],
    ["null", /no conversations/],
    ["[]", /no conversations/],
    ['{"format":"other","conversations":[]}', /no conversations/],
    [file("x"), /no conversations/],
    [file([good, {}]), /Conversation 2/],
    [file([good, { messages: [{ role: "system", content: "x" }] }]), /Conversation 2/],
    [file([{ messages: [{ role: "user", content: long }] }]), /Conversation 1/],
    [file(new Array(IMPORT_MAX.conversations + 1).fill(good)), /more than/],
  ];
  for (const [text, message] of refused) {
    assert.throws(() => store.addExported(text), message);
    assert.deepEqual(store.list(), []);
  }
  assert.equal(store.addExported(file([{ ...good, id: "../x", extra: 1, updated: "soon" }])), 1);
  const [kept] = store.list();
  assert.deepEqual({ ...kept, id: "" }, { ...good, id: "", updated: 0 });
});

test("searching finds all words, in titles and messages", () => {
  const found = conversation("Sewing machines", 1, "How does the NEEDLE work?", "It goes down.");
  assert.ok(matches(found, ""));
  assert.ok(matches(found, "needle sewing"));
  assert.ok(!matches(found, "needle knitting"));
});

test("a title is the first line, not too long", () => {
  assert.equal(titleOf("  one\ntwo"), "one");
  assert.equal(titleOf("x".repeat(100)).length, 80);
  assert.equal(titleOf(" "), "");
});

test("settings are kept; those out of bounds are not believed", () => {
  const storage = new Storage();
  assert.deepEqual(loadSettings(storage), initialSettings());
  const changes = { temperature: 0, top_k: 40, seed: 7, system: "s", json: true };
  const settings = { ...initialSettings(), ...changes };
  assert.ok(saveSettings(storage, settings));
  assert.deepEqual(loadSettings(storage), settings);
  const wrong = '{"temperature":9,"top_k":1.5,"seed":"x","system":3,"json":1}';
  storage.setItem("bespoke.settings", wrong);
  assert.deepEqual(loadSettings(storage), initialSettings());
  storage.setItem("bespoke.settings", "{");
  assert.deepEqual(loadSettings(storage), initialSettings());
});

test("fields say what is wrong with a number", () => {
  const field = (name) => FIELDS.find((field) => field.name === name);
  assert.equal(problemOf(field("temperature"), 2), null);
  assert.match(problemOf(field("temperature"), 2.1), /between 0 and 2/);
  assert.match(problemOf(field("top_k"), 1.5), /whole/);
  assert.match(problemOf(field("seed"), NaN), /not a number/);
  for (const each of FIELDS) {
    if (each.initial !== null) assert.equal(problemOf(each, each.initial), null);
  }
});

test("a request has what was set, and no answers that never began", () => {
  const settings = { ...initialSettings(), system: "Be brief.", top_k: 5, json: true };
  const messages = [
    { role: "user", content: "a" },
    { role: "assistant", content: "", note: "failed" },
    { role: "user", content: "b", extra: 1 },
  ];
  assert.deepEqual(toRequest("m", settings, messages), {
    model: "m",
    messages: [
      { role: "system", content: "Be brief." },
      { role: "user", content: "a" },
      { role: "user", content: "b" },
    ],
    temperature: 0.7, top_p: 0.95, top_k: 5, max_tokens: 1024,
    response_format: { type: "json_object" },
  });
});
