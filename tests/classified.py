"""Classes of layers that are all on one pipeline rank."""

from collections.abc import Mapping
from typing import Any

from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_l2kv.kv_cache_spec import classify_ranks


def classify_layers(specs: Mapping[str, KVCacheSpec], *args: Any, **options: Any) -> dict[str, KVCacheSpec]:
    """Returns the specs that `classify_ranks` makes of the only rank."""
    return classify_ranks([specs], *args, **options)[0]
