"""Per-request KV-cache compression for stock vLLM by the L2 norm of keys.

Importing this package imports neither vLLM nor torch and patches nothing. vLLM finds it through the values that
`engine_args` returns and the entry points in `pyproject.toml`.
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
except PackageNotFoundError:  # the sources are on the path, but not installed
    __version__ = "0+unknown"
__all__ = ["CompressionParams", "ParamError", "__version__", "compression", "engine_args"]


def compression(keep_ratio: float | None = None, **others: FieldValue | None) -> dict[str, FieldValue]:
    """Fields of one offline request: `SamplingParams(extra_args=compression(keep_ratio=0.5, max_tokens=4096))`.

    Args:
        keep_ratio: Share of the prompt's tokens kept in compressed layers, in (0, 1].
        others: The other attributes of `CompressionParams`, where their meanings, types and bounds are documented.

    Returns:
        The given fields by their names in a request. Arguments that are `None` are left out, so that the engine's
        defaults apply.

    Raises:
        ParamError: A value is out of bounds (a `ValueError`).
        TypeError: An argument is unknown.
    """
    given = _fields("compression", {"keep_ratio": keep_ratio, **others}, {field.attribute: field for field in FIELDS})
    fields = {field.name: value for field, value in given.items() if value is not None}
    # Only the engine knows whether a budget covers the protected tokens, since its defaults may protect none.
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
    tensor_parallel_size: int | None = None,
    evaluation_scorers: Sequence[str] = Settings.evaluation_scorers,
    additional_config: dict[str, Any] | None = None,
    **defaults: FieldValue | None,
) -> dict[str, Any]:
    """Arguments that make vLLM compress: `LLM(model, **engine_args(full_layers=(0, 1), default_keep_ratio=0.5))`.

    Args:
        full_layers: Indices of layers that never compact; `None` for those of the profile, or 0 and 1 without one.
        full_heads: KV heads that never compact, by layer index, such as `{7: [0, 2], 12: [1]}`; `None` for those of
            the profile, or for none without one.
        metrics: Report compactions to the front end, for `/metrics`. Only for servers of vllm-l2kv: vLLM's `LLM`
            cannot read these statistics.
        prompt_interval: Rows beyond its budget that a request may hold before the end of its prompt.
        answer_interval: Rows beyond its budget that a request may hold from the end of its prompt on.
        profile: File that `vllm-l2kv profile` wrote for this model; other models are refused. It sets full layers or
            heads, `default_keep_ratio`, and `scorer` with its `granularity`, unless they are given here. For a `scorer`
            that is given it sets what was best with that one. If full layers and the ratio are given, it only provides
            the weights of the scorer `learned`.
        memory: Share of the whole cache, in (0, 1], full layers and heads included, for which the profile chooses its
            settings; `None` for 0.5.
        classes: What stays full by the profile: whole `layers` or single KV `heads`; `None` for those that the profile
            judged better, see `Profile.default_classes`.
        tensor_parallel_size: vLLM's argument, passed on; `None` for vLLM's default, 1. The default of `classes` depends
            on it.
        evaluation_scorers: Scorers without GPU kernels that requests may also name: `lagkv`, `l2_pagerank`, and
            `MODULE:CLASS` for an importable subclass of `vllm_l2kv.scorers.Scorer`.
        additional_config: Other entries for vLLM's option of this name.
        defaults: Values for requests that leave a field out: `default_keep_ratio`, and the other attributes of
            `CompressionParams`. `None` counts as not given.

    Returns:
        `scheduler_cls`, `worker_cls` and `additional_config`, `tensor_parallel_size` if it is given, and on a CPU
        `block_size`. vLLM's default there, 128 tokens, would make the blocks of full layers needlessly long, and
        prefix-cache hits end at whole blocks.

    Raises:
        ValueError: A value is out of bounds, the profile cannot be read, or a scorer cannot be imported.
        TypeError: An argument is unknown.
    """
    # Importing vLLM selects the device, so it is imported only when needed.
    from vllm_l2kv.plugin import device_engine_args
    from vllm_l2kv.scorers import class_of

    given = _fields("engine_args", defaults, {field.argument: field for field in FIELDS_WITH_DEFAULTS})
    params = {field.attribute: value for field, value in given.items() if value is not None}
    layers = None if full_layers is None else tuple(full_layers)
    heads = None if full_heads is None else heads_by_layer(full_heads)
    ranks = {} if tensor_parallel_size is None else {"tensor_parallel_size": tensor_parallel_size}
    asked = layers, "keep_ratio" in params, heads, classes, tensor_parallel_size or 1, params.get("scorer")
    setting = setting_of(profile, memory, *asked)
    if setting is not None:
        layers, heads = setting.full_layers, setting.full_heads
        params = {"keep_ratio": setting.keep_ratio, **setting.ranking(params.get("scorer"))} | params
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
        class_of(scorer)  # fail here, not after the engine has started
    return {
        **device_engine_args(),
        **ranks,
        "additional_config": {**(additional_config or {}), CONFIG_KEY: settings.as_config()},
    }


def _fields(function: str, given: Mapping[str, Any], known: Mapping[str, Field]) -> dict[Field, Any]:
    """Maps request fields to the values given for them by argument name.

    Raises:
        TypeError: An argument is unknown.
    """
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; it takes {', '.join(known)}.")
    return {known[name]: value for name, value in given.items()}
