"""How long a profile of a large model takes and how much GPU memory, with made-up weights.

python -m benchmarks.speed.profile 8b FOLDER --tokenizer MODEL --out profile.jsonl

Writes the weights into FOLDER, 16 GB for the 8B shape. Settings that such a model is given mean nothing.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks.speed.rows import append, where
from benchmarks.speed.shapes import LLAMA, SHAPES
from vllm_l2kv.profile import Profile
from vllm_l2kv.tools.profile.cli import profile

LEFT_OUT = ("kinds", "search", "learned")
"""Of what a profile says of itself: weights that are made up answer nothing."""


def main() -> None:
    """Makes a profile of one shape, with the amounts that the command has on this device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", required=True, help="folder or name of a model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write(args.folder, args.shape, args.tokenizer, args.device)
    path = args.folder / "profile.safetensors"
    profile([str(args.folder), "-o", str(path), "--device", args.device])
    about = {name: value for name, value in Profile.read(path).about.items() if name not in LEFT_OUT}
    append(args.out, {**where(), "shape": args.shape, **about})


def write(folder: Path, shape: str, tokenizer: str, device: str) -> None:
    """Writes a model of a shape with random weights in bf16, and the tokenizer of another one."""
    config = LlamaConfig(**{**LLAMA, **SHAPES[shape]})
    torch.manual_seed(0)
    with torch.device("cpu" if device == "cpu" else "cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main()
