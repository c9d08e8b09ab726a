"""Makes a model's profile: loads the model, measures, trains, searches and writes the file."""

import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_l2kv import __version__
from vllm_l2kv.profile import LEARNED, Profile, Shape, fingerprint, local_folder
from vllm_l2kv.scorers import Heads, Scorers, Weights, bind
from vllm_l2kv.tools.profile.calibration import asked_samples, samples
from vllm_l2kv.tools.profile.choices import answerable
from vllm_l2kv.tools.profile.images import image_norms, processor_of
from vllm_l2kv.tools.profile.learned import Examples, train
from vllm_l2kv.tools.profile.measure import Measured, measure
from vllm_l2kv.tools.profile.model import layout, load, longest_context, slow_frequencies
from vllm_l2kv.tools.profile.recommend import Recommendation, recommend
from vllm_l2kv.tools.profile.units import check_num_ranks
from vllm_l2kv.tools.progress import Progress

MEASURED, SEARCHED, JUDGED = 0, 1, 2
"""Seeds of the texts for measuring, for the search of settings, and for judging them."""

TEXTS_OF_A_QUESTION = 2
"""Texts that may be read for each question of the search."""
SPARE_TOKENS = 128
"""Room in the context in addition to two texts: the request for a repetition, or a question and its answer."""


class Amounts(NamedTuple):
    """Numbers of texts, tokens and questions.

    Attributes:
        texts: Texts for measuring; search and judging read others, see `texts_for`.
        tokens: Tokens of each text; some texts of the search are longer.
        questions: Questions for the search; half as many more are used to judge its results.
    """

    texts: int
    tokens: int
    questions: int

    def texts_for(self, num_questions: int) -> int:
        """The most texts that are read to find this many questions: not all have one that the model answers."""
        return max(self.texts, TEXTS_OF_A_QUESTION * num_questions)


class Made(NamedTuple):
    """A written profile, and the measurements and search results in it."""

    profile: Profile
    measured: Measured
    found: Recommendation


def make(
    model: str,
    path: Path,
    own_texts: Sequence[str],
    pictures: Sequence[Any],
    amounts: Amounts,
    device: str,
    num_ranks: int,
    progress: Progress,
) -> Made:
    """Measures a model and writes its profile.

    Args:
        model: Folder or name on the Hugging Face hub.
        path: The file; its folder must exist.
        own_texts: Texts of the user.
        pictures: PIL images for a vision-language model; empty for no image measurements.
        amounts: Numbers of texts, tokens and questions.
        device: See `model.load`.
        num_ranks: Tensor-parallel size for which full heads are chosen.
        progress: Shows progress.

    Raises:
        OSError: The model cannot be read, or the file cannot be written.
        ValueError: The model cannot be profiled, or the texts are too few or too short.
    """
    from transformers import AutoTokenizer

    clock = _Clock()
    progress.begin(f"loading {model}")
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), load(model, device)
    folder = local_folder(model)
    of_model = fingerprint(folder)
    shape, rope = layout(loaded)
    context = longest_context(loaded)
    _check_length(context, amounts.tokens)
    check_num_ranks(shape, num_ranks)
    processor = processor_of(loaded, model) if pictures else None
    clock.lap("loading")

    progress.begin("generating texts and questions")
    texts = samples(tokenizer, amounts.tokens, amounts.texts, MEASURED, own_texts)
    examples = Examples(rope, slow_frequencies(loaded, rope.rotary_dim // 2), context or 0)
    measured = measure(loaded, tokenizer, shape, texts, progress, lambda rows: examples.add(*rows))
    image_tokens = 0
    if processor is not None:
        words = list(chain.from_iterable(text.token_ids for text in texts))
        images, image_tokens = image_norms(loaded, processor, shape, pictures, words, progress)
        measured = replace(measured, images=images)
    clock.lap("measuring")
    trained = train(examples, shape.num_layers, loaded.device, progress=progress)
    clock.lap("training")
    scorers = _scorers(loaded, shape, Weights(trained.weights, rope))
    progress.begin("searching for settings")
    questions, others = (
        answerable(
            loaded,
            shape,
            asked_samples(tokenizer, amounts.tokens, amounts.texts_for(num), seed, own_texts),
            num,
            progress,
            purpose,
        )
        for seed, num, purpose in (
            (SEARCHED, amounts.questions, "for the search"),
            (JUDGED, -(-amounts.questions // 2), "for judging"),
        )
    )
    found = recommend(loaded, shape, scorers, questions, others, measured.ranks, num_ranks, progress)
    clock.lap("searching")

    profile = Profile(
        model=folder.name if Path(model).is_dir() else model,
        fingerprint=of_model,
        shape=shape,
        rope=rope,
        layer_order=found.layer_order,
        memory=(*found.targets, *found.others),
        about={
            "kinds": dict(Counter(text.kind for text in texts)),
            "own_texts": len(own_texts),
            "pictures": len(pictures),
            "image_tokens": image_tokens,
            **amounts._asdict(),
            "asked": measured.num_questions,
            "answered": measured.num_answered,
            "loss": round(measured.whole_loss, 4),
            "learned": {"overlap": trained.overlap},
            "tensor_parallel_size": num_ranks,
            "search": {
                "tried": found.num_tried,
                "rounds": [of_round._asdict() for of_round in found.rounds],
                "questions": found.searched,
                "judged_by": found.judged,
                "orders": found.orders,
                "outcomes": [outcome._asdict() for outcome in found.outcomes],
            },
            **_machine(loaded),
            "seconds": clock.laps,
        },
    )
    tensors = measured.tensors() | {f"{LEARNED}{name}": tensor for name, tensor in trained.weights.items()}
    return Made(profile.write(path, tensors), measured, found)


def _check_length(context: int | None, num_tokens: int) -> None:
    """Rejects texts that are too long to be read twice in a row in this context."""
    if context is not None and 2 * num_tokens + SPARE_TOKENS > context:
        raise ValueError(
            f"tokens must be at most {(context - SPARE_TOKENS) // 2} for this model, whose context is {context}, since "
            f"texts are read twice in a row, got {num_tokens}; lower --tokens."
        )


def _scorers(model: Any, shape: Shape, weights: Weights) -> Scorers:
    """The scorers of the search, bound to all layers that may compress."""
    heads = Heads.of_rank(shape.compressible, shape.num_kv_heads, 0, 1, model.device)
    return bind(heads, weights)


class _Clock:
    """Measures the time of each part.

    Attributes:
        laps: Parts to seconds.
    """

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, part: str) -> None:
        """Ends a part."""
        now = time.monotonic()
        self.laps[part], self._last = round(now - self._last, 1), now


def _machine(model: Any) -> dict[str, Any]:
    """Device, versions, and peak GPU memory."""
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
