// Conversations, kept in the browser: one entry of localStorage each.

const PREFIX = "bespoke.chat.";
const FORMAT = "bespoke-conversations";
const TITLE_CHARS_MAX = 80;

/** Bounds of what a file may bring in. */
export const IMPORT_MAX = { conversations: 1000, messages: 2000, chars: 1 << 20 };

/**
 * A conversation is `{id, title, updated, messages}`, `updated` in milliseconds since 1970. A
 * message is `{role, content}` with role `user` or `assistant`; answers may have `reasoning`,
 * `stats`, `note` (why it ended early) and `pending` (it was being written when last saved).
 */
export class Store {
  /** `storage` is localStorage, or what behaves like it. */
  constructor(storage) {
    this.storage = storage;
  }

  /** Last used first. */
  list() {
    const found = [];
    for (let idx = 0; idx < this.storage.length; idx += 1) {
      const name = this.storage.key(idx);
      const conversation = name?.startsWith(PREFIX) ? this.get(name.slice(PREFIX.length)) : null;
      if (conversation) found.push(conversation);
    }
    return found.sort((left, right) => right.updated - left.updated);
  }

  get(id) {
    try {
      return checked(JSON.parse(this.storage.getItem(PREFIX + id)), id);
    } catch {
      return null;
    }
  }

  /** Whether there was room. */
  put(conversation) {
    try {
      this.storage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
      return true;
    } catch {
      return false;
    }
  }

  remove(id) {
    this.storage.removeItem(PREFIX + id);
  }

  /** All of them, as the text of a file. */
  exported() {
    return JSON.stringify({ format: FORMAT, version: 1, conversations: this.list() }, null, 1);
  }

  /** Adds what an exported file holds, under new ids; returns how many. Throws what is wrong. */
  addExported(text) {
    const conversations = parseExport(text);
    for (const [idx, conversation] of conversations.entries()) {
      if (!this.put({ ...conversation, id: newId() })) {
        const done = `${idx} of ${conversations.length} conversations were imported`;
        throw new Error(`The browser's storage is full; ${done}.`);
      }
    }
    return conversations.length;
  }
}

/** Whether a storage event is about a conversation; a null name means all of them. */
export function isConversation(name) {
  return name === null || name.startsWith(PREFIX);
}

export function newConversation() {
  return { id: newId(), title: "", updated: Date.now(), messages: [] };
}

/** 128 random bits. `randomUUID` would need HTTPS. */
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The first line of the first message. */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > TITLE_CHARS_MAX ? `${line.slice(0, TITLE_CHARS_MAX - 1)}…` : line;
}

/** Whether each of the words is in the title or in a message. */
export function matches(conversation, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const texts = [conversation.title, ...conversation.messages.map((message) => message.content)];
  const text = texts.join("\n").toLowerCase();
  return words.every((word) => text.includes(word));
}

function parseExport(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON; choose one that was exported here.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) {
    throw new Error("The file holds no conversations of Bespoke.");
  }
  if (file.conversations.length > IMPORT_MAX.conversations) {
    const count = file.conversations.length;
    throw new Error(`The file has ${count} conversations, more than ${IMPORT_MAX.conversations}.`);
  }
  return file.conversations.map((conversation, idx) => {
    const good = checked(conversation, newId());
    if (!good) throw new Error(`Conversation ${idx + 1} of the file is damaged.`);
    return good;
  });
}

/** What is known of a stored conversation, or null where it is none. */
function checked(value, id) {
  if (!Array.isArray(value?.messages) || value.messages.length > IMPORT_MAX.messages) return null;
  const messages = value.messages.map(checkedMessage);
  if (messages.includes(null)) return null;
  const title = typeof value.title === "string" ? value.title.slice(0, TITLE_CHARS_MAX) : "";
  const updated = Number.isFinite(value.updated) ? value.updated : 0;
  return { id, title, updated, messages };
}

function checkedMessage(value) {
  const isText = (text) => typeof text === "string" && text.length <= IMPORT_MAX.chars;
  if (!["user", "assistant"].includes(value?.role) || !isText(value.content)) return null;
  const message = { role: value.role, content: value.content };
  if (isText(value.reasoning)) message.reasoning = value.reasoning;
  if (isText(value.note)) message.note = value.note;
  if (value.pending === true) message.pending = true;
  if (typeof value.stats === "object" && value.stats !== null) message.stats = numbers(value.stats);
  return message;
}

function numbers(stats) {
  return Object.fromEntries(Object.entries(stats).filter(([, value]) => Number.isFinite(value)));
}
