// The dashboard: asks for the numbers each second and draws them.

import { bar, histogram, pageGrid, timeChart } from "./charts.js";
import { json, shortName } from "./client.js";
import { askForKey, wireDialogs } from "./dialogs.js";
import { byId, h, placeIcons, wireThemeButton } from "./dom.js";
import { bytes, count, duration, percent, quantile, short, since, span } from "./statistics.js";

const POLL_MS = 1000;
/** Samples that are kept: five minutes. */
const NUM_SAMPLES = 300;
/** Charts show the least of these that holds all samples. */
const SPANS = [60, 120, NUM_SAMPLES];
const PAGE_CELLS_MAX = 288;
const PAGE_COLUMNS = 24;

/** Limits of moving bytes; the others are of operations. */
const BYTE_BOUNDS = ["memory", "cache"];

const LATENCIES = [
  ["first_token", "To the first token"],
  ["between_tokens", "Between tokens"],
  ["request", "Whole request"],
  ["step", "A step of the batch"],
];

/** `{time_ms, rate, running, waiting, data}`; `data` null: the server did not answer. */
const samples = [];
let hovered = { throughput: null, batch: null };

async function poll() {
  const time_ms = performance.now();
  const data = await json("GET", "/dashboard/data").catch((error) => missed(time_ms, error));
  if (data) {
    notice(null);
    take(time_ms, data);
  }
  // A page that nobody sees asks less often.
  const wait_ms = document.hidden ? 10 * POLL_MS : POLL_MS;
  setTimeout(poll, Math.max(100, wait_ms - (performance.now() - time_ms)));
}

/** The server gave no numbers; the charts have a gap. */
async function missed(time_ms, error) {
  keep({ time_ms, data: null, rate: null, steps: null, running: null, waiting: null });
  setState("unreachable");
  drawCharts();
  notice(error.message);
  if (error.status === 401) {
    setState("locked");
    // Without a key there is nothing to ask for.
    while (!(await askForKey()));
  }
}

function notice(text) {
  const element = byId("notice");
  element.hidden = !text;
  if (element.textContent !== (text ?? "")) element.textContent = text ?? "";
}

function take(time_ms, data) {
  const last = samples.at(-1);
  const rateOf = (name) => {
    const made = last?.data ? data[name] - last.data[name] : null;
    return made === null || made < 0 ? null : made / ((time_ms - last.time_ms) / 1000);
  };
  keep({
    time_ms, data,
    rate: rateOf("output_tokens"),
    steps: rateOf("steps"),
    running: data.requests.running,
    waiting: data.requests.waiting,
  });
  draw();
}

function keep(sample) {
  samples.push(sample);
  if (samples.length > NUM_SAMPLES) samples.shift();
}

function draw() {
  const { data } = samples.at(-1);
  setState(data.state);
  byId("served").title = data.model;
  const served = [shortName(data.model), data.backend, `version ${data.version}`];
  byId("served").textContent = served.join(" · ");
  byId("uptime").textContent = `${span(data.uptime_s)} ago`;
  drawTiles();
  drawCharts();
  drawPages(data.pages, data.engine?.page_size);
  drawTotals(data);
  drawLatencies();
  drawKernels(data.engine?.kernels ?? []);
}

function setState(state) {
  const element = byId("state");
  element.dataset.state = state;
  if (element.textContent !== state) element.textContent = state;
}

/** Buckets of the last minutes, or since the start where those are empty. */
function recent(name) {
  const { data } = samples.at(-1);
  const now = data.latencies[name];
  if (!now) return null;
  const oldest = samples.find((sample) => sample.data)?.data.latencies[name];
  const counts = since(now.counts, oldest?.counts);
  const isRecent = counts.some((count) => count > 0) && counts !== now.counts;
  return { bounds: now.bounds_s, counts: isRecent ? counts : now.counts, isRecent };
}

function spanLen() {
  return SPANS.find((len) => samples.length <= len);
}

function drawTiles() {
  const { rate, steps, data } = samples.at(-1);
  const { requests } = data;
  byId("tile-tokens").textContent = rate === null ? "–" : short(rate);
  byId("tile-tokens-more").textContent = steps === null ? "" : `${short(steps)} steps per second`;
  byId("tile-running").textContent = count(requests.running);
  const waiting = `${count(requests.waiting)} waiting`;
  const tokens = requests.waiting > 0 ? `, ${count(requests.waiting_tokens)} prompt tokens` : "";
  byId("tile-running-more").textContent = waiting + tokens;
  for (const [tile, name] of [["first", "first_token"], ["between", "between_tokens"]]) {
    const { bounds, counts } = recent(name) ?? { bounds: [], counts: [] };
    byId(`tile-${tile}`).textContent = seconds(quantile(bounds, counts, 0.5), bounds);
    const high = quantile(bounds, counts, 0.95);
    byId(`tile-${tile}-more`).textContent =
      high === null ? "nothing measured yet" : `median · 95 % within ${seconds(high, bounds)}`;
  }
}

/** A quantile; beyond the last bound only that is known. */
function seconds(value, bounds) {
  if (value === null) return "–";
  return value === Infinity ? `> ${duration(bounds.at(-1))}` : duration(value);
}

function drawCharts() {
  const valuesOf = (name) => samples.map((sample) => sample[name]);
  const peak = Math.max(0, ...valuesOf("rate"));
  timeChart(byId("throughput"), {
    label: `Output tokens per second, ${short(peak)} at most`,
    series: [{ className: "active", values: valuesOf("rate") }],
    num_samples: spanLen(), least: 10, format: short,
    readout: (idx) => readout("throughput", idx),
  });
  const most = Math.max(0, ...valuesOf("running"));
  timeChart(byId("batch"), {
    label: `Running and waiting requests, at most ${most} running`,
    series: [
      { className: "active", values: valuesOf("running") },
      { className: "waiting", values: valuesOf("waiting") },
    ],
    num_samples: spanLen(), least: 4, format: short,
    readout: (idx) => readout("batch", idx),
  });
  readout("throughput", hovered.throughput);
  readout("batch", hovered.batch);
}

/** The values at a place of a chart, or the last ones. */
function readout(chart, idx) {
  hovered[chart] = idx;
  const at = idx === null ? samples.length - 1 : samples.length - spanLen() + idx;
  const sample = samples[at];
  const ago = Math.round((performance.now() - (sample?.time_ms ?? 0)) / 1000);
  const when = idx === null ? "" : `${ago} s ago: `;
  const texts = {
    throughput: ({ rate }) => `${short(rate ?? NaN)} tokens/s`,
    batch: ({ running, waiting }) =>
      `${count(running ?? NaN)} running, ${count(waiting ?? NaN)} waiting`,
  };
  byId(`${chart}-readout`).textContent = sample ? when + texts[chart](sample) : "nothing yet";
}

function drawPages(pages, page_size) {
  const { total, active, cached, free } = pages;
  const per_cell = pageGrid(byId("pages"), pages, PAGE_CELLS_MAX, PAGE_COLUMNS);
  byId("pages-readout").textContent = `${percent(active / total)} in use`;
  const entry = (state, text) => h("li", {}, h("span", { class: `swatch ${state}` }), text);
  const square = per_cell === 1 ? "a square is a page" : `a square is ${per_cell} pages`;
  byId("pages-legend").replaceChildren(
    entry("active", `${count(active)} active`),
    entry("cached", `${count(cached)} cached`),
    entry("free", `${count(free)} free`),
    h("li", {}, page_size ? `${square} of ${page_size} tokens` : square),
  );
}

function drawTotals(data) {
  const { requests, engine } = data;
  const rows = [
    ["Requests finished", count(requests.finished)],
    ["Cancelled", count(requests.cancelled)],
    ["Refused", count(requests.refused)],
    ["Output tokens", count(data.output_tokens)],
    ["Prompt tokens", count(data.prompt_tokens)],
    ["Found in the prefix cache", percent(data.cached_tokens / data.prompt_tokens)],
    ["Preemptions", count(data.preemptions)],
    ["Sessions kept", count(data.sessions)],
    ["Weights", bytes(engine?.weights_bytes)],
    ["KV cache", bytes(engine?.kv_cache_bytes)],
  ];
  const row = ([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
  byId("totals").replaceChildren(...rows.map(row));
}

function drawLatencies() {
  const places = byId("latencies");
  if (!places.firstChild) {
    for (const [name, title] of LATENCIES) {
      places.append(h("div", { id: `latency-${name}` }, h("h3", {}, title), h("div")));
    }
  }
  let isRecent = false;
  for (const [name, title] of LATENCIES) {
    const found = recent(name);
    byId(`latency-${name}`).hidden = !found;
    if (!found) continue;
    const { bounds, counts } = found;
    isRecent ||= found.isRecent;
    const at = (share) => seconds(quantile(bounds, counts, share), bounds);
    const marks = [["median", at(0.5)], ["95 %", at(0.95)], ["99 %", at(0.99)]];
    const label = `${title}: ${marks.map((mark) => mark.join(" ")).join(", ")}`;
    const place = byId(`latency-${name}`).lastChild;
    histogram(place, { label, bounds, counts, format: duration, marks });
  }
  byId("latency-readout").textContent = isRecent ? "last five minutes" : "since the start";
}

function drawKernels(kernels) {
  byId("kernels-card").hidden = kernels.length === 0;
  const total = kernels.reduce((sum, kernel) => sum + kernel.seconds, 0);
  const limit = kernels.reduce((sum, kernel) => sum + kernel.limit_seconds, 0);
  byId("kernels-readout").textContent = `all together ${percent(limit / total)} of the limit`;
  byId("kernels").replaceChildren(...kernels.map((kernel) => kernelRow(kernel, total)));
}

/** `bound` says whether bytes or operations limit the kernel. */
function kernelRow(kernel, total_seconds) {
  const { symbol, op, calls, seconds, limit_seconds, bound, bytes, ops } = kernel;
  const isMemory = BYTE_BOUNDS.includes(bound);
  const rate = (isMemory ? bytes : ops) / seconds / 1e9;
  const reached = `${short(rate)} ${isMemory ? "GB/s" : "GOP/s"} · ${bound}`;
  const share = limit_seconds / seconds;
  const sizes = symbol.startsWith(`${op}_`) ? symbol.slice(op.length + 1) : symbol;
  return h(
    "tr",
    {},
    h("th", { scope: "row", title: symbol }, h("span", { class: "op" }, op), " ",
      h("span", { class: "sizes" }, sizes.replaceAll("_", " "))),
    h("td", { class: "number" }, count(calls)),
    h("td", {}, bar(seconds / total_seconds, percent(seconds / total_seconds))),
    h("td", {}, bar(share, percent(share), reached)),
  );
}

placeIcons();
wireThemeButton(byId("theme"));
wireDialogs();
poll();
