"""The Dockerfiles: lint, documented properties, and the CPU image's steps replayed. No Docker is needed."""

import json
import os
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import httpx
import pytest
from dockerfile import instructions, stages
from http_server import Server, expected_usage
from packaging.requirements import Requirement
from usages import TINY_SHARE

DOCKERFILES = ["Dockerfile", "Dockerfile.cpu"]


@pytest.fixture(params=DOCKERFILES)
def dockerfile(request, root) -> Path:
    return root / "docker" / request.param


def test_lint(tool, dockerfile):
    done = subprocess.run([tool("hadolint"), str(dockerfile)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_what_a_container_starts(dockerfile):
    image = dict(stages(dockerfile)[-1])
    assert json.loads(image["ENTRYPOINT"]) == ["vllm-l2kv", "serve"]  # exec form: signals reach the server
    assert image["USER"] == "2000:0"
    assert image["EXPOSE"] == "8000"
    assert "/health" in image["HEALTHCHECK"]


def test_base_images_are_pinned(dockerfile):
    arguments = dict(rest.split("=") for name, rest in instructions(dockerfile) if name == "ARG")
    for name, rest in instructions(dockerfile):
        if name == "FROM":
            image = rest.split()[0].replace("${VLLM_VERSION}", arguments.get("VLLM_VERSION", ""))
            tag = image.partition(":")[2]
            assert any(character.isdigit() for character in tag), image


def test_the_gpu_image_is_of_the_vllm_that_we_support(root):
    (version,) = [rest for name, rest in instructions(root / "docker" / "Dockerfile") if name == "ARG"]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (vllm,) = (each for each in map(Requirement, project["optional-dependencies"]["cuda"]) if each.name == "vllm")
    assert version.removeprefix("VLLM_VERSION=") in vllm.specifier


def test_the_build_context_has_every_copied_file(root, dockerfile):
    let_in = {line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name, rest in instructions(dockerfile):
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert source.split("/")[0] in let_in
                assert (root / source).exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_cpu_image_step_by_step(root, tiny_model, tmp_path):
    """Runs its first stage in a scratch folder, then the server from there, with that environment only.

    The second stage's steps need root and are left out: libnuma1, the user, and copying.
    """
    Replay(root, tmp_path).run(stages(root / "docker" / "Dockerfile.cpu")[0])
    words = "--served-model-name tiny --dtype float32 --enforce-eager --max-model-len 2048 --kv-full-layers 0"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        program = [str(tmp_path / "opt" / "venv" / "bin" / "vllm-l2kv")]
        server = Server(tmp_path / "server.log", str(tiny_model("llama")), *words.split(), program=program)
    with server:
        body = {"model": "tiny", "prompt": list(range(100, 300)), "max_tokens": 4, "kv_keep_ratio": 0.5}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    usage = answer.json()["usage"]
    assert usage["kv_cache"] == expected_usage(200, usage["completion_tokens"], full_share=TINY_SHARE, keep_ratio=0.5)


class Replay:
    """Runs COPY, WORKDIR and RUN of a stage, with the absolute paths of the image below a folder."""

    def __init__(self, context: Path, image: Path) -> None:
        self.context, self.image, self.workdir = context, image, image

    def run(self, stage: list[tuple[str, str]]) -> None:
        for name, rest in stage:
            if name == "WORKDIR":
                self.workdir = self.image / rest.lstrip("/")
                self.workdir.mkdir(parents=True)
            elif name == "COPY":
                self.copy(*shlex.split(rest))
            elif name == "RUN":
                self.command(rest)
            else:
                assert name == "ARG", name

    def copy(self, *words: str) -> None:
        *sources, target = words
        for source in sources:
            there = self.workdir / target
            if (self.context / source).is_dir():
                shutil.copytree(
                    self.context / source, there, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
                )
            else:
                there.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.context / source, there)

    def command(self, text: str) -> None:
        here = text.replace("/opt/venv", str(self.image / "opt" / "venv"))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            ["bash", "-c", here], cwd=self.workdir, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
