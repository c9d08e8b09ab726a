"""What vLLM calls at start-up in every process, and the classes it takes for this machine's device.

vLLM imports this module in every environment that has it, stock servers included. So it imports nothing of vLLM before
the version is known: another one may not have the names.
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
    """Tells vLLM which block manager serves which of our specs.

    Called by vLLM as `vllm.general_plugins` in the front end, the engine core and each worker, more than once. It
    registers our own classes and changes nothing of vLLM's: an engine without our worker never meets them. With a
    version of vLLM that is not supported it does nothing, and says so.
    """
    try:
        check_vllm()
    except UnsupportedVLLMError as error:
        logger.warning("%s Requests are not compressed.", error)
        return
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_l2kv.kv_cache_spec import CompressedLayerSpec, FullLayerSpec, RecurrentLayerSpec
    from vllm_l2kv.scheduler.cache_manager import CompressedLayerManager, FullLayerManager, RecurrentLayerManager

    # Once anything is registered vLLM skips its built-in specs, so those go first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(CompressedLayerSpec, CompressedLayerManager)
    KVCacheSpecRegistry.register(FullLayerSpec, FullLayerManager)
    KVCacheSpecRegistry.register(RecurrentLayerSpec, RecurrentLayerManager)


def device_engine_args() -> dict[str, Any]:
    """Scheduler and worker class for this machine's device.

    Raises:
        ValueError: A device without a worker of ours, or a version of vLLM that is not supported.
    """
    check_vllm()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return {"scheduler_cls": SCHEDULER_CLS, "worker_cls": CPU_WORKER_CLS, "block_size": CPU_BLOCK_SIZE}
    if current_platform.is_cuda():
        return {"scheduler_cls": SCHEDULER_CLS, "worker_cls": GPU_WORKER_CLS}
    raise ValueError(
        f"vllm-l2kv does not run on {current_platform.device_name}; use a machine with an NVIDIA GPU or a CPU only."
    )
