// Markdown as models write it → a tree of plain objects, which render.js makes elements of.
//
// It knows no HTML: tags are text. Links keep http, https and mailto addresses only. The time is
// linear in the text, and nothing nests deeper than DEPTH_MAX.

const DEPTH_MAX = 8;
const INLINE_DEPTH_MAX = 16;

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( {1,4}(?=\S)| +|$)/;
const TABLE_RULE = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$/;

/**
 * Text → blocks: `{type, raw, …}`, where `raw` is the source. Equal `raw` and `type` mean an equal
 * block, except that the last fence may be `open`.
 */
export function parse(text) {
  return parseLines(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function parseLines(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const [block, next] = parseBlock(lines, at, depth);
    block.raw = lines.slice(at, next).join("\n");
    blocks.push(block);
    at = next;
  }
  return blocks;
}

/** The block that starts at a line that is not blank, and the line after it. */
function parseBlock(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return parseFence(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const children = inline(withoutClosing(heading[2] ?? ""));
    return [{ type: "heading", level: heading[1].length, children }, at + 1];
  }
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < DEPTH_MAX) {
    if (QUOTE.test(line)) return parseQuote(lines, at, depth);
    const item = ITEM.exec(line);
    if (item) return parseList(lines, at, item, depth);
  }
  if (isTable(lines, at)) return parseTable(lines, at);
  return parseParagraph(lines, at, depth);
}

/** A heading's text without the `##` that may end it. */
function withoutClosing(text) {
  const trimmed = text.trim();
  let end = trimmed.length;
  while (trimmed[end - 1] === "#") end -= 1;
  return end === 0 || /\s/.test(trimmed[end - 1]) ? trimmed.slice(0, end).trimEnd() : trimmed;
}

function parseFence(lines, at, [, marks, info]) {
  const end = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}[ \t]*$`);
  let next = at + 1;
  while (next < lines.length && !end.test(lines[next])) next += 1;
  const block = {
    type: "code",
    language: info.trim().split(/\s/)[0],
    text: lines.slice(at + 1, next).join("\n"),
    open: next === lines.length,
  };
  return [block, Math.min(next + 1, lines.length)];
}

function parseQuote(lines, at, depth) {
  let next = at;
  while (next < lines.length && QUOTE.test(lines[next])) next += 1;
  const inner = lines.slice(at, next).map((line) => line.replace(QUOTE, ""));
  return [{ type: "quote", children: parseLines(inner, depth + 1) }, next];
}

function parseList(lines, at, first, depth) {
  const ordered = /\d/.test(first[2]);
  const mark = first[2].at(-1);
  const block = { type: "list", ordered, start: ordered ? parseInt(first[2], 10) : 1, items: [] };
  let next = at;
  while (next < lines.length) {
    const item = ITEM.exec(lines[next]);
    if (!item || item[2].at(-1) !== mark || RULE.test(lines[next])) break;
    const end = itemEnd(lines, next, item[0].length);
    const inner = lines.slice(next, end).map((line, idx) => dedent(line, item[0].length, idx));
    block.items.push(parseLines(inner, depth + 1));
    next = end;
    // Blank lines between the items of one list.
    let after = next;
    while (after < lines.length && lines[after].trim() === "") after += 1;
    if (after < lines.length && ITEM.test(lines[after])) next = after;
  }
  return [block, next];
}

/** The first line is cut behind its mark; the others lose their indentation, up to as much. */
function dedent(line, width, idx) {
  if (idx === 0) return line.slice(width);
  const indent = line.length - line.trimStart().length;
  return line.slice(Math.min(indent, width));
}

/** The line after an item: whatever is indented belongs to it, and text that simply goes on. */
function itemEnd(lines, at, width) {
  // Models often indent by two where the mark is three wide.
  const indented = new RegExp(`^ {${Math.min(width, 2)},}\\S`);
  let next = at + 1;
  for (let line = next; line < lines.length; line += 1) {
    const isBlank = lines[line].trim() === "";
    const goesOn = next === line && !startsBlock(lines[line]);
    if (!isBlank && !indented.test(lines[line]) && !goesOn) break;
    if (!isBlank) next = line + 1;
  }
  return next;
}

function startsBlock(line) {
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((start) => start.test(line));
}

function isTable(lines, at) {
  const rule = lines[at + 1];
  return lines[at].includes("|") && rule?.includes("|") && TABLE_RULE.test(rule.trim());
}

function parseTable(lines, at) {
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((cell) => {
    const [left, right] = [cell.startsWith(":"), cell.endsWith(":")];
    return right ? (left ? "center" : "right") : "left";
  });
  let next = at + 2;
  const rows = [];
  while (next < lines.length && lines[next].includes("|")) {
    rows.push(cells(lines[next]).slice(0, head.length).map(inline));
    next += 1;
  }
  return [{ type: "table", head: head.map(inline), align, rows }, next];
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function parseParagraph(lines, at, depth) {
  let next = at + 1;
  while (next < lines.length && lines[next].trim() !== "") {
    const ends = depth < DEPTH_MAX ? startsBlock(lines[next]) : FENCE.test(lines[next]);
    if (ends || isTable(lines, next)) break;
    next += 1;
  }
  const text = lines.slice(at, next).map((line) => line.trim()).join("\n");
  return [{ type: "paragraph", children: inline(text) }, next];
}

const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;
const ADDRESS = /https?:\/\/[^\s<>"`]{1,2000}/y;
const ANGLE_ADDRESS = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const TARGET =
  /\([ \n]{0,4}<?([^\s<>]{0,2000}?)>?(?:[ \n]{1,4}["'][^"'\n]{0,500}["'])?[ \n]{0,4}\)/y;

/**
 * Text of one block → spans: strings, and `{type, …}` with `children`, of type `strong`,
 * `emphasis`, `deleted`, `code` (with `text`), `link` (with `href`) or `break`.
 */
export function inline(text) {
  return new Inline(text, true).parse();
}

/** An address that may be followed, as the browser will read it, or null. */
export function safeHref(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

/** One pass from left to right over a stack of emphases that are open. */
class Inline {
  constructor(text, hasLinks) {
    this.text = text;
    this.at = 0;
    this.hasLinks = hasLinks;
    this.frames = [{ mark: "", children: [] }];
    this.codeEnds = backtickRuns(text);
    this.brackets = hasLinks ? bracketPairs(text) : new Map();
  }

  parse() {
    while (this.at < this.text.length) this.step();
    while (this.frames.length > 1) this.flatten();
    return this.frames[0].children;
  }

  step() {
    const char = this.text[this.at];
    if (char === "\\" && PUNCTUATION.test(this.text[this.at + 1] ?? "")) {
      this.put(this.text[this.at + 1], 2);
    } else if (char === "\n") {
      this.put({ type: "break" }, 1);
    } else if (char === "`") {
      this.code();
    } else if (char === "*" || char === "_" || char === "~") {
      this.emphasis(char);
    } else if (!(this.hasLinks && "[<h".includes(char) && this.link(char))) {
      this.put(char, 1);
    }
  }

  put(span, width) {
    const { children } = this.frames.at(-1);
    const last = children.length - 1;
    if (typeof span === "string" && typeof children[last] === "string") children[last] += span;
    else if (span !== "") children.push(span);
    this.at += width;
  }

  code() {
    const length = runLength(this.text, this.at);
    const ends = this.codeEnds.get(length);
    while (ends.length > 0 && ends.at(-1) <= this.at) ends.pop();
    if (ends.length === 0) return this.put("`".repeat(length), length);
    const end = ends.at(-1);
    const inner = this.text.slice(this.at + length, end).replaceAll("\n", " ");
    const text = /^ .*[^ ].* $/.test(inner) ? inner.slice(1, -1) : inner;
    this.put({ type: "code", text }, end + length - this.at);
  }

  emphasis(char) {
    const length = runLength(this.text, this.at);
    const width = char === "~" ? 2 : Math.min(length, 2);
    if (length > 3 || (char === "~" && length !== 2)) {
      return this.put(char.repeat(length), length);
    }
    const [before, after] = [this.text[this.at - 1] ?? " ", this.text[this.at + length] ?? " "];
    // Underscores inside words are names, not emphasis.
    const opens = /\S/.test(after) && !(char === "_" && WORD.test(before));
    const closes = /\S/.test(before) && !(char === "_" && WORD.test(after));
    const closed = closes ? this.closedBy(char, length) : undefined;
    const mark = char.repeat(width);
    if (closed) this.close(closed.mark);
    else if (opens && this.frames.length < INLINE_DEPTH_MAX) this.open(mark);
    else this.put(mark, width);
  }

  /** The innermost open emphasis whose mark a run of `length` holds; one of two takes both. */
  closedBy(char, length) {
    const marks = [1, 2].filter((width) => width === length || length === 3);
    return this.frames.findLast(({ mark }) => marks.some((width) => mark === char.repeat(width)));
  }

  open(mark) {
    this.frames.push({ mark, children: [] });
    this.at += mark.length;
  }

  close(mark) {
    while (this.frames.at(-1).mark !== mark) this.flatten();
    const { children } = this.frames.pop();
    const type = mark === "~~" ? "deleted" : mark.length === 2 ? "strong" : "emphasis";
    if (children.length === 0) this.put(mark + mark, mark.length);
    else this.put({ type, children }, mark.length);
  }

  /** The innermost open emphasis was none. */
  flatten() {
    const { mark, children } = this.frames.pop();
    for (const span of [mark, ...children]) this.put(span, 0);
  }

  link(char) {
    if (char === "[") return this.bracketLink();
    const isAngle = char === "<";
    if (!isAngle && WORD.test(this.text[this.at - 1] ?? " ")) return false;
    const found = matchAt(isAngle ? ANGLE_ADDRESS : ADDRESS, this.text, this.at);
    if (!found) return false;
    const address = isAngle ? found[1] : trimAddress(found[0]);
    const href = safeHref(address);
    if (!href) return false;
    const width = isAngle ? found[0].length : address.length;
    this.put({ type: "link", href, children: [address] }, width);
    return true;
  }

  bracketLink() {
    const end = this.brackets.get(this.at);
    if (end === undefined || this.text[end + 1] !== "(") return false;
    const found = matchAt(TARGET, this.text, end + 1);
    if (!found) return false;
    const label = this.text.slice(this.at + 1, end);
    const href = safeHref(found[1]);
    const children = new Inline(label, false).parse();
    const width = end + 1 + found[0].length - this.at;
    if (href && label.trim() !== "") {
      this.put({ type: "link", href, children }, width);
    } else {
      // An address that is not followed is shown, so that nobody is surprised by what is missing.
      this.put(this.text.slice(this.at, this.at + width), width);
    }
    return true;
  }
}

function matchAt(sticky, text, at) {
  sticky.lastIndex = at;
  return sticky.exec(text);
}

/** Without the punctuation of the sentence that the address stands in. */
function trimAddress(address) {
  const trimmed = address.replace(/[.,;:!?'*_~]{1,20}$/, "");
  const opens = trimmed.split("(").length;
  return trimmed.endsWith(")") && trimmed.split(")").length > opens
    ? trimAddress(trimmed.slice(0, -1))
    : trimmed;
}

function runLength(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

/** Length of a run of backticks → where such runs start, last first. */
function backtickRuns(text) {
  const runs = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!runs.has(run.length)) runs.set(run.length, []);
    runs.get(run.length).push(index);
  }
  for (const starts of runs.values()) starts.reverse();
  return runs;
}

/** Where a bracket opens → where it closes. */
function bracketPairs(text) {
  const pairs = new Map();
  const open = [];
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "[") open.push(at);
    else if (text[at] === "]" && open.length > 0) pairs.set(open.pop(), at);
  }
  return pairs;
}
