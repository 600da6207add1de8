// Numbers from samples and buckets, and how they are written.

/** Counts of `now` that came after `then`; a server that started anew begins from nothing. */
export function since(now, then) {
  if (!then || then.length !== now.length) return now;
  const difference = now.map((count, idx) => count - then[idx]);
  return difference.some((count) => count < 0) ? now : difference;
}

/**
 * The value below which `share` of all lie, in the unit of `bounds`, as if each bucket's lay evenly
 * in it. `counts` has one bucket more than `bounds`, without an upper end; null where nothing was
 * counted, Infinity in that last bucket.
 */
export function quantile(bounds, counts, share) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (total === 0) return null;
  const rank = share * total;
  let below = 0;
  for (const [idx, count] of counts.entries()) {
    if (count > 0 && below + count >= rank) {
      if (idx >= bounds.length) return Infinity;
      const low = idx === 0 ? 0 : bounds[idx - 1];
      return low + ((rank - below) / count) * (bounds[idx] - low);
    }
    below += count;
  }
  return Infinity;
}

/** Seconds as people read them. */
export function duration(seconds) {
  if (seconds === 0) return "0";
  if (seconds < 0.001) return `${short(seconds * 1e6)} µs`;
  if (seconds < 1) return `${short(seconds * 1e3)} ms`;
  if (seconds < 120) return `${short(seconds)} s`;
  return `${short(seconds / 60)} min`;
}

/** Time since the start, in its two largest units. */
export function span(seconds) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = Math.max(0, units.findIndex(([, size]) => seconds >= size));
  if (seconds < 1) return "0 s";
  let rest = seconds;
  const parts = units.slice(first, first + 2).map(([name, size]) => {
    const count = Math.floor(rest / size);
    rest -= count * size;
    return `${count} ${name}`;
  });
  return parts.join(" ");
}

/** Three digits at most, where they say something. */
export function short(value) {
  if (!Number.isFinite(value)) return "–";
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return String(Number(value.toFixed(digits)));
}

/** `12,345`, by the reader's language. */
export function count(value) {
  return Number.isFinite(value) ? value.toLocaleString() : "–";
}

export function percent(share) {
  return Number.isFinite(share) ? `${short(share * 100)} %` : "–";
}

export function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (value >= 1024 && at + 1 < units.length) {
    value /= 1024;
    at += 1;
  }
  return `${short(value)} ${units[at]}`;
}
