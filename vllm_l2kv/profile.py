"""Profiles: which layers and heads a model needs for its answers, measured once and stored in one safetensors file.

The file's metadata has one key, `vllm_l2kv`, with JSON: the model, its fingerprint, its layers in order of importance,
and settings for several shares of memory and scorers, with whole layers full and with single KV heads full. Reading it
needs no torch. The tensors are the measurements by layer and KV head, and the weights of the scorer `learned`.
`vllm-l2kv profile` writes the file.
"""

import hashlib
import json
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from vllm_l2kv.kv_heads import are_even
from vllm_l2kv.params import PROFILE_SCORERS, CompressionParams
from vllm_l2kv.settings import CLASSES, DEFAULT_MEMORY, HEADS, LAYERS, FullHeads, heads_by_layer

if TYPE_CHECKING:
    import torch

VERSION = 2
METADATA_KEY = "vllm_l2kv"
LEARNED = "learned."
"""Prefix of the names of the learned scorer's weights."""
FULL_ATTENTION = "full_attention"
"""Type of layers that may compress, as `transformers` names it."""
SLIDING_ATTENTION = "sliding_attention"
"""Type of layers with a sliding window."""
RECURRENT = frozenset({"linear_attention", "conv"})
"""Types of layers with a state instead of keys: Mamba, gated delta nets, short convolutions."""
WITHOUT_CACHE = frozenset({"mlp", "moe"})
"""Types of feed-forward layers that are counted as layers."""
MAX_HEADER_BYTES = 100_000_000
"""Longest header that safetensors allows."""
SHAPE_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "layer_types",
    "sliding_window",
    "sliding_window_pattern",
    "use_sliding_window",
    "max_window_layers",
)
ROPE_FIELDS = (
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "rope_local_base_freq",
    "partial_rotary_factor",
)
"""Entries of config.json, or of its `text_config`, for the first two parts of a fingerprint."""
PARTS = ("shape", "RoPE", "weights")
"""Parts of a fingerprint in order, each of which is a digest."""
DIGEST_LENGTH = 32
"""Hexadecimal digits of a digest."""
SAMPLED_BYTES = 1024
"""Bytes read at the start, the middle and the end of each tensor."""
RECOMMENDED = {LAYERS: "recommended", HEADS: "recommended heads"}
"""Names of the outcomes of a profile's settings among `about["search"]["outcomes"]`."""
BEST_WITH = {LAYERS: "best with", HEADS: "best heads with"}
"""Names of the outcomes of the best settings with a scorer, which follows the name."""
WORTH_HEADS = 0.02
"""Heads are taken by default only if they answer a larger share of the questions by more than this, since they slow
down a decode step."""


@dataclass(frozen=True)
class Shape:
    """Shape of a model's KV cache.

    Attributes:
        num_layers: Number of all layers.
        num_kv_heads: KV heads of each layer, over all tensor-parallel ranks.
        head_size: Elements of a key.
        layer_types: Type of each layer, as `transformers` names it.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    layer_types: tuple[str, ...]

    @property
    def compressible(self) -> tuple[int, ...]:
        """Indices of the layers that may compress: those with full attention."""
        return tuple(layer for layer, kind in enumerate(self.layer_types) if kind == FULL_ATTENTION)

    @property
    def num_heads(self) -> int:
        """KV heads of all layers that may compress together: the whole cache."""
        return self.num_kv_heads * len(self.compressible)

    def num_full(self, full_layers: Collection[int], full_heads: FullHeads) -> int:
        """How many of these heads never compress."""
        of_layers = (
            self.num_kv_heads if layer in full_layers else len(full_heads.get(layer, ())) for layer in self.compressible
        )
        return sum(of_layers)


@dataclass(frozen=True)
class Rope:
    """How keys are rotated.

    Attributes:
        rotary_dim: Number of first elements of a key that are rotated; even.
        interleaved: Whether elements 2i and 2i + 1 are a pair, as in GLM; else i and i + rotary_dim / 2.
        slow_pairs: Number of last pairs that rotate by less than a quarter turn over the model's longest context.
    """

    rotary_dim: int
    interleaved: bool
    slow_pairs: int = 0


class Ranking(NamedTuple):
    """How the rows of heads that are not full are ranked: values of `kv_scorer` and `kv_granularity`."""

    scorer: str
    granularity: str = CompressionParams.granularity

    def __str__(self) -> str:
        return self.scorer if self == Ranking(self.scorer) else f"{self.scorer} by {self.granularity}"


class Target(NamedTuple):
    """The best setting for a share of memory, with any scorer or with this one.

    Attributes:
        memory: Share of the whole cache (all layers of full attention together), in (0, 1].
        full_layers: Indices of layers that never compress.
        keep_ratio: Keep ratio of the others, at which the whole cache costs `memory`.
        scorer: Scorer of the others.
        full_heads: KV heads that never compress, by layer; empty if whole layers are full.
        granularity: Granularity of the others.
    """

    memory: float
    full_layers: tuple[int, ...]
    keep_ratio: float
    scorer: str
    full_heads: FullHeads = {}  # noqa: RUF012 - nothing writes to it
    granularity: str = CompressionParams.granularity

    @property
    def ranking(self) -> Ranking:
        """How the others are ranked."""
        return Ranking(self.scorer, self.granularity)

    @property
    def classes(self) -> str:
        """What is full: one of `CLASSES`."""
        return HEADS if self.full_heads else LAYERS


class Setting(NamedTuple):
    """The settings of an engine: a `Target` without its memory."""

    full_layers: tuple[int, ...]
    keep_ratio: float
    scorer: str
    full_heads: FullHeads = {}  # noqa: RUF012 - nothing writes to it
    granularity: str = CompressionParams.granularity

    def ranking(self, scorer: str | None) -> dict[str, str]:
        """Scorer and granularity of requests; empty if the user gave another scorer, with which this was not searched.

        Args:
            scorer: The scorer that the user gave; `None` for none.
        """
        return {"scorer": self.scorer, "granularity": self.granularity} if scorer in (None, self.scorer) else {}


@dataclass(frozen=True)
class Profile:
    """The metadata of a profile; tensors are read on demand.

    Attributes:
        model: Name of the model, for messages.
        fingerprint: Result of `fingerprint` for the model.
        shape: Shape of the model's KV cache.
        rope: How the model's keys are rotated.
        layer_order: Indices of layers that may compress, the most important ones first.
        memory: Settings in ascending order of memory. For each memory and each of `CLASSES` the recommended one comes
            first, and may be followed by the best ones of other scorers; older files have recommended ones only.
        about: How the profile was made: texts, tokens, dtype, versions, seconds.
        path: The file; `None` if not written yet.
        tensors: Names of the file's tensors to their shapes.

    Raises:
        ValueError: Fields contradict each other.
    """

    model: str
    fingerprint: str
    shape: Shape
    rope: Rope
    layer_order: tuple[int, ...]
    memory: tuple[Target, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(len(self.fingerprint) == DIGEST_LENGTH * len(PARTS), "fingerprint has the wrong length")
        _require(self.shape.num_layers == len(self.shape.layer_types), "layer_types must have one of each layer")
        _require(self.shape.num_kv_heads >= 1, "num_kv_heads must be at least 1")
        _require(0 <= self.rope.rotary_dim <= self.shape.head_size, "rotary_dim must be in [0, head_size]")
        _require(0 <= self.rope.slow_pairs <= self.rope.rotary_dim // 2, "slow_pairs must be in [0, rotary_dim / 2]")
        compressible = self.shape.compressible
        _require(bool(compressible), "no layer has full attention")
        _require(sorted(self.layer_order) == list(compressible), "layer_order must name each compressible layer once")
        for target in self.memory:
            _require(0 < target.memory <= 1, f"memory must be in (0, 1], got {target.memory}")
            _require(0 < target.keep_ratio <= 1, f"keep_ratio must be in (0, 1], got {target.keep_ratio}")
            _require(
                set(target.full_layers) < set(compressible),
                f"full_layers of memory {target.memory} must be some of the layers of full attention, not all",
            )
            heads = [head for of_layer in target.full_heads.values() for head in of_layer]
            _require(
                set(target.full_heads) <= set(compressible) and max(heads, default=0) < self.shape.num_kv_heads,
                f"full_heads of memory {target.memory} must be of layers of full attention, and less than "
                f"{self.shape.num_kv_heads}",
            )
            _require(
                self.shape.num_full(target.full_layers, target.full_heads) < self.shape.num_heads,
                f"full_heads of memory {target.memory} must leave a head to compress",
            )
        order = {classes: i for i, classes in enumerate(CLASSES)}
        listed = sorted(self.memory, key=lambda target: (target.memory, order[target.classes]))
        object.__setattr__(self, "memory", tuple(listed))

    @property
    def recommended(self) -> tuple[Target, ...]:
        """The recommended one of each memory and each of `CLASSES`."""
        first: dict[tuple[float, str], Target] = {}
        for target in self.memory:
            first.setdefault((target.memory, target.classes), target)
        return tuple(first.values())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Reads the metadata of a file, and the names and shapes of its tensors.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file is not a profile, has another version, or is damaged.
        """
        path = Path(path)
        header = _header(path)
        text = header.pop("__metadata__", {}).get(METADATA_KEY)
        if text is None:
            raise ValueError(f"{path} is not a profile of vllm-l2kv; make one with `vllm-l2kv profile MODEL -o FILE`.")
        try:
            fields = _mapping(json.loads(text))
        except ValueError as error:
            raise _damaged(path, str(error)) from error
        if (version := fields.get("version")) != VERSION:
            raise ValueError(
                f"{path} must be a profile of version {VERSION}, got version {version}; make it again with `vllm-l2kv "
                "profile MODEL -o FILE`."
            )
        try:
            return cls(
                model=str(fields["model"]),
                fingerprint=str(fields["fingerprint"]),
                shape=Shape(**{**fields["shape"], "layer_types": tuple(fields["shape"]["layer_types"])}),
                rope=Rope(**fields["rope"]),
                layer_order=tuple(fields["layer_order"]),
                memory=tuple(map(_target, fields["memory"])),
                about=_mapping(fields["about"]),
                path=path,
                tensors={name: tuple(entry["shape"]) for name, entry in header.items()},
            )
        except KeyError as error:
            raise _damaged(path, f"it has no {error.args[0]}") from error
        except (TypeError, ValueError) as error:
            raise _damaged(path, str(error)) from error

    def write(self, path: str | os.PathLike[str], tensors: Mapping[str, "torch.Tensor"]) -> "Profile":
        """Writes the file atomically, and returns the profile as read from it.

        Args:
            path: The file.
            tensors: Tensors by name, of any device.

        Raises:
            OSError: The file cannot be written.
        """
        from safetensors.torch import save_file

        fields = {name: value for name, value in asdict(self).items() if name not in ("path", "tensors")}
        fields["memory"] = [target._asdict() for target in self.memory]
        metadata = {METADATA_KEY: json.dumps({"version": VERSION} | fields)}
        path = Path(path)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, scratch, metadata)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        return Profile.read(path)

    def setting(
        self,
        memory: float = DEFAULT_MEMORY,
        full_layers: Iterable[int] | None = None,
        full_heads: FullHeads | None = None,
        classes: str | None = None,
        num_ranks: int = 1,
        scorer: str | None = None,
    ) -> Setting:
        """The setting with which the whole cache costs this share of memory.

        Full layers or heads and the scorer are those of the profile's setting for the next lower memory, or for the
        lowest one. The keep ratio is computed from them.

        Args:
            memory: Share of the whole cache (all layers of full attention together), in (0, 1].
            full_layers: Layers to use instead of the profile's; `None` for the profile's.
            full_heads: KV heads to use instead of the profile's; `None` for the profile's.
            classes: Which settings of the profile to use: one of `CLASSES`; `None` for layers if full layers or heads
                are given, else for those of `default_classes`.
            num_ranks: Tensor-parallel size of the engine.
            scorer: Scorer whose best setting is used; the recommended setting if it is `None`, or if the profile has
                none of it.

        Raises:
            ValueError: The memory is out of bounds or less than full layers and heads alone cost, or the profile has no
                settings of these classes.
        """
        if not 0 < memory <= 1:
            raise ValueError(f"memory must be in (0, 1], got {memory}.")
        if classes is None:
            given = full_layers is not None or full_heads is not None
            classes = LAYERS if given else self.default_classes(memory, num_ranks, scorer)
        chosen = self._target_for(memory, classes, scorer)
        if chosen is None:
            kind = "" if classes == LAYERS else " with full heads; make it again, or take layers (--kv-classes layers)"
            raise ValueError(f"{self.path or 'The profile'} has no settings{kind}.")
        layers = chosen.full_layers if full_layers is None else tuple(full_layers)
        heads = chosen.full_heads if full_heads is None else full_heads
        num_heads, num_full = self.shape.num_heads, self.shape.num_full(layers, heads)
        if num_full == num_heads:
            raise ValueError(f"full_{classes} must not name every layer of full attention; leave one to compress.")
        keep_ratio = ratio_for(memory, num_heads, num_full)
        if keep_ratio <= 0:
            whose = "" if full_layers is not None else " of the smallest setting of this profile"
            what = f"{num_full} full heads" if heads else f"{num_full // self.shape.num_kv_heads} full layers"
            raise ValueError(
                f"memory must be more than {num_full / num_heads:.3f}, which the {what}{whose} cost, got {memory}."
            )
        return Setting(layers, keep_ratio, chosen.scorer, heads, chosen.granularity)

    def default_classes(self, memory: float, num_ranks: int, scorer: str | None = None) -> str:
        """Which settings a memory is spent by unless the user says: one of `CLASSES`.

        Heads, if the search judged them better by more than `WORTH_HEADS` and an engine can have them: they cost less
        than the memory, and ranks share them evenly.

        Args:
            memory: See `setting`.
            num_ranks: See `setting`.
            scorer: See `setting`.
        """
        layers, heads = (self._target_for(memory, classes, scorer) for classes in CLASSES)
        if layers is None or heads is None:
            return LAYERS
        num_full = self.shape.num_full(heads.full_layers, heads.full_heads)
        possible = ratio_for(memory, self.shape.num_heads, num_full) > 0 and are_even(
            heads.full_heads, self.shape.num_kv_heads, num_ranks
        )
        better = round(self._answered(heads) - self._answered(layers), 4) > WORTH_HEADS
        return HEADS if possible and better else LAYERS

    def _target_for(self, memory: float, classes: str, scorer: str | None) -> Target | None:
        """The setting of these classes for the next lower memory, or for the lowest one; `None` if there is none."""
        listed = [target for target in self.memory if target.classes == classes]
        if not listed:
            return None
        nearest = max((each.memory for each in listed if each.memory <= memory + 1e-9), default=listed[0].memory)
        recommended, *others = (target for target in listed if target.memory == nearest)
        return next((target for target in others if target.scorer == scorer), recommended)

    def _answered(self, target: Target) -> float:
        """Share of the judged questions that a setting answers exactly, seen and hidden; 0 if it was not judged.

        If only the recommended setting of these classes was judged, it is that one's.
        """
        outcomes = self.about.get("search", {}).get("outcomes", ())
        exact = {each["name"]: each["exact"] for each in outcomes if each["memory"] == target.memory}
        for name in (f"{BEST_WITH[target.classes]} {target.scorer}", RECOMMENDED[target.classes]):
            if name in exact:
                return float(sum(exact[name]) / len(exact[name]))
        return 0.0

    def weights(self) -> dict[str, "torch.Tensor"]:
        """Weights of the learned scorer, by their names without `LEARNED`.

        Raises:
            ValueError: The profile has no such weights.
        """
        weights = self.measures(LEARNED)
        if not weights:
            raise ValueError(
                f"{self.path} has no weights of the scorer learned; make it again with `vllm-l2kv profile MODEL -o "
                "FILE`."
            )
        return weights

    def measures(self, prefix: str = "") -> dict[str, "torch.Tensor"]:
        """Tensors whose names begin with `prefix`, by their names without it, on the CPU.

        Raises:
            ValueError: The file is damaged, or not written yet.
        """
        from safetensors import SafetensorError, safe_open

        if self.path is None:
            raise ValueError("The profile has no file.")
        try:
            with safe_open(self.path, "pt") as file:
                names = [name for name in self.tensors if name.startswith(prefix)]
                return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise _damaged(self.path, str(error)) from error


def setting_of(
    path: str | os.PathLike[str] | None,
    memory: float | None,
    full_layers: Iterable[int] | None = None,
    has_ratio: bool = False,
    full_heads: FullHeads | None = None,
    classes: str | None = None,
    num_ranks: int = 1,
    scorer: str | None = None,
) -> Setting | None:
    """The setting of the file that `--kv-profile` names; used by every command.

    Args:
        path: The file; `None` for no profile.
        memory: See `Profile.setting`; `None` if not given.
        full_layers: See `Profile.setting`.
        has_ratio: Whether a keep ratio is given. Together with full layers it leaves nothing for the profile to set.
        full_heads: See `Profile.setting`.
        classes: See `Profile.setting`.
        num_ranks: See `Profile.setting`.
        scorer: See `Profile.setting`.

    Returns:
        The setting; `None` if the profile sets nothing.

    Raises:
        ValueError: Memory or classes are given without a file or have no effect, or file or memory is refused.
    """
    if path is None:
        asked = {"memory (--kv-memory)": memory, "classes (--kv-classes)": classes}
        for name, value in asked.items():
            if value is not None:
                raise ValueError(f"{name} needs a profile; give its file too (--kv-profile FILE).")
        return None
    if classes == HEADS and (full_layers is not None or full_heads is not None):
        raise ValueError("full layers and heads are set by the profile with --kv-classes heads; leave them out.")
    try:
        profile = Profile.read(path)
    except OSError as error:
        raise ValueError(f"cannot read the profile {path}: {error.strerror or error}.") from error
    if full_layers is None or not has_ratio:
        memory = DEFAULT_MEMORY if memory is None else memory
        return profile.setting(memory, full_layers, full_heads, classes, num_ranks, scorer)
    if memory is not None:
        raise ValueError(
            "memory (--kv-memory) follows from full layers (--kv-full-layers) and a keep ratio "
            "(--kv-default-keep-ratio); leave one of the three out, also of a file given as --config."
        )
    return None


def ratio_for(memory: float, num_heads: int, num_full: int) -> float:
    """The keep ratio at which the whole cache costs `memory`; 0 or less if full layers and heads alone cost more.

    Args:
        memory: Share of what `num_heads` heads hold uncompressed.
        num_heads: KV heads of all layers of full attention. If whole layers are full, both numbers may count layers.
        num_full: How many of these heads never compress. If all of them, the result is 0.
    """
    others = num_heads - num_full
    return round((memory * num_heads - num_full) / others, 6) if others else 0.0


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """Identifies a model: the concatenated digests of shape, RoPE and weights.

    The digest of the weights covers names, types and shapes, and `SAMPLED_BYTES` bytes at three places of each tensor,
    which takes seconds even for the largest models. How weights are spread over files does not matter.

    Args:
        folder: Folder with config.json and weights in safetensors.

    Returns:
        `DIGEST_LENGTH` hexadecimal digits for each of `PARTS`.

    Raises:
        OSError: A file cannot be read.
        ValueError: There are no weights in safetensors, or a file is damaged.
    """
    folder = Path(folder)
    config = _mapping(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    config = config | _mapping(config.get("text_config") or {})
    chosen = [{name: config.get(name) for name in names} for names in (SHAPE_FIELDS, ROPE_FIELDS)]
    digests = [_digest([json.dumps(fields, sort_keys=True).encode()]) for fields in chosen]
    return "".join([*digests, _digest(_weights(folder))])


def check_model(profile: Profile, folder: str | os.PathLike[str]) -> None:
    """Rejects a profile that was made for another model.

    Raises:
        OSError: A file of the model cannot be read.
        ValueError: Shape, RoPE or weights differ; the message says which.
    """
    found = fingerprint(folder)
    parts = [(i * DIGEST_LENGTH, name) for i, name in enumerate(PARTS)]
    differ = [
        name for at, name in parts if found[at : at + DIGEST_LENGTH] != profile.fingerprint[at : at + DIGEST_LENGTH]
    ]
    if differ:
        raise ValueError(
            f"{profile.path or 'The profile'} was made for another model, {profile.model}: {' and '.join(differ)} "
            f"of {folder} differ; make one with `vllm-l2kv profile {folder} -o FILE`."
        )


def local_folder(name: str, revision: str | None = None, cache: str | None = None) -> Path:
    """The folder of a model's files on this machine.

    Args:
        name: A folder, or the name of a downloaded model on the Hugging Face hub.
        revision: Revision of the downloaded model.
        cache: Folder of downloads; `None` for that of Hugging Face.

    Raises:
        ValueError: The files are not on this machine.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"The files of {name} are not on this machine; give the folder of the model.") from error


def _target(fields: Mapping[str, Any]) -> Target:
    """Reads a `Target` from the metadata; older files have no full heads, or no granularity."""
    changed = {
        "full_layers": tuple(fields["full_layers"]),
        "full_heads": heads_by_layer(fields.get("full_heads", {})),
    }
    # Older files do not name it; with them `learned` has always gone with neighbors, and the others with tokens.
    older = {"granularity": "neighbors"} if fields["scorer"] in PROFILE_SCORERS else {}
    return Target(**{**older, **fields, **changed})


def _weights(folder: Path) -> Iterator[bytes]:
    """Names, types, shapes and sampled bytes of a model's tensors, in the order of their names."""
    places: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
    for path in _weight_files(folder):
        with path.open("rb") as file:
            data = 8 + struct.unpack("<Q", file.read(8))[0]
        places |= {name: (path, data, e) for name, e in _header(path).items() if name != "__metadata__"}
    for name, (path, data, entry) in sorted(places.items()):
        yield json.dumps([name, entry["dtype"], entry["shape"]]).encode()
        begin, end = entry["data_offsets"]
        with path.open("rb") as file:
            for at in (begin, (begin + end) // 2, max(begin, end - SAMPLED_BYTES)):
                file.seek(data + at)
                yield file.read(min(SAMPLED_BYTES, end - at))


def _weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights; if a folder has them twice, the index tells which to use."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(_mapping(json.loads(index.read_text(encoding="utf-8")))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    files = [path] if (path := folder / "model.safetensors").exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no weights in safetensors, which profiles need; convert the model.")
    return files


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor names to type, shape and offsets, and `__metadata__`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        text = file.read(length) if length <= min(size, MAX_HEADER_BYTES) else b""
    try:
        header = _mapping(json.loads(text))
        _mapping(header.get("__metadata__", {}))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a safetensors file.") from error
    if 8 + length + max(ends, default=0) != size:
        raise _damaged(path, "its end is missing")
    return header


def _digest(parts: Iterable[bytes]) -> str:
    """Digest of byte strings, each preceded by its length, so that no two lists hash the same bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(struct.pack("<Q", len(part)) + part)
    return digest.hexdigest()[:DIGEST_LENGTH]


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged: {why}.")
