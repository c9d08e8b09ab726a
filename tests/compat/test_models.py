"""Architectures with different keys, heads and layers. Greedy token ids equal those of the reference."""

import pytest
from engine import keep, tokens_of
from reference import Reference, check_numbers
from rules import INTERVALS
from tiny import SLIDING_WINDOW, ChunkedReference, HybridReference, WiderReference
from vllm.config import set_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
EVERY_OTHER = {
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_hidden_layers": 6,
    "sliding_window": SLIDING_WINDOW,
}


def beside(engine, make_reference, model):
    """Returns the reference for the model of an engine.

    vLLM's backend for models that it takes from `transformers` changes their classes, which then need its settings.
    """
    with set_current_vllm_config(engine.worker.vllm_config):
        return make_reference(model)


def layers_of_compressed_groups(engine) -> set[int]:
    groups = engine.worker.kv_cache_groups()
    return {extract_layer_index(name) for group in groups if group["compressed"] for name in group["layers"]}


@pytest.fixture(scope="session")
def check_shared(text_ids):
    """Who asks about a document after another one begins with its rows, and answers as if it were alone."""

    def check(engine, reference, full_layers) -> None:
        """Documents that end inside a block, at the end of one, and before the first window does."""
        for num_document, num_question in ((200, 40), (192, 90), (40, 70)):
            document, rule = text_ids[:num_document], {"ratio": "0.3", "document": num_document}
            for expected, begin in ((0, 300), (num_document, 400), (num_document, 500)):
                prompt = document + text_ids[begin : begin + num_question]
                (output,) = engine.generate([prompt], [keep(**rule)])
                assert tokens_of(output) == reference.generate(prompt, 12, full_layers=full_layers, **rule)
                assert check_numbers(output, **rule)["found_tokens"] == expected
            assert tokens_of(output) != reference.generate(prompt, 12, full_layers=full_layers)
        # The next turn of a conversation begins at the last compaction in the earlier prompt.
        prompt, rule = text_ids[700:1100], {"ratio": "1", "budget": 60, "intervals": INTERVALS}
        for expected in (0, 360):
            (output,) = engine.generate([prompt], [keep(ratio="1", budget=60)])
            assert tokens_of(output) == reference.generate(prompt, 12, full_layers=full_layers, **rule)
            assert check_numbers(output, **rule).get("found_tokens", 0) == expected
            prompt = [*prompt, *tokens_of(output), *text_ids[600:640]]

    return check


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("qwen3", {}, id="QK-norm (Qwen3)"),
        pytest.param("qwen2", {"hidden_size": 128}, id="attention bias (Qwen2)"),
        pytest.param("llama", {"num_key_value_heads": 1}, id="one KV head"),
        pytest.param(
            "llama", {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}, id="three heads"
        ),
        pytest.param(
            "llama",
            {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64},
            id="six heads on three, of size 64",
            marks=pytest.mark.slow,  # the demo model has three KV heads of this size
        ),
        pytest.param("llama", {"head_dim": 256, "num_hidden_layers": 3}, id="heads of size 256"),
        pytest.param("llama", {"tie_word_embeddings": False, "num_hidden_layers": 2}, id="two layers, one compressed"),
    ],
)
def test_an_architecture(kind, changes, tiny_model, run, check_exact):
    model = tiny_model(kind, **changes)
    with run(model) as engine:
        check_exact(engine, Reference(model))


@pytest.mark.slow  # an engine for each
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("mistral", {}, id="Mistral"),
        pytest.param("of_type", {"model_type": "ministral3", "sliding_window": None}, id="Ministral 3"),
        pytest.param("of_type", {"model_type": "mixtral", **EXPERTS}, id="Mixtral"),
        pytest.param(
            "of_type", {"model_type": "qwen2_moe", "hidden_size": 128, **QWEN_EXPERTS}, id="Qwen2 with experts"
        ),
        pytest.param("of_type", {"model_type": "stablelm", "hidden_size": 128}, id="StableLM"),
        pytest.param("phi3", {}, id="Phi-3"),
        pytest.param("of_type", {"model_type": "phi"}, id="Phi-2"),
        pytest.param("glm", {}, id="GLM"),
        pytest.param("glm4", {}, id="GLM-4"),
        pytest.param("glm4_moe", {}, id="GLM-4.5"),
        pytest.param("glm4_moe", {"use_qk_norm": False}, id="GLM-4.5-Air"),
        pytest.param("gpt_neox", {}, id="GPT-NeoX"),
        pytest.param("of_type", {"model_type": "gemma"}, id="Gemma"),
        pytest.param("of_type", {"model_type": "cohere"}, id="Command R"),
        pytest.param("of_type", {"model_type": "granite"}, id="Granite 3"),
        pytest.param("of_type", {"model_type": "nemotron"}, id="Nemotron"),
        pytest.param("of_type", {"model_type": "olmo2"}, id="OLMo 2"),
        pytest.param("of_type", {"model_type": "smollm3"}, id="SmolLM3"),
        pytest.param("of_type", {"model_type": "starcoder2", "sliding_window": None}, id="StarCoder2"),
        pytest.param("of_type", {"model_type": "ernie4_5"}, id="ERNIE 4.5"),
        pytest.param("of_type", {"model_type": "hunyuan_v1_dense"}, id="Hunyuan"),
        pytest.param("of_type", {"model_type": "seed_oss"}, id="Seed-OSS"),
    ],
)
def test_a_family_with_full_attention_alone(kind, changes, tiny_model, run, check_exact):
    model = tiny_model(kind, **changes)
    with run(model) as engine:
        check_exact(engine, beside(engine, Reference, model))


class TestSlidingWindow:
    """Layers 2, 5, 8 (and so on) attend to everything, the others to a window of 48 tokens."""

    @pytest.mark.parametrize(
        ("num_blocks", "full_layers", "block_sizes"),
        [
            pytest.param(2, (), {32}, id="nothing full"),
            pytest.param(2, (0, 1), {32}, id="full layers that slide"),
            pytest.param(2, (2,), {32}, id="one full, one compressed", marks=pytest.mark.slow),
            # The last case has groups of three kinds, and large blocks.
            pytest.param(3, (2,), {64, 32}, id="one full, two compressed", marks=pytest.mark.slow),
            pytest.param(3, (5, 8), {64, 32}, id="two full, one compressed", marks=pytest.mark.slow),
            pytest.param(4, (0, 5), {96, 32}, id="one slides, one full, three compressed"),
        ],
    )
    def test_full_attention_layers_compress_beside_it(
        self, num_blocks, full_layers, block_sizes, tiny_model, run, check_exact
    ):
        model = tiny_model("gemma3", num_blocks=num_blocks)
        with run(model, full_layers) as engine:
            assert {manager.block_size for manager in engine.managers} == block_sizes
            groups = engine.worker.kv_cache_groups()
            group_of = {int(layer.split(".")[2]): group for group in groups for layer in group["layers"]}
            compressed = {index for index, group in group_of.items() if group["compressed"]}
            sliding = {index for index, group in group_of.items() if group["sliding_window"] == SLIDING_WINDOW}
            assert sliding == {index for index in range(3 * num_blocks) if index % 3 != 2}
            assert compressed == {index for index in range(2, 3 * num_blocks, 3) if index not in full_layers}
            check_exact(engine, HybridReference(model), full_layers)

    def test_full_heads_beside_it(self, tiny_model, run, check_exact):
        """One of four KV heads of full attention is full. Layer 0 has a window, so naming its head changes nothing."""
        model, full_heads = tiny_model("gemma3", num_blocks=2), {0: (1,), 2: (1,)}
        with run(model, (), full_heads) as engine:
            groups = engine.worker.kv_cache_groups()
            assert {(group["block_size"], group["sliding_window"]) for group in groups if not group["compressed"]} == {
                (32, SLIDING_WINDOW),
                (96, None),
            }
            check_exact(engine, HybridReference(model, full_heads=full_heads), ())

    def test_a_full_layer_that_slides_gives_back_as_much_as_none(self, tiny_model, run, text_ids):
        """Such a layer holds only its window, so naming it as full changes nothing."""
        held = []
        for full_layers in ((), (0, 1)):
            with run(tiny_model("gemma3", num_blocks=2), full_layers) as engine:
                req_id = engine.add("r", text_ids[:400], keep("0.25", num_tokens=4))
                engine.step()
                engine.step()
                held.append(sum(engine.num_blocks(req_id)))
                engine.drain()
                engine.check_whole()
        assert held[0] == held[1]

    def test_documents_are_shared(self, tiny_model, run, check_shared):
        """Layers 2 and 5 and 8 attend to everything. The first is full, in blocks of 64 tokens."""
        model = tiny_model("gemma3", num_blocks=3)
        with run(model, (2,)) as engine:
            check_shared(engine, HybridReference(model), (2,))

    def test_nothing_left_to_compress_is_refused(self, tiny_model, run):
        model = tiny_model("gemma3", num_blocks=2)
        with pytest.raises(ValueError, match="name fewer layers in --kv-full-layers"), run(model, (2, 5)):
            pass

    @pytest.mark.slow
    def test_windows_alone_are_refused(self, tiny_model, run):
        """As in the first Mistral."""
        with (
            pytest.raises(ValueError, match="nothing to compress; serve it with stock vLLM"),
            run(tiny_model("mistral", sliding_window=SLIDING_WINDOW), (0, 1)),
        ):
            pass

    def test_one_kind_of_group_for_all_layers_is_refused(self, tiny_model, run):
        model = tiny_model("gemma3", num_blocks=2)
        with (
            pytest.raises(ValueError, match="disable-hybrid-kv-cache-manager"),
            run(model, (), disable_hybrid_kv_cache_manager=True),
        ):
            pass


@pytest.mark.slow  # an engine for each
@pytest.mark.parametrize(
    ("kind", "changes", "make_reference"),
    [
        pytest.param("gpt_oss", {}, HybridReference, id="learned sinks beside sliding windows (gpt-oss)"),
        pytest.param("llama4", {}, ChunkedReference, id="chunked local attention (Llama 4)"),
        pytest.param(
            "gemma2", {**EVERY_OTHER, "tie_word_embeddings": True}, HybridReference, id="capped scores (Gemma 2)"
        ),
        pytest.param("of_type", {"model_type": "olmo3", **EVERY_OTHER}, HybridReference, id="OLMo 3"),
        pytest.param("of_type", {"model_type": "exaone4", **EVERY_OTHER}, HybridReference, id="EXAONE 4"),
        pytest.param("of_type", {"model_type": "cohere2", **EVERY_OTHER}, WiderReference, id="Command A (Cohere 2)"),
    ],
)
def test_full_attention_layers_compress_beside_others(
    kind, changes, make_reference, tiny_model, run, check_exact, check_shared
):
    """Layers 1, 3, 5 have full attention, and layer 1 is a full layer."""
    model = tiny_model(kind, **changes)
    with run(model, (0, 1)) as engine:
        assert layers_of_compressed_groups(engine) == {3, 5}
        reference = beside(engine, make_reference, model)
        check_exact(engine, reference, (1,))
        check_shared(engine, reference, (1,))


@pytest.mark.slow  # two engines
@pytest.mark.parametrize(("full_layers", "compressed"), [((1,), {3, 5, 7}), ((), {1, 3, 5, 7})])
def test_layers_that_read_the_cache_of_another(full_layers, compressed, tiny_model, run, check_exact, check_shared):
    """Gemma 4. The last four of eight layers read the caches of layers 2 and 3, and need no compaction of their own."""
    types = ["sliding_attention", "full_attention"] * 4
    model = tiny_model(
        "of_type",
        model_type="gemma4_text",
        num_hidden_layers=8,
        layer_types=types,
        sliding_window=SLIDING_WINDOW,
        num_kv_shared_layers=4,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=49152,
        tie_word_embeddings=False,
    )
    with run(model, full_layers) as engine:
        assert layers_of_compressed_groups(engine) == compressed
        reference = beside(engine, HybridReference, model)
        check_exact(engine, reference, full_layers)
        check_shared(engine, reference, full_layers)
