// How much KV memory a request holds, in layers times tokens. Knows nothing of the page.

/**
 * Shares of what prompt and answer would take uncompressed: `uncompressed` for layers that are never compacted, which
 * count whole, `compressed` for those that are. A layer with a sliding window never holds more than its window.
 */
export function sharesOf(groups, { kept_tokens: kept, evicted_tokens: evicted }) {
  const computed = kept + evicted;
  const uncompressed = sum(groups.filter((group) => !group.compressed), (group) =>
    Math.min(computed, group.sliding_window ?? computed),
  );
  const compressed = groups.filter((group) => group.compressed);
  const whole = uncompressed + sum(compressed, () => computed);
  return { uncompressed: uncompressed / whole, compressed: sum(compressed, () => kept) / whole };
}

/** Layers in the groups that pass. */
export function countLayers(groups, passes = () => true) {
  return sum(groups.filter(passes), () => 1);
}

function sum(groups, perLayer) {
  return groups.reduce((total, group) => total + group.layers.length * perLayer(group), 0);
}
