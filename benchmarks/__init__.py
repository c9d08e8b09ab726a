"""Scripts, with their results, for every number in README.md and docs/. Run them from the root of the repository."""
