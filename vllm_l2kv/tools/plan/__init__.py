"""How many requests a memory holds, with and without compression: `vllm-l2kv plan`.

Nothing runs and no weights are read: a config, vLLM's own planner of the KV cache and the package's own arithmetic.
"""
