"""Compares norms of the keys of images with those of text, in a vision-language model.

Shapes: L layers, H KV heads, n tokens of a prompt.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vllm_l2kv.cli_types import counted
from vllm_l2kv.profile import Shape
from vllm_l2kv.scorers import norms
from vllm_l2kv.tools.profile.attention import variation
from vllm_l2kv.tools.profile.measure import mean, spread
from vllm_l2kv.tools.profile.model import sees
from vllm_l2kv.tools.profile.norms import FIRST
from vllm_l2kv.tools.progress import Progress

KEEP_RATIO = 0.5


def processor_of(model: Any, folder: str) -> Any:
    """The processor that makes a model's prompts with images.

    Args:
        model: Model of `transformers`.
        folder: Folder or name of the model.

    Raises:
        ImportError: A package of the processor is missing.
        OSError: The processor cannot be read.
        ValueError: The model does not take images, or has no chat template.
    """
    from transformers import AutoProcessor

    if not sees(model.config):
        raise ValueError(f"argument --images: {type(model).__name__} does not take images; leave the option out.")
    processor = AutoProcessor.from_pretrained(folder)
    if not processor.chat_template:
        raise ValueError(
            "argument --images: the model has no chat template, which places images in a prompt; leave the option out."
        )
    return processor


def image_norms(
    model: Any, processor: Any, shape: Shape, pictures: Sequence[Any], words: Sequence[int], progress: Progress
) -> tuple[dict[str, torch.Tensor], int]:
    """Reads prompts with one picture each, in the middle of about as many tokens of text.

    Args:
        model: Model of `transformers`.
        processor: Processor from `processor_of`.
        shape: Shape of the model's KV cache.
        pictures: PIL images.
        words: Token ids of text.
        progress: Counts pictures.

    Returns:
        Means over pictures, `[L, H]` fp32 on the CPU, NaN in layers that never compress:

        - image_norm, text_norm: Mean norm of the image's keys, and of the text's keys without the first ones;
        - image_variation, text_variation: Standard deviation of these norms divided by their mean;
        - kept: Share of the image's rows that are among the half of the prompt's rows with the lowest norms.

        And the number of tokens of all pictures.

    Raises:
        ValueError: The model does not mark the tokens of images in a prompt.
    """
    found, num_tokens = [], 0
    progress.begin(f"reading {counted(len(pictures), 'picture')}")
    for number, picture in enumerate(pictures, start=1):
        alone = _prompt(processor, picture, "", "")
        num_image_tokens = int(_is_image(model, alone).sum())
        text = _text(processor.tokenizer, words, number * num_image_tokens, num_image_tokens)
        prompt = _prompt(processor, picture, *text)
        found.append({name: spread(values, shape) for name, values in _of_one(model, shape, prompt).items()})
        num_tokens += num_image_tokens
        progress.reached(number / len(pictures))
    return {name: mean(each[name] for each in found) for name in found[0]}, num_tokens


def _prompt(processor: Any, picture: Any, before: str, after: str) -> Any:
    words = ({"type": "text", "text": text} for text in (before, after))
    content = [next(words), {"type": "image", "image": picture}, next(words)]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )


def _text(tokenizer: Any, words: Sequence[int], first: int, number: int) -> Iterator[str]:
    """The two halves of a text of `number` tokens."""
    some = [words[place % len(words)] for place in range(first, first + number)]
    for half in (some[: number // 2], some[number // 2 :]):
        yield tokenizer.decode(half, skip_special_tokens=True)


def _is_image(model: Any, prompt: Any) -> torch.Tensor:
    """`[n]` bool."""
    found: torch.Tensor = prompt["input_ids"][0] == model.config.image_token_id
    if not found.any():
        raise ValueError(
            f"argument --images: {type(model).__name__} does not mark the tokens of images in a prompt; leave the "
            "option out."
        )
    return found


@torch.inference_mode()
def _of_one(model: Any, shape: Shape, prompt: Any) -> dict[str, torch.Tensor]:
    """Measures one prompt, in the layers that may compress: `[l, H]`."""
    image = _is_image(model, prompt)
    text = ~image
    text[:FIRST] = False
    # Keys are read from the cache, since models may use attention of their own within images.
    cache = model(**prompt.to(model.device, model.dtype), use_cache=True, logits_to_keep=1).past_key_values
    lengths = torch.stack([norms(cache.layers[layer].keys[0].float()).cpu() for layer in shape.compressible])
    lowest = lengths.argsort(dim=-1, stable=True)[..., : math.ceil(KEEP_RATIO * len(image))]
    return {
        "image_norm": lengths[..., image].mean(-1),
        "text_norm": lengths[..., text].mean(-1),
        "image_variation": variation(lengths[..., image]),
        "text_variation": variation(lengths[..., text]),
        "kept": image[lowest].sum(-1) / image.sum(),
    }
