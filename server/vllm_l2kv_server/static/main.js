// The page: sends two requests made from its fields, and shows each error at the field that the error names.

import { Answer, secondsOf } from "./answer.js";
import { getInfo, getSample, ServerError } from "./api.js";
import { aboutOneDocument, atTwoValues } from "./bodies.js";
import { Field } from "./fields.js";
import { countLayers } from "./memory.js";

const RATIO = "kv_keep_ratio";
const BUDGET = "kv_max_tokens";
const COLUMNS = ["A", "B"];
/** Modes in which the columns differ by one field, with its initial value in each; empty means the server's default. */
const COMPARED = {
  ratios: { name: RATIO, starts: [1, 0.5], legend: "Keep ratio", says: (value) => `keep ${value}` },
  budgets: { name: BUDGET, starts: [1024, 256], legend: "Budget", says: (value) => `budget ${value}` },
};
const DOCUMENT = "document"; // the mode of two questions; in it the page sets where the document ends
const DOCUMENT_RATIO = 0.25;
/** The modes in which these fields have one value for both requests. */
const SHARED_IN = { [RATIO]: "budgets", [BUDGET]: `ratios ${DOCUMENT}` };
const DOCUMENT_FIELDS = "kv_prefix_";
const MAX_TOKENS = {
  name: "max_tokens",
  type: "integer",
  default: null,
  bounds: "",
  description: "Maximum length of an answer; empty for as long as the context allows.",
};
const SAMPLE_QUESTIONS = {
  question: "Who was the first keeper of the lighthouse?",
  second: "What was the lid of the coal bunker used for?",
};
const MISSING = { text: "Paste a document.", question: "Ask something.", second: "Ask something else." };
const HOW_ASKED =
  "The second question was sent after the first answer. Both share a new cache salt, so the first finds nothing in " +
  "the prefix cache, and the second finds the compressed document. Temperature 0: always the most likely token.";
const byId = (id) => document.getElementById(id);

const page = { info: null, columns: [], documentRatio: null, options: [], controller: null, connection: null };
const specOf = (name) => page.info.fields.find((field) => field.name === name);

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  connect();
});
byId("ask").addEventListener("input", () => page.columns.forEach(({ answer }) => answer.showError("")));
for (const id of [...Object.keys(MISSING), "key"]) byId(id).addEventListener("input", () => showInputError(id, ""));
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!byId("compare").disabled) compare();
});
byId("stop").addEventListener("click", () => page.controller?.abort());
byId("sample").addEventListener("click", useSample);
byId("text").addEventListener("input", showLength);
byId("mode").addEventListener("change", showMode);
connect();

/** Asks the server for its request fields, and adds them to the page. */
async function connect() {
  showKeyError("");
  page.connection?.abort(); // a late answer to an earlier key would look like one to this key
  const { signal } = (page.connection = new AbortController());
  try {
    page.info = await getInfo(key(), signal);
  } catch (error) {
    if (signal.aborted) return;
    byId("server").textContent = `The server's settings cannot be read: ${error.message}`;
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
  page.columns = COLUMNS.map((name, index) => {
    const root = byId("answer").content.firstElementChild.cloneNode(true);
    const answer = new Answer(root);
    byId("answers").append(root);
    answer.reset(`Answer ${name}`);
    const fields = Object.entries(COMPARED).map(([ofMode, { name: field, starts }]) => {
      const shown = { id: `${field}-${name}`, label: `${field} ${name}`, value: starts[index] };
      return [ofMode, addCompared(field, ofMode, shown)];
    });
    return { name, answer, fields: Object.fromEntries(fields) };
  });
  page.documentRatio = addCompared(RATIO, DOCUMENT, { id: `${RATIO}-document`, label: RATIO, value: DOCUMENT_RATIO });
  const shared = page.info.fields.filter(({ name }) => !name.startsWith(DOCUMENT_FIELDS));
  page.options = [new Field(MAX_TOKENS, { value: 128 }), ...shared.map((field) => new Field(field))];
  for (const { name, root } of page.options) if (name in SHARED_IN) root.dataset.mode = SHARED_IN[name];
  byId("options").append(...page.options.map((field) => field.root));
  showMode();
}

function addCompared(name, ofMode, shown) {
  const field = new Field({ ...specOf(name), description: "" }, shown);
  field.root.dataset.mode = ofMode;
  byId("compared").append(field.root);
  return field;
}

/** Hides the parts of the page that belong to other modes. */
function showMode() {
  for (const part of document.querySelectorAll("[data-mode]")) part.hidden = !part.dataset.mode.split(" ").includes(mode());
  const { name, legend } = COMPARED[mode()] ?? COMPARED.ratios;
  byId("compared-legend").textContent = legend;
  byId("compared-hint").textContent = page.info ? specOf(name).description : "";
}

/** Sends both requests and waits until both have ended, with or without an error. */
async function compare() {
  clearErrors();
  const isDocument = mode() === DOCUMENT;
  const bodies = readBodies(isDocument);
  if (!bodies) return;
  page.controller = new AbortController();
  enable("stop", "compare");
  const atOnce = !isDocument && byId("order").value === "at-once";
  byId("how").textContent = isDocument ? HOW_ASKED : howSent(atOnce);
  const runs = page.columns.map((column, index) => () => run(column, bodies[index]));
  const seconds = atOnce ? await Promise.all(runs.map((start) => start())) : await inTurn(runs);
  if (isDocument) showWait(seconds);
  page.controller = null;
  enable("compare", "stop");
}

/** Enables one button and disables another, and moves the focus if the other one had it. */
function enable(id, other) {
  byId(id).disabled = false;
  if (document.activeElement === byId(other)) byId(id).focus();
  byId(other).disabled = true;
}

async function inTurn(runs) {
  const results = [];
  for (const start of runs) results.push(await start());
  return results;
}

/** Returns the seconds to the first token; nothing after an error. */
async function run(column, body) {
  const { signal } = page.controller;
  try {
    return await column.answer.run(body, key(), signal, page.info.kv_cache_groups);
  } catch (error) {
    if (!signal.aborted) showError(error, column);
  }
}

/** The bodies of both requests; null if a value cannot be sent, and then its field shows an error. */
function readBodies(isDocument) {
  const asked = isDocument ? ["text", "question", "second"] : ["question"];
  const missing = asked.find((id) => !typed(id));
  if (missing) {
    showInputError(missing, MISSING[missing]);
    return null;
  }
  const { name: compared, says } = COMPARED[mode()] ?? COMPARED.ratios;
  const values = readFields(comparedFields());
  const options = values && readOptions();
  if (!options) return null;
  const text = byId("text").value;
  const bodies = isDocument
    ? aboutOneDocument({ text, questions: [typed("question"), typed("second")], ratio: values[0], options })
    : atTwoValues({ text, question: typed("question"), name: compared, values, options, salted: byId("salted").checked });
  page.columns.forEach(({ name, answer }, index) => {
    const value = bodies[index][compared];
    answer.reset(`Answer ${name}: ${value === undefined ? `the server's ${compared}` : says(value)}`);
  });
  return bodies;
}

/** The compared fields of this mode. */
function comparedFields() {
  return mode() === DOCUMENT ? [page.documentRatio] : page.columns.map(({ fields }) => fields[mode()]);
}

/** The fields that both bodies have; null if a value cannot be sent. */
function readOptions() {
  const shown = page.options.filter(({ root }) => !root.hidden);
  const values = readFields(shown);
  return values && Object.fromEntries([["model", page.info.models[0]], ...shown.map(({ name }, index) => [name, values[index]])]);
}

/** The values of the fields; null if one cannot be sent. */
function readFields(fields) {
  const values = [];
  for (const field of fields) {
    try {
      values.push(field.read());
    } catch (error) {
      field.showError(error.message);
      return null;
    }
  }
  return values;
}

function howSent(atOnce) {
  const order = atOnce
    ? "Both requests were sent at once and share the server's batch, so each makes the other slower."
    : "Request B was sent after A had ended.";
  const cache = byId("salted").checked
    ? "Each has a cache salt of its own, so neither finds the prompt in the prefix cache."
    : "A prompt, or its beginning, may be found in the prefix cache if the server has seen it before, " +
      "which shortens the time to the first token.";
  return `${order} ${cache} Temperature 0: always the most likely token.`;
}

/** Shows the time to the first token of each of two questions. */
function showWait([first, second]) {
  if (first == null || second == null) return;
  const waited = `The first answer began after ${secondsOf(first)}, the second after ${secondsOf(second)}.`;
  byId("how").textContent = `${waited} ${HOW_ASKED}`;
}

function showError(error, { answer, fields }) {
  const field = [fields[mode()] ?? page.documentRatio, ...page.options].find(({ name }) => name === error.param);
  if (field) field.showError(error.message);
  else if (isUnauthorized(error)) showKeyError(error);
  else answer.showError(error.message);
}

function clearErrors() {
  for (const field of [...page.options, ...comparedFields()]) field.showError("");
  showKeyError("");
  for (const id of Object.keys(MISSING)) showInputError(id, "");
}

function isUnauthorized(error) {
  return error instanceof ServerError && error.status === 401;
}

/** Shows the field for the API key once the server asks for a key. */
function showKeyError(error) {
  if (error) byId("key-form").hidden = false;
  const asked = key() ? "The server does not take this API key" : "This server asks for an API key";
  showInputError("key", error && `${asked} (${error.message}).`);
}

function showInputError(id, message) {
  byId(`${id}-error`).textContent = message;
  byId(id).setAttribute("aria-invalid", message ? "true" : "false");
  if (message) byId(id).focus();
}

function key() {
  return typed("key");
}

function mode() {
  return byId("mode").value;
}

function typed(id) {
  return byId(id).value.trim();
}

async function useSample() {
  byId("text").value = await getSample();
  for (const [id, question] of Object.entries(SAMPLE_QUESTIONS)) byId(id).value = question;
  for (const id of Object.keys(MISSING)) showInputError(id, "");
  showLength();
}

function showLength() {
  const { length } = byId("text").value;
  byId("length").textContent = length ? `${length.toLocaleString("en")} characters` : "";
}
