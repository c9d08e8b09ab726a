"""The OpenAI-compatible front end: `vllm-l2kv serve`, request fields, usage numbers, metrics and two routes.

Runs in vLLM's API-server processes as an endpoint plugin; it knows the engine only through vLLM's engine client.
"""
