// The two bodies for `/v1/chat/completions` that the page compares. This module does not touch the page.

/**
 * One question about one text, at two values of the field `name`. With `salted`, neither request finds the prompt in
 * the prefix cache.
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
 * Two questions about one document, at one keep ratio. They share a new cache salt, so the first finds nothing in the
 * prefix cache, and the second finds the document that the first left.
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

/** Random, so that no other request has it. Browsers offer `randomUUID` only to pages with TLS. */
function newSalt() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (word) => word.toString(16)).join("-");
}
