"""Gemma 3 with images on a GPU, where the tokens of an image see each other: bf16, CUDA graphs, async scheduling.

Tiny models with random weights, compared as in `test_tiny_models`, one for each attention backend that vLLM takes by
itself. Needs torchvision.
"""

import pytest
import torch
from agreement import check_rules
from engine import Engine, bare_rule, keep
from vllm.config import CUDAGraphMode

pytestmark = pytest.mark.gpu
pytest.importorskip("torchvision")

from tiny_vision import FAMILIES, VisionReference, picture, write  # noqa: E402

INTERVALS = (300, 5)
RULES = (
    {"ratio": "1"},
    {"ratio": "0.5"},
    {"ratio": "0.2", "first": 4, "last": 16},
    {"ratio": "1", "budget": 96, "first": 4, "last": 32},
    {"ratio": "0.5", "budget": 120},
    # Documents that contain an image in two of the prompts.
    {"ratio": "0.3", "document": 100},
    {"ratio": "0.2", "first": 4, "document": 180},
)
FULL_LAYERS = (2,)
NUM_TOKENS = 16


def prompts():
    """Texts and images: an image in the beginning, images around a long text, and images in a row at the end."""
    seeds = iter(range(100))

    def prompt(text):
        text = text.replace("IMAGE", FAMILIES["gemma3"].image)
        images = [picture(next(seeds), 112, 112) for _ in range(text.count(FAMILIES["gemma3"].image))]
        return text, images

    middle = "A lighthouse, a boat and two gulls stand on a rock in the sea. " * 30
    return [
        prompt("These words come before the first picture. IMAGE " + "What is it? " * 40),
        prompt("These words come before the first picture. IMAGE " + middle + "IMAGE What has changed?"),
        prompt("Many words, which come before all the pictures here. " + middle + "IMAGE then IMAGE and IMAGE ?"),
    ]


class Seeing:
    """An engine that takes prompts of text and images."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def generate(self, asked, params):
        requests = [
            {"prompt": text, "multi_modal_data": {"image": [image.copy() for image in images]}}
            for text, images in asked
        ]
        outputs = self.engine.llm.generate(requests, list(params), use_tqdm=False)
        self.engine.check_whole()
        return outputs


class SeeingReference(VisionReference):
    """A reference that takes prompts of text and images."""

    def logits(self, prompt, *args, **kwargs):
        return super().logits(self.see(*prompt), *args, **kwargs)


BACKENDS = {"TRITON_ATTN": {}, "TRITON_FLASH_ATTN": {"head_dim": 256, "query_pre_attn_scalar": 256}}
"""Attention backends, and the models' differences that make vLLM take them on Hopper."""
GRAPHS = {"TRITON_ATTN": CUDAGraphMode.FULL_AND_PIECEWISE, "TRITON_FLASH_ATTN": CUDAGraphMode.PIECEWISE}
"""By the second one vLLM captures no attention where images see keys before a window."""


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    if request.param == "TRITON_FLASH_ATTN" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("vLLM takes this backend on Hopper only")
    return request.param


@pytest.fixture(scope="module")
def model(backend, demo_model, tmp_path_factory):
    # Large weights amplify rounding to bf16's eight bits.
    changes = {"initializer_range": 0.06, **BACKENDS[backend]}
    return write(tmp_path_factory.mktemp("vision") / "gemma3", "gemma3", demo_model, **changes)


@pytest.fixture(scope="module")
def engine(model, start_small):
    rule = bare_rule(full_layers=FULL_LAYERS, prompt_interval=INTERVALS[0], answer_interval=INTERVALS[1])
    sizes = {"compilation_config": {"cudagraph_capture_sizes": [1, 8, 32]}, "kv_cache_memory_bytes": 1 << 28}
    images = {"limit_mm_per_prompt": {"image": 3}, "skip_mm_profiling": True}
    engine = start_small(model, max_num_seqs=32, **sizes, **images, **rule)
    engine.spoil()
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def references(model):
    """The references in fp32 and in bf16."""
    dtypes = torch.float32, torch.bfloat16
    return [SeeingReference(model, is_causal=False, dtype=dtype, device="cuda") for dtype in dtypes]


def test_it_runs_as_vllm_would_run_it(backend, engine):
    config = engine.llm.llm_engine.vllm_config
    assert config.use_v2_model_runner
    assert config.model_config.is_mm_prefix_lm
    assert config.scheduler_config.async_scheduling
    assert config.compilation_config.cudagraph_mode == GRAPHS[backend]
    backends = {layer.attn_backend.get_name() for layer in engine.layers.values() if hasattr(layer, "kv_cache")}
    assert backends == {backend}


ASKED = {"full_layers": FULL_LAYERS, "intervals": INTERVALS, "num_tokens": NUM_TOKENS}


def check(seeing, references, rules) -> str:
    cases = [(prompt, rule) for rule in rules for prompt in prompts()]
    return check_rules(seeing, references, cases, **ASKED)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_answers(rule, engine, references):
    """All prompts in one batch, twice: the second time with the prefix cache of the first."""
    for _ in range(2):
        print(f"{rule}: {check(Seeing(engine), references, [rule])}")


def test_answers_of_all_rules_in_a_batch(engine, references):
    """Some images' ranges are shifted, others are not."""
    assert engine.kv_cache_manager.reset_prefix_cache()
    print(check(Seeing(engine), references, RULES))
    engine.step()  # so that the worker forgets finished requests
    assert engine.worker.num_evicted() == {}


def test_the_comparison_sees_whether_images_attend_in_both_directions(model, engine, references):
    """A reference whose images attend causally differs by far more than bf16."""
    causal = [SeeingReference(model, dtype=reference.model.dtype, device="cuda") for reference in references]
    with pytest.raises(AssertionError, match="logits differ by"):
        check(Seeing(engine), causal, RULES[:1])


@pytest.mark.parametrize("place", ["second token", "last token"])
def test_a_budget_compacts_before_the_image_that_it_would_divide(engine, references, place):
    """Twice: the second time with the rows before the image that the first one published."""
    prompt = prompts()[1]
    num_tokens = len(references[0].see(*prompt))
    first, last = references[0].ranges[1]
    due = first + 1 if place == "second token" else last
    assert due < num_tokens
    rule = {"ratio": "1", "budget": due - INTERVALS[0], "first": 4, "last": 16}
    for _ in range(2):
        print(check_rules(Seeing(engine), references, [(prompt, rule)], **ASKED, images=references[0].ranges))


def test_a_document_that_ends_inside_an_image_is_refused(engine, references):
    prompt = prompts()[1]
    references[0].see(*prompt)
    first, _ = references[0].ranges[1]
    (output,) = Seeing(engine).generate([prompt], [keep(ratio="0.5", document=first + 1)])
    assert output.outputs[0].finish_reason == "error"
