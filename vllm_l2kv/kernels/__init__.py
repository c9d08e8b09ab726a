"""Moving kept rows of the paged KV cache. `reference` is the ground truth that every faster kernel must equal."""
