"""vLLM's `SimpleCPUOffloadConnector` without a GPU: its own code, with plain copies in place of CUDA's."""

from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import KVTransferConfig
from vllm.v1.simple_kv_offload import worker

from vllm_l2kv import refusals


class Stream:
    """A stream whose work is complete as soon as it is launched."""

    def __init__(self, priority: int = 0) -> None:
        self.priority = priority

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class Event:
    """An event that is complete after so many queries, one per step."""

    def __init__(self, lag: int = 0) -> None:
        self._lag = lag

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        self._lag -= 1
        return self._lag < 0

    def synchronize(self) -> None:
        pass


class HostBackend:
    """Replaces `DmaCopyBackend`: caches are `[num_blocks, bytes of a block]` int8, by name of a layer."""

    num_stored = 0
    num_loaded = 0
    lag = 0

    def init(self, gpu_caches: Any, cpu_caches: Any, device: Any, load_stream: Any, store_stream: Any) -> None:
        self._gpu_caches, self._cpu_caches = gpu_caches, cpu_caches

    def launch_copy(
        self, source: list[int], target: list[int], is_store: bool, event_idx: int, events_list: list, **_: Any
    ) -> None:
        here, there = (self._gpu_caches, self._cpu_caches) if is_store else (self._cpu_caches, self._gpu_caches)
        for name in here:
            there[name][target] = here[name][source]
        if is_store:
            self.num_stored += len(source)
        else:
            self.num_loaded += len(source)
        events_list.append((event_idx, Event(self.lag)))


class Torch:
    """torch with fake streams."""

    Event = Event
    cuda = SimpleNamespace(Stream=Stream, current_stream=Stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def open_connector(monkeypatch) -> None:
    """Lets an engine in this process use the connector, which CPUs refuse, since its copies need a GPU."""
    monkeypatch.setattr(worker, "torch", Torch())
    monkeypatch.setattr(worker, "DmaCopyBackend", HostBackend)
    monkeypatch.setitem(refusals.CONNECTORS, "CPUs", ("SimpleCPUOffloadConnector",))


def cpu_memory(num_bytes: int) -> KVTransferConfig:
    """Arguments that switch offloading to CPU memory on."""
    return KVTransferConfig(
        kv_connector="SimpleCPUOffloadConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"lazy_offload": True, "cpu_bytes_to_use": num_bytes},
    )
