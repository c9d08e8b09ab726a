"""The endpoint plugin, which vLLM's API server loads if `VLLM_PLUGINS` names it.

Like `vllm_l2kv.plugin` it imports nothing of vLLM before the version is known.
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
        """Adds our routes.

        Raises:
            UnsupportedVLLMError: vLLM would serve without them, and ignore the fields.
        """
        check_vllm()
        from vllm_l2kv_server.routes import add_routes

        add_routes(app)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Connects our routes with the engine.

        Raises:
            RuntimeError: The engine runs without our worker, so the fields would be ignored.
        """
        from vllm_l2kv_server.routes import connect

        await connect(engine_client, state, args)
