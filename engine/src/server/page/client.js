// The server's HTTP interface, as far as the pages use it.

import { events } from "./sse.js";

const KEY = "bespoke.key";

/** What went wrong, in words for the person at the page. */
export class ClientError extends Error {
  /** `status` is that of the answer; 0: there was none. */
  constructor(message, status, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The API key is kept as long as the tab. */
export function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** A request's answer; every failure is a ClientError, but an abort stays one. */
export async function send(method, path, { body, signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key()) headers.Authorization = `Bearer ${key()}`;
  const text = body === undefined ? undefined : JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, { method, headers, body: text, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ClientError("The server cannot be reached. Is it running?", 0);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export async function json(method, path, options) {
  const response = await send(method, path, options);
  return response.status === 204 ? null : response.json();
}

/** Of a model that is named as a folder or a repository, the last part. */
export function shortName(model) {
  return model.split("/").filter(Boolean).at(-1) ?? model;
}

async function refusal(response) {
  const { error } = await response.json().catch(() => ({}));
  const wait = Number(response.headers.get("Retry-After"));
  const plain = {
    401: "This server asks for an API key.",
    429: "The server is busy.",
    503: "The server takes no new requests just now.",
  }[response.status];
  let message = plain ?? error?.message ?? `The server answered with status ${response.status}.`;
  if (wait > 0) message += ` Try again in ${wait} s.`;
  return new ClientError(message, response.status, error?.code ?? null);
}

/** The chunks of a streamed chat completion. It ends well, or throws. */
export async function* chatChunks(body, signal) {
  const stream = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send("POST", "/v1/chat/completions", { body: stream, signal });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ClientError(chunk.error.message, 500, chunk.error.code);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ClientError) throw error;
    throw new ClientError("The connection broke off before the answer was complete.", 0);
  }
  throw new ClientError("The connection ended before the answer was complete.", 0);
}
