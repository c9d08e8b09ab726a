"""Formulas against plain loops, a tiny model against its own attention maps, recommendations by hand-made numbers."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from vllm_l2kv_server.config_file import read_config_file
from vllm_l2kv_server.serve_options import own_options

from vllm_l2kv.tools.evaluation.attention import (
    attention_loss,
    attention_loss_reference,
    dropped_attention,
    per_kv_head,
    rank_correlation,
    variation,
)
from vllm_l2kv.tools.evaluation.diagnose import (
    KEEP_RATIOS,
    NUM_QUERIES,
    Diagnosis,
    heat_maps,
    measure,
    table,
)
from vllm_l2kv.tools.evaluation.progress import Progress
from vllm_l2kv.tools.evaluation.recommend import INSTEAD, Recommendation, config_text, recommend

ROOT = Path(__file__).parents[2]
NUM_TOKENS = 96
TEXT = (ROOT / "examples" / "lighthouse.txt").read_text()


def looped_drops(norms: list[float], attention: list[float]) -> list[tuple[float, float]]:
    """`L^m` and `L^{m,ref}` for m = 1..n, as equations 1 and 2 are written."""
    n = len(norms)
    # Of equal norms the lower position is kept, so the higher one goes first.
    by_norm = sorted(range(n), key=lambda p: (-norms[p], -p))
    by_attention = sorted(range(n), key=lambda p: attention[p])
    return [
        (sum(attention[p] for p in by_norm[:m]), sum(attention[p] for p in by_attention[:m])) for m in range(1, n + 1)
    ]


def looped_alr(norms: torch.Tensor, attention: torch.Tensor) -> float:
    """Of one head, `[n]` and `[Q, n]`."""
    areas = [sum(loss - ideal for loss, ideal in looped_drops(norms.tolist(), query.tolist())) for query in attention]
    return sum(areas) / len(areas)


def looped_loss(norms: torch.Tensor, attention: torch.Tensor, ratio: float) -> tuple[float, float]:
    n = len(norms)
    if (num_dropped := n - math.ceil(ratio * n - 1e-9)) == 0:
        return 0.0, 0.0
    drops = [looped_drops(norms.tolist(), query.tolist())[num_dropped - 1] for query in attention]
    total = attention.sum().item()
    return sum(loss for loss, _ in drops) / total, sum(ideal for _, ideal in drops) / total


def looped_ranks(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


def looped_correlation(x: list[float], y: list[float]) -> float:
    """Pearson's correlation of ranks."""
    x, y, n = looped_ranks(x), looped_ranks(y), len(x)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


@pytest.fixture
def norms() -> torch.Tensor:
    """Two heads of 13 tokens, with a tie in the first one."""
    norms = torch.rand(2, 13, generator=torch.Generator().manual_seed(0)) + 0.5
    norms[0, 9] = norms[0, 4]
    return norms


@pytest.fixture
def attention() -> torch.Tensor:
    """Of three queries of each head; sums to less than 1."""
    return 0.8 * torch.randn(2, 3, 13, generator=torch.Generator().manual_seed(1)).softmax(-1)


def test_dropped_attention_is_as_in_the_equations(norms, attention):
    by_norm, ideal = dropped_attention(norms, attention)
    for head in range(2):
        for query in range(3):
            expected = looped_drops(norms[head].tolist(), attention[head, query].tolist())
            assert list(zip(by_norm[head, query].tolist(), ideal[head, query].tolist(), strict=True)) == [
                pytest.approx(pair, abs=1e-6) for pair in expected
            ]


def test_alr_is_the_mean_over_queries(norms, attention):
    expected = [looped_alr(norms[head], attention[head]) for head in range(2)]
    assert attention_loss_reference(norms, attention).tolist() == pytest.approx(expected, abs=1e-5)


def test_alr_is_zero_only_where_norms_rank_as_attention_does(attention):
    one_query = attention[:, :1]
    assert attention_loss_reference(-one_query[:, 0], one_query).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert attention_loss_reference(one_query[:, 0], one_query).min() > 1


def test_losses_count_as_the_server_does(norms, attention):
    ratios = (1.0, 0.75, 0.5, 0.1, 0.01)
    losses, ideals = attention_loss(norms, attention, ratios)
    for row, ratio in enumerate(ratios):
        for head in range(2):
            expected = looped_loss(norms[head], attention[head], ratio)
            assert (losses[row, head].item(), ideals[row, head].item()) == pytest.approx(expected, abs=1e-6)


def test_a_head_that_looks_past_the_prompt_loses_nothing(norms):
    losses, ideals = attention_loss(norms, torch.zeros(2, 3, 13), [0.5])
    assert losses.tolist() == ideals.tolist() == [[0, 0]]


def test_rank_correlation_shares_ranks_of_ties(norms, attention):
    received = attention.sum(1)
    expected = [looped_correlation(norms[head].tolist(), received[head].tolist()) for head in range(2)]
    assert rank_correlation(norms, received).tolist() == pytest.approx(expected)
    assert rank_correlation(norms, norms.exp()).tolist() == pytest.approx([1, 1])
    assert rank_correlation(torch.ones(2, 13), received).tolist() == [0, 0]


def test_variation_is_std_over_mean():
    assert variation(torch.tensor([[1.0, 3.0], [5.0, 5.0]])).tolist() == [0.5, 0]


def test_a_kv_head_is_the_mean_of_neighbouring_query_heads():
    heads = torch.tensor([1.0, 3.0, 10.0, 20.0])[:, None, None].expand(4, 2, 5)
    assert per_kv_head(heads, 2)[:, 0, 0].tolist() == [2, 15]


def watched(folder: Path, token_ids: list[int]):
    """Keys and attention maps by `transformers`' own means: `[layer][kv_heads, n, d]`, `[layer][heads, n, n]`."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        output = model(torch.tensor([token_ids]), past_key_values=DynamicCache(), output_attentions=True)
    return [layer.keys[0] for layer in output.past_key_values.layers], [maps[0] for maps in output.attentions]


def token_ids_of(tokenizer, num_chunks: int) -> list[list[int]]:
    token_ids, size = tokenizer(TEXT)["input_ids"], NUM_TOKENS - 1
    return [[tokenizer.bos_token_id, *token_ids[size * i : size * (i + 1)]] for i in range(num_chunks)]


def expected_measures(folder: Path, token_ids: list[int], layer: int, head: int) -> dict[str, float]:
    """Of a model with two KV heads and four heads, from whole maps."""
    keys, maps = watched(folder, token_ids)
    n = NUM_TOKENS - NUM_QUERIES
    norms = torch.tensor([math.sqrt(sum(x * x for x in key)) for key in keys[layer][head, :n].tolist()])
    attention = (maps[layer][2 * head, n:, :n] + maps[layer][2 * head + 1, n:, :n]) / 2
    received = attention.sum(0)
    mean = norms.mean().item()
    return {
        "variation": math.sqrt(sum((x - mean) ** 2 for x in norms.tolist()) / n) / mean,
        "correlation": looped_correlation((-norms).tolist(), received.tolist()),
        "alr": looped_alr(norms, attention),
        "alr_per_token": looped_alr(norms, attention) / n,
        "loss": looped_loss(norms, attention, 0.25)[0],
        "ideal_loss": looped_loss(norms, attention, 0.25)[1],
        "loss_beyond_first": looped_loss(norms[1:], attention[:, 1:], 0.25)[0],
        "sink": (received[0] / received.sum()).item(),
        "sink_rank": sum(x < norms[0].item() for x in norms.tolist()) / n,
    }


# Not layer 0: there a token repeated has its norm again, but for rounding, and the order of the two is anybody's guess.
@pytest.mark.parametrize(("layer", "head"), [(1, 0), (3, 1)])
def test_a_model_is_measured_as_by_hand(llama, tokenizer, layer, head):
    diagnosis = measure(str(llama), [TEXT], NUM_TOKENS, num_chunks=2)
    by_chunk = [expected_measures(llama, chunk, layer, head) for chunk in token_ids_of(tokenizer, 2)]
    row = next(row for row in diagnosis.rows() if (row["layer"], row["head"]) == (layer, head))
    for name, first in by_chunk[0].items():
        found = row[name]["0.25"] if isinstance(row[name], dict) else row[name]
        assert found == pytest.approx((first + by_chunk[1][name]) / 2, abs=1e-4), name
    assert (diagnosis.num_chunks, diagnosis.num_prompt_tokens) == (2, NUM_TOKENS - NUM_QUERIES)


def test_sliding_layers_are_named_and_left_out(tiny_model):
    folder = tiny_model("gemma3")
    diagnosis = measure(str(folder), [TEXT], NUM_TOKENS, num_chunks=1)
    assert diagnosis.candidates == [2, 5]
    assert diagnosis.loss[:, [0, 1, 3, 4]].isnan().all()
    assert not diagnosis.loss[:, [2, 5]].isnan().any()
    assert set(recommend(diagnosis).full_layers) <= {2, 5}
    rows = [json.loads(json.dumps(row, allow_nan=False)) for row in diagnosis.rows()]
    assert [(row["layer_type"], row["variation"], row["flags"]) for row in rows if row["layer"] == 0] == [
        ("sliding_attention", None, [])
    ] * 2
    assert all(row["variation"] > 0 for row in rows if row["layer"] == 5)


def test_texts_end_and_are_not_joined(llama, tokenizer):
    def cut(num_tokens: int) -> str:
        return tokenizer.decode(tokenizer(TEXT)["input_ids"][:num_tokens])

    texts = [cut(NUM_TOKENS + 5), cut(NUM_TOKENS - 10), cut(NUM_TOKENS + 5)]
    assert measure(str(llama), texts, NUM_TOKENS, num_chunks=8).num_chunks == 2
    with pytest.raises(ValueError, match="No text is 96 tokens long"):
        measure(str(llama), texts[1:2], NUM_TOKENS)
    with pytest.raises(ValueError, match="at least 64"):
        measure(str(llama), texts, NUM_QUERIES)


def diagnosis_of(losses: dict[int, list[float]], num_layers: int = 9, **changes: torch.Tensor) -> Diagnosis:
    """Layers of two heads; those in `losses` lose so much at each keep ratio, the others nearly nothing."""
    loss = torch.tensor([0.01, 0.02, 0.03, 0.04])[:, None, None].repeat(1, num_layers, 2)
    for layer, values in losses.items():
        loss[:, layer] = torch.tensor(values)[:, None]
    fields = {
        "layer_types": ("full_attention",) * num_layers,
        "num_prompt_tokens": 100,
        "variation": torch.full((num_layers, 2), 0.1),
        "correlation": torch.full((num_layers, 2), 0.5),
        "alr": torch.full((num_layers, 2), 5.0),
        "loss": loss,
        "ideal_loss": loss / 10,
        "sink": torch.zeros(num_layers, 2),
        "sink_rank": torch.zeros(num_layers, 2),
        "loss_beyond_first": loss,
    }
    return Diagnosis(model="m", num_chunks=1, **{**fields, **changes})


AWFUL = [0.25, 0.5, 0.75, 0.9]
BAD = [0.15, 0.3, 0.6, 0.9]
MEDIUM = [0.08, 0.2, 0.3, 0.4]


def test_a_good_model_compresses_everywhere():
    assert recommend(diagnosis_of({})) == Recommendation((), 0.1, "l2", ())


def test_bad_layers_stay_full_and_do_not_count_for_the_ratio():
    recommended = recommend(diagnosis_of({1: BAD, 4: AWFUL}))
    assert recommended.full_layers == (1, 4)
    assert recommended.keep_ratio == 0.1


def test_the_mean_of_the_compressed_layers_sets_the_ratio():
    assert recommend(diagnosis_of(dict.fromkeys(range(9), MEDIUM))) == Recommendation((), 0.75, "l2", ())
    # At 0.5 the mean is (3 * 0.2 + 6 * 0.02) / 9 = 0.08, at 0.25 it is 0.12.
    assert recommend(diagnosis_of(dict.fromkeys(range(3), MEDIUM))).keep_ratio == 0.5


def test_at_most_a_third_stays_full_the_worst_ones():
    recommended = recommend(diagnosis_of({0: BAD, 2: AWFUL, 3: BAD, 5: AWFUL, 7: AWFUL}))
    assert recommended.full_layers == (2, 5, 7)
    assert any("Left to compress although they lose much: layers 0, 3." in text for text in recommended.warnings)


def test_more_than_a_third_stays_full_where_nothing_else_is_safe():
    recommended = recommend(diagnosis_of({0: AWFUL, 1: AWFUL}, num_layers=3))
    assert recommended.full_layers == (0, 1)
    assert recommended.keep_ratio == 0.1
    assert any("so 1 of 3 compress" in warning for warning in recommended.warnings)
    # One of the six awful ones is diluted by three others.
    assert recommend(diagnosis_of(dict.fromkeys(range(6), AWFUL))).full_layers == (0, 1, 2, 3, 4)


def test_no_ratio_is_safe_where_all_layers_are_bad():
    recommended = recommend(diagnosis_of(dict.fromkeys(range(9), BAD)))
    assert (recommended.keep_ratio, recommended.scorer) == (1.0, "l2")
    assert "Keeping 0.75 would lose 15% of the attention; nothing is evicted." in recommended.warnings
    assert not any("compress" in warning for warning in recommended.warnings)


def one_head(value: float, otherwise: float, layer: int = 6) -> torch.Tensor:
    values = torch.full((9, 2), otherwise)
    values[layer, 1] = value
    return values


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("flat norms", {"variation": one_head(0.01, 0.1)}),
        ("no correlation", {"correlation": one_head(-0.1, 0.5)}),
        ("only the first token", {"loss_beyond_first": one_head(0.6, 0.1).repeat(4, 1, 1)}),
        ("first token at risk", {"sink": one_head(0.4, 0.0), "sink_rank": one_head(0.3, 0.3)}),
    ],
)
def test_flags_name_heads_and_warn(flag, changes):
    diagnosis = diagnosis_of({}, **changes)
    flagged = [(row["layer"], row["head"], row["flags"]) for row in diagnosis.rows() if row["flags"]]
    assert flagged == [(6, 1, [flag])]
    (warning,) = recommend(diagnosis).warnings
    assert warning.startswith(f"{flag}: 1 of 18 heads, layer 6; ")


NO_SIGNAL = {
    "flat norms": {"variation": 0.01},
    "no correlation": {"correlation": -0.1},
    "no better than random": {},  # by `AWFUL` losses
    "only the first token": {"loss_beyond_first": 0.6},
}


def flagged_in(layers: list[int], flag: str) -> Diagnosis:
    """All heads of these layers have a flag, and lose little at any ratio unless the flag says otherwise."""
    changes = {}
    for name, value in NO_SIGNAL[flag].items():
        otherwise = getattr(diagnosis_of({}), name).clone()
        otherwise[..., layers, :] = value
        changes[name] = otherwise
    losses = {layer: [0.05, 0.5, 0.5, 0.5] for layer in layers} if flag == "no better than random" else {}
    return diagnosis_of(losses, **changes)


class TestRecommendationsFollowWarnings:
    """For each thing that is warned of, the settings below the warning do what it says."""

    def settings(self, diagnosis: Diagnosis) -> tuple[Recommendation, dict, str]:
        recommended = recommend(diagnosis)
        text = config_text(recommended, "m")
        return recommended, yaml.safe_load(text), " ".join(recommended.warnings)

    @pytest.mark.parametrize("flag", NO_SIGNAL)
    def test_few_heads_without_signal_are_counted(self, flag):
        layers = [3] if flag == "no better than random" else [3, 4]
        recommended, config, warnings = self.settings(flagged_in(layers, flag))
        assert warnings.startswith(f"{flag}: ")
        assert (config["kv-scorer"], recommended.scorer) == ("l2", "l2")
        if flag == "no better than random":  # so bad a layer stays full
            assert config["kv-full-layers"] == "3"
            assert "left full" in warnings
        else:
            assert "the ratio counts what is lost" in warnings
            assert config["kv-default-keep-ratio"] < 1
        assert "scorer" not in warnings

    @pytest.mark.parametrize("flag", ["flat norms", "no correlation", "only the first token"])
    def test_norms_that_say_nothing_are_not_recommended(self, flag):
        """Although little is lost on paper: before, `kv-scorer: l2` at 0.1 came below "try another kv-scorer"."""
        _, config, warnings = self.settings(flagged_in([0, 1, 2, 3, 4], flag))
        assert "Norms say nothing in 10 of 18 heads that compress, so kv-scorer is keydiff." in warnings
        assert "no ratio is recommended" in warnings
        assert (config["kv-scorer"], config["kv-default-keep-ratio"]) == (INSTEAD, 1.0)
        assert "nothing is evicted" not in warnings
        assert "counts" not in warnings

    def test_random_eviction_everywhere(self):
        _, config, warnings = self.settings(diagnosis_of(dict.fromkeys(range(9), AWFUL)))
        assert "no better than random: 12 of 18 heads" in warnings
        assert "so kv-scorer is keydiff" in warnings
        assert (config["kv-scorer"], config["kv-default-keep-ratio"]) == (INSTEAD, 1.0)

    def test_heads_in_full_layers_do_not_change_the_scorer(self):
        """As on Gemma 3: two of three layers are bad, and low norms do not draw attention there."""
        correlation = torch.full((3, 2), -0.1)
        correlation[2] = 0.5
        _, config, warnings = self.settings(diagnosis_of({0: AWFUL, 1: AWFUL}, num_layers=3, correlation=correlation))
        assert "no correlation: 4 of 6 heads, layers 0, 1; low norms do not draw attention; left full." in (warnings)
        assert (config["kv-scorer"], config["kv-full-layers"]) == ("l2", "0,1")
        assert config["kv-default-keep-ratio"] < 1

    def test_a_first_token_at_risk_is_protected(self):
        changes = {"sink": one_head(0.4, 0.0), "sink_rank": one_head(0.3, 0.3)}
        _, config, warnings = self.settings(diagnosis_of({}, **changes))
        assert "low ratios evict it; kv-protect-first keeps it." in warnings
        assert config["kv-protect-first"] >= 1

    def test_a_sink_that_hides_losses_bounds_the_ratio(self):
        """Before, 0.1 came below "of the rest, 63% is lost"."""
        beyond = torch.tensor([0.10, 0.20, 0.55, 0.63])[:, None, None].repeat(1, 9, 2)
        _, config, warnings = self.settings(diagnosis_of({}, sink=torch.full((9, 2), 0.9), loss_beyond_first=beyond))
        assert config["kv-default-keep-ratio"] == 0.5
        assert warnings == (
            "The first token receives 90% of the attention. Keeping 0.5 loses 20% of the rest, random eviction 50%."
        )

    def test_a_sink_that_hides_losses_at_every_ratio(self):
        beyond = torch.tensor([0.2, 0.35, 0.4, 0.45])[:, None, None].repeat(1, 9, 2)
        _, config, warnings = self.settings(diagnosis_of({}, sink=torch.full((9, 2), 0.9), loss_beyond_first=beyond))
        assert config["kv-default-keep-ratio"] == 1.0
        assert "Keeping 0.75 would lose 20% of the rest, random eviction 25%; nothing is evicted." in warnings

    @pytest.mark.parametrize(("model", "full_layers", "ratio"), [("smollm2", "0,11", 0.75), ("gemma3", "5,11", 0.75)])
    def test_measured_models(self, model, full_layers, ratio):
        """What docs/quality.md says of them still holds, and the committed config is what is recommended."""
        folder = ROOT / "benchmarks/quality/results" / model / "diagnosis"
        diagnosis = read_back(folder / "rows.jsonl")
        _, config, warnings = self.settings(diagnosis)
        assert (config["kv-full-layers"], config["kv-default-keep-ratio"]) == (full_layers, ratio)
        assert config["kv-scorer"] == "l2"
        assert "try another" not in warnings
        committed = (folder / "config.yaml").read_text()
        name = committed.split(" for ")[1].split(",")[0]
        assert config_text(recommend(diagnosis), name) == committed


def read_back(path: Path) -> Diagnosis:
    """A diagnosis from its rows, which are rounded."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    num_layers, num_heads = 1 + max(row["layer"] for row in rows), 1 + max(row["head"] for row in rows)

    def tensor(values: list) -> torch.Tensor:
        numbers = [math.nan if value is None else value for value in values]
        return torch.tensor(numbers).view(num_layers, num_heads)

    singles = ("variation", "correlation", "alr", "sink", "sink_rank")
    by_ratio = ("loss", "ideal_loss", "loss_beyond_first")
    return Diagnosis(
        model="m",
        layer_types=tuple(row["layer_type"] for row in rows if row["head"] == 0),
        num_prompt_tokens=992,
        num_chunks=8,
        **{name: tensor([row[name] for row in rows]) for name in singles},
        **{
            name: torch.stack([tensor([row[name][str(ratio)] for row in rows]) for ratio in KEEP_RATIOS])
            for name in by_ratio
        },
    )


def test_the_table_has_every_layer_that_may_compress():
    heading, random, *lines = table(diagnosis_of({1: BAD}, correlation=one_head(-0.1, 0.5)), [1])
    assert heading[1:5] == ["keep 0.75", "keep 0.5", "keep 0.25", "keep 0.1"]
    assert random[:5] == ["random eviction", "0.25", "0.50", "0.75", "0.90"]
    assert [line[0] for line in lines] == [str(layer) for layer in range(9)]
    assert lines[1] == ["1", "0.15", "0.30", "0.60", "0.90", "0.50", "", "full"]
    assert lines[6] == ["6", "0.01", "0.02", "0.03", "0.04", "0.20", "1", ""]


@pytest.mark.parametrize(("full_layers", "written"), [((0, 11), "0,11"), ((), "")])
def test_the_server_reads_the_config(tmp_path, full_layers, written):
    path = tmp_path / "recommended.yaml"
    path.write_text(
        config_text(Recommendation(full_layers, 0.5, "keydiff", ("flat norms: 1 of 2 heads",)), "some/model")
    )
    assert read_config_file(str(path), own_options()) == [
        f"--kv-full-layers={written}",
        "--kv-default-keep-ratio=0.5",
        "--kv-protect-first=4",
        "--kv-scorer=keydiff",
    ]
    assert "# flat norms: 1 of 2 heads\n" in path.read_text()


def test_heat_maps_are_drawn(tmp_path):
    variation = one_head(math.nan, 0.1)
    paths = heat_maps(diagnosis_of({}, variation=variation), tmp_path)
    assert sorted(path.name for path in paths) == ["alr.png", "correlation.png", "loss_0.5.png", "variation.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert len(set(paths.values())) == 4  # each says how to read it
    assert all("Grey layers never compress." in caption for caption in paths.values())


def test_a_model_of_another_layout_is_told_so(monkeypatch):
    from types import SimpleNamespace

    from vllm_l2kv.tools.evaluation.hf_observer import observe

    class Odd:
        config = None

        def get_decoder(self):
            return SimpleNamespace(layers=[SimpleNamespace(attn=None)])

    monkeypatch.setattr("transformers.DynamicCache", lambda config: None)
    with pytest.raises(ValueError, match="Odd has no attention"):
        observe(Odd(), [0], torch.zeros(1, 4, dtype=torch.int64), 2, Progress())
