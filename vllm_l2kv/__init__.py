"""Per-request KV-cache compression for stock vLLM by the L2 norm of keys.

Importing this package imports neither vLLM nor torch and patches nothing; vLLM is told about us by the values that
`engine_args` returns and by the entry points in `pyproject.toml`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.params import FIELDS, FIELDS_WITH_DEFAULTS, CompressionParams, Field, FieldValue
from vllm_l2kv.profile import setting_of
from vllm_l2kv.settings import CONFIG_KEY, Settings, heads_by_layer

try:
    __version__ = version("vllm-l2kv")
except PackageNotFoundError:  # sources on the path that nothing installed
    __version__ = "0+unknown"
__all__ = ["CompressionParams", "ParamError", "__version__", "compression", "engine_args"]


def compression(keep_ratio: float | None = None, **others: FieldValue | None) -> dict[str, FieldValue]:
    """What one offline request asks: `SamplingParams(extra_args=compression(keep_ratio=0.5, max_tokens=4096))`.

    Args:
        keep_ratio: Share of the prompt's tokens kept in compressed layers, in (0, 1].
        others: The other attributes of `CompressionParams`, which has their meanings, types and bounds.

    Returns:
        The given fields under their names on the wire; what is `None` is left to the engine's defaults.

    Raises:
        ParamError: A value out of bounds (a `ValueError`).
        TypeError: Another argument.
    """
    given = _fields("compression", {"keep_ratio": keep_ratio, **others}, {field.attribute: field for field in FIELDS})
    fields = {field.name: value for field, value in given.items() if value is not None}
    # Whether a budget covers the protected tokens is known by the engine alone, which may protect none by default.
    CompressionParams(protect_first=0, protect_last=0).override(fields)
    return fields


def engine_args(
    full_layers: Iterable[int] | None = None,
    full_heads: Mapping[int, Sequence[int]] | None = None,
    metrics: bool = Settings.metrics,
    prompt_interval: int = Settings.prompt_interval,
    answer_interval: int = Settings.answer_interval,
    profile: str | os.PathLike[str] | None = None,
    memory: float | None = None,
    classes: str | None = None,
    evaluation_scorers: Sequence[str] = Settings.evaluation_scorers,
    additional_config: dict[str, Any] | None = None,
    **defaults: FieldValue | None,
) -> dict[str, Any]:
    """Arguments that make vLLM compress: `LLM(model, **engine_args(full_layers=(0, 1), default_keep_ratio=0.5))`.

    Args:
        full_layers: Indices of layers that never compact; `None` for those of the profile, or 0 and 1 without one.
        full_heads: Layers to those of their KV heads that never compact, such as `{7: [0, 2], 12: [1]}`; `None` for
            those of the profile, or no heads beside those of full layers.
        metrics: Report compactions to the front end, for `/metrics`. Only for servers of vllm-l2kv: vLLM's `LLM` would
            not know what to do with it.
        prompt_interval: Rows beyond its budget that a request may hold before the end of its prompt.
        answer_interval: The same from the end of the prompt on.
        profile: File that `vllm-l2kv profile` wrote for this model; other models are refused. What is not given here
            comes from it: full layers or heads, `default_keep_ratio` and `scorer`. If full layers and ratio are given,
            it serves the scorer `learned` alone.
        memory: Share of the whole cache, what stays full included, that the profile is set for, in (0, 1]; `None` for
            0.5.
        classes: What of the profile stays full: whole `layers`, the default, or single KV `heads`.
        evaluation_scorers: Scorers without kernels on GPUs that requests may name too: `lagkv`, `l2_pagerank`, and
            `MODULE:CLASS` for a subclass of `vllm_l2kv.scorers.Scorer` that Python can import.
        additional_config: Other entries for vLLM's option of this name.
        defaults: What applies to a request that does not give a field: `default_keep_ratio`, and the other attributes
            of `CompressionParams`. What is `None` counts as not given.

    Returns:
        `scheduler_cls`, `worker_cls` and `additional_config`, and on a CPU `block_size`: vLLM's default of 128
        tokens there would make the blocks of full layers, and so the steps of prefix-cache hits, needlessly long.

    Raises:
        ValueError: A value out of bounds, a profile that cannot be read, or a scorer that cannot be imported.
        TypeError: Another argument.
    """
    # vLLM finds the device when it is imported, so wait until that is needed.
    from vllm_l2kv.plugin import device_engine_args
    from vllm_l2kv.scorers import class_of

    given = _fields("engine_args", defaults, {field.argument: field for field in FIELDS_WITH_DEFAULTS})
    params = {field.attribute: value for field, value in given.items() if value is not None}
    layers = None if full_layers is None else tuple(full_layers)
    heads = None if full_heads is None else heads_by_layer(full_heads)
    setting = setting_of(profile, memory, layers, "keep_ratio" in params, heads, classes)
    if setting is not None:
        layers, heads = setting.full_layers, setting.full_heads
        params = {"keep_ratio": setting.keep_ratio, "scorer": setting.scorer} | params
    settings = Settings(
        full_layers=Settings.full_layers if layers is None else layers,
        full_heads=heads or {},
        defaults=CompressionParams(**params),
        metrics=metrics,
        prompt_interval=prompt_interval,
        answer_interval=answer_interval,
        profile=None if profile is None else str(Path(profile).resolve()),
        evaluation_scorers=tuple(evaluation_scorers),
    )
    for scorer in settings.evaluation_scorers:
        class_of(scorer)  # an engine would say so after its start
    return {
        **device_engine_args(),
        "additional_config": {**(additional_config or {}), CONFIG_KEY: settings.as_config()},
    }


def _fields(function: str, given: Mapping[str, Any], known: Mapping[str, Field]) -> dict[Field, Any]:
    """Fields by the names of a function's arguments.

    Raises:
        TypeError: As Python's, for an argument that is not known.
    """
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; it takes {', '.join(known)}.")
    return {known[name]: value for name, value in given.items()}
