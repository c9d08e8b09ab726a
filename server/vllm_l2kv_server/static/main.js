// The page: what its reader typed becomes two requests, whose errors go back to the fields that they name.

import { Answer } from "./answer.js";
import { getInfo, getSample, ServerError } from "./api.js";
import { Field } from "./fields.js";
import { countLayers } from "./memory.js";

const RATIO = "kv_keep_ratio";
const RATIOS = { A: 1, B: 0.5 };
const MAX_TOKENS = {
  name: "max_tokens",
  type: "integer",
  default: null,
  bounds: "",
  description: "Length of an answer at most; empty for as long as the context allows.",
};
const SAMPLE_QUESTION = "Who was the first keeper of the lighthouse?";
const byId = (id) => document.getElementById(id);

const page = { info: null, columns: [], options: [], controller: null };

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  connect();
});
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!byId("compare").disabled) compare();
});
byId("stop").addEventListener("click", () => page.controller?.abort());
byId("sample").addEventListener("click", useSample);
byId("text").addEventListener("input", showLength);
connect();

/** Asks the server what it takes, and makes the fields for it. */
async function connect() {
  showKeyError("");
  try {
    page.info = await getInfo(key());
  } catch (error) {
    byId("server").textContent = `The server does not say what it takes: ${error.message}`;
    if (isUnauthorized(error)) showKeyError(error);
    return;
  }
  const { models, kv_cache_groups: groups } = page.info;
  const compressed = countLayers(groups, (group) => group.compressed);
  byId("server").textContent = `${models[0]}: ${compressed} of ${countLayers(groups)} layers are compressed.`;
  if (!page.columns.length) makeFields();
  byId("compare").disabled = page.controller !== null;
}

function makeFields() {
  const { fields } = page.info;
  const ratio = fields.find((field) => field.name === RATIO);
  byId("ratios-hint").textContent = ratio.description;
  page.columns = Object.entries(RATIOS).map(([name, value]) => {
    const field = new Field({ ...ratio, description: "" }, { id: `${RATIO}-${name}`, label: `${RATIO} ${name}`, value });
    const root = byId("answer").content.firstElementChild.cloneNode(true);
    const answer = new Answer(root);
    byId("ratios").append(field.root);
    byId("answers").append(root);
    answer.reset(`Answer ${name}`);
    return { name, field, answer };
  });
  page.options = [
    new Field(MAX_TOKENS, { value: 128 }),
    ...fields.filter((field) => field.name !== RATIO).map((field) => new Field(field)),
  ];
  byId("options").append(...page.options.map((field) => field.root));
}

/** Sends both requests and waits until both have ended, well or not. */
async function compare() {
  clearErrors();
  const bodies = readBodies();
  if (!bodies) return;
  page.controller = new AbortController();
  byId("compare").disabled = true;
  byId("stop").disabled = false;
  const atOnce = byId("order").value === "at-once";
  byId("how").textContent = howSent(atOnce);
  const runs = page.columns.map((column, index) => () => run(column, bodies[index]));
  if (atOnce) await Promise.all(runs.map((start) => start()));
  else for (const start of runs) await start();
  page.controller = null;
  byId("compare").disabled = false;
  byId("stop").disabled = true;
}

async function run({ field, answer }, body) {
  const { signal } = page.controller;
  try {
    await answer.run(body, key(), signal, page.info.kv_cache_groups);
  } catch (error) {
    if (!signal.aborted) showError(error, field, answer);
  }
}

/** The bodies of both requests, or nothing if a field holds what cannot be sent; that field then says so. */
function readBodies() {
  const question = byId("question").value.trim();
  if (!question) {
    showQuestionError("Ask something.");
    return null;
  }
  const content = [byId("text").value, question].filter(Boolean).join("\n\n");
  const shared = { model: page.info.models[0], messages: [{ role: "user", content }], temperature: 0 };
  for (const field of page.options) {
    if (!readInto(shared, field)) return null;
  }
  const bodies = page.columns.map(({ field }) => {
    const body = { ...shared, ...(byId("salted").checked && { cache_salt: newSalt() }) };
    return readInto(body, field) && body;
  });
  if (!bodies.every(Boolean)) return null;
  page.columns.forEach(({ name, answer }, index) =>
    answer.reset(`Answer ${name}: keep ${bodies[index][RATIO] ?? "the server's default"}`),
  );
  return bodies;
}

function readInto(body, field) {
  try {
    body[field.name] = field.read();
    return true;
  } catch (error) {
    field.showError(error.message);
    return false;
  }
}

/** Random, so that no other request has it. Not `randomUUID`, which pages without TLS do not have. */
function newSalt() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (word) => word.toString(16)).join("-");
}

function howSent(atOnce) {
  const order = atOnce
    ? "Both requests were sent at once and share the server's batch: the times of each hold work for the other."
    : "Request B was sent when A had ended.";
  const cache = byId("salted").checked
    ? "Each has a cache salt of its own, so neither finds the prompt in the prefix cache."
    : "A prompt, or the beginning of one, that the server has seen lately is found in the prefix cache, " +
      "which shortens the time to the first token.";
  return `${order} ${cache} Temperature 0: the likeliest token is taken each time.`;
}

function showError(error, ratio, answer) {
  const field = [ratio, ...page.options].find(({ name }) => name === error.param);
  if (field) field.showError(error.message);
  else if (isUnauthorized(error)) showKeyError(error);
  else answer.showError(error.message);
}

function clearErrors() {
  for (const field of [...page.options, ...page.columns.map((column) => column.field)]) field.showError("");
  showKeyError("");
  showQuestionError("");
}

function isUnauthorized(error) {
  return error instanceof ServerError && error.status === 401;
}

/** Of a server without a key nobody ever sees the field. */
function showKeyError(error) {
  if (error) byId("key-form").hidden = false;
  const asked = key() ? "The server does not take this API key" : "This server asks for an API key";
  showInputError("key", error && `${asked} (${error.message}).`);
}

function showQuestionError(message) {
  showInputError("question", message);
}

function showInputError(id, message) {
  byId(`${id}-error`).textContent = message;
  byId(id).setAttribute("aria-invalid", message ? "true" : "false");
  if (message) byId(id).focus();
}

function key() {
  return byId("key").value.trim();
}

async function useSample() {
  byId("text").value = await getSample();
  byId("question").value = SAMPLE_QUESTION;
  showLength();
}

function showLength() {
  const { length } = byId("text").value;
  byId("length").textContent = length ? `${length.toLocaleString("en")} characters` : "";
}
