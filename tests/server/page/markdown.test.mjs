// Markdown: what models write, unfinished text, and what somebody hostile would have them write.

import assert from "node:assert/strict";
import { test } from "node:test";

import { inline, parse, safeHref } from "../../../engine/src/server/page/markdown.js";

/** A short notation of blocks: `p(…) h2(…) code:rust(…) ul[…|…] table(…)`. */
function show(blocks) {
  return blocks.map(showBlock).join(" ");
}

function showBlock(block) {
  switch (block.type) {
    case "heading":
      return `h${block.level}(${spans(block.children)})`;
    case "code":
      return `code${block.open ? "…" : ""}:${block.language}(${block.text})`;
    case "list":
      return `${block.ordered ? `ol${block.start}` : "ul"}[${block.items.map(show).join("|")}]`;
    case "quote":
      return `quote(${show(block.children)})`;
    case "table": {
      const rows = block.rows.map((row) => row.map(spans).join(","));
      return `table(${block.head.map(spans).join(",")};${block.align.join(",")};${rows.join(";")})`;
    }
    case "rule":
      return "rule";
    default:
      return `p(${spans(block.children)})`;
  }
}

function spans(children) {
  return children
    .map((span) => {
      if (typeof span === "string") return span;
      if (span.type === "break") return "⏎";
      if (span.type === "code") return `<code ${span.text}>`;
      if (span.type === "link") return `<${span.href} ${spans(span.children)}>`;
      return `<${span.type} ${spans(span.children)}>`;
    })
    .join("");
}

const BLOCKS = [
  ["", ""],
  ["\n \n", ""],
  ["one\ntwo\n\nthree", "p(one⏎two) p(three)"],
  ["one\r\ntwo\r\rthree", "p(one⏎two) p(three)"],
  ["# A\n## B ##\n###### C\n####### D", "h1(A) h2(B) h6(C) p(####### D)"],
  ["#no heading", "p(#no heading)"],
  ["# C#", "h1(C#)"],
  ["---\n* * *\n___", "rule rule rule"],
  ["text\n# next", "p(text) h1(next)"],
  ["```rust\nlet a = 1;\n\n# b\n```\nend", "code:rust(let a = 1;\n\n# b) p(end)"],
  ["```\nopen", "code…:(open)"],
  ["```py", "code…:py()"],
  ["````\n```\n````", "code:(```)"],
  ["~~~js title\n`\n~~~", "code:js(`)"],
  ["``` not ` a fence", "p(``` not ` a fence)"],
  ["- a\n- b", "ul[p(a)|p(b)]"],
  ["* a\n* b\n- c", "ul[p(a)|p(b)] ul[p(c)]"],
  ["3. a\n4. b\n\n5. c", "ol3[p(a)|p(b)|p(c)]"],
  ["1) a\n2) b", "ol1[p(a)|p(b)]"],
  ["- a\n  - b\n    - c\n- d", "ul[p(a) ul[p(b) ul[p(c)]]|p(d)]"],
  ["1. a\n  - b\n2. c", "ol1[p(a) ul[p(b)]|p(c)]"],
  ["1. a\n\n   more\n\n2. b", "ol1[p(a) p(more)|p(b)]"],
  ["- a\n  ```\n  code\n  ```\n- b", "ul[p(a) code:(code)|p(b)]"],
  ["- a\nlazy\n\nend", "ul[p(a⏎lazy)] p(end)"],
  ["-no list", "p(-no list)"],
  ["2024. a year", "ol2024[p(a year)]"],
  ["12345678901. x", "p(12345678901. x)"],
  ["-", "ul[]"],
  ["> a\n> b\n>\n> - c\n\nd", "quote(p(a⏎b) ul[p(c)]) p(d)"],
  ["> > deep", "quote(quote(p(deep)))"],
  ["|a|b|\n|-|:-:|\n|1|2|\nend", "table(a,b;left,center;1,2) p(end)"],
  ["a | b\n--|--:\n1 | 2 | 3\n4 |", "table(a,b;left,right;1,2;4)"],
  ["a \\| b | c\n-|-\n`x` | **y**", "table(a | b,c;left,left;<code x>,<strong y>)"],
  ["text\n| a | b |\n|---|---|\n| 1 | 2 |", "p(text) table(a,b;left,left;1,2)"],
  ["| a | b |", "p(| a | b |)"],
  ["<script>alert(1)</script>", "p(<script>alert(1)</script>)"],
];

const SPANS = [
  ["plain", "plain"],
  ["*a* **b** ***c*** _d_ __e__ ~~f~~",
    "<emphasis a> <strong b> <strong <emphasis c>> <emphasis d> <strong e> <deleted f>"],
  ["**a *b* c**", "<strong a <emphasis b> c>"],
  ["*a **b***", "<emphasis a <strong b>>"],
  ["**open", "**open"],
  ["a ** b ** c", "a ** b ** c"],
  ["5 * 3 * 2", "5 * 3 * 2"],
  ["snake_case_name and __init__", "snake_case_name and <strong init>"],
  ["**a *b** c*", "<strong a *b> c*"],
  ["****", "****"],
  ["~one~ ~~~three~~~", "~one~ ~~~three~~~"],
  ["`a*b*` ``c`d``", "<code a*b*> <code c`d>"],
  ["`open *a*", "`open <emphasis a>"],
  ["`` a", "`` a"],
  ["` a `", "<code a>"],
  ["\\*no\\* \\\\ \\a", "*no* \\ \\a"],
  ["[a](https://b.example/c_d_e \"t\")", "<https://b.example/c_d_e a>"],
  ["[**a**](http://b.example)", "<http://b.example/ <strong a>>"],
  ["[a](<https://b.example>)", "<https://b.example/ a>"],
  ["[a](mailto:b@c.example)", "<mailto:b@c.example a>"],
  ["[a] (b) [c][d]", "[a] (b) [c][d]"],
  ["![alt](https://b.example/i.png)", "!<https://b.example/i.png alt>"],
  ["see https://a.example/b_c?d=(e). End",
    "see <https://a.example/b_c?d=(e) https://a.example/b_c?d=(e)>. End"],
  ["(https://a.example)", "(<https://a.example/ https://a.example>)"],
  ["<https://a.example/>", "<https://a.example/ https://a.example/>"],
  ["xhttps://a.example", "xhttps://a.example"],
  ["[https://a.example](https://b.example)", "<https://b.example/ https://a.example>"],
  ["a\nb", "a⏎b"],
  ["🧵 **ü**", "🧵 <strong ü>"],
];

test("blocks", () => {
  for (const [text, expected] of BLOCKS) assert.equal(show(parse(text)), expected, text);
});

test("spans", () => {
  for (const [text, expected] of SPANS) assert.equal(spans(inline(text)), expected, text);
});

const HOSTILE = [
  "[a](javascript:alert(1))",
  "[a](JaVaScRiPt:alert(1))",
  "[a](java\tscript:alert(1))",
  "[a](\u0001javascript:alert(1))",
  "[a](data:text/html,<script>alert(1)</script>)",
  "[a](vbscript:x)",
  "[a](file:///etc/passwd)",
  "[a](//evil.example)",
  "[a](/dashboard)",
  "[a](blob:https://x.example/1)",
  "<javascript:alert(1)>",
  "[a](&#106;avascript:alert(1))",
  "![a](javascript:alert(1))",
  "[](https://a.example)",
  '<img src=x onerror="alert(1)">',
  "<a href=javascript:alert(1)>a</a>",
];

function* links(node) {
  if (Array.isArray(node)) for (const child of node) yield* links(child);
  else if (typeof node === "object" && node !== null) {
    if (node.type === "link") yield node.href;
    for (const child of Object.values(node)) yield* links(child);
  }
}

test("only http, https and mailto become links, and the text of others stays", () => {
  for (const text of HOSTILE) {
    assert.deepEqual([...links(parse(text))], [], text);
    assert.equal(spans(inline(text)), text, text);
  }
  assert.equal(safeHref("https://a.example/\"><script>"), "https://a.example/%22%3E%3Cscript%3E");
  assert.equal(safeHref("javascript:1"), null);
  assert.equal(safeHref(""), null);
});

/** Characters of text in a tree, and how deep it is. */
function measure(node, depth = 0) {
  if (typeof node === "string") return { chars: node.length, depth };
  if (typeof node !== "object" || node === null) return { chars: 0, depth };
  const children = Object.entries(node).filter(([name]) => name !== "raw");
  let total = { chars: 0, depth };
  for (const [, child] of children) {
    const { chars, depth: below } = measure(child, depth + 1);
    total = { chars: total.chars + chars, depth: Math.max(total.depth, below) };
  }
  return total;
}

test("text that asks for work or depth gets little of both", () => {
  const many = 30_000;
  const texts = [
    ...["*", "_", "~~", "`", "[", "]", "(", "[a](", "![", "<", "> ", "- ", "# ", "|", "\\", "**a "]
      .map((piece) => piece.repeat(many)),
    "https://".repeat(many / 10),
    "> ".repeat(many) + "x",
    Array.from({ length: 300 }, (_, idx) => `${" ".repeat(2 * idx)}- x`).join("\n"),
    Array.from({ length: 300 }, (_, idx) => `${"> ".repeat(idx)}x`).join("\n"),
    `# a${" ".repeat(many)}b`,
    `# ${"#".repeat(many)}x`,
    `[a](${" ".repeat(many)}`,
    `[a](${"x".repeat(many)}`,
    `|-|\n-${" ".repeat(many)}x|`,
    `a|b\n-|${" ".repeat(many)}x`,
    "`".repeat(3) + " ".repeat(many) + "`",
    `https://a.example/${")".repeat(many)}`,
    Array.from({ length: 400 }, (_, idx) => "`".repeat(idx + 1)).join(" "),
    `${"a|".repeat(5000)}\n${"-|".repeat(5000)}\n${"x|\n".repeat(3000)}`,
    "-\n\n".repeat(3000),
  ];
  for (const text of texts) {
    const { chars, depth } = measure(parse(text));
    assert.ok(chars <= 20 * text.length + 1000, `${chars} characters of ${text.slice(0, 20)}…`);
    assert.ok(depth < 100, `depth ${depth} of ${text.slice(0, 20)}…`);
  }
});

test("every prefix of an answer parses, and earlier blocks stay as they are", () => {
  const text = BLOCKS.map(([source]) => source).join("\n\n") +
    `\n\n${SPANS.map(([source]) => source).join("\n\n")}`;
  let before = [];
  for (let end = 1; end <= text.length; end += 1) {
    const blocks = parse(text.slice(0, end));
    // What a line adds changes the last block, or the two that a table's head was.
    for (let idx = 0; idx + 2 < before.length; idx += 1) {
      assert.equal(blocks[idx].raw, before[idx].raw, `block ${idx} at ${end}`);
      assert.deepEqual(blocks[idx], before[idx]);
    }
    before = blocks;
  }
});
