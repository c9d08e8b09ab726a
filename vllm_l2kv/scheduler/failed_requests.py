"""Fails single requests with an error message, while the engine goes on."""

from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

from vllm.v1.engine import EngineCoreOutputs, FinishReason
from vllm.v1.request import Request

from vllm_l2kv import seams


class Refusals:
    """Fails requests in the way in which vLLM fails requests with an invalid grammar, and explains it on their outputs.

    A streaming-input session is a request that gets its prompt in chunks. Its caller waits for an answer to each chunk,
    so a failed session sends an error for each chunk that it has received. The session lasts until the caller ends it:
    later chunks are refused too, and the end is not passed to vLLM, which would treat it as a new request.

    Args:
        scheduler: vLLM's scheduler, which fails the requests at the end of the next step.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._sentences: dict[str, str] = {}  # requests that are about to fail
        self._failed_sessions: dict[str, str] = {}

    def refuse(self, req_id: str, sentence: str) -> None:
        """Makes a request fail that the scheduler holds, or that is added before its next step."""
        seams.fail_request(self._scheduler, req_id, sentence)
        self._sentences[req_id] = sentence

    def is_about_to_fail(self, req_id: str) -> bool:
        """Whether a request was refused and has not failed yet."""
        return req_id in self._sentences

    def of_failed_session(self, req_id: str) -> str | None:
        """Why the session with this id failed; `None` if it did not fail, or its caller has ended it."""
        return self._failed_sessions.get(req_id)

    def forget(self, req_ids: Iterable[str]) -> None:
        """Forgets requests that ended in another way."""
        for req_id in req_ids:
            seams.spare_request(self._scheduler, req_id)
            self._sentences.pop(req_id, None)

    def end_sessions(self, req_ids: Iterable[str] | None) -> None:
        """Forgets failed sessions that their callers ended; `None` for all of them."""
        for req_id in list(self._failed_sessions) if req_ids is None else req_ids:
            self._failed_sessions.pop(req_id, None)

    def about_to_fail(self, requests: Mapping[str, Request]) -> list[Request]:
        """Refused requests that the scheduler still holds."""
        return [requests[req_id] for req_id in self._sentences if req_id in requests] if self._sentences else []

    def explain(self, requests: Iterable[Request], outputs_of_clients: Mapping[int, EngineCoreOutputs]) -> None:
        """Adds the messages to the outputs of requests that failed in this step.

        Args:
            requests: Requests that were about to fail.
            outputs_of_clients: The step's outputs, by client index; changed in place.
        """
        for request in requests:
            req_id, queue = request.request_id, request.streaming_queue
            of_client = outputs_of_clients.get(request.client_index)
            outputs = [] if of_client is None else of_client.outputs
            for output in list(outputs):
                if output.request_id == req_id and output.finish_reason == FinishReason.ERROR:
                    output.stop_reason = sentence = self._sentences.pop(req_id)
                    outputs.extend(copy(output) for chunk in queue or () if chunk is not None)
                    if queue is not None and None not in queue:
                        self._failed_sessions[req_id] = sentence
                    break
