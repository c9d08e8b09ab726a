"""YAML files of options."""

import argparse
import json

import pytest
from vllm_l2kv_server.config_file import ConfigFileError, option_names, read_config_file

from vllm_l2kv.cli_types import add_full_heads, layers, positive, ratio


def some_parser() -> argparse.ArgumentParser:
    """Returns a parser with an option of every kind."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("model_tag", nargs="?")
    add("--config")
    add("--host")
    add("--port", type=int, default=8000)
    add("--kv-full-layers", type=layers, default=(0, 1))
    add_full_heads(add, "--kv-full-heads")
    add("--kv-default-keep-ratio", type=ratio)
    add("--max-body-mib", type=positive)
    add("--enforce-eager", action=argparse.BooleanOptionalAction)
    add("--headless", action="store_true")
    add("--served-model-name", nargs="+")
    add("--lora-modules", nargs="+")
    add("--middleware", action="append", type=str)
    add("--hf-token", type=str, nargs="?", const=True)
    add("--compilation-config", "-cc", type=json.loads)
    add("--max-model-len", type=int)
    add("--dtype", choices=["auto", "float32"])
    return parser


@pytest.fixture
def read(tmp_path):
    def read(text: str) -> list[str]:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return read_config_file(str(path), some_parser())

    return read


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("# nothing\n", []),
        ("port: 8123", ["--port=8123"]),
        ("max_model_len: 4096", ["--max-model-len=4096"]),
        ("kv-default-keep-ratio: 0.5", ["--kv-default-keep-ratio=0.5"]),
        ("kv-full-layers: [0, 1]", ["--kv-full-layers=0,1"]),
        ('kv-full-layers: "0,1"', ["--kv-full-layers=0,1"]),
        ("kv-full-layers: []", ["--kv-full-layers="]),
        ('kv-full-layers: ""', ["--kv-full-layers="]),
        ("kv-full-layers: 3", ["--kv-full-layers=3"]),
        ("kv-full-heads: {7: [0, 2], 12: [1]}", ['--kv-full-heads={"7": [0, 2], "12": [1]}']),
        ("kv-full-heads: {}", ["--kv-full-heads={}"]),
        ("kv-full-heads: 7:0,2 12:1", ["--kv-full-heads=7:0,2 12:1"]),
        ("enforce-eager: true", ["--enforce-eager"]),
        ("enforce-eager: false", ["--no-enforce-eager"]),
        ("headless: false", []),
        ("port:", []),
        ("served-model-name: [a, b]", ["--served-model-name", "a", "b"]),
        ("served-model-name: [a, 1]", ["--served-model-name", "a", "1"]),
        ("served-model-name: a", ["--served-model-name=a"]),
        ("served-model-name: []", []),
        ("middleware: [a, b]", ["--middleware=a", "--middleware=b"]),
        ("middleware: []", []),
        ("hf-token: true", ["--hf-token"]),
        ("hf-token: secret", ["--hf-token=secret"]),
        ("compilation-config:\n  mode: 3", ['--compilation-config={"mode": 3}']),
        ("compilation-config: [1, 2]", ["--compilation-config=[1, 2]"]),
        ("lora-modules: [{name: a}]", ["--lora-modules", '{"name": "a"}']),
        ("dtype: float32", ["--dtype=float32"]),
    ],
)
def test_words(read, text, words):
    assert read(text) == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kv-default-keep-ration: 1", "unknown key 'kv-default-keep-ration'; did you mean 'kv-default-keep-ratio'?"),
        ("prot: false", "unknown key 'prot'; did you mean 'port'?"),
        ("1: 2", "unknown key '1'"),
        ("no-enforce-eager: true", "unknown key 'no-enforce-eager'; did you mean 'enforce-eager'?"),
        ("config: other.yaml", "unknown key 'config'"),
        ("a key: 1", "unknown key 'a key'"),
        ("port=1: 2", "unknown key 'port=1'"),
        ("port: [1, 2]", "config.yaml: argument --port: invalid int value: '1,2'"),
        ("host: [a, b]", 'config.yaml: argument --host: one value is expected, got ["a", "b"]'),
        ("port: false", "config.yaml: argument --port: expected one argument"),
        ("port: true", "config.yaml: argument --port: expected one argument"),
        ("port: high", "config.yaml: argument --port: invalid int value: 'high'"),
        ("enforce-eager: 1", "config.yaml: argument --enforce-eager/--no-enforce-eager: ignored explicit argument '1'"),
        ("enforce-eager: {a: b}", '--no-enforce-eager: ignored explicit argument \'{"a": "b"}\''),
        ("kv-default-keep-ratio: 2", "--kv-default-keep-ratio: R must satisfy 0 < R <= 1, got 2"),
        ("kv-default-keep-ratio: 0", "--kv-default-keep-ratio: R must satisfy 0 < R <= 1, got 0"),
        ("max_body_mib: 0", "config.yaml: argument --max-body-mib: N must satisfy 1 <= N <= 2147483647, got 0"),
        ("kv-full-layers: [0, -1]", "argument --kv-full-layers: must be layer indices >= 0 separated by commas"),
        ("kv-full-heads: {7: 0}", "argument --kv-full-heads: must be LAYER:HEAD,HEAD with indices >= 0"),
        ("dtype: int8", "config.yaml: argument --dtype: invalid choice: 'int8' (choose from "),
        ("[a, b]", "must hold a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_errors(read, text, message):
    with pytest.raises(ConfigFileError) as caught:
        read(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(ConfigFileError, match="cannot read"):
        read_config_file(str(tmp_path / "none.yaml"), some_parser())


def test_names():
    names = option_names(some_parser())
    assert {"port", "kv-full-layers", "headless", "compilation-config"} <= set(names)
    assert not {"config", "help", "no-enforce-eager", "model-tag", "cc"} & set(names)
