"""Load tests of vllm-l2kv and stock vLLM, for docs/load_testing.md, and of routers."""
