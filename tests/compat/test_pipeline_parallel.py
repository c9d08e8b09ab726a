"""Pipeline ranks in separate processes, each with its layers: answers and numbers equal the reference's.

vLLM has as many steps in flight here as there are ranks.
"""

import random

import pytest
from engine import bare_rule, draw, keep
from ranks import MixedLoad
from reference import Reference, check_numbers, expected_compactions
from rules import INTERVALS
from scored import ScoredReference
from tiny import HybridReference
from weights import made_up_weights, write_profile

from vllm_l2kv.params import EVALUATION_SCORERS, PROFILE_SCORERS, SCORERS
from vllm_l2kv.profile import fingerprint

RULES = [
    *({"ratio": ratio} for ratio in ("1.0", "0.5", "0.25")),
    {"ratio": "1", "budget": 60},
    {"ratio": "0.25", "budget": 80, "first": 4, "last": 16},
    {"ratio": "0.4", "document": 200},
]


@pytest.mark.slow  # two more processes, in addition to those of `make test`
class TestTwoRanks:
    """Layer 0 is full, so the second rank has no full heads, and one group of its pool has no layers."""

    @pytest.fixture(scope="class")
    def weights(self, llama_reference):
        config = llama_reference.model.config
        return made_up_weights(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)

    @pytest.fixture(scope="class")
    def engine(self, llama, weights, run, unbound_threads, tmp_path_factory):
        """An engine that offers every scorer."""
        profile = tmp_path_factory.mktemp("profile") / "profile.safetensors"
        write_profile(profile, weights, fingerprint(llama))
        intervals = dict(zip(("prompt_interval", "answer_interval"), INTERVALS, strict=True))
        rule = {"full_layers": (0,), "default_keep_ratio": 1.0, **intervals}
        rule = bare_rule(profile=profile, evaluation_scorers=EVALUATION_SCORERS, **rule)
        with run(llama, (0,), pipeline_parallel_size=2, **rule) as engine:
            yield engine

    def test_rules(self, engine, llama_reference):
        check_rules(engine, llama_reference, (0,))
        check_groups(engine, 2, (0,))

    def test_scorers(self, engine, llama, weights, text_ids):
        """Scorers that depend on a layer's number, or on its weights in a profile, use the number in the model."""
        scored, prompt = ScoredReference(llama, 1, weights), text_ids[40:340]
        names = [*SCORERS, *EVALUATION_SCORERS, *PROFILE_SCORERS]
        for name, answer in zip(
            names, engine.tokens([prompt] * len(names), [keep("0.5", scorer=name) for name in names]), strict=True
        ):
            scored.scorer = name
            assert answer == scored.generate(prompt, 12, "0.5", (0,)), name

    def test_many_requests_with_aborts(self, engine, llama_reference, text_ids):
        """Every rank's state equals the scheduler's."""
        load = MixedLoad(text_ids, RULES, num_requests=40, num_aborted=4, max_prompt=200, num_tokens=8)
        load.run(engine)
        assert load.looks["times"] > 3, load.looks
        assert load.looks["compacted"] > 5, load.looks
        for number, (prompt, rule) in enumerate(zip(load.prompts, load.chosen, strict=True)):
            if str(number) not in load.aborted:
                answer = load.answers[str(number)]
                expected = llama_reference.greedy(prompt, answer, full_layers=(0,), intervals=INTERVALS, **rule)
                assert answer == expected, f"{len(prompt)} tokens, {rule}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "full_layers", "full_heads"),
    [
        pytest.param(2, (), {1: (1,), 2: (0,)}, id="some heads full on both"),
        pytest.param(2, (), {}, id="none full"),
        pytest.param(2, (0, 1), {}, id="the first rank has no compressed heads"),
        pytest.param(3, (2,), {0: (0,)}, id="three ranks"),
    ],
)
def test_more_pipelines(num_ranks, full_layers, full_heads, llama, run, unbound_threads):
    with run(llama, full_layers, full_heads=full_heads, pipeline_parallel_size=num_ranks) as engine:
        check_rules(engine, Reference(llama, full_heads=full_heads), full_layers)
        check_groups(engine, num_ranks, full_layers, full_heads)


@pytest.mark.slow
def test_two_ranks_of_two(llama, run, unbound_threads):
    """Tensor parallelism in each of the pipeline's ranks."""
    full_heads = {1: (0, 1)}
    with run(llama, (), full_heads=full_heads, pipeline_parallel_size=2, tensor_parallel_size=2) as engine:
        check_rules(engine, Reference(llama, full_heads=full_heads), ())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "full_layers"), [("gemma3", (5,)), ("lfm2", (0, 1))])
def test_layers_of_other_kinds(kind, full_layers, tiny_model, run, unbound_threads):
    """Sliding windows, with one full-attention layer on each rank; short convolutions and attention."""
    model, num_tokens = tiny_model(kind), 12
    prompts, rules = prompts_of(2), [{"ratio": "0.25"}, {"ratio": "1", "budget": 60}]
    named = {"gemma3": full_layers, "lfm2": (1,)}[kind]
    reference = HybridReference(model)
    with run(model, full_layers, pipeline_parallel_size=2) as engine:
        for prompt, rule, answer in zip(
            prompts, rules, engine.tokens(prompts, [keep(**r) for r in rules]), strict=True
        ):
            assert answer == reference.generate(prompt, num_tokens, full_layers=named, intervals=INTERVALS, **rule), (
                rule
            )


def prompts_of(number: int) -> list[list[int]]:
    """Prompts without repeated tokens, whose keys have equal norms in layer 0, so that rounding would decide."""
    return [draw(random.Random(i), 300) for i in range(number)]


def check_rules(engine, reference, full_layers) -> None:
    """Checks ratios, budgets and documents, in one batch and once more."""
    prompts = prompts_of(len(RULES))
    outputs = engine.generate(prompts, [keep(**rule) for rule in RULES])
    for prompt, rule, output in zip(prompts, RULES, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        assert answer == reference.greedy(prompt, answer, full_layers=full_layers, intervals=INTERVALS, **rule), rule
        numbers = check_numbers(output, intervals=INTERVALS, **rule)
        assert (numbers["compactions"] > 2) is ("budget" in rule)
        (again,) = engine.generate([prompt], [keep(**rule)])
        assert list(again.outputs[0].token_ids) == answer
        # It continued after the document, or from the last compaction in the prompt.
        found = max(expected_compactions(300, 299, intervals=INTERVALS, **rule), default=0)
        assert check_numbers(again, intervals=INTERVALS, **rule).get("found_tokens", 0) == found


def check_groups(engine, num_ranks, full_layers, full_heads=()) -> None:
    """Checks that all ranks have the same groups, and together every layer."""
    ranks = engine.llm.collective_rpc("kv_cache_groups")
    assert len(ranks) == num_ranks
    layers = {True: set(), False: set()}
    for of_group in zip(*ranks, strict=True):
        assert len({(group["compressed"], group["block_size"]) for group in of_group}) == 1
        layers[of_group[0]["compressed"]] |= {name for group in of_group for name in group["layers"]}
    names = [f"model.layers.{i}.self_attn.attn" for i in range(4)]
    full = {names[i] for i in full_layers} | {f"{names[i]}.full" for i in full_heads}
    assert layers == {True: {*names} - full, False: full}
    assert len({str(capacity) for capacity in engine.llm.collective_rpc("kv_capacity")}) == 1
