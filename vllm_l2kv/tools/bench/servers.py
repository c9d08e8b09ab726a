"""The servers under test, and checks that they can be tested."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from vllm_l2kv.settings import FullHeads, heads_by_layer
from vllm_l2kv.tools.bench.memory import process_of

OURS, STOCK = "vllm-l2kv", "stock"
SECONDS = 60
"""Timeout of the first requests to a server."""


@dataclass(frozen=True)
class Server:
    """A server and the model that is requested from it."""

    engine: str
    url: str
    api_key: str | None
    model: str
    max_model_len: int
    vllm: str
    """Version of vLLM."""
    pid: int | None
    """Process id, if known and on this machine."""
    full_layers: tuple[int, ...] = ()
    """Layers that never compact; empty for stock vLLM."""
    full_heads: FullHeads = field(default_factory=dict)
    """KV heads of other layers that never compact."""
    scorer: str | None = None
    """Scorer of requests that name none; `None` for stock vLLM."""

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of every request."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def client(self) -> httpx.AsyncClient:
        """A client without limits on connections."""
        # vLLM closes connections after 5 idle seconds; a request on a connection that is being closed would fail.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
        return httpx.AsyncClient(base_url=self.url, headers=self.headers, limits=limits, timeout=None)

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids from the server's tokenizer.

        Raises:
            ValueError: The server does not answer.
        """
        body = {"model": self.model, "prompt": text, "add_special_tokens": add_special_tokens}
        answer = _answer(lambda: httpx.post(f"{self.url}/tokenize", json=body, headers=self.headers, timeout=SECONDS))
        tokens: list[int] = answer["tokens"]
        return tokens


def connect(url: str, api_key: str | None, model: str | None, pid: int | None) -> Server:
    """Asks a server for its engine, model and version.

    Args:
        url: URL of the server, with or without `/v1`.
        api_key: API key of the server; `None` if it has none.
        model: Name of one of its models; `None` for the first.
        pid: Process id; `None` to look for it on this machine.

    Raises:
        ValueError: The server cannot be tested; the message says why.
    """
    url = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def get(path: str) -> Mapping[str, Any]:
        return _answer(lambda: httpx.get(f"{url}{path}", headers=headers, timeout=SECONDS))

    models = {entry["id"]: entry for entry in get("/v1/models")["data"]}
    name = model or next(iter(models), "")
    if name not in models:
        raise ValueError(f"{url} has no model {name!r}; it has {', '.join(models) or 'none'}.")
    # The bound of a LoRA adapter is that of its base model.
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
        *_compression(answer.json() if compresses else {}),
    )


def _compression(info: Mapping[str, Any]) -> tuple[tuple[int, ...], FullHeads, str | None]:
    """Full layers, full heads and the default scorer of a server; older servers do not report heads."""
    defaults = {field["name"]: field["default"] for field in info.get("fields", ())}
    full_heads = heads_by_layer(info.get("full_heads", {}))
    return tuple(info.get("full_layers", ())), full_heads, defaults.get("kv_scorer")


def _answer(send: Callable[[], httpx.Response]) -> Mapping[str, Any]:
    """The JSON object of an answer.

    Raises:
        ValueError: No answer, an error status, or another body.
    """
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
        raise ValueError(f"{response.request.url} did not answer with a JSON object, as vLLM does.")
    return answer
