"""Tasks of `vllm-l2kv eval`: each module makes the cases of one task and scores their answers."""
