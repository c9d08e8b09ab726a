"""An engine in a process of its own that computes prompts for another one."""

import os
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from typing import Any, NamedTuple

SECONDS = 300
REMOTE = {"do_remote_decode": True, "do_remote_prefill": False}


class Answer(NamedTuple):
    """What a test needs of an output: its steps, the numbers of `usage.kv_cache`, and where its blocks are."""

    steps: list[Any]
    usage: Mapping[str, Any]
    transfer: Mapping[str, Any]


class Prefilling:
    """Starts the engine on a GPU; `model` and `arguments` are those of `engine.Engine`, `port` is for handshakes."""

    def __init__(self, gpu: int, port: int, model: Any, arguments: Mapping[str, Any]) -> None:
        spawn = get_context("spawn")
        self._connection, other = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(other, gpu, port, model, arguments))
        self._process.start()
        other.close()
        self._receive()

    def answer(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Answer]:
        self._connection.send(([list(prompt) for prompt in prompts], list(params)))
        return self._receive()

    def stop(self) -> None:
        self._connection.close()
        self._process.join(60)
        self._process.kill()

    def _receive(self) -> Any:
        """Raises `EOFError` if the engine has ended; why is on its standard error."""
        assert self._connection.poll(SECONDS), f"the prefilling engine does not answer for {SECONDS} s"
        return self._connection.recv()


def serve(connection: Any, gpu: int, port: int, model: Any, arguments: Mapping[str, Any]) -> None:
    """Answers until the other end closes."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
    from agreement import steps_of
    from engine import Engine

    engine = Engine(model, **arguments)
    connection.send("ready")
    while True:
        try:
            prompts, params = connection.recv()
        except EOFError:
            break
        # Not `Engine.generate`: blocks that wait for the other engine are still held.
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = []
        for output in engine.llm.generate(requests, params, use_tqdm=False):
            transfer = dict(output.kv_transfer_params)
            usage = transfer.pop("kv_cache", {})
            answers.append(Answer(steps_of(output), usage, transfer))
        connection.send(answers)
    engine.shutdown()
