"""Tiny vision-language models with random weights, and the reference for their prompts with images.

In transformers, their processors need torchvision. PyPI's build for Linux is for CUDA and cannot be imported with a CPU
build of PyTorch; see "PyTorch for CPUs" in docs/quick_start.md for an index with builds for CPUs.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from reference import Reference
from safetensors.torch import load_file, save_file
from tiny import SHAPE, SLIDING_WINDOW, llama4
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, PretrainedConfig

# More embeddings than words in the demo model's tokenizer.
TEXT = {**SHAPE, "vocab_size": 49216, "hidden_size": 128}
QWEN_WORDS = {
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
PIXTRAL_WORDS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
LLAMA_WORDS = {
    "image_token": "<|image|>",
    "patch_token": "<|patch|>",
    "start_of_image_token": "<|image_start|>",
    "end_of_image_token": "<|image_end|>",
    "tile_x_separator_token": "<|tile_x_separator|>",
    "tile_y_separator_token": "<|tile_y_separator|>",
}
IDEFICS_WORDS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_token": "<global-img>",
    **{f"row_{row}_col_{column}": f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)},
}
INTERN_WORDS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
GEMMA_WORDS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


class Family(NamedTuple):
    """A kind of vision-language model.

    Attributes:
        make: Makes configuration and processor, with the words of a tokenizer's folder and a few more.
        image: Placeholder of an image in a prompt.
        num_tokens: Returns the number of tokens of an image, by height and width in pixels.
    """

    make: Callable[[Path], tuple[PretrainedConfig, Any]]
    image: str
    num_tokens: Callable[[int, int], int]


def tokenizer_of(folder: Path, **words: str) -> Any:
    """Returns the tokenizer with more words, by the names of its attributes."""
    return transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=words)


def qwen_tokenizer(folder: Path) -> tuple[Any, dict[str, int]]:
    tokenizer = tokenizer_of(folder, **QWEN_WORDS)
    return tokenizer, {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in QWEN_WORDS}


def qwen2_5_vl(folder: Path) -> tuple[PretrainedConfig, Any]:
    """An image takes one token per 28 x 28 pixels; its positions have three dimensions."""
    tokenizer, tokens = qwen_tokenizer(folder)
    del tokens["vision_end_token_id"]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=transformers.Qwen2_5_VLTextConfig(**TEXT, rope_parameters=rope).to_dict(),
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
        tie_word_embeddings=True,
        **tokens,
    )
    images = transformers.Qwen2VLImageProcessor(min_pixels=28**2, max_pixels=400 * 28**2)
    videos = transformers.Qwen2VLVideoProcessor()
    return config, transformers.Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=None)


def qwen3_vl(folder: Path) -> tuple[PretrainedConfig, Any]:
    """One token per 32 x 32 pixels, with QK-norm; the first layers also add features of an image (DeepStack)."""
    tokenizer, tokens = qwen_tokenizer(folder)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config=transformers.Qwen3VLTextConfig(**TEXT, rope_parameters=rope).to_dict(),
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 1,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=True,
        **tokens,
    )
    size = {"shortest_edge": 32**2, "longest_edge": 64 * 32**2}
    images = transformers.Qwen2VLImageProcessor(patch_size=16, size=size)
    videos = transformers.Qwen3VLVideoProcessor()
    return config, transformers.Qwen3VLProcessor(images, tokenizer, videos, chat_template=None)


def gemma3(folder: Path) -> tuple[PretrainedConfig, Any]:
    """Every image takes 16 tokens, between two special ones and line breaks; two of three layers have windows."""
    tokenizer = tokenizer_of(folder, **GEMMA_WORDS)
    tokenizer.add_tokens(["\n" * times for times in range(1, 5)])  # vLLM searches for them between images
    ids = {f"{name}_index": getattr(tokenizer, f"{name}_id") for name in GEMMA_WORDS}
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    text = {
        **TEXT,
        "num_hidden_layers": len(types),
        "layer_types": types,
        "sliding_window": SLIDING_WINDOW,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": False,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": 112,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text).to_dict(),
        vision_config=vision,
        mm_tokens_per_image=16,
        tie_word_embeddings=False,
        **ids,
    )
    images = transformers.Gemma3ImageProcessor(size={"height": 112, "width": 112})
    return config, transformers.Gemma3Processor(images, tokenizer, image_seq_length=16)


def llava(folder: Path) -> tuple[PretrainedConfig, Any]:
    """Llama after a vision tower: every image takes 16 tokens."""
    tokenizer = tokenizer_of(folder, image_token="<image>")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "image_size": 56,
        "patch_size": 14,
    }
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.SiglipVisionConfig(**vision),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=16,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    images = transformers.SiglipImageProcessor(size={"height": 56, "width": 56})
    return config, transformers.LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="full")


def pixtral_vision() -> PretrainedConfig:
    return transformers.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        head_dim=32,
        image_size=112,
        patch_size=14,
    )


def pixtral(folder: Path) -> tuple[PretrainedConfig, Any]:
    """Mistral after a vision tower: one token per 14 x 14 pixels of an image of at most 112, and one after each row."""
    tokenizer = tokenizer_of(folder, **PIXTRAL_WORDS)
    config = transformers.LlavaConfig(
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        vision_config=pixtral_vision(),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    images = transformers.PixtralImageProcessor(size={"longest_edge": 112}, patch_size=14)
    return config, transformers.PixtralProcessor(images, tokenizer, patch_size=14)


def mistral3(folder: Path) -> tuple[PretrainedConfig, Any]:
    """The same, with one token for 2 x 2 of Pixtral's."""
    tokenizer = tokenizer_of(folder, **PIXTRAL_WORDS)
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        vision_config=pixtral_vision(),
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=True,
    )
    images = transformers.PixtralImageProcessor(size={"longest_edge": 112}, patch_size=14)
    return config, transformers.PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=2)


def llama4_vision(folder: Path) -> tuple[PretrainedConfig, Any]:
    """Every tile of 56 x 56 pixels takes 4 tokens; an image has up to 4 tiles, and one more of the whole."""
    tokenizer = tokenizer_of(folder, **LLAMA_WORDS)
    vision = {
        "hidden_size": 64,
        "intermediate_size": 256,  # of 2 x 2 patches, which a projector joins
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    }
    config = transformers.Llama4Config(
        text_config=llama4(vocab_size=TEXT["vocab_size"], hidden_size=TEXT["hidden_size"]),
        vision_config=transformers.Llama4VisionConfig(**vision),
        image_token_index=tokenizer.patch_token_id,
        boi_token_index=tokenizer.start_of_image_token_id,
        eoi_token_index=tokenizer.end_of_image_token_id,
        tie_word_embeddings=False,
    )
    images = transformers.Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4)
    return config, transformers.Llama4Processor(images, tokenizer, patch_size=14, chat_template=None)


def internvl(folder: Path) -> tuple[PretrainedConfig, Any]:
    """Qwen2 after a vision tower: every tile of 112 x 112 pixels takes 4 tokens, and so does the whole image."""
    tokenizer = tokenizer_of(folder, **INTERN_WORDS)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": (112, 112),
        "patch_size": (28, 28),
    }
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config=transformers.InternVLVisionConfig(**vision),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=True,
    )
    images = transformers.GotOcr2ImageProcessor(size={"height": 112, "width": 112})
    videos = transformers.InternVLVideoProcessor(size={"height": 112, "width": 112})
    return config, transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=4)


def idefics3(folder: Path) -> tuple[PretrainedConfig, Any]:
    """Llama after a vision tower: every tile of 56 x 56 pixels takes 4 tokens, and so does the whole image."""
    tokenizer = tokenizer_of(folder, **IDEFICS_WORDS)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": 56,
        "patch_size": 14,
    }
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=vision,
        image_token_id=tokenizer.image_token_id,
        pad_token_id=TEXT["pad_token_id"],
        tie_word_embeddings=True,
    )
    sizes = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    images = transformers.Idefics3ImageProcessor(**sizes)
    return config, transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
FAMILIES = {
    "qwen2.5-vl": Family(qwen2_5_vl, QWEN_IMAGE, lambda height, width: height * width // 28**2),
    "qwen3-vl": Family(qwen3_vl, QWEN_IMAGE, lambda height, width: round(height / 32) * round(width / 32)),
    "gemma3": Family(gemma3, "<start_of_image>", lambda _height, _width: 16),
    "llava": Family(llava, "<image>", lambda _height, _width: 16),
    "pixtral": Family(pixtral, "[IMG]", lambda height, width: 8 * 8 * width // height),
    "mistral3": Family(mistral3, "[IMG]", lambda height, width: 4 * 4 * width // height),
    "llama4": Family(llama4_vision, "<|image|>", lambda height, width: 4 * 3),
    "idefics3": Family(idefics3, "<image>", lambda height, width: 4 * 3),
    "internvl": Family(internvl, "<IMG_CONTEXT>", lambda _height, _width: 3 * 4),
}


def write(folder: Path, family: str, tokenizer: Path, chat_template: str | None = None, **changes: Any) -> Path:
    """Writes a model with random weights, a processor, and the words of another model's tokenizer.

    Args:
    folder: Destination.
    family: One of `FAMILIES`.
    tokenizer: Folder of the other model.
    chat_template: Template of the processor.
    changes: Differences of the text model's configuration.

    Returns:
        The folder.
    """
    config, processor = FAMILIES[family].make(tokenizer)
    config.get_text_config().update(changes)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += torch.empty_like(parameter).uniform_(-0.5, 0.5)
            elif "visual" in name or "vision" in name or "projector" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    if config.vision_config.model_type == "siglip_vision_model":
        # As in the files of real models, since vLLM needs these names of the vision tower's weights.
        weights = load_file(folder / "model.safetensors")
        named = {
            re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): weights[name]
            for name in weights
        }
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    processor.chat_template = chat_template
    processor.save_pretrained(folder)
    return folder


def picture(seed: int, height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def ranges_of(tokens: Sequence[int], token: int) -> list[tuple[int, int]]:
    """Returns the first and the last position of each run of a token."""
    runs = itertools.groupby(range(len(tokens)), key=lambda i: tokens[i] == token)
    positions = [[*run] for is_image, run in runs if is_image]
    return [(run[0], run[-1]) for run in positions]


class VisionReference(Reference):
    """The reference for one prompt with images at a time.

    Args:
        is_causal: Whether attention is causal in images too, as in vLLM on CPUs; otherwise all their tokens see each
        other.

    Attributes:
        ranges: First and last positions of images whose tokens see each other, in the prompt last seen.
    """

    auto_class = AutoModelForImageTextToText
    attention = {"text_config": "any_rows", "vision_config": "sdpa"}  # noqa: RUF012

    def __init__(self, folder: Path, is_causal: bool = True, **options: Any) -> None:
        super().__init__(folder, **options)
        self.is_causal = is_causal
        self.processor = AutoProcessor.from_pretrained(folder)
        decoder, text = self.model.get_decoder(), self.model.config.get_text_config()
        self.decoder = getattr(decoder, "model", decoder)  # Llama 4's has its output layer
        self.has_chunks = "chunked_attention" in (getattr(text, "layer_types", None) or ())
        self.new_cache = lambda: DynamicCache(config=text)

    @torch.inference_mode()
    def see(self, text: str, images: Sequence[Image.Image]) -> list[int]:
        """Embeds the prompt for the next calls as the model does, and returns its tokens."""
        self._begun.clear()
        inputs = self.processor(images=list(images), text=text, return_tensors="pt").to(self.device, self.model.dtype)
        seen: dict[str, Any] = {}
        hook = self.decoder.register_forward_pre_hook(
            lambda _module, _args, given: seen.update(given), with_kwargs=True
        )
        self.model(**inputs)
        hook.remove()
        self._embeddings, self._positions = seen["inputs_embeds"], seen["position_ids"]
        if self._positions is None:
            self._positions = torch.arange(self._embeddings.shape[1], device=self.device)[None]
        self._images, self._deep = seen.get("visual_pos_masks"), seen.get("deepstack_visual_embeds")
        tokens = inputs["input_ids"][0].tolist()
        self.ranges = () if self.is_causal else ranges_of(tokens, self.model.config.image_token_id)
        return tokens

    def _forward(self, cache, tokens, position, num_logits):
        n = self._embeddings.shape[1]
        first = max(position, n)  # first token of the answer
        answered = torch.tensor([tokens[first:]], dtype=torch.long, device=self.device)
        embeddings = self.model.get_input_embeddings()(answered)
        after = self._positions.max() + 1 + torch.arange(first - n, first - n + answered.shape[1], device=self.device)
        positions = self._positions[..., position : len(tokens)]
        positions = torch.cat([positions, after.expand(*positions.shape[:-1], -1)], -1)
        hidden = self.decoder(
            inputs_embeds=torch.cat([self._embeddings[:, position : len(tokens)], embeddings], 1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **({"images": self.ranges, "first_position": position} if self.ranges or self.has_chunks else {}),
            **self._deep_features(position, len(tokens)),
        ).last_hidden_state
        return cache, self.model.get_output_embeddings()(hidden[0, -num_logits:]).float()

    def _deep_features(self, begin: int, end: int) -> dict[str, Any]:
        """Returns the features that the first layers add to the tokens from `begin` to `end`."""
        if self._images is None:
            return {}
        n, before = self._images.shape[1], int(self._images[:, :begin].sum())
        of_prompt = self._images[:, begin:end]
        rows = slice(before, before + int(of_prompt.sum()))
        answer = torch.zeros(1, end - max(begin, n) if end > n else 0, dtype=torch.bool)
        return {
            "visual_pos_masks": torch.cat([of_prompt, answer], 1),
            "deepstack_visual_embeds": [features[rows] for features in self._deep],
        }
