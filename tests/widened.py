"""A model with one more KV head and the same answers, since two ranks cannot share the demo model's three heads."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def widened(folder: Path, model: Path) -> Path:
    """Writes `model`, of Llama's architecture, with one more KV head and its query heads.

    They are copies of the first ones, and their outputs are multiplied by zeros. Heads are compacted independently, so
    the other heads compute the same as before.
    """
    llama = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    config = llama.config
    head_dim = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in llama.model.layers:
        attention = layer.self_attn
        for projection, num_heads in ((attention.q_proj, group), (attention.k_proj, 1), (attention.v_proj, 1)):
            replace(projection, torch.cat([projection.weight, projection.weight[: num_heads * head_dim]]))
        unheard = torch.zeros_like(attention.o_proj.weight[:, : group * head_dim])
        replace(attention.o_proj, torch.cat([attention.o_proj.weight, unheard], dim=1))
    config.head_dim = head_dim
    config.num_attention_heads += group
    config.num_key_value_heads += 1
    llama.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (model / name).exists():
            shutil.copy(model / name, folder)
    return folder


def replace(projection: torch.nn.Linear, weight: torch.Tensor) -> None:
    projection.weight = torch.nn.Parameter(weight.detach())
