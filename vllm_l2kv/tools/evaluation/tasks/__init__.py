"""Tasks of `vllm-l2kv eval`: one module each, which makes cases and knows how to score their answers."""
