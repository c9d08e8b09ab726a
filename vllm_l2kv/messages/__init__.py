"""Messages between processes, and the vLLM objects that carry them. Standard library only.

| message | from | to | carried by | module of `vllm_l2kv` |
|---|---|---|---|---|
| settings of an engine | front end | all | `VllmConfig.additional_config` | `settings` |
| fields of a request | front end | scheduler | `SamplingParams.extra_args` | `params` |
| compaction orders | scheduler | worker | an attribute of `SchedulerOutput` | `messages.orders` |
| requests that begin on compacted rows | scheduler | worker | an attribute of `SchedulerOutput` | `messages.orders` |
| seconds of compactions | worker | scheduler | an attribute of `ModelRunnerOutput` | `messages.orders` |
| usage of a prompt | scheduler | front end | `EngineCoreOutput.kv_transfer_params` | `messages.usage` |
| why a request failed | scheduler | front end | `EngineCoreOutput.stop_reason`, `error` | `scheduler.failed_requests` |
| statistics | scheduler | front end | `SchedulerStats.kv_connector_stats` | `messages.stats` |

vLLM itself provides the carriers of settings and fields. Each message of this package has two functions: one puts it on
the vLLM object, the other reads it back.
"""
