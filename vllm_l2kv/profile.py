"""A profile: what one model's layers and heads do for answers, measured once, in one file of safetensors.

The file's metadata has one key, `vllm_l2kv`, which holds JSON: the model, its fingerprint, the layers in the order in
which answers need them, and settings for several memories, with whole layers full and with single KV heads full.
Reading it needs no torch. The tensors are the measurements by layer and KV head, and the weights of the learned scorer.
`vllm-l2kv profile` writes it.
"""

import hashlib
import json
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from vllm_l2kv.settings import CLASSES, DEFAULT_MEMORY, HEADS, LAYERS, FullHeads, heads_by_layer

if TYPE_CHECKING:
    import torch

VERSION = 2
METADATA_KEY = "vllm_l2kv"
LEARNED = "learned."
"""Names of the learned scorer's weights begin so."""
FULL_ATTENTION = "full_attention"
"""What `transformers` calls layers of the kind that compresses."""
SLIDING_ATTENTION = "sliding_attention"
"""Those with a sliding window."""
RECURRENT = frozenset({"linear_attention", "conv"})
"""Those that keep a state in place of keys: Mamba, gated delta nets, short convolutions."""
WITHOUT_CACHE = frozenset({"mlp", "moe"})
"""Feed-forward layers that count as layers."""
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
"""Entries of config.json, or of its `text_config`, that make up the first two parts of a fingerprint."""
PARTS = ("shape", "RoPE", "weights")
"""What a fingerprint has a digest of, in this order."""
DIGEST_LENGTH = 32
"""Hexadecimal digits of each."""
SAMPLED_BYTES = 1024
"""Read from the beginning, the middle and the end of each tensor."""


@dataclass(frozen=True)
class Shape:
    """Of a model's KV cache.

    Attributes:
        num_layers: All of them.
        num_kv_heads: Of each layer, over all tensor-parallel ranks.
        head_size: Elements of a key.
        layer_types: Of each layer, as `transformers` names them.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    layer_types: tuple[str, ...]

    @property
    def compressible(self) -> tuple[int, ...]:
        """Layers that may compress: those of full attention."""
        return tuple(layer for layer, kind in enumerate(self.layer_types) if kind == FULL_ATTENTION)

    @property
    def num_heads(self) -> int:
        """KV heads of all layers that may compress: the whole cache."""
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
        rotary_dim: Elements at the beginning of a key that are rotated; even.
        interleaved: Whether elements 2i and 2i + 1 are a pair, as in GLM; else i and i + rotary_dim / 2.
        slow_pairs: Pairs at the end that turn by less than a quarter circle over the model's longest context.
    """

    rotary_dim: int
    interleaved: bool
    slow_pairs: int = 0


class Target(NamedTuple):
    """What a memory is best spent on.

    Attributes:
        memory: Share of the whole cache, all layers of full attention together; in (0, 1].
        full_layers: Layers that never compress.
        keep_ratio: Of the others, so that the whole cache costs `memory`.
        scorer: Of the others.
        full_heads: Layers to those of their KV heads that never compress; empty where whole layers do.
    """

    memory: float
    full_layers: tuple[int, ...]
    keep_ratio: float
    scorer: str
    full_heads: FullHeads = {}  # noqa: RUF012 - nothing writes to it

    @property
    def classes(self) -> str:
        """Of `CLASSES`."""
        return HEADS if self.full_heads else LAYERS


class Setting(NamedTuple):
    """What an engine does: `Target` without its memory."""

    full_layers: tuple[int, ...]
    keep_ratio: float
    scorer: str
    full_heads: FullHeads = {}  # noqa: RUF012 - nothing writes to it


@dataclass(frozen=True)
class Profile:
    """The metadata of a profile; tensors are read when they are asked for.

    Attributes:
        model: Name, for people.
        fingerprint: As of `fingerprint`.
        shape: Of the model's KV cache.
        rope: How its keys are rotated.
        layer_order: Layers that may compress, those first that answers need most.
        memory: Settings, the smallest memory first; for a memory there may be one of each of `CLASSES`.
        about: How it was made: texts, tokens, dtype, versions, seconds.
        path: The file; `None` if there is none yet.
        tensors: Shapes of the file's tensors.

    Raises:
        ValueError: Fields that contradict each other.
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

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Reads the metadata of a file, and where its tensors are.

        Raises:
            OSError: It cannot be read.
            ValueError: It is no profile, one of another version, or damaged.
        """
        path = Path(path)
        header = _header(path)
        text = header.pop("__metadata__", {}).get(METADATA_KEY)
        if text is None:
            raise ValueError(f"{path} is no profile of vllm-l2kv: make one with `vllm-l2kv profile MODEL -o FILE`.")
        try:
            fields = _mapping(json.loads(text))
        except ValueError as error:
            raise _damaged(path, str(error)) from error
        if (version := fields.get("version")) != VERSION:
            raise ValueError(
                f"{path} is a profile of version {version}, and this vllm-l2kv reads version {VERSION}: make it again "
                "with `vllm-l2kv profile MODEL -o FILE`."
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
        """Writes the file, whole or not at all, and returns the profile as read from it."""
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
        classes: str = LAYERS,
    ) -> Setting:
        """What stays full, and keep ratio and scorer of the rest, with which the whole cache costs this share.

        What stays full and the scorer are those of the listed memory that is next below, or of the smallest one. The
        ratio follows.

        Args:
            memory: Share of what all layers of full attention would hold together, in (0, 1].
            full_layers: Layers to take in place of the listed ones; `None` for those.
            full_heads: The same of KV heads.
            classes: Of `CLASSES`: which of the listed settings.

        Raises:
            ValueError: A memory out of bounds, or so small that what stays full alone costs more, or no such settings.
        """
        if not 0 < memory <= 1:
            raise ValueError(f"memory must be in (0, 1], got {memory}.")
        listed = [target for target in self.memory if target.classes == classes]
        if not listed:
            kind = "" if classes == LAYERS else " with full heads; make it again, or leave --kv-classes out"
            raise ValueError(f"{self.path or 'The profile'} names no settings{kind}.")
        below = [target for target in listed if target.memory <= memory + 1e-9]
        chosen = below[-1] if below else listed[0]
        layers = chosen.full_layers if full_layers is None else tuple(full_layers)
        heads = chosen.full_heads if full_heads is None else full_heads
        num_heads, num_full = self.shape.num_heads, self.shape.num_full(layers, heads)
        if num_full == num_heads:
            raise ValueError(f"full_{classes} names every layer of full attention; leave one to compress.")
        keep_ratio = ratio_for(memory, num_heads, num_full)
        if keep_ratio <= 0:
            whose = "" if full_layers is not None else " of the smallest setting of this profile"
            what = f"{num_full} full heads" if heads else f"{num_full // self.shape.num_kv_heads} full layers"
            raise ValueError(
                f"memory must be more than {num_full / num_heads:.3f}, which the {what}{whose} cost, got {memory}."
            )
        return Setting(layers, keep_ratio, chosen.scorer, heads)

    def weights(self) -> dict[str, "torch.Tensor"]:
        """Weights of the learned scorer, their names without `LEARNED`.

        Raises:
            ValueError: The profile has none.
        """
        weights = self.measures(LEARNED)
        if not weights:
            raise ValueError(f"{self.path} has no weights of the scorer learned.")
        return weights

    def measures(self, prefix: str = "") -> dict[str, "torch.Tensor"]:
        """Tensors whose names begin with `prefix`, their names without it, on the CPU.

        Raises:
            ValueError: The file is damaged, or there is none.
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
) -> Setting | None:
    """What the file that `--kv-profile` names sets, as every command reads it.

    Args:
        path: The file; `None` if none is named.
        memory: As of `Profile.setting`; `None` if none is asked.
        full_layers: Likewise.
        has_ratio: Whether a keep ratio is given too, so that with full layers nothing is left to set.
        full_heads: As of `Profile.setting`.
        classes: The same; `None` for layers.

    Returns:
        `None` if nothing is set.

    Raises:
        ValueError: A memory or classes without a file or without a use, or a file or a memory that is refused.
    """
    if path is None:
        asked = {"memory (--kv-memory)": memory, "classes (--kv-classes)": classes}
        for name, value in asked.items():
            if value is not None:
                raise ValueError(f"{name} is what a profile is set for; name its file too (--kv-profile FILE).")
        return None
    if classes == HEADS and (full_layers is not None or full_heads is not None):
        raise ValueError("full layers and heads come from the profile with --kv-classes heads; leave them out.")
    try:
        profile = Profile.read(path)
    except OSError as error:
        raise ValueError(f"cannot read the profile {path}: {error.strerror or error}.") from error
    if full_layers is None or not has_ratio:
        return profile.setting(DEFAULT_MEMORY if memory is None else memory, full_layers, full_heads, classes or LAYERS)
    if memory is not None:
        raise ValueError("memory (--kv-memory) follows from full layers and a keep ratio; leave one of the three out.")
    return None


def ratio_for(memory: float, num_heads: int, num_full: int) -> float:
    """The keep ratio with which the whole cache costs `memory`; 0 or less if what stays full alone costs more.

    Args:
        memory: Share of what `num_heads` heads hold uncompressed.
        num_heads: KV heads of all layers of full attention. Where whole layers stay full, both numbers may be layers.
        num_full: Those of them that never compress. If they are all, nothing is left to compress, and it is 0.
    """
    others = num_heads - num_full
    return round((memory * num_heads - num_full) / others, 6) if others else 0.0


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """Identifies a model: digests of shape, RoPE and weights, one after the other.

    Of the weights it takes names, types and shapes, and `SAMPLED_BYTES` at three places of each: seconds for the
    largest models. How they are spread over files does not matter.

    Args:
        folder: With config.json and weights in safetensors.

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
    """Refuses a profile of another model.

    Raises:
        OSError: A file of the model cannot be read.
        ValueError: Says whether shape, RoPE or weights differ.
    """
    found = fingerprint(folder)
    parts = [(i * DIGEST_LENGTH, name) for i, name in enumerate(PARTS)]
    differ = [
        name for at, name in parts if found[at : at + DIGEST_LENGTH] != profile.fingerprint[at : at + DIGEST_LENGTH]
    ]
    if differ:
        raise ValueError(
            f"{profile.path or 'The profile'} is a profile of another model, {profile.model}: {' and '.join(differ)} "
            f"of {folder} differ. Make one with `vllm-l2kv profile {folder} -o FILE`."
        )


def local_folder(name: str, revision: str | None = None, cache: str | None = None) -> Path:
    """Where a model's files are on this machine.

    Args:
        name: A folder, or a name on the Hugging Face hub that has been downloaded.
        revision: Of the latter.
        cache: Folder of downloads; `None` for that of Hugging Face.

    Raises:
        ValueError: They are not here.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"The files of {name} are not on this machine: give its folder.") from error


def _target(fields: Mapping[str, Any]) -> Target:
    """Of the metadata. Files that were made before heads could be full name none."""
    changed = {
        "full_layers": tuple(fields["full_layers"]),
        "full_heads": heads_by_layer(fields.get("full_heads", {})),
    }
    return Target(**{**fields, **changed})


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
    """The files that hold a model's weights; some folders hold them twice, and the index says which are meant."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(_mapping(json.loads(index.read_text(encoding="utf-8")))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    files = [path] if (path := folder / "model.safetensors").exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no weights in safetensors, so no profile can be tied to it.")
    return files


def _header(path: Path) -> dict[str, Any]:
    """The header of a file of safetensors: names to type, shape and place, and `__metadata__`."""
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
        raise ValueError(f"{path} is no file of safetensors.") from error
    if 8 + length + max(ends, default=0) != size:
        raise _damaged(path, "its end is missing")
    return header


def _digest(parts: Iterable[bytes]) -> str:
    """Of byte strings, each with its length in front, so that no two lists have the same one."""
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
