"""The plugin's entry point, which vLLM calls at start-up in every process, and the classes for this machine's device.

vLLM imports this module in every environment in which it is installed, stock servers included. So it imports names of
vLLM only after checking the version: an unsupported version may not have them.
"""

from typing import Any

from vllm_l2kv.log import logger_of
from vllm_l2kv.supported_vllm import UnsupportedVLLMError, check_vllm

logger = logger_of(__name__)

SCHEDULER_CLS = "vllm_l2kv.scheduler.scheduler.L2KVScheduler"
CPU_WORKER_CLS = "vllm_l2kv.worker.cpu.L2KVCPUWorker"
GPU_WORKER_CLS = "vllm_l2kv.worker.gpu.L2KVGPUWorker"
CPU_BLOCK_SIZE = 32


def register() -> None:
    """Registers the block managers of this plugin's KV-cache specs with vLLM.

    vLLM calls this as `vllm.general_plugins` in the front end, the engine core and each worker, more than once. It
    changes nothing of vLLM: an engine without this plugin's worker never uses the registered classes. With an
    unsupported version of vLLM it only logs a warning.
    """
    try:
        check_vllm()
    except UnsupportedVLLMError as error:
        logger.warning("%s Requests are not compressed.", error)
        return
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_l2kv.kv_cache_spec import (
        ChunkedLayerSpec,
        CompressedLayerSpec,
        FullLayerSpec,
        RecurrentLayerSpec,
        SlidingLayerSpec,
    )
    from vllm_l2kv.scheduler.cache_manager import (
        ChunkedLayerManager,
        CompressedLayerManager,
        FullLayerManager,
        RecurrentLayerManager,
        SlidingLayerManager,
    )

    # vLLM registers its built-in specs only while nothing else is registered, so they come first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(CompressedLayerSpec, CompressedLayerManager)
    KVCacheSpecRegistry.register(FullLayerSpec, FullLayerManager)
    KVCacheSpecRegistry.register(SlidingLayerSpec, SlidingLayerManager)
    KVCacheSpecRegistry.register(ChunkedLayerSpec, ChunkedLayerManager)
    KVCacheSpecRegistry.register(RecurrentLayerSpec, RecurrentLayerManager)


def device_engine_args() -> dict[str, Any]:
    """The arguments of vLLM that name scheduler and worker class for this machine's device.

    Raises:
        ValueError: The device has no worker class, or the version of vLLM is not supported.
    """
    check_vllm()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return {"scheduler_cls": SCHEDULER_CLS, "worker_cls": CPU_WORKER_CLS, "block_size": CPU_BLOCK_SIZE}
    if current_platform.is_cuda():
        return {"scheduler_cls": SCHEDULER_CLS, "worker_cls": GPU_WORKER_CLS}
    raise ValueError(
        f"vllm-l2kv does not support the device {current_platform.device_name}; use an NVIDIA GPU, or a machine "
        "without GPUs."
    )
