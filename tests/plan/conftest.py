"""Folders that contain only a config."""

import pytest
from transformers import LlamaConfig


@pytest.fixture(scope="session")
def llama_8b(tmp_path_factory) -> str:
    """The shape of Llama-3.1-8B."""
    folder = tmp_path_factory.mktemp("llama-3.1-8b")
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        vocab_size=128256,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return str(folder)
