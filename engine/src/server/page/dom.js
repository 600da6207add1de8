// Making elements, and the few controls that both pages share.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element. A prop is a listener (`onclick`), a property (`value`, `checked`, …) or an attribute;
 * null and false leave it out. Strings among the children become text, whatever they hold.
 */
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** As `h`, for drawings. */
export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (["checked", "disabled", "hidden", "value"].includes(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

const ICONS = {
  plus: "M12 5v14M5 12h14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M8 8h8v8H8z",
  copy: "M9 9h10v10H9zM5 15V5h10",
  check: "M5 12l5 5 9-10",
  edit: "M5 19h3L19 8l-3-3L5 16zM13 8l3 3",
  again: "M19 12a7 7 0 1 1-2-5l2 2M19 4v5h-5",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10 11v5M14 11v5",
  menu: "M4 7h16M4 12h16M4 17h16",
  sliders: "M4 8h9M17 8h3M4 16h3M11 16h9M15 6v4M9 14v4",
  chart: "M5 20V11M12 20V4M19 20v-6",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6L19" +
    " 19M19 5l-1.4 1.4M6.4 17.6L5 19",
  moon: "M20 14.5A8 8 0 0 1 9.5 4 8 8 0 1 0 20 14.5z",
  down: "M12 5v14M6 13l6 6 6-6",
  close: "M6 6l12 12M18 6L6 18",
  chat: "M4 5h16v11H10l-5 4v-4H4z",
};

/** A drawing beside or instead of a word; never read aloud. */
export function icon(name) {
  const props = { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", focusable: "false" };
  return svg("svg", props, svg("path", { d: ICONS[name] }));
}

/** Puts the icons into elements that name one. */
export function placeIcons() {
  for (const element of document.querySelectorAll("[data-icon]")) {
    element.prepend(icon(element.dataset.icon));
  }
}

/** A button that shows a drawing; its name is read aloud and shown as a tip. */
export function iconButton(name, label, onclick) {
  return h("button", { type: "button", class: "quiet", "aria-label": label, title: label, onclick },
    icon(name));
}

/** Copies what `text()` gives, and says so for a moment. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const isCopied = await copy(text());
    button.replaceChildren(icon(isCopied ? "check" : "close"));
    announce(isCopied ? "Copied" : "Copying is not possible here");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without HTTPS there is no clipboard but on this machine's own address.
    const area = h("textarea", { class: "unseen", value: text, "aria-hidden": "true" });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return isCopied;
  }
}

/** Tells those who cannot see what happened. */
export function announce(text) {
  const region = byId("announcements");
  if (!region) return;
  // The same words twice are two announcements.
  region.replaceChildren(h("p", {}, text));
}

/** Shows the theme switch's state and lets it work; theme.js has set the theme by now. */
export function wireThemeButton(button) {
  const show = () => {
    const isDark = document.documentElement.dataset.theme === "dark";
    const label = isDark ? "Light theme" : "Dark theme";
    button.replaceChildren(icon(isDark ? "sun" : "moon"));
    button.setAttribute("aria-label", label);
    button.title = label;
  };
  button.addEventListener("click", () => {
    const { dataset } = document.documentElement;
    dataset.theme = dataset.theme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("bespoke.theme", dataset.theme);
    } catch {
      // Without storage the choice lasts as long as the page.
    }
    show();
  });
  // The theme follows the system as long as nobody has chosen.
  new MutationObserver(show).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  show();
}
