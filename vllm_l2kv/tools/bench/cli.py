"""`vllm-l2kv bench`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_l2kv.cli_types import (
    OneLineParser,
    add_profile,
    aligned,
    count,
    full_in_words,
    list_of,
    positive,
    ratio,
)
from vllm_l2kv.profile import setting_of
from vllm_l2kv.settings import HEADS, LAYERS
from vllm_l2kv.tools.bench.load import FORMS, Load, lengths, positive_number, share

ROWS, REQUESTS, SAMPLES = "rows.jsonl", "requests.jsonl", "samples.jsonl"
RATIOS = (1.0, 0.5, 0.25)
"""Keep ratios of the rounds by default."""
NUM_REQUESTS = 32
NUM_CLIENTS = 8


def bench(argv: Sequence[str]) -> None:
    """Runs a load test and writes rows, plots and a page to a folder.

    Args:
        argv: Arguments after `bench`.

    Raises:
        SystemExit: With 2 if an option is bad or a server cannot be tested, with 1 if no request was answered, with 130
            after an interrupt, after which the finished rounds are reported.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if (options.out / ROWS).exists():
        parser.error(f"argument --out: {options.out} has rows of another run; choose another folder.")
    plan = _plan(parser, options)
    prompts = _prompts(parser, options, plan.servers)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    rows: list[Any] = []
    samples: list[Any] = []
    status = 0
    try:
        _measure(plan, prompts, options, rows, samples)
    except KeyboardInterrupt:
        status = 130
    if rows:
        _report(rows, samples, options.out)
    if not status and all(row["num_failed"] == row["num_requests"] for row in rows):
        status = 1
    sys.exit(status)


def _measure(plan: Any, prompts: Any, options: argparse.Namespace, rows: list[Any], samples: list[Any]) -> None:
    """Adds the rows and samples of each round, and writes them when it ends, so an interrupt loses only one round."""
    from vllm_l2kv.tools.bench.run import rounds

    for done in rounds(plan, prompts):
        rows.append(done.row)
        samples += done.samples
        _append(options.out / ROWS, [done.row])
        _append(options.out / SAMPLES, done.samples)
        if options.per_request:
            _append(options.out / REQUESTS, done.requests)


def _plan(parser: OneLineParser, options: argparse.Namespace) -> Any:
    from vllm_l2kv.tools.bench.run import Plan

    servers = _servers(parser, options)
    try:
        _take_profile(options, servers[0])
    except ValueError as error:
        parser.error(f"argument --kv-profile: {error}")
    return Plan(
        servers=servers,
        asked=[
            *({"kv_keep_ratio": ratio} for ratio in options.ratios),
            *({"kv_keep_ratio": 1.0, "kv_max_tokens": budget} for budget in options.budgets),
        ],
        load=Load(
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            shared_prefix=options.shared_prefix,
            seed=options.seed,
            rate=options.rate,
            concurrency=options.concurrency,
            num_requests=None if options.duration else options.requests,
            duration_s=options.duration,
        ),
        num_warmups=options.warmup,
        fields=options.fields,
        timeout_s=options.timeout,
        sample_s=options.sample_seconds,
    )


def _take_profile(options: argparse.Namespace, server: Any) -> None:
    """Sets ratios and scorer from the profile, if there is one and they are not given.

    Args:
        options: Options of the command line; changed in place.
        server: The `Server` under test, whose full layers and heads no request can change. It has those for its
            default scorer and, unless `--kv-classes` is given, of the classes that it took.

    Raises:
        ValueError: Profile or memory is refused, or the server has other full layers or heads.
    """
    taken = options.kv_profile and (HEADS if server.full_heads else LAYERS)
    classes = options.kv_classes or taken
    setting = setting_of(options.kv_profile, options.kv_memory, classes=classes, scorer=server.scorer)
    if setting is not None:
        wanted, found = (full_in_words(each.full_layers, each.full_heads) for each in (setting, server))
        if wanted != found:
            raise ValueError(
                f"the profile has {wanted} at this memory, but the server has {found}; start the server with the same "
                "--kv-profile, --kv-memory and --kv-classes."
            )
        ranking = setting.ranking(options.fields.get("kv_scorer"))
        options.fields = {f"kv_{name}": value for name, value in ranking.items()} | options.fields
    if options.ratios is None:
        options.ratios = [1.0, setting.keep_ratio] if setting else RATIOS


def _report(rows: Sequence[Any], samples: Sequence[Any], out: Path) -> None:
    from vllm_l2kv.tools.bench.report import comparison, errors, table, write_report
    from vllm_l2kv.tools.bench.servers import OURS, STOCK
    from vllm_l2kv.tools.bench.summary import label

    tables = {OURS: table(rows, OURS), STOCK: table(rows, STOCK), f"{OURS} / {STOCK}": comparison(rows)}
    for title, lines in tables.items():
        if len(lines) > 1:
            sys.stdout.write("\n".join(["", title, *aligned(lines), ""]))
    if failed := errors(rows):
        sys.stderr.write(f"{failed}\n")
    for row in rows:
        # A second run with the same seed finds prompts of the first in the server's prefix cache.
        if (hits := row["prefix_hits"] or 0) > (shared := row["load"]["shared_prefix"]) + 0.05:
            sys.stderr.write(
                f"{label(row)}: {hits:.0%} of the prompt tokens were found in the prefix cache, but only "
                f"{shared:.0%} are shared; if the server has seen this --seed before, use another one.\n"
            )
    sys.stdout.write(f"\n{write_report(rows, samples, out)}\n")


def _servers(parser: OneLineParser, options: argparse.Namespace) -> list[Any]:
    """The server under test, and the stock server if it is given; exits if one of them cannot be tested."""
    from vllm_l2kv.tools.bench.servers import OURS, STOCK, connect

    found = []
    wanted = [("--url", options.url, options.pid, OURS), ("--compare", options.compare, options.compare_pid, STOCK)]
    for name, url, pid, engine in wanted:
        if url is None:
            continue
        try:
            server = connect(url, options.api_key, options.model, pid)
        except ValueError as error:
            parser.error(f"argument {name}: {error}")
        if server.engine != engine:
            what = {OURS: "a vllm-l2kv server, which has /v1/kv_compression", STOCK: "a server of stock vLLM"}
            parser.error(f"argument {name}: {server.url} is {server.engine}; give {what[engine]}.")
        longest = options.prompt_tokens.high + options.output_tokens.high
        if longest > server.max_model_len:
            parser.error(
                f"argument --prompt-tokens: with --output-tokens must be at most {server.max_model_len} for "
                f"{server.model} of {server.url}, got {longest}."
            )
        found.append(server)
    return found


def _prompts(parser: OneLineParser, options: argparse.Namespace, servers: Sequence[Any]) -> Any:
    """Prompts from the bundled texts, made with the server's tokenizer; all servers must have the same."""
    from vllm_l2kv.tools.bench.prompts import Prompts
    from vllm_l2kv.tools.evaluation.texts import SAMPLES as TEXTS
    from vllm_l2kv.tools.evaluation.texts import read_text

    first, *others = servers
    text = "\n".join(read_text(name) for name in TEXTS)
    try:
        token_ids, bos = first.tokenize(text, False), first.tokenize("", True)
        differing = [server.url for server in others if server.tokenize(text, False) != token_ids]
    except ValueError as error:
        parser.error(f"argument --url: {error}")
    if differing:
        parser.error(f"argument --compare: {differing[0]} must serve a model with the tokenizer of {first.url}.")
    return Prompts(token_ids, bos, options.shared_prefix, options.seed)


def _append(path: Path, rows: Sequence[Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _process(text: str) -> int:
    from psutil import pid_exists  # type: ignore[import-untyped]

    if not pid_exists(pid := positive(text)):
        raise argparse.ArgumentTypeError(f"N must be the id of a process on this machine, got {pid}.")
    return pid


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}.")
    return found


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="vllm-l2kv bench",
        description="Load-tests a running server, once for each keep ratio and budget, and writes rows, plots and a "
        "page to a folder. docs/load_testing.md explains every number.",
    )
    _add_servers(parser)
    _add_load(parser)
    _add_results(parser)
    return parser


def _add_servers(parser: OneLineParser) -> None:
    add = parser.add_argument_group("servers").add_argument
    add("--url", default="http://localhost:8000", help="the vllm-l2kv server (default: %(default)s)")
    add("--compare", metavar="URL", help="a stock vLLM server, which gets the same load uncompressed")
    add("--model", help="name of the model (default: the first that the server lists)")
    add(
        "--api-key",
        default=os.environ.get("OPENAI_API_KEY"),
        metavar="KEY",
        help="API key of both servers (default: OPENAI_API_KEY)",
    )
    add("--pid", type=_process, metavar="N", help="process id of --url (default: found on this machine)")
    add("--compare-pid", type=_process, metavar="N", help="process id of --compare (default: found on this machine)")


def _add_load(parser: OneLineParser) -> None:
    from vllm_l2kv.tools.bench.prompts import MIN_TOKENS

    group = parser.add_argument_group("load")
    add = group.add_argument
    default = ",".join(f"{each:g}" for each in RATIOS)
    add("--ratios", type=list_of(ratio), metavar="R,R", help=f"keep ratios (default: {default})")
    add_profile(add, "--ratios, after 1, kv_scorer and kv_granularity", classes="those of the server")
    add(
        "--budgets",
        type=list_of(positive),
        default=[],
        metavar="N,N",
        help="values of kv_max_tokens, each measured in a round after the ratios",
    )
    arrivals = group.add_mutually_exclusive_group()
    arrivals.add_argument(
        "--concurrency",
        type=positive,
        default=NUM_CLIENTS,
        metavar="N",
        help="clients, each of which waits for an answer before its next request (default: %(default)s)",
    )
    arrivals.add_argument("--rate", type=positive_number, metavar="X", help="requests per second, Poisson arrivals")
    end = group.add_mutually_exclusive_group()
    end.add_argument(
        "--requests", type=positive, default=NUM_REQUESTS, metavar="N", help="requests per round (default: %(default)s)"
    )
    end.add_argument(
        "--duration",
        type=positive_number,
        metavar="X",
        help="seconds during which requests are sent, instead of --requests",
    )
    add("--prompt-tokens", type=lengths(MIN_TOKENS), default="512", metavar="L", help=f"{FORMS} (default: %(default)s)")
    add("--output-tokens", type=lengths(1), default="64", metavar="L", help="in the same form (default: %(default)s)")
    add(
        "--shared-prefix",
        type=share,
        default=0.0,
        metavar="X",
        help="share of each prompt that all prompts of a round share, 0 <= X < 1 (default: %(default)s)",
    )
    add("--warmup", type=count, default=2, metavar="N", help="requests before each measurement (default: %(default)s)")
    add(
        "--seed",
        type=count,
        default=0,
        metavar="N",
        help="seed of lengths, arrivals and prompts (default: %(default)s)",
    )
    add(
        "--fields",
        type=_object,
        default={},
        metavar="JSON",
        help='additional fields of requests to --url, such as \'{"kv_scorer": "keydiff"}\'',
    )
    add(
        "--timeout",
        type=positive_number,
        default=600.0,
        metavar="X",
        help="seconds after which a request counts as failed (default: 600)",
    )


def _add_results(parser: OneLineParser) -> None:
    add = parser.add_argument_group("results").add_argument
    add("--out", type=Path, default=Path("bench"), metavar="DIR", help="folder of results (default: %(default)s)")
    add("--per-request", action="store_true", help=f"also write a row for each request, to {REQUESTS}")
    add(
        "--sample-seconds",
        type=positive_number,
        default=1.0,
        metavar="X",
        help="seconds between samples of /metrics and memory (default: %(default)s)",
    )
