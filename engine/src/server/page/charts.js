// Drawings by hand: no library is small enough. Each says in words what it shows.

import { h, svg } from "./dom.js";

const WIDTH = 1000;
const HEIGHT = 200;

/** The least of 1, 2, 4, 6 and 8 times a power of ten that is not below `value`. */
export function niceMax(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].map((factor) => factor * power).find((max) => max >= value * 0.999);
}

/**
 * Areas over time, stacked from below: the last of `num_samples` values of each series is now.
 * `series`: `[{name, className, values}]`; null values are gaps. `least` is the smallest height.
 */
export function timeChart(container, { label, series, num_samples, least, format, readout }) {
  const tops = stack(series, num_samples);
  const max = niceMax(Math.max(least, ...tops.flat().map((value) => value ?? 0)));
  const x = (idx) => (idx / (num_samples - 1)) * WIDTH;
  const y = (value) => HEIGHT - (value / max) * HEIGHT;
  const drawing = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none",
    role: "img", "aria-label": label,
  });
  for (const part of [0, 1, 2]) {
    const at = (HEIGHT * part) / 2;
    drawing.append(svg("path", { class: "grid", d: `M0 ${at}H${WIDTH}` }));
  }
  // The topmost first, so that each lower one covers what is not its own.
  for (const [idx, top] of [...tops.entries()].reverse()) {
    const floor = tops[idx - 1] ?? top.map((value) => (value === null ? null : 0));
    for (const run of runs(top)) {
      const up = run.map((at) => `${x(at)} ${y(top[at])}`).join("L");
      const down = [...run].reverse().map((at) => `${x(at)} ${y(floor[at] ?? 0)}`).join("L");
      drawing.append(svg("path", { class: `area ${series[idx].className}`, d: `M${up}L${down}Z` }));
      drawing.append(svg("path", { class: `line ${series[idx].className}`, d: `M${up}` }));
    }
  }
  const cursor = svg("path", { class: "cursor", d: "" });
  drawing.append(cursor);
  const scale = [max, max / 2, 0].map((value) => h("span", {}, format(value)));
  const plot = h("div", { class: "plot" }, drawing);
  container.replaceChildren(h("div", { class: "scale", "aria-hidden": "true" }, ...scale), plot,
    h("div", { class: "times", "aria-hidden": "true" }, ...times(num_samples)));
  followPointer(plot, cursor, { num_samples, x, readout });
}

/** Shows the values under the pointer; `readout(null)` is back to now. */
function followPointer(plot, cursor, { num_samples, x, readout }) {
  plot.onpointermove = ({ clientX }) => {
    const { left, width } = plot.getBoundingClientRect();
    const share = Math.min(Math.max((clientX - left) / width, 0), 1);
    const idx = Math.round(share * (num_samples - 1));
    cursor.setAttribute("d", `M${x(idx)} 0V${HEIGHT}`);
    readout(idx);
  };
  plot.onpointerleave = () => {
    cursor.setAttribute("d", "");
    readout(null);
  };
}

function stack(series, num_samples) {
  const sums = new Array(num_samples).fill(0);
  return series.map(({ values }) =>
    Array.from({ length: num_samples }, (_, at) => {
      const value = values[values.length - num_samples + at] ?? null;
      if (value === null) return null;
      sums[at] += value;
      return sums[at];
    }),
  );
}

/** Indices of values that are there, by unbroken runs. */
function runs(values) {
  const found = [[]];
  for (const [idx, value] of values.entries()) {
    if (value !== null) found.at(-1).push(idx);
    else if (found.at(-1).length > 0) found.push([]);
  }
  return found.filter((run) => run.length > 0);
}

/** Samples are a second apart. */
function times(num_samples) {
  const [size, unit] = num_samples > 120 ? [60, "min"] : [num_samples / 4, "s"];
  const name = (part) => `${unit === "s" ? part * size : part} ${unit} ago`;
  const parts = range(1, Math.round(num_samples / size)).reverse();
  return [...parts.map(name), "now"].map((label) => h("span", {}, label));
}

/** A square for each page, or for as many pages as make `cells_max` squares. */
export function pageGrid(container, { active, cached, total }, cells_max, columns) {
  const per_cell = Math.max(1, Math.ceil(total / cells_max));
  const num_cells = Math.ceil(total / per_cell);
  // A state with any page at all has a square.
  const cellsOf = (pages) => Math.min(num_cells, Math.ceil(pages / per_cell));
  const num_active = cellsOf(active);
  const num_cached = Math.min(cellsOf(cached), num_cells - num_active);
  const rows = Math.ceil(num_cells / columns);
  const label = `${active} pages active, ${cached} cached, ${total - active - cached} free`;
  const drawing = svg("svg", {
    viewBox: `0 0 ${columns * 10 - 2} ${rows * 10 - 2}`, role: "img", "aria-label": label,
  });
  for (let cell = 0; cell < num_cells; cell += 1) {
    const isCached = cell < num_active + num_cached;
    const state = cell < num_active ? "active" : isCached ? "cached" : "free";
    const [left, top] = [(cell % columns) * 10, Math.floor(cell / columns) * 10];
    const props = { x: left, y: top, width: 8, height: 8, rx: 2, class: state };
    drawing.append(svg("rect", props));
  }
  container.replaceChildren(drawing);
  return per_cell;
}

/**
 * A column for each bucket from the first to the last that is not empty. `marks`, below, are
 * `[text, value]`.
 */
export function histogram(container, { label, bounds, counts, format, marks }) {
  const first = counts.findIndex((count) => count > 0);
  if (first < 0) {
    container.replaceChildren(h("p", { class: "fine empty" }, "Nothing measured yet."));
    return;
  }
  // An empty bucket on each side shows that there is no more.
  const last = counts.findLastIndex((count) => count > 0);
  const shown = range(Math.max(0, first - 1), Math.min(counts.length - 1, last + 1));
  const max = Math.max(...counts);
  const columns = shown.map((bucket) => {
    const column = h("span", { class: counts[bucket] > 0 ? "column" : "column none" });
    // What was seen at all can be seen.
    column.style.height = `${Math.max(3, (counts[bucket] / max) * 100)}%`;
    return column;
  });
  const limit = (bucket) => (bucket < bounds.length ? `≤ ${format(bounds[bucket])}` : "more");
  const every = Math.ceil(shown.length / 4);
  const axis = shown.map((bucket, place) =>
    h("span", {}, place % every === every - 1 || shown.length <= 4 ? limit(bucket) : ""));
  container.replaceChildren(
    h("div", { class: "columns", role: "img", "aria-label": label }, ...columns),
    h("div", { class: "axis", "aria-hidden": "true" }, ...axis),
    h("dl", { class: "marks" }, ...marks.map(([name, value]) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, value)))));
}

function range(from, to) {
  return Array.from({ length: to - from + 1 }, (_, idx) => from + idx);
}

/** A share of one as a bar; the number stands beside it. */
export function bar(share, text, more = null) {
  const fill = h("span", { class: "fill" });
  fill.style.width = `${Math.min(Math.max(share, 0), 1) * 100}%`;
  return h("div", { class: "bar-row" },
    h("span", { class: "track", "aria-hidden": "true" }, fill), h("span", { class: "value" }, text),
    more ? h("span", { class: "more" }, more) : null);
}
