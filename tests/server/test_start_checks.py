"""Errors that end a start before the engine starts, in one sentence."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import BertConfig, DeepseekV2Config, DeepseekV3Config, GlmMoeDsaConfig
from vllm_l2kv_server.config_file import option_names
from vllm_l2kv_server.serve import make_parser, parse
from vllm_l2kv_server.serve_options import own_options
from vllm_l2kv_server.start_checks import (
    VLLM_KV_OPTIONS,
    StartError,
    check_address,
    check_model,
    check_parsed,
    check_words,
)
from weights import made_up_weights, write_profile

from vllm_l2kv.profile import Target, fingerprint

OWN = option_names(own_options())
SHARED_MEMORY = Path("/dev/shm")
CPU = ["--dtype", "float32", "--enforce-eager", "--port", "0", "--kv-cache-memory-bytes", "1G"]


@pytest.fixture(scope="module")
def parser():
    return make_parser()


@pytest.fixture
def taken():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def refused(*words: str) -> str:
    with pytest.raises(StartError) as caught:
        check_words(words, OWN)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_vllms_options_that_begin_with_kv():
    names = option_names(make_parser())
    assert {name for name in names if name.startswith("kv-")} - set(OWN) == set(VLLM_KV_OPTIONS)


class TestWords:
    @pytest.mark.parametrize(
        "words",
        [
            [],
            ["m", "--kv-cache-dtype", "auto", "--kv_cache_memory_bytes=1G", "--port=0"],
            ["m", "--kv-transfer-config.kv_role", "kv_both", "--port", "0"],
            ["--kv-events-config", "{}", "m", "--port", "0"],
            ["--port", "no number"],
            ["--port", "99999"],
        ],
    )
    def test_nothing_to_refuse(self, words):
        check_words(words if "--port" in " ".join(words) else [*words, "--port", "0"], OWN)

    @pytest.mark.parametrize("word", ["--kv-keep-ratio", "--kv-keep-ratio=0.5", "--kv_keep_ratio"])
    def test_an_unknown_option(self, word):
        said = "unrecognized option --kv-keep-ratio; did you mean --kv-default-keep-ratio?"
        assert refused("m", word, "0.5", "--port", "0") == said

    def test_an_unknown_key(self, tmp_path):
        path = tmp_path / "c.yaml"
        path.write_text("kv_keep_ratio: 0.5\n")
        said = f"argument --config: {path}: unknown key 'kv-keep-ratio'; did you mean 'kv-default-keep-ratio'?"
        assert refused("--config", str(path)) == said

    @pytest.mark.parametrize("form", ["positional", "option", "file"])
    def test_a_missing_folder(self, tmp_path, form):
        folder, config = tmp_path / "none", tmp_path / "c.yaml"
        config.write_text(f"model: {folder}\n")
        words = {"positional": [str(folder)], "option": ["--model", str(folder)], "file": [f"--config={config}"]}[form]
        assert f"there is no folder {folder}" in refused(*words)

    @pytest.mark.parametrize("form", ["option", "file"])
    def test_a_taken_port(self, tmp_path, taken, form):
        config = tmp_path / "c.yaml"
        config.write_text(f"host: 127.0.0.1\nport: {taken}\n")
        words = {"option": ["--host=127.0.0.1", "--port", str(taken)], "file": ["--config", str(config)]}[form]
        assert refused(*words).startswith(f"argument --port: {taken} is taken on 127.0.0.1; name another")

    def test_the_command_line_wins_over_the_file(self, tmp_path, taken):
        config = tmp_path / "c.yaml"
        config.write_text(f"host: 127.0.0.1\nport: {taken}\n")
        check_words(["--config", str(config), "--port", "0"], OWN)

    @pytest.mark.parametrize("switch", ["--headless", "--data-parallel-multi-port-external-lb"])
    def test_servers_that_listen_elsewhere(self, taken, switch):
        check_words(["m", switch, "--host", "127.0.0.1", "--port", str(taken)], OWN)


class TestAddress:
    def test_it_stays_free(self, tmp_path):
        check_address(None, 0, None)
        check_address("::1", 0, None) if socket.has_ipv6 else None
        path = tmp_path / "socket"
        check_address(None, 0, str(path))
        assert not path.exists()

    @pytest.mark.parametrize("host", ["203.0.113.1", "no.such.host.invalid"])
    def test_an_address_of_another_machine(self, host):
        with pytest.raises(StartError, match=f"argument --host: cannot listen on {host} "):
            check_address(host, 0, None)

    def test_a_socket_that_is_there(self, tmp_path):
        path = tmp_path / "socket"
        path.touch()
        with pytest.raises(StartError, match=r"argument --uds: .*; remove it if no server uses it"):
            check_address(None, 0, str(path))
        assert path.exists()

    def test_a_socket_in_no_folder(self, tmp_path):
        with pytest.raises(StartError, match=r"argument --uds: .*No such file or directory"):
            check_address(None, 0, str(tmp_path / "none" / "socket"))


class TestModel:
    @pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "owner/name", "owner/name:Q4_K_M", "s3://a/b/c"])
    def test_names_pass(self, name):
        check_model(name)

    def test_folders_and_files(self, tmp_path):
        with pytest.raises(StartError, match=f"the folder {tmp_path} holds no config.json"):
            check_model(str(tmp_path))
        (tmp_path / "config.json").touch()
        check_model(str(tmp_path))
        (tmp_path / "model.gguf").touch()
        check_model(str(tmp_path / "model.gguf"))

    @pytest.mark.parametrize("name", ["/no/such", "./no", "../no", "~/no", "models/of/mine"])
    def test_folders_that_do_not_exist(self, name):
        with pytest.raises(StartError, match=f"there is no folder {name}"):
            check_model(name)


class TestParsed:
    """Checks by the model's config alone, within a second after vLLM is imported."""

    def refused(self, parser, *words: str) -> str:
        with pytest.raises(StartError) as caught:
            check_parsed(parse(parser, [*words, *CPU]))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_model_that_is_served(self, parser, llama):
        args = parse(parser, [str(llama), *CPU])
        before = dict(vars(args))
        check_parsed(args)
        assert vars(args) == before

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--decode-context-parallel-size", "2", "--tensor-parallel-size", "2"], "context parallelism"),
            (["--kv-full-layers", "0,99"], "full_layers names layer 99"),
            (["--kv-cache-dtype", "fp8_e5m2"], "--kv-cache-dtype"),
            (["--disable-hybrid-kv-cache-manager"], "--disable-hybrid-kv-cache-manager"),
            (["--max-model-len", "1000000"], "max_model_len"),
            (["--runner", "pooling"], "pooling models"),
        ],
    )
    def test_refusals(self, parser, llama, words, said):
        assert said in self.refused(parser, str(llama), *words)

    def test_a_profile_of_another_model(self, parser, llama, tmp_path):
        path, memory = tmp_path / "p.safetensors", (Target(0.5, (0,), 0.333333, "l2"),)
        write_profile(path, made_up_weights(4, 2, 32), fingerprint(llama), memory)
        check_parsed(parse(parser, [str(llama), "--kv-profile", str(path), *CPU]))
        write_profile(path, made_up_weights(4, 2, 32), memory=memory)
        said = f"{path} was made for another model, made up: shape and RoPE and weights of {llama} differ; "
        assert self.refused(parser, str(llama), "--kv-profile", str(path)).startswith(said)

    def test_a_pooling_model(self, parser, tmp_path):
        BertConfig(vocab_size=100, hidden_size=64, num_attention_heads=4, architectures=["BertModel"]).save_pretrained(
            tmp_path
        )
        said = "vllm-l2kv does not support pooling models (serve them with stock vLLM)."
        assert self.refused(parser, str(tmp_path)) == said

    @pytest.mark.parametrize("config_class", [DeepseekV2Config, DeepseekV3Config, GlmMoeDsaConfig])
    def test_a_model_with_mla(self, parser, tmp_path, config_class):
        name = config_class.__name__.replace("Config", "ForCausalLM")
        config_class(architectures=[name]).save_pretrained(tmp_path)
        said = (
            "vllm-l2kv does not support models with MLA, whose cache holds no keys (serve them with stock vLLM; see "
            "docs/mla.md)."
        )
        assert self.refused(parser, str(tmp_path)) == said
        assert (Path(__file__).parents[2] / "docs" / "mla.md").exists()

    def test_an_invalid_config(self, parser, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        assert self.refused(parser, str(tmp_path))

    def test_heads_that_cannot_be_dealt_out(self, parser, tiny_model):
        folder = tiny_model("llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
        said = "3 KV heads on 2 ranks (set --tensor-parallel-size to a divisor or multiple of them)"
        assert said in self.refused(parser, str(folder), "--tensor-parallel-size", "2")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kv-keep-ratio", "0.5"], "did you mean --kv-default-keep-ratio?"),
        (["/no/such/folder"], "there is no folder /no/such/folder"),
        (["--host", "127.0.0.1", "--port", "TAKEN"], "is taken on 127.0.0.1"),
    ],
)
def test_the_whole_command_without_vllm(taken, words, said, measured):
    """In a process where importing vLLM fails, which proves that the check comes first."""
    code = f"""
import sys
sys.modules["vllm.entrypoints.cli"] = sys.modules["torch"] = None
from vllm_l2kv_server.serve import serve
serve({json.dumps([str(taken) if word == "TAKEN" else word for word in words])})
"""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("vllm-l2kv serve: error: ")
    assert said in line
    measured(start=f"`{' '.join(words)}`", seconds=time.monotonic() - begin, status=2)


class TestLastLine:
    def ended(self, code: str) -> tuple[int, list[str]]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        return done.returncode, done.stderr.splitlines()

    def test_nothing_to_say(self):
        imports = "from vllm_l2kv_server.last_line import LastLine; from vllm_l2kv_server.screen import Screen"
        assert self.ended(f"{imports}; LastLine(Screen())") == (0, [])

    def test_it_comes_after_children_and_what_they_left(self):
        """With a child that ends slowly, and leaked shared memory, which is freed without a message."""
        status, lines = self.ended(
            """
from vllm_l2kv_server.last_line import LastLine
from vllm_l2kv_server.screen import Screen
last_line = LastLine(Screen())
import atexit, subprocess, sys
from multiprocessing.shared_memory import SharedMemory
from multiprocessing import resource_tracker
leaked = SharedMemory(create=True, size=10)
print(leaked.name, file=sys.stderr, flush=True)
child = subprocess.Popen([sys.executable, "-c", "import os, time; time.sleep(1); os.write(2, b'child' + bytes([10]))"])
atexit.register(lambda: sys.stderr.write("at exit\\n"))
last_line.end(3, "this.")
"""
        )
        assert status == 3
        assert lines[-1] == "vllm-l2kv: this."
        assert {"child", "at exit"} <= set(lines)
        assert not any("leaked" in line for line in lines)
        assert not (SHARED_MEMORY / lines[0]).exists()


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_during_imports(number, status):
    """The first seconds of a start."""
    command = [sys.executable, "-m", "vllm_l2kv.cli", "serve", "m", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for_import(process.pid)
    process.send_signal(getattr(signal, number))
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert said.splitlines()[-1] == f"vllm-l2kv: stopped by {number} before it was ready."


def wait_for_import(pid: int) -> None:
    """Waits until the process has loaded torch's library, that is, imports vLLM."""
    deadline = time.monotonic() + 60
    while "libtorch" not in Path(f"/proc/{pid}/maps").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--kv-answer-interval", "0"],
            "argument --kv-answer-interval: N must satisfy 1 <= N <= 2147483647, got 0.",
        ),
        (
            ["--kv-default-max-tokens", "10"],
            "kv_max_tokens must be at least kv_protect_first + kv_protect_last = 68, got 10; raise it or protect fewer "
            "tokens.",
        ),
    ],
)
def test_options_that_are_refused(words, sentence, measured):
    """In a separate process."""
    command = [sys.executable, "-m", "vllm_l2kv.cli", "serve", *words]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"vllm-l2kv serve: error: {sentence}"
    measured(start=f"`{' '.join(words)}`", seconds=time.monotonic() - begin, status=2)
