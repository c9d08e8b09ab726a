import dataclasses
from pathlib import Path

import pytest

import vllm_l2kv
from vllm_l2kv.field_kinds import MAX_TOKENS, ParamError
from vllm_l2kv.params import FIELD_NAMES, OFFERED_SCORERS, SCORERS, CompressionParams, check_names, check_session

BAD_RATIOS = [
    0, -0.5, 1.0001, 2, float("nan"), float("inf"), -float("inf"), 10**400, -(10**400),
    "0.5", "", True, False, [0.5], {}, {"a": 1}, (0.5,), b"0.5",
]  # fmt: skip
BAD_COUNTS = [-1, 1.0, 0.5, float("nan"), MAX_TOKENS + 1, 10**400, "3", True, [], {}, None.__class__]


@pytest.mark.parametrize("value", BAD_RATIOS, ids=lambda value: repr(value)[:20] if value != 10**400 else "huge")
def test_bad_ratio_is_refused_by_name_and_bound(value):
    with pytest.raises(ParamError, match="0 < kv_keep_ratio <= 1") as error:
        CompressionParams().override({"kv_keep_ratio": value})
    assert error.value.param == "kv_keep_ratio"


@pytest.mark.parametrize("name", ["kv_protect_first", "kv_protect_last", "kv_prefix_tokens"])
@pytest.mark.parametrize("value", BAD_COUNTS, ids=lambda value: repr(value)[:20] if value != 10**400 else "huge")
def test_bad_count_is_refused_by_name(name, value):
    with pytest.raises(ParamError, match=name) as error:
        CompressionParams().override({name: value})
    assert error.value.param == name


def test_a_document_has_a_token():
    with pytest.raises(ParamError, match="1 <= kv_prefix_tokens <= 2147483647, got 0") as error:
        CompressionParams(prefix_tokens=0)
    assert error.value.param == "kv_prefix_tokens"
    assert CompressionParams().override({"kv_prefix_tokens": 1}).prefix_tokens == 1


def test_only_a_server_counts_messages():
    """Refused offline, and in the engine of a server without the routes of vllm-l2kv."""
    with pytest.raises(ParamError, match="only with a server of vllm-l2kv; set kv_prefix_tokens instead") as error:
        CompressionParams().read({"kv_prefix_messages": 1})
    assert error.value.param == "kv_prefix_messages"
    with pytest.raises(TypeError, match=r"it takes .*, prefix_tokens"):
        vllm_l2kv.compression(prefix_messages=1)


@pytest.mark.parametrize("value", ["", "L2", "l2 ", "knorm", 0, True, [], ["l2"], {}, "x" * 1000])
def test_bad_scorer_is_refused_by_name_and_with_the_good_ones(value):
    with pytest.raises(ParamError, match=f"kv_scorer must be one of {', '.join(OFFERED_SCORERS)}, got ") as error:
        CompressionParams().override({"kv_scorer": value})
    assert error.value.param == "kv_scorer"
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("value", ["", "Block", "block ", "head", 16, True, [], ["block"], {}, "x" * 1000])
def test_bad_granularity_is_refused_by_name_and_with_the_good_ones(value):
    with pytest.raises(ParamError, match="kv_granularity must be one of token, neighbors, block, got ") as error:
        CompressionParams().override({"kv_granularity": value})
    assert error.value.param == "kv_granularity"
    assert len(str(error.value)) < 250


def test_every_scorer_has_a_module():
    files = {path.stem for path in (Path(vllm_l2kv.__file__).parent / "scorers").glob("*.py")}
    assert files == {"__init__", *SCORERS}


@pytest.mark.parametrize("value", [1, 1.0, 0.5, 1e-300])
def test_good_ratio(value):
    params = CompressionParams().override({"kv_keep_ratio": value})
    assert params.keep_ratio == value
    assert type(params.keep_ratio) is float


def test_null_means_not_given():
    defaults = CompressionParams(0.5, 4, 8)
    assert defaults.override(dict.fromkeys(FIELD_NAMES)) == defaults
    for values in (dict.fromkeys(FIELD_NAMES), None):
        assert not defaults.read(values).by_client


def test_fields_override_defaults():
    asked = CompressionParams(0.5, 4, 8).read({"kv_protect_first": 0, "temperature": 1})
    assert asked.params == CompressionParams(0.5, 0, 8)
    assert asked.by_client


@pytest.mark.parametrize(
    ("default", "values", "reports"),
    [(1, {}, False), (1, {"kv_keep_ratio": 1}, True), (0.5, {}, True), (0.5, {"kv_keep_ratio": 1}, True)],
)
def test_numbers_are_reported_where_a_field_is_given_or_the_defaults_compress(default, values, reports):
    assert CompressionParams(default).read(values).reports == reports


@pytest.mark.parametrize("alone", [{}, {"kv_keep_ratio": 0.5}])
def test_a_document_alone_is_not_compressed_and_reported(alone):
    """At a ratio of 1 nothing is evicted, and the numbers give the reason."""
    asked = CompressionParams().read({"kv_prefix_tokens": 10, **alone})
    assert asked.params.compresses == bool(alone)
    assert asked.reports


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"kv_keep_ratio": 0.5}, "kv_keep_ratio"),
        ({"kv_max_tokens": 100}, "kv_max_tokens"),
        ({"kv_prefix_tokens": 10}, "kv_prefix_tokens"),
    ],
)
def test_streaming_input_is_refused_by_the_field_that_compresses_it(given, param):
    with pytest.raises(ParamError, match="or give the whole prompt at once") as error:
        check_session(CompressionParams().read(given))
    assert error.value.param == param
    check_session(CompressionParams().read({"kv_keep_ratio": 1}))
    check_session(CompressionParams(0.5, max_tokens=100).read({}))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("kv_keep_ration", "kv_keep_ratio"),
        ("kv_ratio", "kv_keep_ratio"),
        ("kv_protect_frist", "kv_protect_first"),
        ("kv_protectlast", "kv_protect_last"),
        ("kv_prefix_token", "kv_prefix_tokens"),
    ],
)
def test_unknown_name_gets_the_nearest_known_one(name, nearest):
    with pytest.raises(ParamError, match=f"did you mean '{nearest}'") as error:
        CompressionParams().override({name: 0.5})
    assert error.value.param == name


def test_names_of_vllm_pass():
    check_names(["kv_transfer_params", "temperature", "top_p"])


def test_params_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CompressionParams().keep_ratio = 0.5


def test_compression_returns_only_the_given_arguments():
    assert vllm_l2kv.compression() == {}
    assert vllm_l2kv.compression(0.5, protect_last=0) == {"kv_keep_ratio": 0.5, "kv_protect_last": 0}
    assert vllm_l2kv.compression(granularity="block") == {"kv_granularity": "block"}
    assert vllm_l2kv.compression(0.25, prefix_tokens=900) == {"kv_keep_ratio": 0.25, "kv_prefix_tokens": 900}


def test_compression_refuses_bad_values():
    with pytest.raises(ValueError, match="kv_keep_ratio"):
        vllm_l2kv.compression(keep_ratio=1.5)
    with pytest.raises(ValueError, match="kv_protect_last"):
        vllm_l2kv.compression(protect_last=-1)
    with pytest.raises(ValueError, match="kv_granularity"):
        vllm_l2kv.compression(granularity="page")
    with pytest.raises(ValueError, match="kv_prefix_tokens"):
        vllm_l2kv.compression(prefix_tokens=0)


def test_an_offline_budget_is_checked_against_the_engines_protection():
    assert vllm_l2kv.compression(max_tokens=8) == {"kv_max_tokens": 8}
    with pytest.raises(ParamError, match="at least kv_protect_first"):
        vllm_l2kv.compression(max_tokens=8, protect_last=9)
