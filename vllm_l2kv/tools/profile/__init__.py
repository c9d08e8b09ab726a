"""`vllm-l2kv profile`: measures how much a model's answers need each layer and KV head."""
