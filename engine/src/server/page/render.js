// The tree of markdown.js → elements. Text reaches the page as text nodes only.

import { copyButton, h } from "./dom.js";
import { parse } from "./markdown.js";

/**
 * Shows `text` in `container`. Blocks that are as they were keep their elements, so that a growing
 * answer costs its last block, and a selection above it stays.
 */
export function renderInto(container, text) {
  const blocks = parse(text);
  const shown = container.shownBlocks ?? [];
  let same = 0;
  while (same < blocks.length && same < shown.length && isSame(blocks[same], shown[same])) {
    same += 1;
  }
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const block of blocks.slice(same)) container.append(renderBlock(block));
  container.shownBlocks = blocks;
}

function isSame(left, right) {
  return left.type === right.type && left.raw === right.raw && left.open === right.open;
}

function renderBlock(block) {
  switch (block.type) {
    case "heading":
      // The page's own headings come first.
      return h(`h${Math.min(block.level + 2, 6)}`, {}, ...spans(block.children));
    case "rule":
      return h("hr");
    case "code":
      return renderCode(block);
    case "quote":
      return h("blockquote", {}, ...block.children.map(renderBlock));
    case "list":
      return renderList(block);
    case "table":
      return renderTable(block);
    default:
      return h("p", {}, ...spans(block.children));
  }
}

function renderCode({ language, text }) {
  const name = language || "code";
  return h(
    "figure",
    { class: "code" },
    h("figcaption", {}, h("span", {}, name), copyButton(`Copy ${name}`, () => text)),
    h("pre", { tabindex: "0", "aria-label": name }, h("code", {}, text)),
  );
}

function renderList({ ordered, start, items }) {
  const list = h(ordered ? "ol" : "ul", ordered && start !== 1 ? { start } : {});
  for (const blocks of items) {
    const isTight = blocks.filter((block) => block.type === "paragraph").length <= 1;
    const children = blocks.flatMap((block) =>
      isTight && block.type === "paragraph" ? spans(block.children) : [renderBlock(block)],
    );
    list.append(h("li", {}, ...children));
  }
  return list;
}

function renderTable({ head, align, rows }) {
  const row = (tag, cells) =>
    h("tr", {}, ...cells.map((cell, idx) => h(tag, cellProps(tag, align[idx]), ...spans(cell))));
  const table = h(
    "table",
    {},
    h("thead", {}, row("th", head)),
    h("tbody", {}, ...rows.map((cells) => row("td", cells))),
  );
  return h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
}

function cellProps(tag, align) {
  const props = tag === "th" ? { scope: "col" } : {};
  return align === "left" || !align ? props : { ...props, class: align };
}

function spans(children) {
  return children.map((span) => (typeof span === "string" ? span : renderSpan(span)));
}

function renderSpan(span) {
  switch (span.type) {
    case "break":
      return h("br");
    case "code":
      return h("code", {}, span.text);
    case "link": {
      const props = { href: span.href, target: "_blank", rel: "noopener noreferrer" };
      return h("a", props, ...spans(span.children));
    }
    default: {
      const tags = { strong: "strong", emphasis: "em", deleted: "del" };
      return h(tags[span.type], {}, ...spans(span.children));
    }
  }
}
