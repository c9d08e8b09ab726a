import json

import pytest

from vllm_l2kv.params import CompressionParams
from vllm_l2kv.settings import CONFIG_KEY, Settings


def test_settings_survive_the_trip_through_additional_config():
    settings = Settings((3, 0, 3), CompressionParams(0.25, 4, 64, "keydiff", "block"))
    config = json.loads(json.dumps({CONFIG_KEY: settings.as_config(), "other": 1}))
    assert Settings.from_config(config) == settings
    assert settings.full_layers == (0, 3)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"full_layer": [0]}, "did you mean 'full_layers'"),
        ({"keep_ratio": 0.5}, "did you mean 'kv_keep_ratio'"),
        ({"kv_keep_ratio": 0}, "0 < kv_keep_ratio <= 1"),
        ({"kv_granularity": "page"}, "kv_granularity must be one of token, block"),
        ({"full_layers": [-1]}, "layer indices >= 0"),
        ({"full_layers": [True]}, "layer indices >= 0"),
        ({"full_layers": ["0"]}, "layer indices >= 0"),
    ],
)
def test_bad_settings_are_refused(section, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_config({CONFIG_KEY: section})
