"""YAML files of options."""

import argparse
import json

import pytest
from vllm_l2kv_server.config_file import ConfigFileError, read_config_file
from vllm_l2kv_server.config_keys import keys_of

from vllm_l2kv.cli_types import layers, positive, ratio


def some_parser() -> argparse.ArgumentParser:
    """An option of every kind."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("model_tag", nargs="?")
    add("--config")
    add("--port", type=int, default=8000, help="where it listens. More of it.")
    add("--kv-full-layers", type=layers, default=(0, 1))
    add("--kv-default-keep-ratio", type=ratio)
    add("--max-body-mib", type=positive)
    add("--enforce-eager", action=argparse.BooleanOptionalAction)
    add("--headless", action="store_true")
    add("--served-model-name", nargs="+")
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
        return read_config_file(str(path), keys_of(some_parser()))

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
        ("enforce-eager: true", ["--enforce-eager"]),
        ("enforce-eager: false", ["--no-enforce-eager"]),
        ("headless: false", []),
        ("port:", []),
        ("served-model-name: [a, b]", ["--served-model-name", "a", "b"]),
        ("served-model-name: a", ["--served-model-name=a"]),
        ("middleware: [a, b]", ["--middleware=a", "--middleware=b"]),
        ("middleware: []", []),
        ("hf-token: true", ["--hf-token"]),
        ("hf-token: secret", ["--hf-token=secret"]),
        ("compilation-config:\n  mode: 3", ['--compilation-config={"mode": 3}']),
        ("compilation-config: [1, 2]", ["--compilation-config=[1, 2]"]),
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
        ("port: [1, 2]", "config.yaml: port: [1, 2] is not of type 'integer'"),
        ("port: false", "config.yaml: port: False is not of type 'integer'"),
        ("port: high", "config.yaml: port: 'high' is not of type 'integer'"),
        ("enforce-eager: 1", "config.yaml: enforce-eager: 1 is not of type 'boolean'"),
        ("enforce-eager: {a: b}", "config.yaml: enforce-eager: {'a': 'b'} is not of type 'boolean'"),
        ("served-model-name: [a, 1]", "config.yaml: served-model-name: 1 is not of type 'string'"),
        ("kv-default-keep-ratio: 2", "config.yaml: kv-default-keep-ratio: 2 is greater than the maximum of 1"),
        ("kv-default-keep-ratio: 0", "config.yaml: kv-default-keep-ratio: 0 is less than or equal to the minimum of 0"),
        ("max_body_mib: 0", "config.yaml: max_body_mib: 0 is less than the minimum of 1"),
        ("kv-full-layers: [0, -1]", "config.yaml: kv-full-layers: -1 is less than the minimum of 0"),
        ("dtype: int8", "config.yaml: dtype: 'int8' is not one of ['auto', 'float32']"),
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
        read_config_file(str(tmp_path / "none.yaml"), {})


def test_schemas_say_type_default_and_first_sentence():
    keys = keys_of(some_parser())
    assert keys["port"].schema == {"type": "integer", "default": 8000, "description": "where it listens"}
    assert keys["kv-full-layers"].schema["default"] == [0, 1]
    assert keys["compilation-config"].option == "--compilation-config"
    assert not {"config", "help", "no-enforce-eager", "model_tag", "cc"} & set(keys)
