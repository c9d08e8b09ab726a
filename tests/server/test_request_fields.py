"""Fields of a body: which are read, which names are refused, and the error messages."""

import json
import math

import pytest
from vllm.exceptions import VLLMValidationError
from vllm_l2kv_server.context import ChatDocument
from vllm_l2kv_server.request_fields import CHAT_PATHS, GENERATING_PATHS, parse_if_needed, read_compression, read_fields

from vllm_l2kv.params import EVALUATION_SCORERS, FIELD_NAMES, CompressionParams
from vllm_l2kv.settings import Settings

CHAT = "/v1/chat/completions"
BAD_RATIOS = [0, -1, -0.5, 1.0001, 2, math.nan, math.inf, -math.inf, 10**400, "0.5", "", True, False, [], [0.5], {}]
BAD_COUNTS = [-1, 0.5, 1.0, math.nan, math.inf, 2**31, 10**400, "1", True, [], [1], {"a": 1}]
BAD_VALUES = [("kv_keep_ratio", value) for value in BAD_RATIOS] + [
    (name, value)
    for name in ("kv_protect_first", "kv_protect_last", "kv_prefix_tokens", "kv_prefix_messages")
    for value in BAD_COUNTS
]
BAD_VALUES += [(name, value) for name in ("kv_scorer", "kv_granularity") for value in ("", "L2", 1, True, ["l2"], {})]
ELSEWHERE = ["/tokenize", "/generative_scoring", "/v1/chat/completions/render", "/v1/messages/count_tokens", "/pause"]
NEAR_SPELLINGS = {
    "kv-keep-ratio": "kv_keep_ratio",
    "KV_KEEP_RATIO": "kv_keep_ratio",
    "kvKeepRatio": "kv_keep_ratio",
    "KVKeepRatio": "kv_keep_ratio",
    "kv keep ratio": "kv_keep_ratio",
    " kv_keep_ratio": "kv_keep_ratio",
    "kv_keep_ration": "kv_keep_ratio",
    "kvprotectfist": "kv_protect_first",
    "Kv-Scorer": "kv_scorer",
    "kv_prefix_message": "kv_prefix_messages",
}


def fields(body, path: str = CHAT, by_default: bool = False) -> dict | None:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    settings = Settings(defaults=CompressionParams(keep_ratio=0.5 if by_default else 1))
    compression = read_compression(parse_if_needed(body), path, settings)
    return None if compression is None else compression.fields


def refused(body, path: str = CHAT) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as caught:
        fields(body, path)
    return caught.value


def placed(nested: bool, given: dict) -> dict:
    return {"vllm_xargs": given} if nested else given


def nested_at(path: str, given: dict) -> dict:
    return {"sampling_params": {"extra_args": given}} if path == "/inference/v1/generate" else {"vllm_xargs": given}


@pytest.mark.parametrize("path", GENERATING_PATHS)
class TestGeneratingEndpoints:
    def test_all_fields(self, path):
        given = {"kv_keep_ratio": 0.25, "kv_protect_first": 4, "kv_protect_last": 32}
        given |= {"kv_scorer": "keydiff", "kv_granularity": "block", "kv_prefix_tokens": 9}
        assert fields({"model": "m", **given}, path) == given

    def test_nested(self, path):
        given = {"other": 1, "kv_keep_ratio": 0.5, "kv_protect_first": None}
        body = {"kv_protect_last": 1, **nested_at(path, given)}
        assert fields(body, path) == {"kv_keep_ratio": 0.5, "kv_protect_last": 1}
        assert refused(nested_at(path, {"kv_keep": 0.5}), path).parameter == "kv_keep"
        assert refused(nested_at(path, {"kv_keep_ratio": 5}), path).parameter == "kv_keep_ratio"

    @pytest.mark.parametrize("scorer", [*EVALUATION_SCORERS, "learned", "os:system"])
    def test_scorers_that_this_engine_does_not_have(self, path, scorer):
        error = refused({"kv_keep_ratio": 0.5, "kv_scorer": scorer}, path)
        assert error.parameter == "kv_scorer"
        assert f"kv_scorer '{scorer}'" in str(error)

    def test_nothing_asked(self, path):
        assert fields({"model": "m", "kv_keep_ratio": None}, path) is None
        assert fields({"kv_transfer_params": {"a": 1}}, path) is None

    def test_nothing_asked_of_a_server_that_compresses(self, path):
        assert fields({"model": "m"}, path, by_default=True) == {}
        assert fields({"use_beam_search": True}, path, by_default=True) is None

    def test_beam_search(self, path):
        error = refused({"use_beam_search": True, "n": 2, **nested_at(path, {"kv_keep_ratio": 0.5})}, path)
        assert error.parameter == "kv_keep_ratio"
        assert "leave out use_beam_search" in str(error)
        assert fields({"use_beam_search": False, "kv_keep_ratio": 0.5}, path) == {"kv_keep_ratio": 0.5}


@pytest.mark.parametrize("path", ELSEWHERE)
class TestEndpointsThatGenerateNothing:
    @pytest.mark.parametrize("name", FIELD_NAMES)
    @pytest.mark.parametrize("nested", [False, True])
    def test_refused_by_name(self, path, name, nested):
        value = {"kv_scorer": "l2", "kv_granularity": "token"}.get(name, 1)
        error = refused(placed(nested, {name: value}), path)
        assert error.parameter == name
        assert all(path in str(error) for path in (CHAT_PATHS if name == "kv_prefix_messages" else GENERATING_PATHS))

    @pytest.mark.parametrize("by_default", [False, True])
    def test_nothing_asked(self, path, by_default):
        assert fields({"kv_keep_ratio": None, "kv_transfer_params": {}}, path, by_default) is None
        assert fields({"text": 'say "kv_keep_ratio"'}, path, by_default) is None


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages", "/tokenize"])
class TestEveryEndpoint:
    @pytest.mark.parametrize(("name", "meant"), NEAR_SPELLINGS.items())
    @pytest.mark.parametrize("nested", [False, True])
    def test_near_spelling(self, path, name, meant, nested):
        error = refused(placed(nested, {name: 0.5}), path)
        assert error.parameter == name
        assert f"did you mean '{meant}'" in str(error)

    @pytest.mark.parametrize("place", ["extra_body", "extra_args", "chat_template_kwargs", "parameters"])
    @pytest.mark.parametrize("name", ["kv_keep_ratio", "kv-keep-ratio"])
    def test_inside_another_object(self, path, place, name):
        error = refused({"model": "m", place: {"other": 1, name: 0.5}}, path)
        assert error.parameter == f"{place}.{name}"
        assert "put it at the top level of the body" in str(error)
        assert ("Python client" in str(error)) == (place == "extra_body")

    @pytest.mark.parametrize(
        "body",
        [
            b'{"kv_keep_ratio": 0.5, "kv_keep_ratio": 0.25}',
            b'{"kv_keep_ratio": 0.5, "\\u006bv_keep_ratio": 0.5}',
            b'{"vllm_xargs": {"kv_keep_ratio": 1, "kv_keep_ratio": null}}',
        ],
    )
    def test_twice(self, path, body):
        error = refused(body, path)
        assert error.parameter == "kv_keep_ratio"
        assert "is given 2 times" in str(error)

    def test_xargs_twice(self, path):
        error = refused(b'{"vllm_xargs": {"kv_keep_ratio": 0.5}, "vllm_xargs": {}}', path)
        assert error.parameter == "vllm_xargs"

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    @pytest.mark.parametrize("nested", [False, True])
    def test_encodings(self, path, encoding, nested):
        assert refused(json.dumps(placed(nested, {"kv_keep": 0.5})).encode(encoding), path).parameter == "kv_keep"

    @pytest.mark.parametrize("name", [rb"\u006bv_keep", rb"k\u0076_keep", rb"\u006b\u0076\u005f\u006b\u0065\u0065p"])
    def test_escapes(self, path, name):
        assert refused(b'{"%b": 0.5}' % name, path).parameter == "kv_keep"

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
    def test_depth(self, path, encoding):
        assert fields(('{"a":' * 128 + "1" + "}" * 128).encode(encoding), path) is None
        for depth in (129, 600, 100_000):
            assert "too deeply" in str(refused(('{"a":' * depth + "1" + "}" * depth).encode(encoding), path))
        assert "too deeply" in str(refused(("[" * 100_000).encode(encoding), path))

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
    def test_number_of_values(self, path, encoding):
        error = refused(('{"messages": [' + "{}," * 30_000 + "{}]}").encode(encoding), path)
        assert "more than 30000 values" in str(error)
        assert fields({"prompt": [5] * 100_000}, path) is None


@pytest.mark.parametrize("nested", [False, True])
class TestValues:
    @pytest.mark.parametrize(("name", "value"), BAD_VALUES)
    def test_bad_value(self, name, value, nested):
        error = refused(placed(nested, {name: value}))
        assert error.parameter == name
        assert name in str(error)
        assert len(str(error)) < 300

    def test_unknown_name(self, nested):
        error = refused(placed(nested, {"kv_keep_ration": 0.5}))
        assert error.parameter == "kv_keep_ration"
        assert "did you mean 'kv_keep_ratio'" in str(error)

    def test_name_that_is_not_unicode(self, nested):
        assert "not Unicode" in str(refused(placed(nested, {"kv_\ud800": 1})))

    def test_transfer_params(self, nested):
        assert refused(placed(nested, {"kv_transfer_params": "x"})).parameter == "kv_transfer_params"


class TestDocumentOfAChat:
    """It is not a field of the engine, which has only `kv_prefix_tokens`."""

    def document(self, path: str, body: dict) -> ChatDocument | None:
        compression = read_compression(parse_if_needed(json.dumps(body).encode()), path, Settings())
        assert compression.fields == {}
        return compression.document

    @pytest.mark.parametrize("path", CHAT_PATHS)
    @pytest.mark.parametrize("nested", [False, True])
    def test_read(self, path, nested):
        """As with every field, a request with this field alone reports its numbers."""
        assert self.document(path, placed(nested, {"kv_prefix_messages": 2})).num_messages == 2

    @pytest.mark.parametrize(
        ("path", "body", "num_given"),
        [
            (CHAT, {"messages": [1, 2]}, None),
            ("/v1/chat/completions/batch", {"messages": [[1, 2], [3]]}, None),
            ("/v1/messages", {"messages": [1, 2]}, 2),
            ("/v1/messages", {"messages": [1, 2], "system": "a"}, 3),
            ("/v1/messages", {"messages": [1, 2], "system": [{"type": "text", "text": "a"}]}, 3),
            ("/v1/responses", {"input": "a"}, 1),
            ("/v1/responses", {"input": [1, 2, 3], "instructions": "a"}, 4),
            ("/v1/responses", {"input": [1, 2, 3], "instructions": None}, 3),
        ],
    )
    def test_number_of_messages_where_vllm_makes_others(self, path, body, num_given):
        assert self.document(path, {**body, "kv_prefix_messages": 1}) == ChatDocument(1, num_given)

    def test_not_given(self):
        compression = read_compression({"kv_keep_ratio": 0.5, "kv_prefix_messages": None}, CHAT, Settings())
        assert compression.document is None


def test_error_that_cannot_be_sent_as_it_is():
    """Names also come from forms, whose JSON the middleware does not read."""
    with pytest.raises(VLLMValidationError) as caught:
        read_fields({"kv_\ud800": 1}, Settings())
    assert caught.value.parameter.encode() == rb"kv_\ud800"
    assert str(caught.value).encode()


def test_the_token_api_has_no_xargs():
    error = refused({"vllm_xargs": {"kv_keep_ratio": 0.5}}, "/inference/v1/generate")
    assert error.parameter == "vllm_xargs.kv_keep_ratio"
    assert "inside sampling_params.extra_args" in str(error)
    twice = {"kv_keep_ratio": 0.5, "sampling_params": {"extra_args": {"kv_keep_ratio": 0.25}}}
    assert "0.25 inside sampling_params.extra_args" in str(refused(twice, "/inference/v1/generate"))


def test_same_value_twice():
    assert fields({"kv_keep_ratio": 0.5, "vllm_xargs": {"kv_keep_ratio": 0.5}}) == {"kv_keep_ratio": 0.5}


def test_two_values():
    error = refused({"kv_keep_ratio": 0.5, "vllm_xargs": {"kv_keep_ratio": 0.25}})
    assert error.parameter == "kv_keep_ratio"
    assert "0.5" in str(error)
    assert "0.25" in str(error)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b'["kv_keep_ratio"]',
        b'{"kv_keep_ratio"',
        b"\xff" * 8,
        b'--boundary\r\n\r\n"kv_keep_ratio"',
        b'{"vllm_xargs": 3}',
        b'{"vllm_xargs": [{"kv_keep_ratio": 0.5}]}',
        b'{"metadata": {"kv_keep_ratio": "a label of the client"}}',
        b'{"tools": [{"parameters": {"properties": {"kv_keep_ratio": {"type": "number"}}}}]}',
        b'{"messages": [{"role": "user", "content": "kv_keep_ratio"}, {"role": "user", "content": "KV"}]}',
        b'{"kv_keep_ratio_of_nobody_in_a_list": [], "x": 1',
    ],
)
def test_left_to_the_endpoint(body):
    assert fields(body) is None


def test_other_names_pass():
    assert fields({"kvm": 1, "kvantum": 2, "prompt": "KV", "kv_cache_report_mode": "x"}) is None
