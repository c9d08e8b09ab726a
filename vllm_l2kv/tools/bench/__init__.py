"""A load test of a running server: `vllm-l2kv bench`.

`load` says what is sent and when, `prompts` makes token ids of it, `client` asks for one completion and times it,
`drive` keeps many of them in flight, `watch` looks at the server meanwhile. `summary` makes one JSON row of a round,
`report` tables, plots and a page of rows, and `cli` puts the rounds in order.
"""
