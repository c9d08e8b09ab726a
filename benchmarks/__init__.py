"""Scripts, and what they measured, behind every number of README.md and docs/. Run from the root of the repository."""
