"""The settings that docs/quality.md compares: methods, memories, lengths and numbers of prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from vllm_l2kv.cli_types import heads_in_words
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.profile import Profile, ratio_for
from vllm_l2kv.settings import HEADS, LAYERS, FullHeads
from vllm_l2kv.tools.evaluation.variants import BASELINE

MEMORIES = (0.75, 0.5, 0.35, 0.25, 0.15)
"""Shares of the whole cache, that is of all layers without a sliding window, with full layers."""
EQUAL, PROFILE, PROFILE_HEADS = "equal counts", "profile", "profile, full heads"


class Method(NamedTuple):
    """How a method chooses rows.

    Attributes:
        source: Where full layers and heads come from: `EQUAL`, `PROFILE` or `PROFILE_HEADS`.
        scorer: Scorer of the other layers and heads.
        granularity: Their granularity.
    """

    source: str
    scorer: str
    granularity: str = CompressionParams.granularity


METHODS = {
    "equal-l2": Method(EQUAL, "l2"),
    "equal-keydiff_value": Method(EQUAL, "keydiff_value"),
    "equal-keydiff_value-neighbors": Method(EQUAL, "keydiff_value", "neighbors"),
    "profile-l2": Method(PROFILE, "l2"),
    "profile-l2-neighbors": Method(PROFILE, "l2", "neighbors"),
    "profile-keydiff_value": Method(PROFILE, "keydiff_value"),
    "profile-keydiff_value-neighbors": Method(PROFILE, "keydiff_value", "neighbors"),
    "profile-learned": Method(PROFILE, "learned"),
    "profile-learned-neighbors": Method(PROFILE, "learned", "neighbors"),
    "profile-random": Method(PROFILE, "random"),
    "heads-l2": Method(PROFILE_HEADS, "l2"),
    "heads-l2-neighbors": Method(PROFILE_HEADS, "l2", "neighbors"),
    "heads-learned": Method(PROFILE_HEADS, "learned"),
    "heads-learned-neighbors": Method(PROFILE_HEADS, "learned", "neighbors"),
}
"""`profile-random` is the control."""
EQUAL_LAYERS = (0, 1)
"""Full layers of the methods without a profile, the default of an engine."""
NO_HEADS: FullHeads = {}
WHOLE = "whole cache"
RETRIEVAL = ("needle", "passkey", "ruler")
MAIN_LENGTH = 2048
LENGTHS = (MAIN_LENGTH, 1024, 4096, 8192)
"""Tokens of prompts and answers together, the most important one first."""
COPY_LENGTH = 450
"""Tokens of lists and their copies; small models fail at longer lists."""
SEED = 19
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
OPTIONS: dict[str, dict[str, Any]] = {
    "needle": {"text": "state_of_the_union", "depths": DEPTHS},
    "passkey": {"depths": DEPTHS},
    "ruler": {
        "text": "state_of_the_union",
        # The subtasks that both models can do; in the others they find hardly anything even with the whole cache.
        "subtasks": [
            "niah_single_1",
            "niah_single_2",
            "niah_single_3",
            "niah_multikey_1",
            "niah_multivalue",
            "niah_multiquery",
        ],
    },
    "chat": {"text": "moby_dick"},
    "perplexity": {"text": "moby_dick", "continued": 128},
    "copy": {},
}
NUM_SAMPLES = {
    "needle": (8, 3),
    "passkey": (4, 2),
    "ruler": (8, 2),
    "chat": (10, 4),
    "perplexity": (20, 8),
    "copy": (12, 0),
}
"""For each depth or subtask, at the main length and at others: 40 needles, 20 pass keys, 48 prompts of RULER, 40
questions of 10 conversations, 20 texts, 12 lists; 15, 10, 12, 16 and 8 elsewhere."""


Full = tuple[tuple[int, ...], str]
"""Full layers, and full heads as on a command line."""


@dataclass(frozen=True)
class Setting:
    """One method at one memory.

    Attributes:
        method: One of `METHODS`, or `WHOLE`.
        memory: One of `MEMORIES`; 1 for `WHOLE`.
        full_layers: Layers that never compact.
        keep_ratio: Ratio of the other layers and heads.
        scorer: Scorer of the other layers and heads.
        full_heads: KV heads that never compact, as on a command line.
        granularity: Granularity of the other layers and heads.
    """

    method: str
    memory: float
    full_layers: tuple[int, ...]
    keep_ratio: float
    scorer: str
    full_heads: str = ""
    granularity: str = CompressionParams.granularity

    @property
    def full(self) -> Full:
        """Full layers and heads; an engine is started for each set of them."""
        return tuple(self.full_layers), self.full_heads

    @property
    def params(self) -> CompressionParams:
        """Parameters of requests; protection is the engine's default."""
        if self.method == WHOLE:
            return BASELINE
        return CompressionParams(self.keep_ratio, scorer=self.scorer, granularity=self.granularity)

    def as_row(self) -> dict[str, Any]:
        """Returns the setting for a file of rows."""
        return asdict(self)


def settings(profile: Profile, methods: Iterable[str], memories: Sequence[float]) -> list[Setting]:
    """Returns the whole cache, then every method at every memory.

    What stays full is the best for the method's scorer, and for the recommended one if that is `random`. Methods with
    full heads are left out if the profile has none, as for a model with one KV head in each layer.
    """
    compressible = profile.shape.compressible
    equal_layers = tuple(layer for layer in EQUAL_LAYERS if layer in compressible)
    found = [Setting(WHOLE, 1.0, equal_layers, 1.0, CompressionParams.scorer)]
    has_heads = any(target.full_heads for target in profile.memory)
    for method in methods:
        source, scorer, granularity = METHODS[method]
        if source == PROFILE_HEADS and not has_heads:
            continue
        for memory in memories:
            if source == EQUAL:
                full_layers, full_heads = equal_layers, NO_HEADS
                ratio = ratio_for(memory, len(compressible), len(equal_layers))
            else:
                classes = HEADS if source == PROFILE_HEADS else LAYERS
                full_layers, ratio, _, full_heads, _ = profile.setting(memory, classes=classes, scorer=scorer)
            words = heads_in_words(full_heads)
            found.append(Setting(method, memory, tuple(full_layers), ratio, scorer, words, granularity))
    return found
