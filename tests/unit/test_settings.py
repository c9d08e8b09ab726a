import json

import pytest

from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.params import EVALUATION_SCORERS, SCORERS, CompressionParams
from vllm_l2kv.settings import CONFIG_KEY, Settings

OWN = "my.scorers:Recent"


def test_settings_pass_through_additional_config_unchanged():
    params = CompressionParams(0.25, 4, 64, "learned", "block")
    settings = Settings(
        (3, 0, 3),
        {7: [2, 0, 2], 5: (), 1: (3,)},
        params,
        profile="a/model.safetensors",
        evaluation_scorers=("lagkv", OWN),
    )
    config = json.loads(json.dumps({CONFIG_KEY: settings.as_config(), "other": 1}))
    assert Settings.from_config(config) == settings
    assert settings.full_layers == (0, 3)
    assert settings.full_heads == {1: (3,), 7: (0, 2)}


def refusal_of(settings: Settings, scorer: str) -> str | None:
    try:
        settings.read({"kv_scorer": scorer})
    except ParamError as error:
        return f"{error.param}: {error}"
    return None


@pytest.mark.parametrize("scorer", [*SCORERS, OWN])
def test_scorers_that_an_engine_has(scorer):
    """Serving engines have the offered scorers, evaluating ones have more; `learned` needs a profile."""
    plain, profiled = refusal_of(Settings(), scorer), refusal_of(Settings(profile="model.safetensors"), scorer)
    unserved = (*EVALUATION_SCORERS, OWN)
    assert (plain is not None) == (scorer in (*unserved, "learned"))
    assert (profiled is not None) == (scorer in unserved)
    assert refusal_of(Settings(profile="model.safetensors", evaluation_scorers=unserved), scorer) is None
    if plain is not None:
        advice = "--kv-profile FILE" if scorer == "learned" else "choose one of l2, l1, "
        assert plain.startswith("kv_scorer: ")
        assert advice in plain


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"full_layer": [0]}, "did you mean 'full_layers'"),
        ({"keep_ratio": 0.5}, "did you mean 'kv_keep_ratio'"),
        ({"kv_keep_ratio": 0}, "0 < kv_keep_ratio <= 1"),
        ({"kv_granularity": "page"}, "kv_granularity must be one of token, neighbors, block"),
        ({"full_layers": [-1]}, "layer indices >= 0"),
        ({"full_layers": [True]}, "layer indices >= 0"),
        ({"full_layers": ["0"]}, "layer indices >= 0"),
        ({"full_heads": [0]}, r"full_heads must map layer indices to lists of KV heads, got \[0\]"),
        ({"full_heads": {"-1": [0]}}, "full_heads must name layers by indices >= 0, got '-1'"),
        ({"full_heads": {True: [0]}}, "full_heads must name layers by indices >= 0, got True"),
        ({"full_heads": {"7": 0}}, "full_heads must give layer 7 a list of KV heads, got 0"),
        ({"full_heads": {"7": "02"}}, "full_heads must give layer 7 a list of KV heads, got '02'"),
        ({"full_heads": {"7": [0, -2]}}, "full_heads must give layer 7 KV heads >= 0, got -2"),
        ({"full_heads": {"7": [True]}}, "full_heads must give layer 7 KV heads >= 0, got True"),
        ({"profile": 3}, "profile must be the path of a file, got 3"),
        ({"profile": ""}, "profile must be the path of a file"),
        ({"evaluation_scorers": True}, "evaluation_scorers must be a list of names, got True"),
        ({"evaluation_scorers": "lagkv"}, "evaluation_scorers must be a list of names, got 'lagkv'"),
        ({"evaluation_scorers": ["l2"]}, f"must hold {', '.join(EVALUATION_SCORERS)} or MODULE:CLASS, got 'l2'"),
        ({"evaluation_scorers": ["a/b.py:C"]}, "or MODULE:CLASS, got 'a/b.py:C'"),
        ({"kv_scorer": "lagkv"}, "only `vllm-l2kv eval` and offline"),
        ({"kv_scorer": OWN}, "only `vllm-l2kv eval` and offline"),
        ({"kv_scorer": "learned"}, "needs the weights of a profile"),
    ],
)
def test_bad_settings_are_refused(section, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_config({CONFIG_KEY: section})
