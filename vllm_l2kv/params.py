"""What a request may ask of its KV cache, checked.

Knows nothing of HTTP, vLLM or tensors: plain values in, one frozen dataclass out. Every entrance (HTTP body,
`vllm_xargs`, offline `SamplingParams.extra_args`, server defaults) comes through here, so a value is good everywhere
or nowhere.
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
"""vLLM's own request fields and `extra_args` keys that happen to start with our prefix."""
NEAR_SPELLING = 0.8
"""Similarity, by `difflib`, from which a name in another spelling counts as a misspelt field."""
CONTROLS = ("random", "l2_high", "first_last")
"""Scorers to compare the others with: chance, the opposite of `l2`, StreamingLLM."""
OFFERED_SCORERS = ("l2", "l1", "linf", "keydiff", "keydiff_value", "value_key_ratio", "learned", *CONTROLS)
"""Scorers that every server takes, those with weights if it has a profile."""
EVALUATION_SCORERS = ("lagkv", "l2_pagerank")
"""Scorers without a kernel on GPUs, which only `vllm-l2kv eval` takes: slow, and a request would hold up all others."""
SCORERS = (*OFFERED_SCORERS, *EVALUATION_SCORERS)
"""Values of `kv_scorer`: the modules of `vllm_l2kv.scorers`."""
OWN_SCORER = re.compile(r"(?:[A-Za-z_]\w{0,63}\.){0,8}[A-Za-z_]\w{0,63}:[A-Za-z_]\w{0,63}", re.ASCII)
"""`MODULE:CLASS`, a scorer of a user's own. No request makes an engine import one: it has those of its settings."""
UNSERVED_SCORER = re.compile(rf"{'|'.join(EVALUATION_SCORERS)}|{OWN_SCORER.pattern}", re.ASCII)
"""Scorers without a kernel, for comparisons alone."""
ONE_COMPACTION_SCORERS = ("lagkv", "random")
"""Scorers that read a row's place in the prompt, which rows no longer show once some were evicted."""
PROFILE_SCORERS = ("learned",)
"""Scorers whose weights are in a profile."""
GRANULARITIES = ("token", "block")
"""Values of `kv_granularity`, see `vllm_l2kv.token_groups`."""
TOKENS_PER_BLOCK = 16
"""Tokens in a group of granularity `block`: the page of PagedEviction, arXiv 2509.04377."""


def _field(default: FieldValue | None, kind: Kind, description: str, option: str = "", kw_only: bool = False) -> Any:
    """Declares a request field, with all that the API, the command line and the docs derive from it.

    Args:
        default: Its value in an engine whose operator sets no other; `None` if it then has no effect.
        kind: The kind of its values.
        description: One sentence for API docs and help texts.
        option: The server's option for the default of requests that do not give the field; empty if it has none.
        kw_only: Whether the constructor takes it by name only.
    """
    return dataclasses.field(
        default=default, kw_only=kw_only, metadata={"kind": kind, "description": description, "option": option}
    )


@dataclass(frozen=True)
class CompressionParams:
    """How much of a request stays in the KV cache of compressed layers.

    The defaults here are those of every entrance: an engine, a server, `eval` and `plan` read them from this class.
    docs/choosing.md says why they were chosen. The rule of the paper protects nothing, see configs/paper.yaml.

    Attributes:
        keep_ratio: Share of the prompt's tokens kept, in (0, 1].
        max_tokens: The budget: rows that each head holds at most between compactions; `None` for no bound.
        protect_first: Tokens at the start that every compaction keeps.
        protect_last: Tokens at the end, of the prompt and later of the answer, that every compaction keeps.
        scorer: How the others are ranked, one of `SCORERS` or `MODULE:CLASS`.
        granularity: What is kept or evicted as one, one of `GRANULARITIES`.
        prefix_tokens: Tokens at the start of the prompt that are a document, compressed by itself; `None` for none.

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
        "Rows that each head of a compressed layer holds at most between compactions, in the prompt and the answer.",
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
        f"What is kept or evicted as one: a token of a head, or {TOKENS_PER_BLOCK} consecutive tokens of all heads of "
        "a layer.",
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
                f"kv_scorer {self.scorer!r} is defined for one compaction only, and kv_max_tokens compacts again and "
                f"again; choose one of {', '.join(known)}, or leave kv_max_tokens out.",
            )
        if self.granularity != "token":
            raise ParamError(
                "kv_granularity",
                f"kv_granularity {self.granularity!r} is defined for one compaction only, and kv_max_tokens compacts "
                "again and again; set kv_granularity to 'token', or leave kv_max_tokens out.",
            )

    @property
    def compresses(self) -> bool:
        """Whether anything may be evicted."""
        return self.keep_ratio < 1 or self.max_tokens is not None

    def override(self, values: Mapping[str, Any]) -> "CompressionParams":
        """These params, with the `kv_` fields of a request in place of their own values.

        Args:
            values: Field names to values; `None` means not given, names without the `kv_` prefix are ignored.

        Raises:
            ParamError: A bad value, or an unknown name that starts with `kv_`.
        """
        check_names(values)
        if values.get(PREFIX_MESSAGES.name) is not None:
            raise ParamError(
                PREFIX_MESSAGES.name,
                f"{PREFIX_MESSAGES.name} counts the messages of a chat, which only a server of vllm-l2kv sees; give "
                f"{PREFIX_TOKENS.name} instead.",
            )
        given = {f.attribute: values[f.name] for f in FIELDS if values.get(f.name) is not None}
        return replace(self, **given) if given else self

    def read(self, values: Mapping[str, Any] | None) -> "Asked":
        """What a request asks of an engine whose defaults these are.

        Args:
            values: Field names to values, as for `override`; `None` for a request without any.

        Raises:
            ParamError: A bad value, or an unknown name that starts with `kv_`.
        """
        values = values or {}
        params = self.override(values)
        return Asked(params, by_client=any(values.get(name) is not None for name in FIELD_NAMES))

    def as_fields(self) -> dict[str, FieldValue | None]:
        """The params by the names of their request fields."""
        return {field.name: getattr(self, field.attribute) for field in FIELDS}


@dataclass(frozen=True)
class Field:
    """A request field, as `CompressionParams` declares it.

    Attributes:
        name: Name in a request.
        attribute: Its attribute of `CompressionParams`; empty for one that the server turns into another field.
        default: Its value in an engine whose operator sets no other; `None` if it then has no effect.
        kind: The kind of its values.
        description: One sentence for API docs and help texts.
        option: The server's option for its default; empty if only requests give it.
        chats_only: Whether it works at endpoints of chats only.
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
        """Its bounds, in words."""
        return self.kind.bounds(self.name)

    @property
    def argument(self) -> str:
        """The argument of `engine_args` for its default; empty if only requests give it."""
        return self.option.removeprefix("--kv-").replace("-", "_")


FIELDS = tuple(
    Field(
        name=PREFIX + field.name, attribute=field.name, default=getattr(CompressionParams, field.name), **field.metadata
    )
    for field in dataclasses.fields(CompressionParams)
)
"""What `CompressionParams` holds."""
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
"""What a request may give."""
FIELD_NAMES = tuple(field.name for field in REQUEST_FIELDS)
FIELDS_WITH_DEFAULTS = tuple(field for field in FIELDS if field.option)
"""Those for which the operator of a server sets a default."""


@dataclass(frozen=True)
class Asked:
    """What one request asks of the KV cache, from `CompressionParams.read`.

    Attributes:
        params: What applies to it: its own fields over the engine's defaults.
        by_client: Whether it gave any field, even `kv_keep_ratio=1`.
    """

    params: CompressionParams
    by_client: bool

    @property
    def reports(self) -> bool:
        """Whether its numbers are reported: it gave a field, or the defaults compress it."""
        return self.by_client or self.params.compresses


def check_session(asked: Asked) -> None:
    """Refuses compression of streaming input: a prompt in chunks, each answered before the next one is computed.

    Where a client gives no field and the operator's defaults compress, its prompt is kept whole instead.

    Args:
        asked: What a chunk of the prompt asks.

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
    """Refuses names that are meant for a field but are not the name of one.

    Args:
        names: Names that a client wrote; vLLM's own pass, and so do those that resemble no field.

    Raises:
        ParamError: For the first such name; the message holds the right one.
    """
    for name in names:
        if isinstance(name, str) and (meant := meant_field(name)) is not None:
            raise ParamError(name, f"Unknown field {name!r}; did you mean {meant!r}?")


def meant_field(name: str) -> str | None:
    """The field that a wrong name is meant for: `kv_keep_ratio` for `kv-keep-ratio`, `KVKeepRatio` and `kv_keep_rate`.

    A name with the prefix `kv_` must be a field or one of vLLM's. One that only begins with "kv" in another spelling
    may belong to another component, so it must be close to a field.

    Args:
        name: A name that a client wrote.

    Returns:
        The nearest field, or `None` if the name is a field, is vLLM's, or means something else.
    """
    if name in FIELD_NAMES or name in VLLM_NAMES or not (letters := _letters(name)).startswith("kv"):
        return None
    by_letters = {_letters(field): field for field in FIELD_NAMES}
    cutoff = 0.0 if name.startswith(PREFIX) else NEAR_SPELLING
    nearest = difflib.get_close_matches(letters, by_letters, n=1, cutoff=cutoff)
    return by_letters[nearest[0]] if nearest else None


def _letters(name: str) -> str:
    """What is left of a name when case, hyphens, underscores and spaces do not count."""
    return re.sub(r"[\W_]+", "", name).lower()
