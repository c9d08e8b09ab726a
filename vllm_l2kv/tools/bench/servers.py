"""The servers under test, and whether they can be tested at all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from vllm_l2kv.settings import FullHeads, heads_by_layer
from vllm_l2kv.tools.bench.memory import process_of

OURS, STOCK = "vllm-l2kv", "stock"
SECONDS = 60
"""A server that does not answer a simple question by then is not there."""


@dataclass(frozen=True)
class Server:
    """One server and the model asked of it."""

    engine: str
    url: str
    api_key: str | None
    model: str
    max_model_len: int
    vllm: str
    """Its version."""
    pid: int | None
    """Its process, if it is known and on this machine."""
    full_layers: tuple[int, ...] = ()
    """Layers that it never compacts, if it is vllm-l2kv."""
    full_heads: FullHeads = field(default_factory=dict)
    """KV heads of other layers that it never compacts."""

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def client(self) -> httpx.AsyncClient:
        """A client without bounds of its own."""
        # vLLM closes connections that idled for 5 seconds; a request that meets the closing one would fail.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
        return httpx.AsyncClient(base_url=self.url, headers=self.headers, limits=limits, timeout=None)

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids by the server's own tokenizer.

        Raises:
            ValueError: The server does not say.
        """
        body = {"model": self.model, "prompt": text, "add_special_tokens": add_special_tokens}
        answer = _answer(lambda: httpx.post(f"{self.url}/tokenize", json=body, headers=self.headers, timeout=SECONDS))
        tokens: list[int] = answer["tokens"]
        return tokens


def connect(url: str, api_key: str | None, model: str | None, pid: int | None) -> Server:
    """Asks a server who it is.

    Args:
        url: Where it is, with or without `/v1`.
        api_key: What it was started with, if anything.
        model: One of its models; the first one if `None`.
        pid: Its process; looked for on this machine if `None`.

    Raises:
        ValueError: It cannot be tested, and why.
    """
    url = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def get(path: str) -> Mapping[str, Any]:
        return _answer(lambda: httpx.get(f"{url}{path}", headers=headers, timeout=SECONDS))

    models = {entry["id"]: entry for entry in get("/v1/models")["data"]}
    name = model or next(iter(models), "")
    if name not in models:
        raise ValueError(f"{url} has no model {name!r}, but {', '.join(models) or 'none'}.")
    # A LoRA adapter has its model's bound, under its parent's name.
    bound = models[name].get("max_model_len") or models[models[name]["parent"]]["max_model_len"]
    answer = httpx.get(f"{url}/v1/kv_compression", headers=headers, timeout=SECONDS)
    compresses = answer.status_code == httpx.codes.OK
    return Server(
        OURS if compresses else STOCK,
        url,
        api_key,
        name,
        bound,
        get("/version")["version"],
        pid or process_of(url),
        *_full(answer.json() if compresses else {}),
    )


def _full(compression: Mapping[str, Any]) -> tuple[tuple[int, ...], FullHeads]:
    """Layers and heads that a server never compacts; older servers name no heads."""
    return tuple(compression.get("full_layers", ())), heads_by_layer(compression.get("full_heads", {}))


def _answer(send: Callable[[], httpx.Response]) -> Mapping[str, Any]:
    """The JSON object of an answer, or one line that says what came instead."""
    try:
        response = send()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"no answer: {error}.") from None
    if response.status_code != httpx.codes.OK:
        said = " ".join(response.text.split())[:200]
        raise ValueError(f"{response.request.url} answers {response.status_code}: {said}")
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ValueError(f"{response.request.url} does not answer like vLLM.")
    return answer
