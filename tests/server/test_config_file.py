"""YAML files of options."""

import pytest
from vllm_l2kv_server.config_file import ConfigFileError, read_config_file

OPTIONS = [
    "--port",
    "--kv-full-layers",
    "--kv-default-keep-ratio",
    "--enforce-eager",
    "--no-enforce-eager",
    "--headless",
    "--served-model-name",
    "--compilation-config",
    "--max-model-len",
]


@pytest.fixture
def read(tmp_path):
    def read(text: str) -> list[str]:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return read_config_file(str(path), OPTIONS, comma_lists=["--kv-full-layers"])

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
        ("compilation-config:\n  mode: 3", ['--compilation-config={"mode": 3}']),
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
        read_config_file(str(tmp_path / "none.yaml"), OPTIONS)
