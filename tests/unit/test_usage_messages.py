from pathlib import Path

import pytest

from vllm_l2kv.messages.usage import KeptWhole, prompt_usage, why_whole
from vllm_l2kv.params import CompressionParams

DOCS = Path(__file__).parents[2] / "docs" / "request_fields.md"


def test_numbers():
    assert prompt_usage(10, 4) == {"prompt_tokens": 10, "kept_tokens": 4, "evicted_tokens": 6}


@pytest.mark.parametrize(
    ("num_prompt_tokens", "params", "reason"),
    [
        (10, CompressionParams(), None),
        (10, CompressionParams(protect_first=99), None),
        (10, CompressionParams(0.5, 0, 0), KeptWhole.FIRST_TOKEN),
        (68, CompressionParams(keep_ratio=0.5, protect_first=4, protect_last=64), KeptWhole.PROTECTED),
        (69, CompressionParams(keep_ratio=0.5, protect_first=4, protect_last=64), KeptWhole.FIRST_TOKEN),
        (5, CompressionParams(0.9, 0, 0), KeptWhole.ROUNDED),
        (1, CompressionParams(0.01, 0, 0), KeptWhole.ROUNDED),
    ],
)
def test_the_reason(num_prompt_tokens, params, reason):
    assert why_whole(num_prompt_tokens, params) is reason


def test_a_reason_is_a_plain_string():
    assert type(prompt_usage(10, 10, KeptWhole.PROTECTED)["reason"]) is str


def test_the_docs_list_every_reason():
    rows = [line.split("|")[1].strip().strip("`") for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    assert set(KeptWhole) <= set(rows)
