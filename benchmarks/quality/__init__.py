"""What a keep ratio costs: docs/quality.md."""
