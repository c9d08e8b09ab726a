"""Defaults of an engine: the same for every way to start or measure it."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm_l2kv_server.routes import _describe
from vllm_l2kv_server.serve import make_parser, parse
from weights import judged, made_up_weights, write_profile

import vllm_l2kv
from vllm_l2kv.params import FIELDS_WITH_DEFAULTS, CompressionParams
from vllm_l2kv.profile import Target
from vllm_l2kv.settings import CONFIG_KEY, Settings
from vllm_l2kv.tools.bench.client import body_of
from vllm_l2kv.tools.evaluation import cli as evaluation
from vllm_l2kv.tools.evaluation.cli import _eval_parser
from vllm_l2kv.tools.evaluation.variants import variants
from vllm_l2kv.tools.plan.cli import _parser as plan_parser
from vllm_l2kv.tools.plan.cli import take_profile

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "full_layers": (0, 1),
    "full_heads": {},
    "prompt_interval": 2048,
    "answer_interval": 256,
    "kv_keep_ratio": 1.0,
    "kv_max_tokens": None,
    "kv_protect_first": 4,
    "kv_protect_last": 64,
    "kv_scorer": "l2",
    "kv_granularity": "token",
}
OF_REQUESTS = {"kv_prefix_tokens": None, "kv_prefix_messages": None}
"""Fields without an operator's default."""


def of(settings: Settings) -> dict[str, Any]:
    own = {
        name: getattr(settings, name) for name in ("full_layers", "full_heads", "prompt_interval", "answer_interval")
    }
    fields = settings.defaults.as_fields()
    assert fields.pop("kv_prefix_tokens") is None
    return {**own, **fields}


def served(*words: str) -> dict[str, Any]:
    return of(Settings.from_config(parse(make_parser(), ["m", *words]).additional_config))


def file_of(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_the_dataclasses():
    assert of(Settings()) == EXPECTED
    assert of(Settings(defaults=CompressionParams())) == EXPECTED


@pytest.mark.parametrize("config", [None, {}, {"other": {}}, {CONFIG_KEY: {}}, {CONFIG_KEY: None}])
def test_additional_config_without_settings(config):
    assert of(Settings.from_config(config)) == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_additional_config_with_one_setting(name):
    """Settings that are not given keep their defaults, whatever else is given."""
    other = {
        "full_layers": (3,),
        "full_heads": {3: (1,)},
        "kv_keep_ratio": 0.5,
        "kv_max_tokens": 700,
        "kv_scorer": "keydiff",
        "kv_granularity": "block",
    }
    value = other.get(name, 7)
    assert of(Settings.from_config({CONFIG_KEY: {name: value}})) == {**EXPECTED, name: value}


@pytest.mark.parametrize("name", OF_REQUESTS)
def test_a_document_has_no_default(name):
    """Each request has its own prompt, so an operator cannot set where its document ends."""
    assert name not in Settings().as_config()
    with pytest.raises(ValueError, match=f"Unknown key '{name}'"):
        Settings.from_config({CONFIG_KEY: {name: 7}})
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        vllm_l2kv.engine_args(**{name.removeprefix("kv_"): 7})
    with pytest.raises(SystemExit):
        served(f"--{name.replace('_', '-')}", "7")


def test_all_settings_have_an_expected_default():
    assert {name for name in EXPECTED if name.startswith("kv_")} == {field.name for field in FIELDS_WITH_DEFAULTS}


def test_engine_args():
    assert of(Settings.from_config(vllm_l2kv.engine_args()["additional_config"])) == EXPECTED


def test_compression_returns_only_given_fields():
    assert vllm_l2kv.compression(keep_ratio=0.5) == {"kv_keep_ratio": 0.5}


def test_serve(tmp_path):
    assert served() == EXPECTED
    assert served("--config", file_of(tmp_path, "")) == EXPECTED
    assert served("--config", file_of(tmp_path, "port: 8123\n")) == EXPECTED
    assert served("--kv-default-keep-ratio", "0.5") == {**EXPECTED, "kv_keep_ratio": 0.5}
    full = {**EXPECTED, "full_heads": {7: (0, 2), 12: (1,)}}
    assert served("--kv-full-heads", "7:0,2", "12:1") == full
    assert served("--config", file_of(tmp_path, "kv-full-heads: {12: [1], 7: [0, 2]}\n")) == full


def test_help_of_serve():
    text = make_parser().format_help()
    shown = {
        "--kv-default-max-tokens": "none",
        "--kv-protect-first": 4,
        "--kv-protect-last": 64,
        "--kv-scorer": "l2",
        "--kv-prompt-interval": 2048,
        "--kv-answer-interval": 256,
    }
    for option, default in shown.items():
        described = text.partition(f"  {option}")[2].partition("\n  --")[0]
        assert f"(default: {default})" in " ".join(described.split())


def test_the_paper_stays_available():
    """Without protected rows; all else has the usual defaults."""
    expected = {**EXPECTED, "kv_protect_first": 0, "kv_protect_last": 0}
    assert served("--config", str(ROOT / "configs" / "paper.yaml")) == expected


def test_plain_vllm_serve_as_the_docs_say():
    text = (ROOT / "docs" / "quick_start.md").read_text()
    (words,) = re.findall(r"--additional-config ('.*?')$", text, re.MULTILINE)
    assert of(Settings.from_config(json.loads(shlex.split(words)[0]))) == EXPECTED


def test_the_helm_chart():
    values = yaml.safe_load((ROOT / "docker" / "kubernetes" / "production-stack-values.yaml").read_text())
    words = values["servingEngineSpec"]["modelSpec"][0]["vllmConfig"]["extraArgs"]
    config = json.loads(words[words.index("--additional-config") + 1])
    assert of(Settings.from_config(config)) == EXPECTED
    assert not {"kv_protect_first", "kv_protect_last"} & config[CONFIG_KEY].keys(), "the default need not be spelled"


def test_the_server_describes_its_defaults():
    described = _describe(["m"], Settings.from_config({CONFIG_KEY: {}}), [])
    fields = {field.name: field.default for field in described.fields}
    intervals = {"prompt_interval": described.prompt_interval, "answer_interval": described.answer_interval}
    full = {"full_layers": tuple(described.full_layers), "full_heads": described.full_heads}
    assert {**full, **intervals, **fields} == {**EXPECTED, **OF_REQUESTS}


@pytest.mark.parametrize("task", ["perplexity", "passkey", "needle", "ruler"])
def test_eval(task):
    """It measures a server's behaviour with only the ratio given."""
    options = _eval_parser().parse_args([task, "m", "--ratios", "0.5"])
    evaluation.take_profile(options)
    assert options.full_layers == EXPECTED["full_layers"]
    (measured,) = {
        variant
        for variant in variants(options.scorers, options.ratios, options.protect, options.granularities)
        if variant.scorer == EXPECTED["kv_scorer"] and variant.keep_ratio < 1
    }
    assert of(Settings(options.full_layers, defaults=measured)) == {**EXPECTED, "kv_keep_ratio": 0.5}


def test_variants_named_by_nothing_but_scorers_and_ratios():
    assert Settings().defaults.override({"kv_keep_ratio": 0.5}) in variants(["l2"], [0.5])


def test_plan():
    options = plan_parser().parse_args(["m", "--context", "100", "--output", "10"])
    take_profile(options)
    assert options.full_layers == EXPECTED["full_layers"]
    assert options.protect == (EXPECTED["kv_protect_first"], EXPECTED["kv_protect_last"])


@pytest.mark.parametrize(("num_ranks", "heads"), [(1, {2: (0, 1), 7: (1,)}), (2, {})])
def test_what_a_profile_keeps_full(tmp_path, num_ranks, heads):
    """Two ranks cannot share head 1 of layer 7. `eval` has one rank."""
    memory = Target(0.5, (2, 7), 0.375, "keydiff"), Target(0.5, (), 0.411765, "l2", {2: (0, 1), 7: (1,)})
    about = judged(zip(memory, [(0.5, 0.5), (0.9, 0.9)], strict=True))
    write_profile(tmp_path / "p", made_up_weights(10, 2, 32), memory=memory, about=about)
    words = ["--kv-profile", str(tmp_path / "p")]
    ranks = ["--tensor-parallel-size", str(num_ranks)]
    of_server = served(*words, *ranks)
    full = {"full_layers": () if heads else (2, 7), "full_heads": heads}
    assert {name: of_server[name] for name in full} == full
    planned = plan_parser().parse_args(["m", "--context", "100", "--output", "10", *words, *ranks])
    take_profile(planned)
    assert {name: getattr(planned, name) for name in full} == full
    assert planned.ratio == [of_server["kv_keep_ratio"]]
    if num_ranks == 1:
        evaluated = _eval_parser().parse_args(["passkey", "m", *words])
        evaluation.take_profile(evaluated)
        assert {name: getattr(evaluated, name) for name in full} == full
        assert (evaluated.ratios, evaluated.scorers) == ([of_server["kv_keep_ratio"]], [of_server["kv_scorer"]])


def test_bench():
    """It sets a ratio, and leaves all other fields to the server."""
    body = body_of("m", [1], 4, {"kv_keep_ratio": 0.5})
    assert [name for name in body if name.startswith("kv_")] == ["kv_keep_ratio"]
