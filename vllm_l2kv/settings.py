"""Settings that the operator makes once for an engine.

vLLM's `additional_config` carries them to every process, under the key `l2kv`. Standard library only.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from vllm_l2kv.field_kinds import Count, ParamError
from vllm_l2kv.params import (
    EVALUATION_SCORERS,
    FIELDS_WITH_DEFAULTS,
    OFFERED_SCORERS,
    PROFILE_SCORERS,
    UNSERVED_SCORER,
    Asked,
    CompressionParams,
)
from vllm_l2kv.policy import Intervals

FullHeads = Mapping[int, tuple[int, ...]]
"""Layer index to indices of KV heads, both as numbered in the model."""
CONFIG_KEY = "l2kv"
DEFAULT_MEMORY = 0.5
"""Share of the whole cache for which a profile chooses its settings by default."""
LAYERS, HEADS = CLASSES = ("layers", "heads")
"""What stays full by a profile: whole layers or single KV heads."""


@dataclass(frozen=True)
class Settings:
    """Settings of one engine.

    Attributes:
        full_layers: Indices of layers that never compact; the paper's skipped layers are 0 and 1.
        full_heads: KV heads that never compact, by layer index. Heads are numbered as in the model, over all
            tensor-parallel ranks. A layer whose heads are all named is a full layer.
        defaults: Params of a request that gives no field.
        metrics: Whether the engine reports statistics to its front end, which must then be that of vllm-l2kv.
        prompt_interval: Rows beyond its budget that a request may hold before the end of its prompt, at least 1.
        answer_interval: Rows beyond its budget that a request may hold from the end of its prompt on, at least 1.
        profile: Path of the model's profile; `None` without one.
        evaluation_scorers: Scorers without kernels that requests may also name: some of
            `params.EVALUATION_SCORERS`, and `MODULE:CLASS` for a user's scorers.

    Raises:
        ValueError: An index of a layer or a head is not an integer >= 0, an interval is out of bounds, or the default
            scorer is not allowed by these settings.
    """

    full_layers: tuple[int, ...] = (0, 1)
    full_heads: FullHeads = field(default_factory=dict, hash=False)
    defaults: CompressionParams = field(default_factory=CompressionParams)
    metrics: bool = False
    prompt_interval: int = Intervals().prompt
    answer_interval: int = Intervals().answer
    profile: str | None = None
    evaluation_scorers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        layers = tuple(self.full_layers)
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ValueError(f"full_layers must hold layer indices >= 0, got {layer!r}.")
        if not isinstance(self.metrics, bool):
            raise ValueError(f"metrics must be true or false, got {self.metrics!r}.")
        object.__setattr__(self, "evaluation_scorers", _unserved(self.evaluation_scorers))
        if self.profile is not None and not (isinstance(self.profile, str) and self.profile):
            raise ValueError(f"profile must be the path of a file, got {self.profile!r}.")
        for name in ("prompt_interval", "answer_interval"):
            Count(1).check(name, getattr(self, name))
        object.__setattr__(self, "full_layers", tuple(sorted(set(layers))))
        object.__setattr__(self, "full_heads", heads_by_layer(self.full_heads))
        self._check_scorer(self.defaults.scorer)

    @property
    def intervals(self) -> Intervals:
        """Both intervals."""
        return Intervals(self.prompt_interval, self.answer_interval)

    @property
    def scorers(self) -> tuple[str, ...]:
        """The scorers that requests may name as `kv_scorer`."""
        barred = () if self.profile else PROFILE_SCORERS
        return (*(name for name in OFFERED_SCORERS if name not in barred), *self.evaluation_scorers)

    def read(self, values: Mapping[str, Any] | None) -> Asked:
        """Reads the fields of a request as `CompressionParams.read` does, and checks that this engine has its scorer.

        Raises:
            ParamError: A value is out of bounds, a name that starts with `kv_` is unknown, or these settings do not
                allow the scorer.
        """
        asked = self.defaults.read(values)
        self._check_scorer(asked.params.scorer)
        return asked

    def as_config(self) -> dict[str, Any]:
        """JSON-serializable values for `additional_config["l2kv"]`: attributes, and the defaults by field name."""
        config = {name: getattr(self, name) for name in _own_keys()}
        config |= {field.name: getattr(self.defaults, field.attribute) for field in FIELDS_WITH_DEFAULTS}
        config["full_heads"] = {str(layer): list(heads) for layer, heads in self.full_heads.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}

    @classmethod
    def from_config(cls, additional_config: Any) -> "Settings":
        """Reads `additional_config`; keys that are not given keep their defaults.

        Raises:
            ValueError: A key below `l2kv` is unknown, or its value is out of bounds.
        """
        section = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        section = dict(section or {})
        known = [*_own_keys(), *(field.name for field in FIELDS_WITH_DEFAULTS)]
        for key in section:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise ValueError(f"Unknown key {key!r} in additional_config[{CONFIG_KEY!r}]; did you mean {nearest!r}?")
        own = {name: section.pop(name) for name in _own_keys() if name in section}
        return cls(**own, defaults=CompressionParams().override(section))

    def _check_scorer(self, scorer: str) -> None:
        if scorer in self.scorers:
            return
        if scorer in PROFILE_SCORERS:
            raise ParamError(
                "kv_scorer",
                f"kv_scorer {scorer!r} needs the weights of a profile, and this engine was started without one; choose "
                "another scorer, or start the engine with --kv-profile FILE (`vllm-l2kv profile MODEL -o FILE` writes "
                "one).",
            )
        raise ParamError(
            "kv_scorer",
            f"kv_scorer {scorer!r} is slow and would delay other requests, so only `vllm-l2kv eval` and offline "
            f"engine_args(evaluation_scorers=[{scorer!r}]) take it; choose one of {', '.join(self.scorers)}.",
        )


def _unserved(named: Any) -> tuple[str, ...]:
    """Checks `Settings.evaluation_scorers` and removes duplicates.

    Raises:
        ValueError: It is not a list, or a name in it is not allowed.
    """
    if not isinstance(named, list | tuple):
        raise ValueError(f"evaluation_scorers must be a list of names, got {named!r}.")
    for name in named:
        if not isinstance(name, str) or not UNSERVED_SCORER.fullmatch(name):
            known = ", ".join(EVALUATION_SCORERS)
            raise ValueError(f"evaluation_scorers must hold {known} or MODULE:CLASS, got {name!r}.")
    return tuple(dict.fromkeys(named))


def heads_by_layer(named: Any) -> FullHeads:
    """Checks and sorts `Settings.full_heads`.

    Args:
        named: Layer indices to lists of KV heads; layer indices may be strings, as in JSON.

    Returns:
        The same, without layers whose list is empty.

    Raises:
        ValueError: An index is not an integer >= 0, or a value has another type.
    """
    if not isinstance(named, Mapping):
        raise ValueError(f"full_heads must map layer indices to lists of KV heads, got {named!r}.")
    found: dict[int, tuple[int, ...]] = {}
    for layer, heads in named.items():
        if not str(layer).isdecimal():
            raise ValueError(f"full_heads must name layers by indices >= 0, got {layer!r}.")
        if not isinstance(heads, Sequence) or isinstance(heads, str):
            raise ValueError(f"full_heads must give layer {layer} a list of KV heads, got {heads!r}.")
        for head in heads:
            if isinstance(head, bool) or not isinstance(head, int) or head < 0:
                raise ValueError(f"full_heads must give layer {layer} KV heads >= 0, got {head!r}.")
        if heads:
            found[int(layer)] = tuple(sorted(set(heads)))
    return dict(sorted(found.items()))


def _own_keys() -> list[str]:
    """Keys that are not request fields: the attributes of `Settings` except `defaults`."""
    return [attribute.name for attribute in fields(Settings) if attribute.name != "defaults"]
