"""The part of vLLM's HTTP API that load tests use."""

import json
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from usages import usage

Broken = str | tuple[int, str] | None
"""How a request fails: a status and a message in place of an answer, or a way to break the answer off."""
METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_running{engine="1"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.75
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0"} %(requests)d.0
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0"} %(prompt_tokens)d.0
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0"} %(hits)d.0
# TYPE vllm_l2kv:rows_evicted_total counter
vllm_l2kv:rows_evicted_total{engine="0",kind="ratio"} %(evicted)d.0
vllm_l2kv:rows_evicted_total{engine="0",kind="answer_budget"} 0.0
# TYPE vllm_l2kv:logical_tokens gauge
vllm_l2kv:logical_tokens{engine="0"} 4.0
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{engine="0",le="+Inf"} 7.0
vllm:e2e_request_latency_seconds_count{engine="0"} 7.0
vllm:e2e_request_latency_seconds_sum{engine="0"} 7.0
# TYPE process_resident_memory_bytes gauge
process_resident_memory_bytes 1.048576e+06
"""


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: Any) -> None:
        """Prints an error, but not that of a client which has disconnected: another test may be reading the output."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*args)


class Fake:
    """A server on a free port.

    Args:
        compresses: Whether it is vllm-l2kv and reports what it kept.
        broken: Returns how the request with a body fails.
        delay_s: Time before each event.
        api_key: Key that requests must have.
        token: Added to token ids, so that two servers can have different tokenizers.
        hits: Share of prompt tokens found in its prefix cache.
        metrics: Whether it has metrics.
    """

    def __init__(
        self,
        compresses: bool = True,
        broken: Callable[[dict[str, Any]], Broken] = lambda body: None,
        delay_s: float = 0.0,
        api_key: str | None = None,
        token: int = 0,
        hits: float = 0.0,
        metrics: bool = True,
        max_model_len: int = 1000,
    ) -> None:
        self.compresses, self.broken, self.delay_s, self.api_key = compresses, broken, delay_s, api_key
        self.token, self.hits, self.metrics, self.max_model_len = token, hits, metrics, max_model_len
        self.full: dict[str, Any] = {"full_layers": [0, 1]}
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._server = Listener(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def measured(self, ratio: float | None, budget: int | None = None) -> list[dict[str, Any]]:
        """Returns the bodies of one round without its two warm-ups."""
        asked = (ratio, budget)
        return [body for body in self.bodies if (body.get("kv_keep_ratio"), body.get("kv_max_tokens")) == asked][2:]

    def begin(self, body: dict[str, Any]) -> None:
        with self._lock:
            self.bodies.append(body)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)

    def end(self) -> None:
        with self._lock:
            self._at_once -= 1

    def tokens(self, text: str, special: bool) -> list[int]:
        """Returns a token for each word, by its first two letters; 1 is the BOS."""
        return [1] * special + [ord(word[0]) * 256 + ord(word[-1]) + self.token for word in text.split()[:5000]]

    def usage(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = len(body["prompt"])
        kept = min(round(body.get("kv_keep_ratio", 1) * prompt), body.get("kv_max_tokens", prompt))
        reported = {"kv_cache": usage(prompt, body["max_tokens"], prompt - kept)}
        counts = {"prompt_tokens": prompt, "completion_tokens": body["max_tokens"]}
        return counts | (reported if self.compresses and "kv_keep_ratio" in body else {})

    def metrics_text(self) -> str:
        with self._lock:
            bodies = list(self.bodies)
        prompt_tokens = sum(len(body["prompt"]) for body in bodies)
        evicted = sum(self.usage(body).get("kv_cache", {}).get("evicted_tokens", 0) for body in bodies)
        numbers = {"requests": len(bodies), "prompt_tokens": prompt_tokens, "evicted": evicted}
        return METRICS % {**numbers, "hits": self.hits * prompt_tokens}


def _handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def answer_json(self, content: Any, status: int = 200) -> None:
            self.answer(status, json.dumps(content).encode())

        def do_GET(self) -> None:
            found = {
                "/v1/models": {"data": [{"id": "fake", "max_model_len": fake.max_model_len}]},
                "/version": {"version": "0.32.0"},
                **({"/v1/kv_compression": fake.full} if fake.compresses else {}),
            }
            if fake.api_key and self.headers.get("authorization") != f"Bearer {fake.api_key}":
                self.answer_json({"error": "Unauthorized"}, 401)
            elif self.path == "/metrics" and fake.metrics:
                self.answer(200, fake.metrics_text().encode())
            elif self.path in found:
                self.answer_json(found[self.path])
            else:
                self.answer_json({"detail": "Not Found"}, 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path == "/tokenize":
                self.answer_json({"tokens": fake.tokens(body["prompt"], body["add_special_tokens"])})
                return
            fake.begin(body)
            try:
                self.complete(body)
            finally:
                fake.end()

        def complete(self, body: dict[str, Any]) -> None:
            broken = fake.broken(body)
            if isinstance(broken, tuple):
                self.answer_json({"error": {"message": broken[1], "code": broken[0]}}, broken[0])
                return
            self.send_response(200)
            self.send_header("connection", "close")
            self.end_headers()
            for _ in range(1 if broken else body["max_tokens"]):
                time.sleep(fake.delay_s)
                self.event({"choices": [{"text": "x"}], "usage": None})
            usage = fake.usage(body)
            if broken == "error event":
                self.event({"error": {"message": "The engine is dead.", "code": 500}})
            elif broken == "hang":
                time.sleep(2)
            elif broken == "no usage":
                return
            elif broken == "short":
                usage["completion_tokens"] = 1
            elif broken == "not reported":
                usage.pop("kv_cache")
            self.event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")

        def event(self, content: Any) -> None:
            self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
            self.wfile.flush()

    return Handler
