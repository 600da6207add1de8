// Server-sent events, cut in all places.

import assert from "node:assert/strict";
import { test } from "node:test";

import { events, SseDecoder } from "../../../engine/src/server/page/sse.js";

const bytesOf = (text) => new TextEncoder().encode(text);

function decode(pieces) {
  const decoder = new SseDecoder();
  return [...pieces.flatMap((piece) => decoder.push(piece)), ...decoder.finish()];
}

const CASES = [
  ["", []],
  ["data: a\n\n", ["a"]],
  ["data:a\n\ndata: b\n\n", ["a", "b"]],
  ["data:  two spaces\n\n", [" two spaces"]],
  ["data: one\ndata: two\n\n", ["one\ntwo"]],
  ["data\n\n", [""]],
  [": keep-alive\n\ndata: a\n\n: bye\n\n", ["a"]],
  ["event: x\nid: 1\nretry: 5\ndata: a\n\n", ["a"]],
  ["database: no\n\n", []],
  ["data: unfinished", []],
  ["data: unfinished\n", []],
  ["data: a\r\n\r\ndata: b\r\rdata: c\n\n", ["a", "b", "c"]],
  ["\n\n\r\n\ndata: a\n\n", ["a"]],
  ["\uFEFFdata: a\n\n", ["a"]],
  ['data: {"text":"Grüße, 世界 🧵\\n"}\n\ndata: [DONE]\n\n', ['{"text":"Grüße, 世界 🧵\\n"}', "[DONE]"]],
];

test("events come out the same wherever their bytes are cut", () => {
  for (const [text, expected] of CASES) {
    const bytes = bytesOf(text);
    assert.deepEqual(decode([bytes]), expected, JSON.stringify(text));
    const single = Array.from(bytes, (byte) => Uint8Array.of(byte));
    assert.deepEqual(decode(single), expected, `byte by byte: ${JSON.stringify(text)}`);
    for (let at = 0; at <= bytes.length; at += 1) {
      const halves = [bytes.slice(0, at), new Uint8Array(), bytes.slice(at)];
      assert.deepEqual(decode(halves), expected, `cut at ${at}: ${JSON.stringify(text)}`);
    }
  }
});

test("bytes that are no UTF-8 become replacement characters", () => {
  const bytes = Uint8Array.of(...bytesOf("data: "), 0xff, 0xf0, 0x9f, 10, 10);
  assert.deepEqual(decode([bytes]), ["\uFFFD\uFFFD"]);
});

test("an event without an end is refused", () => {
  const decoder = new SseDecoder();
  const piece = bytesOf("x".repeat(1 << 20));
  assert.throws(() => {
    for (let count = 0; count < 5; count += 1) decoder.push(piece);
  }, RangeError);
});

test("small events do not add up to a large one", () => {
  const decoder = new SseDecoder();
  const piece = bytesOf(`data: ${"x".repeat(1 << 20)}\n\n`);
  for (let count = 0; count < 6; count += 1) assert.equal(decoder.push(piece).length, 1);
});

test("leaving the loop cancels the body", async () => {
  let isCancelled = false;
  const body = new ReadableStream({
    pull: (controller) => controller.enqueue(bytesOf("data: a\n\n")),
    cancel: () => {
      isCancelled = true;
    },
  });
  for await (const data of events(body)) {
    assert.equal(data, "a");
    break;
  }
  await new Promise(setImmediate);
  assert.ok(isCancelled);
});

test("an error of the body reaches the reader", async () => {
  const body = new ReadableStream({
    pull: (controller) => controller.error(new Error("cut")),
  });
  await assert.rejects(async () => {
    for await (const data of events(body)) assert.fail(data);
  }, /cut/);
});
