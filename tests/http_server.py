"""The real server in a process of its own."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from usages import DEMO_SHARE, memory_ratio

from vllm_l2kv.messages.usage import why_whole
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import Intervals, num_keep

START_SECONDS = 240
STOP_SECONDS = 60
KEY = "sesame"
"""The API key of servers that need one."""
INTERVALS = Intervals()
"""Intervals of servers without other options."""


class Server:
    """`vllm-l2kv serve` on a free port and in its own session, with its log in a file."""

    def __init__(
        self, log: Path, *words: str, program: Sequence[str] = (sys.executable, "-m", "vllm_l2kv.cli")
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        # Tests name the rows that they protect.
        bare_rule = ["--kv-protect-first", "0", "--kv-protect-last", "0"]
        command = [*program, "serve", "--port", str(self.port), *bare_rule, *words]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "2",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        }
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def __enter__(self) -> Self:
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.is_healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The server did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.5)

    def is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def metrics(self) -> Counter[str]:
        """Returns values of `/metrics` by name, summed over labels."""
        values: Counter[str] = Counter()
        for line in httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(maxsplit=1)
                values[name.partition("{")[0]] += float(value)
        return values

    def family(self) -> list[psutil.Process]:
        """Returns the server's process and all that it started, also those that outlived it."""
        return [process for process in psutil.process_iter() if _session(process.pid) == self.process.pid]

    def stop(self) -> list[psutil.Process]:
        """Asks the server to end; returns the processes that outlive it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        finally:
            _, left = psutil.wait_procs(self.family(), timeout=10)
            for process in left:
                process.kill()
        return left


def expected_usage(
    num_prompt_tokens: int,
    num_output_tokens: int,
    intervals: Intervals = INTERVALS,
    found: int = 0,
    full_share: Fraction = DEMO_SHARE,
    **params: Any,
) -> dict[str, Any]:
    """Returns the expected `usage.kv_cache` of an answer, by a walk over its tokens.

    Args:
        num_prompt_tokens: The prompt's length.
        num_output_tokens: The answer's length; its last token is never computed on.
        intervals: The server's.
        found: Tokens whose compressed rows were found; a compaction must leave them.
        full_share: Share of full layers in all layers.
        params: Arguments of `CompressionParams`; no rows are protected by default, as in `Server`.
    """
    asked = CompressionParams(**{"protect_first": 0, "protect_last": 0, **params})
    num_computed = num_prompt_tokens + num_output_tokens - 1
    held, points = 0, []
    document = asked.prefix_tokens
    end = document or num_prompt_tokens
    for position in range(num_computed):
        kept = held
        if position == end:
            kept = min(kept, num_keep(end, asked))
        if position == document:
            kept = min(kept, asked.max_tokens or kept)
        interval = intervals.prompt if position < num_prompt_tokens else intervals.answer
        if asked.max_tokens is not None and held >= asked.max_tokens + interval:
            kept = min(kept, asked.max_tokens)
        if kept < held:
            points.append(position)
        held = kept + 1
    assert found in {0, *(position for position in points if position < num_prompt_tokens)}, (found, points)
    numbers: dict[str, Any] = {
        "prompt_tokens": num_prompt_tokens,
        "kept_tokens": held,
        "evicted_tokens": num_computed - held,
        "compactions": len(points),
        "memory_ratio": memory_ratio(held, num_computed, full_share),
    }
    if (document and asked.compresses) or found:
        numbers["found_tokens"] = found
    reason = why_whole(num_prompt_tokens, asked)
    return numbers if points or reason is None else {**numbers, "reason": str(reason)}


def free_port() -> int:
    """Returns a free port outside the kernel's range of ephemeral ports, which no connection of another test can take.

    An ephemeral port can even be taken by the check whether the server is ready: a connection to a port without a
    listener succeeds if the kernel assigns it the same source port.
    """
    chance = random.SystemRandom()  # engines seed Python's generator with one number in each process of `make test`
    while True:
        port = chance.randrange(10_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None  # it has ended, or belongs to another user
