// How answers are made: what a person may set, and the request it becomes.

const NAME = "bespoke.settings";

/**
 * `initial` null leaves the choice to the server. `step` "any" allows fractions. The server checks
 * again; these bounds tell at once.
 */
export const FIELDS = [
  { name: "temperature", label: "Temperature", hint: "0 always takes the likeliest token",
    min: 0, max: 2, step: "any", initial: 0.7 },
  { name: "top_p", label: "Top-p", hint: "smallest set of tokens with this probability",
    min: 0.01, max: 1, step: "any", initial: 0.95 },
  { name: "top_k", label: "Top-k", hint: "this many likeliest tokens",
    min: 1, max: 1000, step: 1, initial: null },
  { name: "min_p", label: "Min-p", hint: "share of the likeliest token's probability",
    min: 0, max: 1, step: "any", initial: null },
  { name: "repetition_penalty", label: "Repetition penalty", hint: "1 is none",
    min: 0.1, max: 2, step: "any", initial: null },
  { name: "presence_penalty", label: "Presence penalty", hint: "0 is none",
    min: -2, max: 2, step: "any", initial: null },
  { name: "frequency_penalty", label: "Frequency penalty", hint: "0 is none",
    min: -2, max: 2, step: "any", initial: null },
  { name: "max_tokens", label: "Longest answer", hint: "tokens",
    min: 1, max: 1000000, step: 1, initial: 1024 },
  { name: "seed", label: "Seed", hint: "the same seed gives the same answer",
    min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, initial: null },
];

export function initialSettings() {
  const values = FIELDS.map(({ name, initial }) => [name, initial]);
  return { ...Object.fromEntries(values), system: "", json: false };
}

export function loadSettings(storage) {
  try {
    const saved = JSON.parse(storage.getItem(NAME)) ?? {};
    const settings = initialSettings();
    for (const field of FIELDS) {
      if (field.name in saved) settings[field.name] = numberOr(field, saved[field.name]);
    }
    if (typeof saved.system === "string") settings.system = saved.system;
    settings.json = saved.json === true;
    return settings;
  } catch {
    return initialSettings();
  }
}

function numberOr(field, value) {
  return value === null || problemOf(field, value) === null ? value : field.initial;
}

/** Whether there was room. */
export function saveSettings(storage, settings) {
  try {
    storage.setItem(NAME, JSON.stringify(settings));
    return true;
  } catch {
    return false;
  }
}

/** What is wrong with a field's number, or null. */
export function problemOf({ label, min, max, step }, value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return `${label} is not a number`;
  if (value < min || value > max) return `${label} has to be between ${min} and ${max}`;
  if (step === 1 && !Number.isInteger(value)) return `${label} has to be a whole number`;
  return null;
}

/** The request for the answer that follows `messages`. */
export function toRequest(model, settings, messages) {
  const request = { model, messages: [] };
  if (settings.system.trim()) request.messages.push({ role: "system", content: settings.system });
  for (const { role, content } of messages) {
    // An answer that failed before its first word was none.
    if (role === "user" || content !== "") request.messages.push({ role, content });
  }
  for (const { name } of FIELDS) {
    if (settings[name] !== null) request[name] = settings[name];
  }
  if (settings.json) request.response_format = { type: "json_object" };
  return request;
}
