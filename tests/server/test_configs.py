"""The files in configs/: accepted by the parser, valid by the schema, and able to serve."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine import keep
from jsonschema import Draft7Validator
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine
from vllm_l2kv_server.config_file import option_names
from vllm_l2kv_server.serve import make_parser, parse
from vllm_l2kv_server.serve_options import INTERVALS, own_options

from vllm_l2kv.cli import main
from vllm_l2kv.cli_types import heads_in_words
from vllm_l2kv.params import FIELDS_WITH_DEFAULTS, OFFERED_SCORERS, PROFILE_SCORERS
from vllm_l2kv.profile import setting_of

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
PROMPT = [(i * 31) % 40_000 + 1000 for i in range(300)]


@pytest.fixture(scope="module")
def parser():
    return make_parser()


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads((FOLDER / "schema.json").read_text())


def test_the_schema_is_current(capsys):
    """If this fails, run `vllm-l2kv config-schema > configs/schema.json`."""
    main(["config-schema"])
    assert capsys.readouterr().out == (FOLDER / "schema.json").read_text()


def test_the_schema_has_our_options(schema):
    Draft7Validator.check_schema(schema)
    assert list(schema["properties"]) == option_names(own_options())
    assert all("description" in key for key in schema["properties"].values())


def options_of(path: Path) -> dict[str, Any]:
    """Returns the options of a file, with the profile replaced by the options that it sets.

    Full layers and scorer have their defaults where a file leaves them out, so that a profile can set them.
    """
    options = yaml.safe_load(path.read_text())
    profile, memory, classes = (options.pop(key, None) for key in ("kv-profile", "kv-memory", "kv-classes"))
    setting = profile and setting_of(path.parent / profile, memory, classes=classes, scorer=options.get("kv-scorer"))
    if setting:
        options = {
            "kv-full-layers": ",".join(map(str, setting.full_layers)),
            "kv-full-heads": heads_in_words(setting.full_heads),
            "kv-default-keep-ratio": setting.keep_ratio,
            "kv-scorer": setting.scorer,
            "kv-granularity": setting.granularity,
        } | options
    return {"kv-full-layers": "0,1", "kv-scorer": "l2"} | options


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
class TestEach:
    def test_the_parser_accepts_it(self, parser, path):
        options = options_of(path)
        args = parse(parser, ["--config", str(path)])
        ours = args.additional_config["l2kv"]
        layers = options.pop("kv-full-layers").split(",")
        # With full heads there are no full layers.
        assert ours.pop("full_layers") == [int(layer) for layer in layers if layer]
        heads = {int(layer): tuple(of) for layer, of in ours.pop("full_heads").items()}
        assert heads_in_words(heads) == options.pop("kv-full-heads", "")
        keys = {field.option.removeprefix("--"): field.name for field in FIELDS_WITH_DEFAULTS}
        keys |= {option: attribute for option, (attribute, _) in INTERVALS.items()}
        given = {keys[option]: value for option, value in options.items() if option in keys}
        assert {"kv_protect_first", "kv_protect_last", "kv_scorer"} <= given.keys()
        assert given.items() <= ours.items()

    def test_it_is_valid_by_the_schema(self, schema, path):
        Draft7Validator(schema).validate(yaml.safe_load(path.read_text()))
        assert path.read_text().splitlines()[0] == "# yaml-language-server: $schema=schema.json"

    @pytest.mark.engine
    def test_it_serves(self, parser, monkeypatch, path, tiny_model, tmp_path):
        """Starts an engine with these options, those that a CPU needs, and a tiny model in place of the real one.

        A profile belongs to the real model, so its settings are given as options.
        """
        options = options_of(path)
        if options["kv-scorer"] in PROFILE_SCORERS:
            options["kv-scorer"] = "l2"
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
        # With as many layers and KV heads as the real demo model has, since the files name them.
        num_layers = 30 if "demo" in path.stem else 4
        model = (
            tiny_model("gemma3", num_blocks=6)
            if "gemma" in path.stem
            else tiny_model(
                "llama", hidden_size=192, num_hidden_layers=num_layers, num_attention_heads=6, num_key_value_heads=3
            )
        )
        monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")  # it would override the option
        words = ["--dtype=float32", "--enforce-eager", "--kv-cache-dtype=auto", "--kv-cache-memory-bytes=64M"]
        words += ["--disable-log-stats"]  # otherwise only a front end of the server takes its stats out
        words += [] if path.stem == "long-context" else ["--max-model-len=1024"]
        args = parse(parser, [str(model), "--config", str(tmp_path / "config.yaml"), *words])
        engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(args))
        engine.engine_core._finalizer.detach()  # other tests' engines share the process groups
        engine.add_request("a", {"prompt_token_ids": PROMPT}, keep(0.5))
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        assert outputs[-1].kv_transfer_params["kv_cache"]["evicted_tokens"] == 150


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kv-default-keep-ratio: half", "'half' is not of type 'number'"),
        ("kv-default-keep-ratio: 1.5", "1.5 is greater than the maximum of 1"),
        ("kv-default-max-tokens: 0", "0 is less than the minimum of 1"),
        ("kv-prompt-interval: 2.5", "2.5 is not of type 'integer'"),
        ("kv-scorer: l3", f"'l3' is not one of {list(OFFERED_SCORERS)}"),
        ("max-body-mib: high", "'high' is not of type 'integer'"),
        ("playground: 3", "3 is not of type 'boolean'"),
    ],
)
def test_the_schema_refuses(schema, text, message):
    (error,) = Draft7Validator(schema).iter_errors(yaml.safe_load(text))
    assert message in error.message
