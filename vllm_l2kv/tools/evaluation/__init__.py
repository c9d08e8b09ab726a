"""Measures what a keep ratio or a budget costs in quality: `vllm-l2kv eval`.

Tasks make cases (`tasks`). The engine answers each case under every variant and writes one JSON row for each answer
(`run`). Tables and plots are made from rows (`report`).
"""
