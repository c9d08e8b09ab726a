"""Bodies that must get 4xx, the same in every run."""

import json
import math
import random
from collections.abc import Iterator
from typing import Any

BAD_RATIOS = [0, -1, -0.5, 1.0001, 2, math.nan, math.inf, -math.inf, 10**400, "0.5", "", True, False, [], [0.5], {}]
BAD_COUNTS = [-1, 0.5, math.nan, math.inf, 2**31, 10**400, "1", True, [], [1], {"a": 1}]
BAD_FIELDS = [("kv_keep_ratio", value) for value in BAD_RATIOS] + [
    (name, value) for name in ("kv_max_tokens", "kv_protect_first", "kv_protect_last") for value in BAD_COUNTS
]
BAD_FIELDS += [("kv_max_tokens", value) for value in (0, 1.5, "many", False)]
BAD_FIELDS += [("kv_scorer", value) for value in ("", "L2", "knorm", 1, True, ["l2"], {})]
BAD_FIELDS += [("kv_granularity", value) for value in ("", "Token", "page", 16, True, ["block"], {})]

WRONG_EVERYWHERE: list[tuple[str, Any]] = [
    ("model", 5),
    ("model", "no-such-model"),
    ("max_tokens", "many"),
    ("max_tokens", [8]),
    ("max_tokens", -3),
    ("temperature", "hot"),
    ("temperature", -1),
    ("top_p", math.nan),
    ("top_p", 7),
    ("presence_penalty", 99),
    ("n", 0),
    ("n", "two"),
    ("n", 10**12),
    ("seed", 10**30),
    ("seed", "x"),
    ("stop", {"a": 1}),
    ("stop", 5),
    ("logit_bias", [1]),
    ("logit_bias", {"no number": 1}),
    ("stream", "perhaps"),
    ("stream_options", {"include_usage": True}),
    ("response_format", 5),
    ("response_format", {"type": "json_schema"}),
    ("logprobs", "x"),
    ("vllm_xargs", 5),
    ("vllm_xargs", [{"kv_keep_ratio": 0.5}]),
    ("vllm_xargs", {"a": {"b": 1}}),
    ("min_tokens", -1),
    ("stop_token_ids", ["a"]),
    ("priority", "high"),
    ("stream_interval", 10**30),
    ("repetition_detection", {"max_pattern_size": 10**30, "min_count": 10**30}),
    ("use_beam_search", [1]),
    ("stop", "\ud800"),
    ("request_id", "\ud800"),
]
WRONG: dict[str, list[tuple[str, Any]]] = {
    "/v1/chat/completions": [
        ("messages", 3),
        ("messages", None),
        ("messages", "hello"),
        ("messages", [3]),
        ("messages", [{"role": "user", "content": 3}]),
        ("messages", [{"content": "no role"}]),
        ("tools", 5),
        ("tools", [{}]),
        ("chat_template_kwargs", 5),
    ],
    "/v1/completions": [
        ("prompt", None),
        ("prompt", {"a": 1}),
        ("prompt", [None]),
        ("prompt", [-1]),
        ("prompt", [10**30]),
        ("prompt", [10**7]),
        ("prompt", [[1], "a"]),
        ("echo", "loudly"),
        ("suffix", 5),
    ],
}


def nested(depth: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def _output(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


HARMFUL: list[dict[str, Any]] = [
    # The first three ended the engine, or the server, before their depth and number were bounded.
    {"kv_transfer_params": nested(600)},
    {"mm_processor_kwargs": nested(900)},
    {"stop": [{}] * 30_001},
    {"no_field_at_all": nested(200)},
    {"vllm_xargs": {"kv_transfer_params": "text"}},
    {"structured_outputs": "text"},
    {"use_beam_search": True, "length_penalty": -1e300},
    # Grammars that vLLM accepts, but its engine core cannot compile or follow.
    _output(grammar="root ::= root"),
    _output(grammar='root ::= root "a" | '),
    _output(regex=r"\p{L}+"),
    _output(json={"$ref": "#"}),
    _output(json={"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    _output(json={"type": "object", "properties": {"a": False}}),
    _output(json={"type": "array", "minItems": 100_000, "maxItems": 200_000}),
    _output(json={"type": "object", "patternProperties": {"(": {}}}),
    # Grammars that vLLM refuses.
    _output(grammar="not a grammar"),
    _output(regex="("),
    _output(regex="a\0b"),
    _output(json="{"),
    _output(json={"type": "no such type"}),
    _output(json="[" * 100_000),
    _output(structural_tag="[" * 100_000),
    _output(choice=[]),
    _output(choice=["a"], regex="a"),
]
HARMFUL_TO_CHAT: list[dict[str, Any]] = [
    {"messages": [{}] * 15_000},
    {"chat_template": "{{ 1 / 0 }}"},
    {"chat_template_kwargs": {"chat_template": "{{ 1 / 0 }}"}},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
    {
        "messages": [
            {
                "role": "assistant",
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}],
            }
        ]
    },
]


def malformed(good: dict[str, dict[str, Any]], count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Makes paths and bodies that a server must refuse.

    Args:
        good: A valid body for each path.
        count: Number of bodies.
        seed: Seed of the random choices.

    Yields:
        Path and body.
    """
    rng = random.Random(seed)
    makers = [_truncated, _not_unicode, _deep, _wrong_type, _wrong_type, _bad_field, _bad_field, _bad_xargs, _no_object]
    for number in range(count):
        path = rng.choice(sorted(good))
        yield path, makers[number % len(makers)](rng, path, good[path])


def _text(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _truncated(rng: random.Random, path: str, body: dict[str, Any]) -> bytes:
    text = _text(body)
    return text[: rng.randrange(1, len(text))]


def _not_unicode(rng: random.Random, path: str, body: dict[str, Any]) -> bytes:
    text = _text(body)
    # After the brackets, from which json detects UTF-8 or UTF-16.
    cut = rng.randrange(8, len(text))
    return text[:cut] + rng.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\x80"]) + text[cut:]


def _deep(rng: random.Random, path: str, body: dict[str, Any]) -> bytes:
    depth = rng.randrange(2_000, 100_000)
    nest = rng.choice([b"[", b'{"a":', b'[{"kv_keep_ratio":'])
    return rng.choice([nest * depth, _text(body)[:-1] + b', "kv_keep_ratio": ' + nest * depth])


def _wrong_type(rng: random.Random, path: str, body: dict[str, Any]) -> bytes:
    name, value = rng.choice([*WRONG_EVERYWHERE, *WRONG[path]])
    return _text({**body, name: value})


def _bad_field(rng: random.Random, path: str, body: dict[str, Any]) -> bytes:
    name, value = rng.choice(BAD_FIELDS)
    return _text({**body, name: value})


def _bad_xargs(rng: random.Random, path: str, body: dict[str, Any]) -> bytes:
    name, value = rng.choice([*BAD_FIELDS, ("kv_keep", 1), ("kv_", None), ("kv_\ud800", 1)])
    return _text({**body, "vllm_xargs": {name: value}})


def _no_object(rng: random.Random, path: str, body: dict[str, Any]) -> bytes:
    return rng.choice([b"", b"null", b"[]", b"7", b'"text"', b"NaN", b"\x00", b"1" * 5000, _text([body])])
