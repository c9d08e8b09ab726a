"""Computes how many requests fit a GPU's memory, with and without compression: `vllm-l2kv plan`.

No engine runs and no weights are read: it uses the model's config, vLLM's planner of the KV cache, and the arithmetic
of this package.
"""
