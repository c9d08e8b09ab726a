"""`vllm-l2kv profile`: what each layer and KV head of a model does for its answers."""
