// One answer while it is being written.

import { chatChunks } from "./client.js";

/** Milliseconds between two saves of a growing answer. */
const SAVE_MS = 500;

export class Answer {
  #abort = new AbortController();
  #saveTimer = null;

  /** Appends an empty answer to the conversation. */
  constructor(conversation, { save, grown }) {
    this.conversation = conversation;
    this.message = { role: "assistant", content: "", pending: true };
    this.saveNow = save;
    this.grown = grown;
    conversation.messages.push(this.message);
  }

  /** What came so far is kept. */
  stop() {
    this.#abort.abort();
  }

  save() {
    clearTimeout(this.#saveTimer);
    this.#saveTimer = null;
    this.saveNow();
  }

  /** Fills the message; the error that ended it early, or null. */
  async run(request) {
    const { message } = this;
    const clock = new Clock();
    let failure = null;
    try {
      for await (const chunk of chatChunks(request, this.#abort.signal)) this.#take(chunk, clock);
    } catch (error) {
      if (error.name === "AbortError") {
        message.note = "Stopped by you.";
      } else {
        message.note = error.message;
        failure = error;
      }
    }
    clearTimeout(this.#saveTimer);
    delete message.pending;
    message.stats = clock.stats();
    return failure;
  }

  #take(chunk, clock) {
    const choice = chunk.choices?.[0];
    const { content, reasoning_content: reasoning } = choice?.delta ?? {};
    if (chunk.usage) clock.usage = chunk.usage;
    if (choice?.finish_reason === "length") {
      this.message.note = "Cut off at the longest answer allowed.";
    }
    if (!content && !reasoning) return;
    clock.token();
    if (reasoning) this.message.reasoning = (this.message.reasoning ?? "") + reasoning;
    if (content) this.message.content += content;
    this.#saveTimer ??= setTimeout(() => this.save(), SAVE_MS);
    this.grown(this.message);
  }
}

/** When tokens came, as seen from here. */
class Clock {
  usage = null;
  #start = performance.now();
  #first = null;
  #last = null;

  token() {
    this.#last = performance.now();
    this.#first ??= this.#last;
  }

  /** Times in milliseconds; what is not known is left out. */
  stats() {
    const stats = {};
    if (this.#first !== null) {
      stats.first_ms = this.#first - this.#start;
      stats.total_ms = this.#last - this.#start;
    }
    if (this.usage) {
      const { prompt_tokens, completion_tokens, prompt_tokens_details } = this.usage;
      stats.prompt = prompt_tokens;
      stats.output = completion_tokens;
      stats.cached = prompt_tokens_details?.cached_tokens ?? 0;
    }
    return stats;
  }
}
