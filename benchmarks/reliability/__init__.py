"""Results of the tests that attack servers, for docs/reliability.md."""
