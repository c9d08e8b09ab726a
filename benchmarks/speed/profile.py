"""Time and GPU memory of making a profile of a large model, with random weights.

python -m benchmarks.speed.profile 8b FOLDER --tokenizer MODEL --out profile.jsonl

Writes the weights into FOLDER, 16 GB for the 8B shape. The settings in such a profile mean nothing.
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
"""Parts of a profile's description that rows leave out, since a model with random weights answers nothing."""


def main() -> None:
    """Makes a profile of one shape, with the command's default amounts for this device."""
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
    """Writes a model of a shape with random weights in bf16, and the tokenizer of another model."""
    config = LlamaConfig(**{**LLAMA, **SHAPES[shape]})
    torch.manual_seed(0)
    with torch.device("cpu" if device == "cpu" else "cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main()
