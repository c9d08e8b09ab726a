// Calls to the server that sent this page. This module does not touch the page.
//
// Addresses are relative to the page, so that they also work behind a proxy that adds a path.

/** An error in the server's answer. */
export class ServerError extends Error {
  constructor(status, message, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** `GET /v1/kv_compression`: fields, bounds, defaults, KV-cache groups, models. */
export async function getInfo(key, signal) {
  return (await call("v1/kv_compression", key, { signal })).json();
}

/** The sample text. */
export async function getSample() {
  return (await call("playground/lighthouse.txt", "")).text();
}

/** The chunks of a streamed chat completion; each has the usage so far, with `kv_cache`. */
export async function* streamChat(body, key, signal) {
  const streamed = {
    ...body,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  const response = await call("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(streamed),
    signal,
  });
  for await (const data of eventsOf(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw errorOf(chunk, response.status);
    yield chunk;
  }
  throw new Error("The connection ended before the answer did.");
}

async function call(path, key, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({})); // a proxy answers in HTML
  throw errorOf(answer, response.status, response.statusText);
}

/** vLLM's error handlers send an object; its check of the API key sends a string. */
function errorOf({ error }, status, fallback = "") {
  if (typeof error === "object" && error !== null) return new ServerError(status, error.message, error.param);
  return new ServerError(status, `${status} ${error ?? fallback}`.trim());
}

/** The data of server-sent events, which vLLM sends as one line each. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (unread + value).split("\n\n");
    unread = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ")) yield event.slice("data: ".length);
    }
  }
}
