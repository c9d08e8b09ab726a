// OpenAI's npm client, with half of the prompt kept. It passes unknown fields of requests and answers on unchanged, so
// nothing like `extra_body` is needed.
//
// Needs a running server (`make serve`):
//
//   npm install --no-save openai
//   node examples/node_client.mjs [TEXT_FILE]

import { readFileSync } from "node:fs";
import OpenAI from "openai";

const file = process.argv[2] ?? new URL("lighthouse.txt", import.meta.url);
const client = new OpenAI({
  baseURL: process.env.OPENAI_BASE_URL ?? "http://localhost:8000/v1",
  apiKey: process.env.OPENAI_API_KEY ?? "none",
});
const model = (await client.models.list()).data[0].id;
const answer = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: `${readFileSync(file, "utf8")}\n\nWho was the first keeper?` }],
  max_tokens: 60,
  temperature: 0,
  kv_keep_ratio: 0.5,
});
console.log(answer.choices[0].message.content);
console.log(JSON.stringify(answer.usage.kv_cache));
