"""Requests to an engine in this process, and the times of their answers."""

import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.speed.engines import abort_all, add_request


@dataclass(eq=False)
class Answer:
    """One request and its answer.

    Attributes:
        num_prompt_tokens: Length of its prompt.
        asked_at: When it was handed to the engine, in seconds.
        first_token_at: When its first token came; `None` before that.
        cached_tokens: Tokens of the prompt that the engine found in its cache, known with the first token.
        token_ids: The tokens generated so far.
    """

    num_prompt_tokens: int
    asked_at: float
    first_token_at: float | None = None
    cached_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)

    @property
    def first_token_ms(self) -> float:
        """Milliseconds from the request to its first token."""
        assert self.first_token_at is not None
        return (self.first_token_at - self.asked_at) * 1000


class Client:
    """Sends requests to an engine and records when its answers come."""

    def __init__(self, llm: Any, name: str) -> None:
        """Takes a name, which makes request ids unique among clients."""
        self._llm = llm
        self._name = name
        self._num_asked = 0
        self.unfinished: dict[str, Answer] = {}

    def add(self, prompt: list[int], num_output_tokens: int, **asked: Any) -> Answer:
        """Adds a request; `asked` are arguments of `vllm_l2kv.compression`."""
        req_id = f"{self._name}-{self._num_asked}"
        self._num_asked += 1
        answer = self.unfinished[req_id] = Answer(len(prompt), time.perf_counter())
        add_request(self._llm, req_id, prompt, num_output_tokens, **asked)
        return answer

    def step(self) -> list[Answer]:
        """Runs a step; returns the answers that ended in it."""
        outputs = self._llm.llm_engine.step()
        now = time.perf_counter()
        ended = []
        for output in outputs:
            answer, token_ids = self.unfinished[output.request_id], output.outputs[0].token_ids
            if token_ids and answer.first_token_at is None:
                answer.first_token_at, answer.cached_tokens = now, output.num_cached_tokens
            answer.token_ids += token_ids
            if output.finished:
                ended.append(self.unfinished.pop(output.request_id))
        return ended

    def ask(self, prompt: list[int], num_output_tokens: int, **asked: Any) -> Answer:
        """Adds a request and waits until it and all others have ended."""
        answer = self.add(prompt, num_output_tokens, **asked)
        while self.unfinished:
            self.step()
        return answer

    def abort(self) -> None:
        """Aborts all requests and runs the engine until it is idle."""
        abort_all(self._llm, list(self.unfinished))
        self.unfinished.clear()
