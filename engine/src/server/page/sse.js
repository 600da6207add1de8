// Server-sent events over fetch: EventSource cannot POST.

// An event larger than this is no answer of ours; better an error than a full memory.
const EVENT_CHARS_MAX = 1 << 22;

/** Bytes in any pieces → the data of the events that they complete. */
export class SseDecoder {
  #decoder = new TextDecoder();
  #line = "";
  #data = [];
  #size = 0;
  #endsWithCr = false;

  push(bytes) {
    return this.#take(this.#decoder.decode(bytes, { stream: true }));
  }

  /** The rest of a character that broke off shows as U+FFFD; an unfinished event is dropped. */
  finish() {
    return this.#take(this.#decoder.decode());
  }

  #take(text) {
    const events = [];
    // "\r\n" is one line end, also where a chunk ends between the two.
    if (this.#endsWithCr && text.startsWith("\n")) text = text.slice(1);
    else if (text === "") return events;
    this.#endsWithCr = text.endsWith("\r");
    const lines = text.split(/\r\n|\n|\r/);
    for (const [idx, piece] of lines.entries()) {
      this.#grow(piece.length);
      this.#line += piece;
      if (idx + 1 === lines.length) break;
      this.#endLine(events);
    }
    return events;
  }

  #endLine(events) {
    const line = this.#line;
    this.#line = "";
    if (line === "") {
      if (this.#data.length > 0) events.push(this.#data.join("\n"));
      this.#data = [];
      this.#size = 0;
    } else if (line === "data" || line.startsWith("data:")) {
      this.#data.push(line.slice(5).replace(/^ /, ""));
    }
    // Comments keep the connection alive; ids, names and retry times mean nothing here.
  }

  #grow(num_chars) {
    this.#size += num_chars;
    if (this.#size > EVENT_CHARS_MAX) {
      throw new RangeError(`an event of more than ${EVENT_CHARS_MAX} characters`);
    }
  }
}

/** The data of each event of a response body. Leaving the loop cancels the body. */
export async function* events(body) {
  const decoder = new SseDecoder();
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      yield* done ? decoder.finish() : decoder.push(value);
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
