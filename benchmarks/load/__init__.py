"""Both servers under load: docs/load_testing.md."""
