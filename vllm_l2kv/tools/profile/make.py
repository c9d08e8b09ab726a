"""The whole way from a model's folder to its profile."""

import platform
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_l2kv import __version__
from vllm_l2kv.profile import Profile, Shape, Target, fingerprint, local_folder, ratio_for
from vllm_l2kv.tools.evaluation.progress import Progress
from vllm_l2kv.tools.profile.calibration import samples
from vllm_l2kv.tools.profile.measure import Measured, measure
from vllm_l2kv.tools.profile.model import layout, load

MEMORIES = (0.75, 0.5, 0.35, 0.25, 0.15)


class Made(NamedTuple):
    """A profile that was written, and what it is made of."""

    profile: Profile
    measured: Measured


def make(
    model: str, path: Path, texts: Sequence[str], num_texts: int, num_tokens: int, device: str, progress: Progress
) -> Made:
    """Measures a model and writes its profile.

    Args:
        model: Folder or name on the Hugging Face hub.
        path: The file; its folder exists.
        texts: Of the user.
        num_texts: Texts to read.
        num_tokens: Of each.
        device: As of `model.load`.
        progress: Says what is being done.

    Raises:
        OSError: The model cannot be read, or the file not written.
        ValueError: The model cannot be profiled, or the texts are too few or too short.
    """
    from transformers import AutoTokenizer

    begun = time.monotonic()
    progress.begin(f"loading {model}")
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), load(model, device)
    folder = local_folder(model)
    of_model = fingerprint(folder)
    shape, rope = layout(loaded)
    progress.begin("making up texts and questions")
    read = samples(tokenizer, num_tokens, num_texts, own_texts=texts)
    measured = measure(loaded, tokenizer, shape, read, progress)
    order = _order(shape, measured)
    about = {
        "texts": dict(Counter(sample.kind for sample in read)),
        "own_texts": len(texts),
        "tokens": num_tokens,
        "questions": measured.num_questions,
        "answered": measured.num_answered,
        "loss": round(measured.whole_loss, 4),
        **_machine(loaded),
        "seconds": round(time.monotonic() - begun, 1),
    }
    profile = Profile(
        model=folder.name if Path(model).is_dir() else model,
        fingerprint=of_model,
        shape=shape,
        rope=rope,
        layer_order=order,
        memory=_targets(shape, order),
        about=about,
    )
    return Made(profile.write(path, measured.tensors()), measured)


def _machine(model: Any) -> dict[str, Any]:
    """What ran, and the memory that it took."""
    gpus = range(torch.cuda.device_count()) if model.device.type == "cuda" else ()
    peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if gpus else "CPU",
        "peak_gib": round(peak / 2**30, 2) if gpus else None,
        "versions": {
            "vllm_l2kv": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
    }


def _order(shape: Shape, measured: Measured) -> tuple[int, ...]:
    best = measured.repetition.amax(-1).tolist()
    return tuple(sorted(shape.compressible, key=lambda layer: -best[layer]))


def _targets(shape: Shape, order: Sequence[int]) -> tuple[Target, ...]:
    num_layers, found = len(order), []
    for memory in MEMORIES:
        num_full = max(0, int((memory - 0.125) * num_layers / 0.875))
        full = tuple(sorted(order[:num_full]))
        found.append(Target(memory, full, ratio_for(memory, num_layers, num_full), "l2"))
    return tuple(found)
