"""Writes the `config.json` of a shape, which is all that an engine with random weights needs.

python -m benchmarks.speed.shapes 70b FOLDER [--gpus 2 --gpu-gib 79]

Prints the number of layers: as many as fit on the GPUs with a small KV cache, at most the shape's own.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
}
SPARE_GIB = 9.0
"""Memory of each GPU that is not for weights: a small KV cache, activations, CUDA graphs, NCCL's buffers, a margin."""


def main() -> None:
    """Writes one shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu-gib", type=float, default=79.0, help="memory of each")
    args = parser.parse_args()
    config = {**LLAMA, **SHAPES[args.shape]}
    config["num_hidden_layers"] = layers_that_fit(config, args.gpus, args.gpu_gib)
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    sys.stdout.write(f"{config['num_hidden_layers']}\n")


def layers_that_fit(config: dict[str, Any], num_gpus: int, gpu_gib: float) -> int:
    """Returns the number of layers whose bf16 weights fit, at most as many as the shape has.

    Args:
        config: The model's configuration.
        num_gpus: Number of GPUs that share the weights.
        gpu_gib: Memory of each GPU.

    Raises:
        ValueError: Fewer than three fit, so no layer would be left to compress beside two full layers.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"] + config["num_key_value_heads"]
    of_layer = hidden * (2 * heads * config["head_dim"] + 3 * config["intermediate_size"])
    outside = 2 * config["vocab_size"] * hidden
    room = num_gpus * (gpu_gib - SPARE_GIB) * 2**30 / 2 - outside
    fit = min(int(room / of_layer), config["num_hidden_layers"])
    if fit < 3:
        raise ValueError(f"{num_gpus} GPUs of {gpu_gib} GiB hold fewer than 3 layers; raise --gpus or --gpu-gib.")
    return fit


if __name__ == "__main__":
    main()
