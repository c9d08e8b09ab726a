"""What a keep ratio or a budget costs: `vllm-l2kv eval`.

Tasks make cases (`tasks`), the real engine answers each of them under every variant (`run`), one JSON row for each
answer; tables and plots are made of rows (`report`).
"""
