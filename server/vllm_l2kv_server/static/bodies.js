// What the page compares: two bodies for `/v1/chat/completions`, from what its reader typed. Knows nothing of the page.

/**
 * One question about one text, at two values of the field `name`. With `salted` neither finds the prompt in the prefix
 * cache.
 */
export function atTwoValues({ text, question, name, values, options, salted }) {
  const content = [text, question].filter(Boolean).join("\n\n");
  return values.map((value) => ({
    ...options,
    messages: [{ role: "user", content }],
    temperature: 0,
    [name]: value,
    ...(salted && { cache_salt: newSalt() }),
  }));
}

/**
 * Two questions about one document, at one keep ratio. They share a salt that no earlier request had: the first finds
 * nothing, and the second what the first left.
 */
export function aboutOneDocument({ text, questions, ratio, options }) {
  const salt = newSalt();
  return questions.map((question) => ({
    ...options,
    messages: [{ role: "system", content: text }, { role: "user", content: question }],
    temperature: 0,
    kv_keep_ratio: ratio,
    kv_prefix_messages: 1,
    cache_salt: salt,
  }));
}

/** Random, so that no other request has it. Not `randomUUID`, which pages without TLS do not have. */
function newSalt() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (word) => word.toString(16)).join("-");
}
