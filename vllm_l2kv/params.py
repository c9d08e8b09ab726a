"""The request fields of KV-cache compression, and their checks.

Knows nothing of HTTP, vLLM or tensors: plain values in, one frozen dataclass out. Every source of values (HTTP body,
`vllm_xargs`, offline `SamplingParams.extra_args`, server defaults) is checked here, by the same rules.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_l2kv.field_kinds import Choice, Count, Kind, ParamError, Ratio

PREFIX = "kv_"
FieldValue = float | int | str
VLLM_NAMES = frozenset({"kv_transfer_params", "kv_cache_report_mode"})
"""vLLM's own request fields and `extra_args` keys that also start with `kv_`."""
NEAR_SPELLING = 0.8
"""`difflib` similarity from which a name that starts with "kv" in another spelling counts as a misspelt field."""
CONTROLS = ("random", "l2_high", "first_last")
"""Scorers to compare with: random choice, the opposite of `l2`, StreamingLLM."""
OFFERED_SCORERS = ("l2", "l1", "linf", "keydiff", "keydiff_value", "value_key_ratio", "learned", *CONTROLS)
"""Scorers that every server offers; those in `PROFILE_SCORERS` need a profile."""
EVALUATION_SCORERS = ("lagkv", "l2_pagerank")
"""Scorers without GPU kernels, for `vllm-l2kv eval` only: they are slow, and would delay all other requests."""
SCORERS = (*OFFERED_SCORERS, *EVALUATION_SCORERS)
"""Values of `kv_scorer`: the modules of `vllm_l2kv.scorers`."""
OWN_SCORER = re.compile(r"(?:[A-Za-z_]\w{0,63}\.){0,8}[A-Za-z_]\w{0,63}:[A-Za-z_]\w{0,63}", re.ASCII)
"""`MODULE:CLASS`, a user's scorer. A request cannot make an engine import one: only the engine's settings can."""
UNSERVED_SCORER = re.compile(rf"{'|'.join(EVALUATION_SCORERS)}|{OWN_SCORER.pattern}", re.ASCII)
"""Scorers without GPU kernels, for comparisons only."""
ONE_COMPACTION_SCORERS = ("lagkv", "random")
"""Scorers that use a row's index as its position in the prompt, which it no longer is once rows were evicted."""
PROFILE_SCORERS = ("learned",)
"""Scorers whose weights are in a profile."""
GRANULARITIES = ("token", "neighbors", "block")
"""Values of `kv_granularity`, see `vllm_l2kv.token_groups`."""
NEIGHBORS = 1
"""Tokens on each side of a token whose scores count for it with granularity `neighbors`."""
TOKENS_PER_BLOCK = 16
"""Tokens in a group of granularity `block`: the page of PagedEviction, arXiv 2509.04377."""


def _field(default: FieldValue | None, kind: Kind, description: str, option: str = "", kw_only: bool = False) -> Any:
    """Declares a request field; the API, the command line and the docs derive from this declaration.

    Args:
        default: Value where neither request nor operator gives one; `None` if the field then has no effect.
        kind: Kind of value.
        description: One sentence for API docs and help texts.
        option: The server option that sets the operator's default; empty if there is none.
        kw_only: Whether the constructor takes the field by name only.
    """
    return dataclasses.field(
        default=default, kw_only=kw_only, metadata={"kind": kind, "description": description, "option": option}
    )


@dataclass(frozen=True)
class CompressionParams:
    """How much of a request is kept in the KV cache of compressed layers.

    Engines, servers, `eval` and `plan` all take their defaults from this class. docs/choosing.md explains the choice.
    The paper protects no tokens, see configs/paper.yaml.

    Attributes:
        keep_ratio: Share of the prompt's tokens kept, in (0, 1].
        max_tokens: The budget: most rows that each head keeps at a compaction; `None` for no bound.
        protect_first: Number of first tokens that every compaction keeps.
        protect_last: Number of last tokens, of the prompt and later of the answer, that every compaction keeps.
        scorer: How the other tokens are ranked: one of `SCORERS`, or `MODULE:CLASS`.
        granularity: The unit that is kept or evicted: one of `GRANULARITIES`.
        prefix_tokens: Number of first tokens of the prompt that are a document, compressed by itself; `None` for none.

    Raises:
        ParamError: A value is of the wrong type or out of bounds, or two values exclude each other.
    """

    keep_ratio: float = _field(
        1.0,
        Ratio(),
        "Share of the prompt's tokens whose KV is kept in compressed layers; 1 keeps everything.",
        "--kv-default-keep-ratio",
    )
    max_tokens: int | None = _field(
        None,
        Count(1),
        "Most rows that each head of a compressed layer keeps at a compaction, in the prompt and in the answer.",
        "--kv-default-max-tokens",
        kw_only=True,
    )
    protect_first: int = _field(4, Count(), "Tokens at the start that every compaction keeps.", "--kv-protect-first")
    protect_last: int = _field(
        64,
        Count(),
        "Tokens at the end, of the prompt and later of the answer, that every compaction keeps.",
        "--kv-protect-last",
    )
    scorer: str = _field(
        "l2",
        Choice(OFFERED_SCORERS, unlisted=UNSERVED_SCORER),
        "How the other tokens are ranked; l2 keeps the keys of lowest norm.",
        "--kv-scorer",
    )
    granularity: str = _field(
        "token",
        Choice(GRANULARITIES),
        "What is kept or evicted as one: a token of a head, by its own score or by the mean over it and its neighbors, "
        f"or {TOKENS_PER_BLOCK} consecutive tokens of all heads of a layer.",
        "--kv-granularity",
    )
    prefix_tokens: int | None = _field(
        None,
        Count(1),
        "Tokens at the start of the prompt that are a document: compressed by itself, and reused by later requests.",
        kw_only=True,
    )

    def __post_init__(self) -> None:
        for field in FIELDS:
            value = getattr(self, field.attribute)
            if value is not None or field.default is not None:
                object.__setattr__(self, field.attribute, field.kind.check(field.name, value))
        if self.max_tokens is not None:
            self._check_budget(self.max_tokens)

    def _check_budget(self, budget: int) -> None:
        protected = self.protect_first + self.protect_last
        if budget < protected:
            raise ParamError(
                "kv_max_tokens",
                f"kv_max_tokens must be at least kv_protect_first + kv_protect_last = {protected}, got {budget}; "
                "raise it or protect fewer tokens.",
            )
        if self.scorer in ONE_COMPACTION_SCORERS:
            known = [scorer for scorer in OFFERED_SCORERS if scorer not in ONE_COMPACTION_SCORERS]
            raise ParamError(
                "kv_scorer",
                f"kv_scorer {self.scorer!r} is defined for a single compaction, and kv_max_tokens compacts repeatedly; "
                f"choose one of {', '.join(known)}, or leave kv_max_tokens out.",
            )
        if self.granularity == "block":
            raise ParamError(
                "kv_granularity",
                f"kv_granularity {self.granularity!r} is defined for a single compaction, and kv_max_tokens compacts "
                "repeatedly; set kv_granularity to 'token' or 'neighbors', or leave kv_max_tokens out.",
            )

    @property
    def compresses(self) -> bool:
        """Whether tokens may be evicted."""
        return self.keep_ratio < 1 or self.max_tokens is not None

    def override(self, values: Mapping[str, Any]) -> "CompressionParams":
        """A copy of these params in which the `kv_` fields of a request replace the values.

        Args:
            values: Field names to values; `None` means not given, names without the `kv_` prefix are ignored.

        Raises:
            ParamError: A value is out of bounds, or a name that starts with `kv_` is unknown.
        """
        check_names(values)
        if values.get(PREFIX_MESSAGES.name) is not None:
            raise ParamError(
                PREFIX_MESSAGES.name,
                f"{PREFIX_MESSAGES.name} counts messages of a chat, and works only with a server of vllm-l2kv; set "
                f"{PREFIX_TOKENS.name} instead.",
            )
        given = {f.attribute: values[f.name] for f in FIELDS if values.get(f.name) is not None}
        return replace(self, **given) if given else self

    def read(self, values: Mapping[str, Any] | None) -> "Asked":
        """Reads the fields of a request, with these params as the engine's defaults.

        Args:
            values: Field names to values, as for `override`; `None` for a request without fields.

        Raises:
            ParamError: A value is out of bounds, or a name that starts with `kv_` is unknown.
        """
        values = values or {}
        params = self.override(values)
        return Asked(params, by_client=any(values.get(name) is not None for name in FIELD_NAMES))

    def as_fields(self) -> dict[str, FieldValue | None]:
        """Request field names to the values of these params."""
        return {field.name: getattr(self, field.attribute) for field in FIELDS}


@dataclass(frozen=True)
class Field:
    """A request field, as `CompressionParams` declares it.

    Attributes:
        name: Name in a request.
        attribute: Attribute of `CompressionParams`; empty for a field that the server converts to another field.
        default: Value where neither request nor operator gives one; `None` if the field then has no effect.
        kind: Kind of value.
        description: One sentence for API docs and help texts.
        option: The server option that sets the operator's default; empty if only requests set the field.
        chats_only: Whether only the chat endpoint takes it.
    """

    name: str
    attribute: str
    default: FieldValue | None
    kind: Kind
    description: str
    option: str
    chats_only: bool = False

    @property
    def type(self) -> str:
        """The type of its JSON value."""
        return self.kind.type

    @property
    def bounds(self) -> str:
        """The bounds of the value, as text."""
        return self.kind.bounds(self.name)

    @property
    def argument(self) -> str:
        """The argument of `engine_args` that sets the default; empty if only requests set the field."""
        return self.option.removeprefix("--kv-").replace("-", "_")


FIELDS = tuple(
    Field(
        name=PREFIX + field.name, attribute=field.name, default=getattr(CompressionParams, field.name), **field.metadata
    )
    for field in dataclasses.fields(CompressionParams)
)
"""The fields that `CompressionParams` holds."""
(PREFIX_TOKENS,) = (field for field in FIELDS if field.attribute == "prefix_tokens")
PREFIX_MESSAGES = Field(
    name="kv_prefix_messages",
    attribute="",
    default=None,
    kind=Count(1),
    description="Messages at the start of a chat that are a document; the server computes kv_prefix_tokens from them.",
    option="",
    chats_only=True,
)
REQUEST_FIELDS = (*FIELDS, PREFIX_MESSAGES)
"""All fields that a request may give."""
FIELD_NAMES = tuple(field.name for field in REQUEST_FIELDS)
FIELDS_WITH_DEFAULTS = tuple(field for field in FIELDS if field.option)
"""The fields for which an operator can set a default."""


@dataclass(frozen=True)
class Asked:
    """The compression that one request asks for, from `CompressionParams.read`.

    Attributes:
        params: The request's fields, with the engine's defaults for those that it leaves out.
        by_client: Whether the request gave any field, even `kv_keep_ratio=1`.
    """

    params: CompressionParams
    by_client: bool

    @property
    def reports(self) -> bool:
        """Whether `usage` reports the request's numbers: it gave a field, or the defaults compress it."""
        return self.by_client or self.params.compresses


def check_session(asked: Asked) -> None:
    """Refuses compression of streaming input: a prompt in chunks, each answered before the next one is computed.

    If only the operator's defaults ask for compression, nothing is raised; such a prompt is kept whole.

    Args:
        asked: The fields of one chunk of the prompt.

    Raises:
        ParamError: The client asks for compression.
    """
    params = asked.params
    if asked.by_client and params.keep_ratio < 1:
        raise ParamError(
            "kv_keep_ratio",
            f"kv_keep_ratio must be 1 for streaming input (a prompt that comes in chunks), got {params.keep_ratio:g}; "
            "set it to 1, leave all kv_ fields out, or give the whole prompt at once.",
        )
    for name, value in (("kv_max_tokens", params.max_tokens), (PREFIX_TOKENS.name, params.prefix_tokens)):
        if asked.by_client and value is not None:
            raise ParamError(
                name,
                f"{name} does not work with streaming input (a prompt that comes in chunks), got {value}; leave all "
                "kv_ fields out, or give the whole prompt at once.",
            )


def check_names(names: Iterable[Any]) -> None:
    """Refuses misspelt field names.

    Args:
        names: Names that a client wrote. Names of vLLM's fields, and names that resemble no field, are accepted.

    Raises:
        ParamError: A name is misspelt; the message suggests the right one.
    """
    for name in names:
        if isinstance(name, str) and (meant := meant_field(name)) is not None:
            raise ParamError(name, f"Unknown field {name!r}; did you mean {meant!r}?")


def meant_field(name: str) -> str | None:
    """The field that a misspelt name means: `kv_keep_ratio` for `kv-keep-ratio`, `KVKeepRatio` and `kv_keep_rate`.

    A name with the prefix `kv_` must be a field of this plugin or of vLLM. A name that starts with "kv" in another
    spelling may belong to another component, so it counts as misspelt only if it is close to a field.

    Args:
        name: A name that a client wrote.

    Returns:
        The nearest field, or `None` if the name is a field, is vLLM's, or belongs to another component.
    """
    if name in FIELD_NAMES or name in VLLM_NAMES or not (letters := _letters(name)).startswith("kv"):
        return None
    by_letters = {_letters(field): field for field in FIELD_NAMES}
    cutoff = 0.0 if name.startswith(PREFIX) else NEAR_SPELLING
    nearest = difflib.get_close_matches(letters, by_letters, n=1, cutoff=cutoff)
    return by_letters[nearest[0]] if nearest else None


def _letters(name: str) -> str:
    """The name in lower case, without hyphens, underscores and spaces."""
    return re.sub(r"[\W_]+", "", name).lower()
