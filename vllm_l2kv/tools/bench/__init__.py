"""A load test of a running server: `vllm-l2kv bench`.

`load` defines what is sent and when, `prompts` makes token ids, `client` requests and times one completion, `drive`
keeps many requests in flight, and `watch` samples the server meanwhile. `summary` turns a round into a JSON row,
`report` turns rows into tables, plots and a page, and `cli` runs the rounds.
"""
