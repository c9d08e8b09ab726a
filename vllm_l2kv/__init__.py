"""Per-request KV-cache compression for stock vLLM by the L2 norm of keys.

Importing this package imports neither vLLM nor torch and patches nothing; vLLM is told about us by the values that
`engine_args` returns and by the entry points in `pyproject.toml`.
"""

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from vllm_l2kv.params import CompressionParams, FieldValue, ParamError
from vllm_l2kv.settings import CONFIG_KEY, Settings

__version__ = version("vllm-l2kv")
__all__ = ["CompressionParams", "ParamError", "__version__", "compression", "engine_args"]


def compression(
    keep_ratio: float | None = None,
    protect_first: int | None = None,
    protect_last: int | None = None,
    scorer: str | None = None,
    granularity: str | None = None,
) -> dict[str, FieldValue]:
    """What one offline request asks: `SamplingParams(extra_args=compression(keep_ratio=0.5))`.

    Args:
        keep_ratio: Share of the prompt's tokens kept in compressed layers, in (0, 1].
        protect_first: Prompt tokens at the start that are always kept.
        protect_last: Prompt tokens at the end that are always kept.
        scorer: What decides which of the others are kept, one of `vllm_l2kv.params.SCORERS`.
        granularity: What is kept or evicted as one, one of `vllm_l2kv.params.GRANULARITIES`.

    Returns:
        The given fields under their names on the wire; what is `None` is left to the engine's defaults.

    Raises:
        ParamError: A value out of bounds (a `ValueError`).
    """
    given = {
        "kv_keep_ratio": keep_ratio,
        "kv_protect_first": protect_first,
        "kv_protect_last": protect_last,
        "kv_scorer": scorer,
        "kv_granularity": granularity,
    }
    fields = {name: value for name, value in given.items() if value is not None}
    CompressionParams().override(fields)
    return fields


def engine_args(
    full_layers: Iterable[int] = Settings.full_layers,
    default_keep_ratio: float = CompressionParams.keep_ratio,
    protect_first: int = CompressionParams.protect_first,
    protect_last: int = CompressionParams.protect_last,
    scorer: str = CompressionParams.scorer,
    granularity: str = CompressionParams.granularity,
    metrics: bool = Settings.metrics,
    additional_config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments that make vLLM compress: `LLM(model, **engine_args(full_layers=(0, 1)))`.

    Args:
        full_layers: Indices of layers that never compact.
        default_keep_ratio: Keep ratio of a request that names none, in (0, 1].
        protect_first: Default number of protected tokens at the start of a prompt.
        protect_last: Default number of protected tokens at the end of a prompt.
        scorer: Default scorer, one of `vllm_l2kv.params.SCORERS`.
        granularity: Default granularity, one of `vllm_l2kv.params.GRANULARITIES`.
        metrics: Tell the front end about compactions, for `/metrics`. For servers of ours alone: vLLM's `LLM` would
            not know what to do with it.
        additional_config: Other entries for vLLM's option of this name.

    Returns:
        `scheduler_cls`, `worker_cls` and `additional_config`, and on a CPU `block_size`: vLLM's default of 128
        tokens there would make the blocks of full layers, and so the steps of prefix-cache hits, needlessly long.

    Raises:
        ValueError: A value out of bounds.
    """
    # vLLM finds the device when it is imported, so wait until somebody needs to know it.
    from vllm_l2kv.plugin import device_engine_args

    defaults = CompressionParams(default_keep_ratio, protect_first, protect_last, scorer, granularity)
    settings = Settings(tuple(full_layers), defaults, metrics)
    return {
        **device_engine_args(),
        "additional_config": {**(additional_config or {}), CONFIG_KEY: settings.as_config()},
    }
