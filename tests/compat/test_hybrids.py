"""Models with recurrent layers, which keep a state and stay as they are; full-attention layers compress."""

import json

import pytest
from engine import bare_rule, greedy, keep, tokens_of
from reference import check_numbers
from rules import INTERVALS
from tiny import HybridReference

from vllm_l2kv.cli import main
from vllm_l2kv.profile import Profile
from vllm_l2kv.tools.plan import cli


class TestShortConvolution:
    """LFM2: short convolutions in layers 0, 2, 4, attention in 1, 3, 5. The prefix cache holds states too."""

    @pytest.fixture(scope="class")
    def model(self, tiny_model):
        return tiny_model("lfm2")

    @pytest.fixture(scope="class")
    def engine(self, model, run):
        with run(model, (0, 1)) as engine:
            engine.spoil()
            yield engine

    @pytest.fixture(scope="class")
    def reference(self, model):
        return HybridReference(model)

    def test_the_first_attention_layer_is_full(self, engine):
        groups = engine.worker.kv_cache_groups()
        layers = {tuple(int(name.split(".")[2]) for name in group["layers"]): group for group in groups}
        assert {indices for indices, group in layers.items() if group["compressed"]} == {(3, 5)}
        assert layers[1,]["block_size"] == 2 * layers[3, 5]["block_size"] == 64
        assert engine.scheduler.cache_config.mamba_cache_mode == "align"

    def test_answers(self, engine, reference, check_exact):
        check_exact(engine, reference, (1,))

    def test_states_of_a_compressed_context_are_not_found(self, engine, reference, text_ids):
        """Each of the three requests must not find what the earlier ones cached at the end of the same prompt."""
        prompt = text_ids[1000:1600]
        expected = reference.generate(prompt, 12, full_layers=(1,))
        found = []
        for rule in ({"ratio": "1", "budget": 60}, {"ratio": "1"}, {"ratio": "1"}):
            (output,) = engine.generate([prompt], [keep(**rule)])
            found.append(output.num_cached_tokens)
            rule = {**rule, "intervals": INTERVALS}
            assert tokens_of(output) == reference.generate(prompt, 12, full_layers=(1,), **rule)
            check_numbers(output, **rule)
        assert tokens_of(output) == expected
        # vLLM keeps the state at the end of a prompt. That of the first request belongs to a compressed context.
        assert found == [0, 0, 576]

    @pytest.mark.parametrize(("rule", "found"), [({"ratio": "0.5"}, 576), ({"ratio": "1", "budget": 60}, 0)])
    def test_a_hit_ends_before_the_first_compaction(self, rule, found, engine, reference, text_ids):
        """Unless an earlier prompt has left compacted rows."""
        prompt = text_ids[1000:1600]
        assert engine.kv_cache_manager.reset_prefix_cache()
        engine.generate([prompt], [keep("1")])
        (output,) = engine.generate([prompt], [keep(**rule)])
        rule = {**rule, "intervals": INTERVALS}
        assert tokens_of(output) == reference.generate(prompt, 12, full_layers=(1,), **rule)
        assert tokens_of(output) != reference.generate(prompt, 12, full_layers=(1,))
        assert output.num_cached_tokens == found
        check_numbers(output, **rule)

    @pytest.mark.parametrize("num_document", [200, 224, 31, 97])
    def test_documents_are_shared(self, num_document, engine, reference, text_ids):
        """The first asker overwrites the state at the end of the document; the others begin on a copy of it."""
        document, rule = text_ids[2000 : 2000 + num_document], {"ratio": "0.3", "document": num_document}
        prompts = [document + text_ids[begin : begin + 40] for begin in (300, 340, 380, 300)]
        outputs = [engine.generate([prompt], [keep(**rule)])[0] for prompt in prompts]
        answers = [tokens_of(output) for output in outputs]
        assert answers == [reference.generate(prompt, 12, full_layers=(1,), **rule) for prompt in prompts]
        assert answers != [reference.generate(prompt, 12, full_layers=(1,)) for prompt in prompts]
        found = [check_numbers(output, **rule)["found_tokens"] for output in outputs]
        assert found == [0, *[num_document] * 3]

    def test_askers_of_one_document_at_once(self, engine, reference, text_ids):
        """All but one wait for the document, then begin on copies of one state in the same step."""
        rule = {"ratio": "0.4", "document": 150}
        prompts = [text_ids[3000:3150] + text_ids[begin : begin + 30] for begin in (100, 200, 400, 700)]
        outputs = engine.generate(prompts, [keep(**rule)] * 4)
        assert sorted(output.kv_transfer_params["kv_cache"]["found_tokens"] for output in outputs) == [0, 150, 150, 150]
        for prompt, output in zip(prompts, outputs, strict=True):
            assert tokens_of(output) == reference.generate(prompt, 12, full_layers=(1,), **rule)

    def test_a_conversation_with_a_budget_goes_on_at_an_earlier_compaction(self, engine, reference, text_ids):
        """Its state is that of a compressed context, and found by its history alone."""
        rule = {"ratio": "1", "budget": 60}
        prompt = text_ids[500:1100]
        (first,) = engine.generate([prompt], [keep(**rule)])
        prompt = [*prompt, *tokens_of(first), *text_ids[1700:1800]]
        (second,) = engine.generate([prompt], [keep(**rule)])
        found = second.kv_transfer_params["kv_cache"]["found_tokens"]
        assert 400 < found < 600
        assert tokens_of(second) == reference.generate(prompt, 12, full_layers=(1,), intervals=INTERVALS, **rule)
        assert tokens_of(second) != reference.generate(prompt, 12, full_layers=(1,))
        check_numbers(second, intervals=INTERVALS, **rule)

    def test_the_plan_is_of_these_blocks(self, engine, model, text_ids, capsys):
        """The plan bounds states but does not count them: with a prefix cache a request holds one or two per layer."""
        config, num_tokens = engine.scheduler.kv_cache_config, 40
        size = config.kv_cache_tensors[0].size
        capsys.readouterr()
        words = ["--context=600", f"--output={num_tokens}", "--ratio=0.25", "--protect=0:0", "--budgets=60"]
        words += ["--full-layers=0,1", "--device=cpu", "--dtype=float32", f"--kv-cache-gib={size / 2**30}", "--json"]
        words += [f"--prompt-interval={INTERVALS[0]}", f"--answer-interval={INTERVALS[1]}"]
        cli.plan([str(model), *words, "--max-num-batched-tokens=512"])
        planned = json.loads(capsys.readouterr().out)["engines"][1]
        assert (planned["num_blocks"], planned["block_bytes"]) == (config.num_blocks, size // config.num_blocks)
        assert [(group["layers"], group["block_size"]) for group in planned["groups"]] == [
            (len(group.layer_names), group.kv_cache_spec.block_size) for group in config.kv_cache_groups
        ]
        num_states = sum(group["kind"] == "recurrent" for group in planned["groups"])
        assert num_states
        for row in planned["rows"]:
            assert engine.kv_cache_manager.reset_prefix_cache()
            params = keep(row["keep_ratio"], budget=row["max_tokens"], num_tokens=num_tokens)
            req_id = engine.add("a", text_ids[:600], params)
            held = []
            while engine.llm.llm_engine.has_unfinished_requests():
                engine.step()
                tables = [manager.req_to_blocks.get(req_id, ()) for manager in engine.managers]
                held.append(sum(not block.is_null for table in tables for block in table))
            assert held.pop() == 0
            prompt, answering = held[: 2 - num_tokens], held[2 - num_tokens :]
            assert row["prompt_blocks"] - num_states <= max(prompt) <= row["prompt_blocks"]
            assert row["answer_blocks"] - num_states <= max(answering) <= row["answer_blocks"]


@pytest.mark.slow  # an engine for each
@pytest.mark.parametrize(
    ("kind", "named", "full_layers", "full_heads"),
    [
        # Layer numbers include feed-forward layers: Mamba is in 0, 2, 4 and 7, attention in 3, 6 and 9.
        pytest.param("nemotron_h", (0, 1), (3,), {}, id="Nemotron-H"),
        pytest.param("nemotron_h", (), (), {}, id="Nemotron-H, nothing full"),
        pytest.param("nemotron_h", (), (), {6: (1,)}, id="Nemotron-H, a full head"),
        pytest.param("granite_hybrid", (0, 1), (1,), {}, id="Granite 4"),
        pytest.param("granite_hybrid", (3, 5), (3, 5), {}, id="Granite 4, two full"),
        pytest.param("granite_hybrid", (0, 1), (1,), {5: (0,)}, id="Granite 4, a full layer and a full head"),
        pytest.param("lfm2", (), (), {}, id="LFM2, nothing full"),
        pytest.param("falcon_h1", (0,), (0,), {}, id="Falcon-H1"),
    ],
)
def test_an_architecture(kind, named, full_layers, full_heads, tiny_model, run, check_exact):
    """Without a prefix cache, which vLLM's Mamba 2 for CPUs cannot have."""
    model = tiny_model(kind)
    with run(model, named, full_heads, enable_prefix_caching=False) as engine:
        engine.spoil()
        check_exact(engine, HybridReference(model, full_heads=full_heads), full_layers)


@pytest.mark.slow
@pytest.mark.parametrize(("named", "full_layers"), [((0, 1), (1,)), ((), ())])
def test_short_convolutions_with_experts(named, full_layers, tiny_model, run, check_exact):
    """LFM2 with experts, with a prefix cache."""
    model = tiny_model("lfm2_moe")
    with run(model, named) as engine:
        engine.spoil()
        assert engine.scheduler.cache_config.mamba_cache_mode == "align"
        check_exact(engine, HybridReference(model), full_layers)


@pytest.mark.slow
def test_a_profile_sets_full_layers(tiny_model, run, tmp_path, text_ids):
    """The profile's settings name attention layers, and its memory counts their rows alone."""
    model, path = tiny_model("granite_hybrid"), tmp_path / "granite.safetensors"
    main(["profile", str(model), "-o", str(path), "--samples=3", "--tokens=160", "--questions=2", "--device=cpu"])
    setting = Profile.read(path).setting(0.5)
    with run(model, None, **bare_rule(profile=path, memory=0.5), enable_prefix_caching=False) as engine:
        prompt = text_ids[:600]
        (output,) = engine.generate([prompt], [greedy(2)])
        compressed = [group["layers"] for group in engine.worker.kv_cache_groups() if group["compressed"]]
        layers = {int(name.split(".")[2]) for group in compressed for name in group}
        assert layers == {1, 3, 5}.difference(setting.full_layers)
        assert output.kv_transfer_params["kv_cache"]["memory_ratio"] == pytest.approx(0.5, abs=0.01)
        (learned,) = engine.generate([prompt], [keep(0.5, scorer="learned")])
        assert len(tokens_of(learned)) == 12
