// The KV memory that a request holds, relative to uncompressed. This module does not touch the page.

/**
 * The two parts of `memory_ratio`: `uncompressed` for layers that are never compacted, `compressed` for those that are.
 * Layers with a sliding window are left out, as the server leaves them out.
 */
export function sharesOf(groups, { memory_ratio: total }) {
  const full = countLayers(groups, (group) => !group.compressed && !group.sliding_window);
  const uncompressed = full / (full + countLayers(groups, (group) => group.compressed));
  return { uncompressed, compressed: Math.max(0, total - uncompressed) };
}

/** Layers in the groups that pass. */
export function countLayers(groups, passes = () => true) {
  return groups.filter(passes).reduce((total, group) => total + group.layers.length, 0);
}
