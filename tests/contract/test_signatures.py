"""What the project relies on in vLLM. A failure after an upgrade names the row of docs/vllm_hooks.md to look at."""

import inspect
from dataclasses import fields, is_dataclass

import pytest
from overrides import classes, overrides
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.simple_cpu_offload_connector import SimpleCPUOffloadConnector
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import RequestStateStats, SchedulerStats
from vllm.v1.request import Request
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.utils import AttentionGroup
from vllm.v1.worker.worker_base import WorkerBase
from vllm_l2kv_server.engine_client import EngineCalls

import vllm_l2kv
from vllm_l2kv.scheduler.cpu_memory import CPUMemory
from vllm_l2kv.scheduler.decode_fast_path import DecodeFastPath
from vllm_l2kv.scheduler.external_hits import ExternalHits
from vllm_l2kv.scheduler.held_blocks import HeldBlocks
from vllm_l2kv.seams import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm_l2kv.supported_vllm import check_vllm
from vllm_l2kv.worker.by_head import AttentionByHead
from vllm_l2kv.worker.heads import SplitAttention
from vllm_l2kv.worker.runner_v1 import CompressedBlockTable
from vllm_l2kv.worker.runner_v2 import CompressedBlockTables


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_version():
    check_vllm()


@pytest.mark.parametrize(
    ("function", "first"),
    [
        (FullAttentionManager.get_num_blocks_to_allocate, ["self", "request_id", "num_tokens"]),
        (FullAttentionManager.allocate_new_blocks, ["self", "request_id", "num_tokens"]),
        (FullAttentionManager.cache_blocks, ["self", "request", "num_tokens"]),
        (FullAttentionManager.pop_blocks_for_free, ["self", "request_id"]),
        (Scheduler.schedule, ["self"]),
        (Scheduler.update_from_output, ["self", "scheduler_output", "model_runner_output"]),
        (Scheduler.add_request, ["self", "request"]),
        (WorkerBase.get_kv_cache_spec, ["self"]),
        (WorkerBase.get_supported_kv_cache_layouts, ["self"]),
        (CPUWorker.initialize_from_config, ["self", "kv_cache_config"]),
        (CPUWorker.execute_model, ["self", "scheduler_output"]),
        (AttentionGroup.build_metadata, ["self", "common_attn_metadata"]),
        (BlockTable.compute_slot_mapping, ["self", "num_reqs", "query_start_loc", "positions"]),
        (BlockTable.add_row, ["self", "block_ids", "row_idx"]),
        (BlockPool.get_new_blocks, ["self", "num_blocks"]),
        (BlockPool.free_blocks, ["self", "ordered_blocks"]),
        (BlockPool.evict_blocks, ["self", "block_ids"]),
        (KVCacheSpec.is_uniform_with_collection, ["self", "kv_cache_specs"]),
        (KVCacheSpecRegistry.register, ["kvcache_spec_cls", "manager_class"]),
        (get_kv_cache_groups, ["vllm_config", "kv_cache_spec"]),
        (get_kv_cache_config_from_groups, ["vllm_config", "kv_cache_groups", "available_memory"]),
        (SlidingWindowSpec.max_admission_blocks_per_request, ["self", "max_in_flight_tokens", "max_model_len"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_first_parameters(function, first):
    assert parameters(function)[: len(first)] == first


WRAPPED = {
    DecodeFastPath: KVCacheManager,
    HeldBlocks: KVCacheManager,
    ExternalHits: SimpleCPUOffloadConnector,
    CPUMemory: SimpleCPUOffloadConnector,
    CompressedBlockTable: BlockTable,
    CompressedBlockTables: BlockTables,
    SplitAttention: CPUAttentionBackendImpl,
    AttentionByHead: FlashAttentionImpl,
}
"""Each wrapper class, and the class of vLLM that it wraps."""
SET_ON_AN_INSTANCE = {EngineCalls: AsyncLLM}
"""Each class, and the class of vLLM of which one instance gets its methods."""
REPLACING = [(getattr(cls, name), theirs) for (cls, name), several in overrides().items() for theirs in several] + [
    (method, getattr(theirs, name))
    for ours, theirs in (WRAPPED | SET_ON_AN_INSTANCE).items()
    for name, method in vars(ours).items()
    if inspect.isfunction(method) and hasattr(theirs, name) and not name.startswith("__")
]


@pytest.mark.parametrize(("ours", "theirs"), REPLACING, ids=lambda method: method.__qualname__)
def test_a_replacement_takes_the_arguments_of_vllms_method(ours, theirs):
    """Its named parameters have vLLM's names and order, and it passes all others on."""
    own = inspect.signature(getattr(ours, "__func__", ours)).parameters.values()
    kinds = {p.kind for p in own}
    positional = [p.name for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert positional == parameters(theirs)[: len(positional)]
    assert set(named) <= set(parameters(theirs))
    passes_on = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
    assert passes_on or len(named) == len(parameters(theirs))
    optional = {p.name for p in inspect.signature(theirs).parameters.values() if p.default is not p.empty}
    assert not optional & {p.name for p in own if p.default is p.empty}, "vLLM may leave them out"


def test_every_wrapper_class_is_compared():
    assert {cls for cls in classes() if "__getattr__" in vars(cls)} == set(WRAPPED) - {CPUMemory}


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (AttentionGroup, ["backend", "layer_names", "kv_cache_spec", "kv_cache_group_id", "metadata_builders"]),
        (CommonAttentionMetadata, ["seq_lens", "max_seq_len", "seq_lens_cpu_upper_bound", "req_idx"]),
        (SchedulerOutput, ["scheduled_new_reqs", "scheduled_cached_reqs", "finished_req_ids", "preempted_req_ids"]),
        (CachedRequestData, ["resumed_req_ids"]),
        (SchedulerStats, ["kv_connector_stats"]),
        (RequestStateStats, ["arrival_time", "first_token_latency", "first_token_ts", "last_token_ts"]),
        (FullAttentionSpec, ["sliding_window", "attention_chunk_size", "non_causal"]),
        (AttentionSpec, ["block_size", "num_kv_heads", "head_size", "dtype"]),
        (KVCacheGroupSpec, ["layer_names", "kv_cache_spec"]),
        (SlidingWindowSpec, ["sliding_window"]),
        (KVCacheTensor, ["layers", "layer_stride"]),
        (VllmConfig, ["additional_config", "kv_transfer_config", "speculative_config"]),
    ],
)
def test_dataclass_fields(cls, names):
    assert is_dataclass(cls)
    assert set(names) <= {field.name for field in fields(cls)}


def test_attributes_of_instances():
    assert {"req_to_blocks", "num_cached_block", "block_pool", "block_size"} <= names_assigned_in(
        SingleTypeKVCacheManager.__init__
    )
    assert {"coordinator", "block_pool"} <= names_assigned_in(KVCacheManager.__init__)
    assert {"single_type_managers"} <= names_assigned_in(KVCacheCoordinator.__init__)
    assert {"requests", "running", "kv_cache_manager", "grammar_compile_error_reqs"} <= names_assigned_in(
        Scheduler.__init__
    )
    assert {"is_prefill_chunk", "num_output_placeholders", "num_computed_tokens", "max_tokens"} <= names_assigned_in(
        Request.__init__
    )
    assert "kv_transfer_params" in EngineCoreOutput.__struct_fields__


def names_assigned_in(function) -> set[str]:
    return {name for name in function.__code__.co_names if f"self.{name}" in inspect.getsource(function)}


def test_the_count_of_cached_blocks_ends_publication():
    """`stop_prefix_caching` relies on vLLM publishing blocks from this count on and deleting it with the blocks."""
    source = inspect.getsource(SingleTypeKVCacheManager.cache_blocks)
    assert "self.num_cached_block.get(request.request_id, 0)" in source
    assert "if num_cached_blocks >= num_full_blocks" in source
    assert "self.num_cached_block.pop(request_id" in inspect.getsource(SingleTypeKVCacheManager.pop_blocks_for_free)


def test_hits_inside_blocks_are_a_switch_of_the_coordinator():
    """`find_prefixes_inside_blocks` sets this switch; the block managers use it for nothing else."""
    assert "self.enable_partial_hash_hits" in inspect.getsource(
        HybridKVCacheCoordinator._cache_hit_alignment_tokens.fget
    )
    assert "self.enable_partial_hash_hits" in inspect.getsource(HybridKVCacheCoordinator._align_cacheable)
    assert FullAttentionManager.supports_fine_grained_hash_lookup
    assert parameters(BlockPool._insert_block_hash) == ["self", "block_hash_with_group_id", "block", "num_tokens"]
    assert "self._remove_cached_block_hashes(blk)" in inspect.getsource(BlockPool.cache_full_blocks)


def test_the_scheduler_derives_from_vllms_own_choice(tiny_model):
    """With and without async scheduling, the scheduler derives from the class that vLLM itself would use."""
    model = str(tiny_model("llama"))
    ours, stock = (EngineArgs(model, **args).create_engine_config() for args in (vllm_l2kv.engine_args(), {}))
    assert ours.max_concurrent_batches == stock.max_concurrent_batches
    for is_async in (True, False):
        for config in (ours, stock):
            config.scheduler_config.async_scheduling = is_async
        assert stock.scheduler_config.get_scheduler_cls() in ours.scheduler_config.get_scheduler_cls().__mro__


def test_what_the_servers_shutdown_relies_on():
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor

    assert parameters(AsyncLLM.shutdown)[:2] == ["self", "timeout"]
    assert parameters(OutputProcessor.propagate_error) == ["self", "e"]
    assert isinstance(AsyncLLM.errored, property)
    assert isinstance(AsyncLLM.dead_error, property)
    assert {"output_handler", "output_processor"} <= names_assigned_in(AsyncLLM.__init__)


def test_what_the_check_of_a_prompt_relies_on():
    """Endpoints give the engine client a dict with a type; the Responses API makes its generator in one call."""
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.inputs import tokens_input
    from vllm.renderers.inputs.preprocess import extract_prompt_len

    assert tokens_input([1, 2]).keys() >= {"type", "prompt_token_ids"}
    assert parameters(extract_prompt_len) == ["model_config", "prompt"]
    assert inspect.isasyncgenfunction(OpenAIServingResponses._generate_with_builtin_tools)
    names = ["self", "request_id", "engine_input", "sampling_params"]
    assert parameters(OpenAIServingResponses._generate_with_builtin_tools)[:4] == names
    assert "= self._generate_with_builtin_tools(" in inspect.getsource(OpenAIServingResponses._create_responses)


def test_what_the_document_of_a_chat_relies_on():
    """All endpoints render chats by one method of one object, which returns conversations and prompts."""
    from vllm.renderers import BaseRenderer, ChatParams, TokenizeParams
    from vllm.renderers.chat_utils import has_non_text_content
    from vllm.renderers.online_renderer import OnlineRenderer

    assert parameters(BaseRenderer.render_chat_async)[:4] == ["self", "conversations", "chat_params", "tok_params"]
    assert inspect.iscoroutinefunction(BaseRenderer.render_chat_async)
    assert "return out_conversations, eng_prompts" in inspect.getsource(BaseRenderer.render_chat_async)
    assert "await renderer.render_chat_async(" in inspect.getsource(OnlineRenderer.preprocess_chat)
    for render in (OnlineRenderer.render_chat, OnlineRenderer.render_responses):
        assert "await self.preprocess_chat(" in inspect.getsource(render)
    assert "chat_template_kwargs" in {field.name for field in fields(ChatParams)}
    assert "max_output_tokens" in {field.name for field in fields(TokenizeParams)}
    assert {"renderer"} <= names_assigned_in(AsyncLLM.__init__)
    text = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}
    assert [has_non_text_content(messages) for messages in ([text], [text, image])] == [False, True]


def test_loggers_share_one_object_and_plugins_run_before_vllms():
    """`vllm_l2kv_server.metrics` takes the stats of vllm-l2kv out of it before vLLM's loggers read it."""
    assert parameters(StatLoggerManager.record)[:5] == [
        "self",
        "scheduler_stats",
        "iteration_stats",
        "mm_cache_stats",
        "engine_idx",
    ]
    assert " in self.stat_loggers:" in inspect.getsource(StatLoggerManager.record)
    assert {"logger_manager"} <= names_assigned_in(AsyncLLM.__init__)
    assert {"engine_indexes", "stat_loggers"} <= names_assigned_in(StatLoggerManager.__init__)
    assert "Any" in str(next(f.type for f in fields(SchedulerStats) if f.name == "kv_connector_stats"))


def test_the_call_for_slots_of_a_decoding_request():
    """`DecodeFastPath` handles exactly this call."""
    source = inspect.getsource(Scheduler.schedule)
    assert "num_lookahead_tokens=self.num_lookahead_tokens" in source
    assert parameters(KVCacheManager.allocate_slots)[:3] == ["self", "request", "num_new_tokens"]
    assert {"empty_kv_cache_blocks"} <= names_assigned_in(KVCacheManager.__init__)
    source = inspect.getsource(KVCacheManager.allocate_slots)
    assert "self.coordinator.cache_blocks(request, num_tokens_to_cache)" in source
