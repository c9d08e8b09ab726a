"""What a keep ratio gains on GPUs: docs/benchmarks.md."""
