"""The OpenAI-compatible front end: command line, request fields, usage numbers, one route of our own.

Runs in vLLM's API-server processes as an endpoint plugin; knows the engine only through `EngineClient`.
"""
