"""The endpoint plugin, which vLLM's API server loads if `VLLM_PLUGINS` names it.

Like `vllm_l2kv.plugin`, it checks vLLM's version before it imports anything from vLLM.
"""

from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from vllm_l2kv.supported_vllm import check_vllm


class KVCompressionEndpoints:
    """What `VLLM_PLUGINS=l2kv` adds to vLLM's API server."""

    name = "l2kv"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes of vllm-l2kv.

        Raises:
            UnsupportedVLLMError: This version of vLLM is not supported.
        """
        check_vllm()
        from vllm_l2kv_server.routes import add_routes

        add_routes(app)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Connects the routes with the engine.

        Raises:
            RuntimeError: The engine runs without the worker of vllm-l2kv, so the fields would be ignored.
        """
        from vllm_l2kv_server.routes import connect

        await connect(engine_client, state, args)
