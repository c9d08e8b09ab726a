"""Differences between the front ends of the supported versions of vLLM; `vllm_l2kv.seams` has the rest."""

__all__ = ["cli_env_setup", "make_arg_parser", "validate_parsed_serve_args"]

# Moved in 0.33. Remove the imports after `except` when support for 0.32 ends.
try:
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.common.startup import cli_env_setup
except ImportError:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
