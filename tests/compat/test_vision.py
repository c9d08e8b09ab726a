"""Images are tokens of a prompt: rows of them are kept, evicted and protected as those of words are.

A tiny Qwen2.5-VL with random weights, whose positions have three dimensions where an image is. Its greedy answers equal
those of Hugging Face's model on the same embeddings and positions. vLLM wants torchvision for such models.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from engine import keep, tokens_of
from PIL import Image
from reference import Reference, check_numbers
from rules import INTERVALS
from tiny import SHAPE
from transformers import AutoModelForImageTextToText, AutoProcessor

pytestmark = pytest.mark.slow  # one more engine
pytest.importorskip("torchvision")

WORDS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def model(demo_model, tmp_path_factory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("vision") / "qwen2.5-vl"
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model)
    tokenizer.add_special_tokens({"additional_special_tokens": list(WORDS)})
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(WORDS))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    text = {**SHAPE, "vocab_size": 49216, "hidden_size": 128, "rope_parameters": rope}
    config = transformers.Qwen2_5_VLConfig(
        text_config=transformers.Qwen2_5_VLTextConfig(**text).to_dict(),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 1,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
            "patch_size": 14,
            "window_size": 112,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    made = transformers.Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:
                parameter += torch.empty_like(parameter).uniform_(-0.5, 0.5)
            elif "visual" in name:
                parameter.normal_(0, 0.2)
    made.save_pretrained(folder)
    images = transformers.Qwen2VLImageProcessor(min_pixels=28**2, max_pixels=64 * 28**2)
    videos = transformers.Qwen2VLVideoProcessor()
    transformers.Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=None).save_pretrained(folder)
    return folder


class VisionReference(Reference):
    """The reference for one prompt with images at a time."""

    auto_class = AutoModelForImageTextToText
    attention = {"text_config": "any_rows", "vision_config": "sdpa"}  # noqa: RUF012

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.processor = AutoProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def see(self, text: str, images: list[Image.Image]) -> list[int]:
        """Embeds the prompt of the next calls, as the model itself does, and returns its tokens."""
        self._begun.clear()
        inputs = self.processor(images=images, text=text, return_tensors="pt")
        seen: dict = {}
        language = self.model.model.language_model
        hook = language.register_forward_pre_hook(lambda _module, _args, given: seen.update(given), with_kwargs=True)
        self.model(**inputs)
        hook.remove()
        self._embeddings, self._positions = seen["inputs_embeds"], seen["position_ids"]
        return inputs["input_ids"][0].tolist()

    def _forward(self, cache, tokens, position, num_logits):
        n = self._embeddings.shape[1]
        first = max(position, n)  # of the answer
        answered = torch.tensor([tokens[first:]], dtype=torch.long)
        embeddings = self.model.get_input_embeddings()(answered)
        after = self._positions.max() + 1 + torch.arange(first, first + answered.shape[1]) - n
        positions = self._positions[..., position : len(tokens)]
        positions = torch.cat([positions, after.expand(*positions.shape[:-1], -1)], -1)
        hidden = self.model.model.language_model(
            inputs_embeds=torch.cat([self._embeddings[:, position : len(tokens)], embeddings], 1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return cache, self.model.lm_head(hidden[0, -num_logits:]).float()


@pytest.fixture(scope="module")
def reference(model):
    return VisionReference(model)


@pytest.fixture(scope="module")
def engine(model, run):
    with run(model, (0,), limit_mm_per_prompt={"image": 2, "video": 0}, skip_mm_profiling=True) as engine:
        yield engine


def picture(seed: int, height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


PROMPTS = [
    # An image of 112 x 168 pixels is 4 x 6 tokens of 28 x 28 pixels each.
    (f"The picture {IMAGE} shows a lighthouse. " + "What is it? " * 20, [picture(0, 112, 168)], 24),
    (
        f"First {IMAGE} and " + "then, after some words, " * 20 + f"{IMAGE} too.",
        [picture(1, 196, 140), picture(2, 84, 56)],
        41,
    ),
]


@pytest.mark.parametrize(
    "rule",
    [
        {"ratio": "1"},
        {"ratio": "0.5"},
        {"ratio": "0.2", "first": 4, "last": 8},
        {"ratio": "1", "budget": 30, "first": 8},
        # A document that ends after the image, one that ends inside it, and protection that reaches into it.
        {"ratio": "0.4", "document": 40},
        {"ratio": "0.4", "document": 12},
        {"ratio": "0.3", "first": 15},
    ],
)
@pytest.mark.parametrize("prompt", PROMPTS, ids=["one image", "two images"])
def test_answers(prompt, rule, engine, reference):
    text, images, num_image_tokens = prompt
    tokens = reference.see(text, images)
    asked = {**rule, "intervals": INTERVALS}
    request = {"prompt": text, "multi_modal_data": {"image": copy.deepcopy(images)}}
    for _ in range(2):  # the second may find a document of the first
        (output,) = engine.llm.generate([request], [keep(**rule)], use_tqdm=False)
        engine.check_whole()
        assert output.prompt_token_ids == tokens
        assert tokens.count(reference.model.config.image_token_id) == num_image_tokens
        check_numbers(output, **asked)
        assert tokens_of(output) == reference.generate(tokens, 12, full_layers=(0,), **asked)


def test_another_image_finds_nothing(engine, reference):
    """Where the same words have another image, a document is another one."""
    text, (image,), _ = PROMPTS[0]
    rule = {"ratio": "0.5", "document": 40}
    found, answers = [], []
    for images in ([image], [image], [picture(7, 112, 168)]):
        (output,) = engine.llm.generate(
            [{"prompt": text, "multi_modal_data": {"image": images}}], [keep(**rule)], use_tqdm=False
        )
        tokens = reference.see(text, images)
        assert tokens_of(output) == reference.generate(tokens, 12, full_layers=(0,), **rule)
        found.append(check_numbers(output, **rule)["found_tokens"])
        answers.append(tokens_of(output))
    assert found[1:] == [40, 0]
    assert answers[2] != answers[0]
