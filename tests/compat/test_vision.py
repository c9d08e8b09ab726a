"""Images are tokens of a prompt: their rows are kept, evicted and protected like those of text.

Tiny models with random weights: Qwen2.5-VL, whose positions in an image have three dimensions; Qwen3-VL, whose first
layers add features of images; Gemma 3, with sliding windows; Llama 4, with chunks; LLaVA, Pixtral, Mistral 3, Idefics 3
and InternVL, with full attention alone. Their greedy answers equal those of Hugging Face's models on the same
embeddings and positions.
"""

import copy
from pathlib import Path

import pytest
from engine import keep, tokens_of
from reference import check_numbers
from rules import INTERVALS

pytestmark = pytest.mark.slow  # an engine for each
pytest.importorskip("torchvision")

from tiny_vision import FAMILIES, VisionReference, picture, write  # noqa: E402

PROMPTS = [
    ("The picture IMAGE shows a lighthouse. " + "What is it? " * 20, [picture(0, 224, 112)]),
    (
        "First IMAGE and " + "then, after some words, " * 20 + "IMAGE too.",
        [picture(1, 224, 112), picture(2, 112, 56)],
    ),
]
RULES = [
    {"ratio": "1"},
    {"ratio": "0.5"},
    {"ratio": "0.2", "first": 4, "last": 8},
    {"ratio": "1", "budget": 30, "first": 8},
    # A document that ends after the image, one that ends inside it, and protected rows inside it.
    {"ratio": "0.4", "document": 45},
    {"ratio": "0.4", "document": 12},
    {"ratio": "0.3", "first": 15},
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family, demo_model, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("vision") / family, family, demo_model)


@pytest.fixture(scope="module")
def reference(model):
    return VisionReference(model)


@pytest.fixture(scope="module")
def engine(model, run):
    limits = {"image": 2, "video": 0} if "qwen" in model.name else {"image": 2}
    with run(model, (0,), limit_mm_per_prompt=limits, skip_mm_profiling=True) as engine:
        yield engine


def inputs(prompt, family):
    text, images = prompt
    return text.replace("IMAGE", FAMILIES[family].image), images


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("prompt", PROMPTS, ids=["one image", "two images"])
def test_answers(prompt, rule, family, engine, reference):
    text, images = inputs(prompt, family)
    tokens = reference.see(text, images)
    num_image_tokens = sum(FAMILIES[family].num_tokens(image.height, image.width) for image in images)
    assert tokens.count(reference.model.config.image_token_id) == num_image_tokens
    asked = {**rule, "intervals": INTERVALS}
    request = {"prompt": text, "multi_modal_data": {"image": copy.deepcopy(images)}}
    for _ in range(2):  # the second may find the first one's document
        (output,) = engine.llm.generate([request], [keep(**rule)], use_tqdm=False)
        engine.check_whole()
        assert output.prompt_token_ids == tokens
        check_numbers(output, **asked)
        assert tokens_of(output) == reference.generate(tokens, 12, full_layers=(0,), **asked)


def test_another_image_finds_nothing(family, engine, reference):
    """A document with the same words and another image is another document."""
    text, (image,) = inputs(PROMPTS[0], family)
    rule = {"ratio": "0.5", "document": 45}
    found, answers = [], []
    for images in ([image], [image], [picture(7, image.height, image.width)]):
        (output,) = engine.llm.generate(
            [{"prompt": text, "multi_modal_data": {"image": images}}], [keep(**rule)], use_tqdm=False
        )
        tokens = reference.see(text, images)
        assert tokens_of(output) == reference.generate(tokens, 12, full_layers=(0,), **rule)
        found.append(check_numbers(output, **rule)["found_tokens"])
        answers.append(tokens_of(output))
    assert found[1:] == [45, 0]
    assert answers[2] != answers[0]
