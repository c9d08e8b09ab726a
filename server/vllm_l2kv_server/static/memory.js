// How much KV memory a prompt takes, in layers times tokens. Knows nothing of the page.

/**
 * Shares of what the prompt would take uncompressed: `uncompressed` for layers that are never compacted, which count
 * whole, `compressed` for those that are. A layer with a sliding window never holds more than its window.
 */
export function sharesOf(groups, { prompt_tokens: prompt, kept_tokens: kept }) {
  const uncompressed = sum(groups.filter((group) => !group.compressed), (group) =>
    Math.min(prompt, group.sliding_window ?? prompt),
  );
  const compressed = groups.filter((group) => group.compressed);
  const whole = uncompressed + sum(compressed, () => prompt);
  return { uncompressed: uncompressed / whole, compressed: sum(compressed, () => kept) / whole };
}

/** Layers in the groups that pass. */
export function countLayers(groups, passes = () => true) {
  return sum(groups.filter(passes), () => 1);
}

function sum(groups, perLayer) {
  return groups.reduce((total, group) => total + group.layers.length * perLayer(group), 0);
}
