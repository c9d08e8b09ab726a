"""What the operator sets once for an engine.

Travels to every process inside vLLM's own `additional_config`, under the key `l2kv`. Standard library only.
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
"""Layers to some of their KV heads, by their numbers in the model."""
CONFIG_KEY = "l2kv"
DEFAULT_MEMORY = 0.5
"""Share of the whole cache that a profile is set for unless another one is asked."""
LAYERS, HEADS = CLASSES = ("layers", "heads")
"""What of a profile stays full: whole layers, or single KV heads."""


@dataclass(frozen=True)
class Settings:
    """Settings of one engine.

    Attributes:
        full_layers: Indices of layers that never compact; the paper's skipped layers are 0 and 1.
        full_heads: Layers to those of their KV heads that never compact. Heads have their numbers in the model, over
            all tensor-parallel ranks. A layer whose heads are all named is a full layer.
        defaults: Params of a request that gives no field.
        metrics: Whether the engine reports statistics to its front end, which must then be that of vllm-l2kv.
        prompt_interval: Rows beyond its budget that a request may hold before the end of its prompt, at least 1.
        answer_interval: The same from the end of the prompt on.
        profile: Path of the model's profile; `None` without one.
        evaluation_scorers: Scorers without kernels that requests may name beside the others: some of
            `params.EVALUATION_SCORERS`, and `MODULE:CLASS` for those of a user's own.

    Raises:
        ValueError: An index of a layer or a head that is not a non-negative integer, an interval out of bounds, or a
            default scorer that these settings do not allow.
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
        """The two intervals."""
        return Intervals(self.prompt_interval, self.answer_interval)

    @property
    def scorers(self) -> tuple[str, ...]:
        """What requests may name as `kv_scorer`."""
        barred = () if self.profile else PROFILE_SCORERS
        return (*(name for name in OFFERED_SCORERS if name not in barred), *self.evaluation_scorers)

    def read(self, values: Mapping[str, Any] | None) -> Asked:
        """What a request asks of this engine: `CompressionParams.read`, and a scorer that the engine has.

        Raises:
            ParamError: A bad value, an unknown name that starts with `kv_`, or a scorer that these settings do not
                allow.
        """
        asked = self.defaults.read(values)
        self._check_scorer(asked.params.scorer)
        return asked

    def as_config(self) -> dict[str, Any]:
        """A JSON-able form for `additional_config["l2kv"]`: attributes, and the defaults by their fields' names."""
        config = {name: getattr(self, name) for name in _own_keys()}
        config |= {field.name: getattr(self.defaults, field.attribute) for field in FIELDS_WITH_DEFAULTS}
        config["full_heads"] = {str(layer): list(heads) for layer, heads in self.full_heads.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}

    @classmethod
    def from_config(cls, additional_config: Any) -> "Settings":
        """Reads `additional_config`; what is not given keeps its default.

        Raises:
            ValueError: An unknown key or a bad value below `l2kv`.
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
                "another scorer, or start it with --kv-profile FILE (`vllm-l2kv profile MODEL -o FILE` writes one).",
            )
        raise ParamError(
            "kv_scorer",
            f"kv_scorer {scorer!r} is slow and would hold up other requests, so only `vllm-l2kv eval` takes it, "
            f"and offline engine_args(evaluation_scorers=[{scorer!r}]); choose one of {', '.join(self.scorers)}.",
        )


def _unserved(named: Any) -> tuple[str, ...]:
    """Checks `Settings.evaluation_scorers`; each counts once.

    Raises:
        ValueError: No list, or another name in it.
    """
    if not isinstance(named, list | tuple):
        raise ValueError(f"evaluation_scorers must be a list of names, got {named!r}.")
    for name in named:
        if not isinstance(name, str) or not UNSERVED_SCORER.fullmatch(name):
            known = ", ".join(EVALUATION_SCORERS)
            raise ValueError(f"evaluation_scorers must hold {known} or MODULE:CLASS of your own, got {name!r}.")
    return tuple(dict.fromkeys(named))


def heads_by_layer(named: Any) -> FullHeads:
    """Checks and sorts `Settings.full_heads`.

    Args:
        named: Layers to lists of KV heads; layers may be words, as JSON has them.

    Returns:
        Only layers of which heads are named.

    Raises:
        ValueError: Another value.
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
    """Keys that are no request field: attributes of `Settings` but `defaults`."""
    return [attribute.name for attribute in fields(Settings) if attribute.name != "defaults"]
