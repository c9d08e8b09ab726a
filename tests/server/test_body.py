"""Bodies that no handler should meet."""

import math

import pytest
from vllm.exceptions import VLLMValidationError
from vllm_l2kv_server.body import parse_body


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\x00", "not JSON"),
        (b'{"a": "\xff"}', "not Unicode"),
        (rb'{"a": "\ud800"}', "not Unicode"),
        (rb'{"a": "\uD800"}', "not Unicode"),
        (rb'{"\udfff": 1}', "not Unicode"),
        (b"[" * 100_000, "too deeply"),
        (b'{"a":' * 100_000, "too deeply"),
        (b"[" * 100_000 + b"1" * 5000 + b"]" * 100_000, "too deeply"),
        (b'{"a": ' + b"1" * 5000, "not JSON"),
    ],
)
def test_refused(body, words):
    with pytest.raises(VLLMValidationError, match=words):
        parse_body(body)


def test_surrogate_pairs_are_fine():
    assert parse_body(rb'"\ud83e\udd8a"') == "\N{FOX FACE}"


def test_integers_beyond_pythons_limit_become_infinite():
    assert parse_body(b'{"a": ' + b"9" * 5000 + b', "b": 7}') == {"a": math.inf, "b": 7}


def test_plain():
    assert parse_body(b'{"a": [1, 2.5, null, "x"]}') == {"a": [1, 2.5, None, "x"]}
