from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_l2kv.messages.usage import KeptWhole, RequestUsage, attach_usage, take_usage, why_whole
from vllm_l2kv.params import PREFIX_MESSAGES, PREFIX_TOKENS, CompressionParams

DOCS = Path(__file__).parents[2] / "docs" / "request_fields.md"


@pytest.mark.parametrize(
    ("num_prompt_tokens", "params", "reason"),
    [
        (10, CompressionParams(), None),
        (10, CompressionParams(protect_first=99), None),
        (10, CompressionParams(0.5, protect_first=0, protect_last=0), KeptWhole.FIRST_TOKEN),
        (68, CompressionParams(0.5, protect_first=4, protect_last=64), KeptWhole.PROTECTED),
        (69, CompressionParams(0.5, protect_first=4, protect_last=64), KeptWhole.FIRST_TOKEN),
        (5, CompressionParams(0.9, protect_first=0, protect_last=0), KeptWhole.ROUNDED),
        (1, CompressionParams(0.01, protect_first=0, protect_last=0), KeptWhole.ROUNDED),
        (10, CompressionParams(max_tokens=68), KeptWhole.BUDGET),
        (10_000, CompressionParams(max_tokens=68), KeptWhole.BUDGET),
        (69, CompressionParams(0.5, max_tokens=68), KeptWhole.FIRST_TOKEN),
        (68, CompressionParams(0.5, max_tokens=68), KeptWhole.BUDGET),
        (100, CompressionParams(0.5, prefix_tokens=69), KeptWhole.FIRST_TOKEN),
        (100, CompressionParams(0.5, prefix_tokens=68), KeptWhole.PROTECTED),
        (100, CompressionParams(0.9, prefix_tokens=5, protect_first=0, protect_last=0), KeptWhole.ROUNDED),
        (100, CompressionParams(prefix_tokens=69), KeptWhole.WHOLE_DOCUMENT),
        (100, CompressionParams(prefix_tokens=69, max_tokens=200), KeptWhole.BUDGET),
    ],
)
def test_the_reason(num_prompt_tokens, params, reason):
    assert why_whole(num_prompt_tokens, params) is reason


def test_the_reason_of_a_whole_document_names_both_fields():
    """A client gives one of them, and the engine core does not know which."""
    assert all(field.name in KeptWhole.WHOLE_DOCUMENT for field in (PREFIX_MESSAGES, PREFIX_TOKENS))


def test_usage_is_attached_to_an_output_and_taken_out():
    output = SimpleNamespace(kv_transfer_params=None)
    assert take_usage(output) is None
    usage = RequestUsage(prompt_tokens=10, kept_tokens=4, evicted_tokens=6, compactions=1, memory_ratio=0.5)
    attach_usage(output, usage)
    assert take_usage(output) == usage
    assert output.kv_transfer_params is None


def test_other_values_stay():
    output = SimpleNamespace(kv_transfer_params={"remote_block_ids": [1]})
    assert take_usage(output) is None
    assert output.kv_transfer_params == {"remote_block_ids": [1]}


def test_the_docs_list_every_reason():
    rows = [line.split("|")[1].strip().strip("`") for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    assert set(KeptWhole) <= set(rows)
