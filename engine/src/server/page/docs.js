// Draws /openapi.json.

import { ClientError, json, setKey } from "./client.js";
import { byId, h } from "./dom.js";

const METHODS = ["get", "post", "delete"];

/** A schema in a few words. */
function kind(schema) {
  if (!schema) return "anything";
  if (schema.$ref) return link(schema.$ref);
  const several = schema.oneOf ?? schema.anyOf ?? schema.allOf;
  if (several) return words(several.map(kind), " or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  const types = [schema.type ?? "anything"].flat();
  return words(types.map((type) => oneKind(type, schema)), " or ");
}

function oneKind(type, schema) {
  if (type === "array") return words(["list of ", kind(schema.items)]);
  const bounds = [];
  if (schema.minimum !== undefined) bounds.push(`from ${schema.minimum}`);
  if (schema.maximum !== undefined) bounds.push(`to ${schema.maximum}`);
  if (schema.minLength !== undefined) bounds.push(`at least ${schema.minLength} long`);
  if (schema.maxLength !== undefined) bounds.push(`at most ${schema.maxLength} long`);
  return [type, ...bounds].join(" ");
}

/** Texts and elements in one line. */
function words(parts, between = "") {
  const line = h("span");
  parts.forEach((part, idx) => line.append(idx > 0 ? between : "", part));
  return line;
}

const nameOf = (ref) => ref.split("/").pop();
const link = (ref) => h("a", { href: `#${nameOf(ref)}` }, nameOf(ref));

/** The fields of an object, or what else a schema is. */
function fields(schema) {
  if (!schema.properties) return h("p", { class: "kind" }, kind(schema));
  const required = new Set(schema.required ?? []);
  const rows = Object.entries(schema.properties).map(([name, field]) =>
    h(
      "tr",
      {},
      h("td", {}, name),
      h("td", { class: "kind" }, kind(field)),
      h("td", {}, `${required.has(name) ? "Required. " : ""}${field.description ?? ""}`),
    ),
  );
  const titles = ["Field", "Type", "Meaning"].map((title) => h("th", { scope: "col" }, title));
  const table = h("table", {}, h("thead", {}, h("tr", {}, ...titles)), h("tbody", {}, ...rows));
  return h("div", { class: "scrolled" }, table);
}

function body(content) {
  return Object.entries(content ?? {}).map(([type, { schema }]) =>
    h("p", { class: "kind" }, `${type}: `, kind(schema)),
  );
}

function operation(id, method, path, of) {
  const statuses = Object.entries(of.responses).map(([status, response]) =>
    h(
      "tr",
      {},
      h("td", {}, status),
      h("td", {}, response.description),
      h("td", {}, ...body(response.content)),
    ),
  );
  const titles = ["Status", "Meaning", "Body"].map((title) => h("th", { scope: "col" }, title));
  return h(
    "section",
    { class: "card", id },
    h("h2", {}, h("span", { class: "method" }, method.toUpperCase()), h("span", { class: "path" }, path)),
    h("p", {}, of.summary ?? ""),
    ...(of.requestBody ? [h("h3", {}, "Request"), ...body(of.requestBody.content)] : []),
    h("h3", {}, "Answers"),
    h(
      "div",
      { class: "scrolled" },
      h("table", {}, h("thead", {}, h("tr", {}, ...titles)), h("tbody", {}, ...statuses)),
    ),
  );
}

function schema([name, of]) {
  const variants = (of.oneOf ?? []).filter((variant) => variant.properties);
  return h(
    "section",
    { class: "card", id: name },
    h("h2", {}, name),
    h("p", {}, of.description ?? ""),
    ...(variants.length > 0 ? variants.map(fields) : [fields(of)]),
  );
}

function draw({ info, paths, components }) {
  byId("title").textContent = `${info.title} API`;
  byId("about").textContent = info.description ?? "";
  const tags = new Map();
  const cards = [];
  for (const [path, item] of Object.entries(paths)) {
    for (const method of METHODS.filter((method) => item[method])) {
      const id = `${method}${path}`;
      const tag = item[method].tags?.[0] ?? "Other";
      const entry = h(
        "a",
        { href: `#${id}` },
        h("span", { class: "method" }, method.toUpperCase()),
        h("span", { class: "path" }, path),
        h("span", { class: "fine" }, item[method].summary ?? ""),
      );
      tags.set(tag, [...(tags.get(tag) ?? []), entry]);
      cards.push(operation(id, method, path, item[method]));
    }
  }
  const groups = [...tags].flatMap(([tag, entries]) => [h("h2", {}, tag), ...entries]);
  byId("contents").replaceChildren(...groups);
  const schemas = Object.entries(components.schemas).map(schema);
  byId("main").replaceChildren(...cards, h("h2", {}, "Types"), ...schemas);
}

async function load() {
  byId("problem").textContent = "";
  try {
    draw(await json("GET", "/openapi.json"));
    byId("key-form").hidden = true;
  } catch (error) {
    if (!(error instanceof ClientError)) throw error;
    byId("problem").textContent = error.message;
    byId("key-form").hidden = error.status !== 401;
  }
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  load();
});
load();
