// What the dashboard makes of counters.

import assert from "node:assert/strict";
import { test } from "node:test";

import { niceMax } from "../../../engine/src/server/page/charts.js";
import {
  bytes, duration, percent, quantile, short, since, span,
} from "../../../engine/src/server/page/statistics.js";

test("quantiles lie within their bucket", () => {
  const bounds = [1, 2, 4];
  assert.equal(quantile(bounds, [0, 0, 0, 0], 0.5), null);
  assert.equal(quantile(bounds, [10, 0, 0, 0], 0.5), 0.5);
  assert.equal(quantile(bounds, [0, 10, 0, 0], 1), 2);
  assert.equal(quantile(bounds, [0, 5, 5, 0], 0.5), 2);
  assert.equal(quantile(bounds, [0, 5, 5, 0], 0.75), 3);
  assert.equal(quantile(bounds, [1, 0, 0, 9], 0.5), Infinity);
  assert.equal(quantile([], [3], 0.5), Infinity);
});

test("differences of counters, also over a new start", () => {
  assert.deepEqual(since([3, 4], [1, 4]), [2, 0]);
  assert.deepEqual(since([3, 4], undefined), [3, 4]);
  assert.deepEqual(since([1, 0], [5, 0]), [1, 0]);
  assert.deepEqual(since([1, 2, 3], [1, 2]), [1, 2, 3]);
});

test("numbers are short and have units", () => {
  assert.deepEqual([0, 2e-5, 0.0031, 0.25, 1.234, 12.34, 119, 600].map(duration),
    ["0", "20 µs", "3.1 ms", "250 ms", "1.23 s", "12.3 s", "119 s", "10 min"]);
  assert.deepEqual([0, 0.5, 59, 61, 3600, 90061].map(span),
    ["0 s", "0 s", "59 s", "1 min 1 s", "1 h 0 min", "1 d 1 h"]);
  assert.deepEqual([0, 1536, 98e6, 2 ** 60].map(bytes),
    ["0 B", "1.5 KiB", "93.5 MiB", "1048576 TiB"]);
  assert.deepEqual([0, 0.416, 1, 0 / 0].map(percent), ["0 %", "41.6 %", "100 %", "–"]);
  assert.equal(short(1234.5), "1235");
});

test("scales end at round numbers, with a round middle", () => {
  assert.deepEqual([0, 0.3, 1, 1.1, 3, 5, 7, 9, 11, 229].map(niceMax),
    [1, 0.4, 1, 2, 4, 6, 8, 10, 20, 400]);
});
