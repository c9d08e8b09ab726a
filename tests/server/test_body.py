"""Bodies that no handler should receive."""

import json
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
        (b"[" * 129 + b"]" * 129, "too deeply"),
        (b'{"a":' * 600 + b"1" + b"}" * 600, "too deeply"),
        (b"[" + b"0," * 30_000 + b"0]", "more than 30000 values"),
        (b'{"messages": [' + b"0," * 30_000 + b"0]}", "more than 30000 values"),
        (b'{"prompt": [' + b"null," * 30_000 + b"0]}", "more than 30000 values"),
        (b'{"prompt": [' + b"[null]," * 20_000 + b"0]}", "more than 30000 values"),
        (b'{"prompt": [' + b"[]," * 40_000 + b"0]}", "more than 30000 values"),
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


@pytest.mark.parametrize(
    ("digits", "value"),
    [
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
        ("18446744073709551615", 2**64 - 1),
        ("18446744073709551616", math.inf),
        ("-9223372036854775809", -math.inf),
        ("9" * 5000, math.inf),
        ("-" + "9" * 400, -math.inf),
    ],
)
def test_integers_beyond_64_bits_become_infinite(digits, value):
    parsed = parse_body(f'{{"a": {digits}, "b": 7, "c": "{digits}"}}'.encode())
    assert parsed == {"a": value, "b": 7, "c": digits}
    assert type(parsed["a"]) is type(value)


def test_plain():
    assert parse_body(b'{"a": [1, 2.5, null, "x"]}') == {"a": [1, 2.5, None, "x"]}


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 128 + b"]" * 128,
        b"[" + b"0," * 29_999 + b"0]",
        b'{"prompt": [' + b"5," * 100_000 + b"5]}",
        b'{"prompt": [[' + b"5," * 100_000 + b'5], [5]], "stop_token_ids": [' + b"5," * 40_000 + b"5]}",
        b'{"prompt": "' + b"[{," * 100_000 + b'"}',
    ],
)
def test_large_but_fine(body):
    assert parse_body(body) == json.loads(body)
