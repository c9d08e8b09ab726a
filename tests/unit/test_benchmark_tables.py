"""Pages made from rows: the committed ones, and the section of a run on two GPUs."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

SPEED = Path(__file__).parents[2] / "benchmarks" / "speed"
WHERE = {"gpu": "NVIDIA H100 80GB HBM3", "commit": "abc1234", "vllm": "0.32.0", "num_gpus": 2, "kv_cache_dtype": "auto"}
STOCK = {**WHERE, "engine": "stock", "groups": [[80, 16]], "num_blocks": 1001}
OURS = {**WHERE, "engine": "l2kv", "groups": [[2, 624], [78, 16]], "num_blocks": 1001}


@pytest.fixture(scope="module")
def tables():
    sys.path.append(str(SPEED))
    import tables

    return tables


@pytest.fixture
def section(tables):
    """Returns the section about two GPUs from the rows of some files, without the others."""
    return lambda **rows: tables.two_gpus_section({name: rows.get(name, []) for name in tables.TWO_GPU_FILES})


def steps(engine, **cases):
    return [{**engine, "case": case, "median_step_ms": ms} for case, ms in cases.items()]


def test_the_page_is_made_from_the_rows(tables):
    assert tables.PAGE.read_text() == tables.page()


def test_the_headline_is_made_from_the_rows(tables):
    assert tables.headline_of_rows() in tables.README.read_text()


def test_the_tables_of_reliability_are_made_from_the_rows():
    from benchmarks.reliability.tables import PAGE, with_tables

    text = PAGE.read_text()
    assert with_tables(text) == text
    torn = re.sub(r"(reliability/tables.py -->\n).*?(<!-- end of)", r"\1\2", text, flags=re.DOTALL)
    assert with_tables(torn) == text != torn
    for page in (text.replace("<!-- end of faults -->", ""), text * 2):
        with pytest.raises(ValueError, match="must hold the marks of"):
            with_tables(page)


def test_paragraphs_and_lists_are_filled_and_nothing_else():
    from benchmarks.speed.page_parts import filled

    words, cells = " ".join(["word"] * 30), f"| {'cell ' * 30}|"
    page = filled(f"\n# Title\n\n{words}\nend\n\n- {words}\n- b\n\n{cells}\n\n    a command \\\n        goes on\n\n")
    line, rest = " ".join(["word"] * 24), " ".join(["word"] * 6)
    item, item_rest = " ".join(["word"] * 23), " ".join(["word"] * 7)
    assert page == (
        f"# Title\n\n{line}\n{rest} end\n\n- {item}\n  {item_rest}\n- b\n\n{cells}\n\n"
        "    a command \\\n        goes on\n"
    )


def test_no_section_without_rows(section):
    assert section() == ""


def test_steps_with_the_floor_of_the_shape(section):
    rows = [
        *steps(STOCK, **{"8x128": 10.0, "8x4000": 18.0}),
        *steps(OURS, **{"8x128": 10.1, "8x4000": 18.2, "8x4000@0.5": 14.0, "8x15000@0.5": 20.0}),
    ]
    page = section(**{"70b_decode_step": rows})
    assert "| 8x4000 | 18.00 | 18.20 | 1.011 |  |  |" in page
    # 10 + 8 * (2 + 78 / 2) / 80
    assert "| 8x4000@0.5 | 18.00 | 14.00 | 0.778 | 14.10 | 0.993 |" in page
    assert "8x15000" not in page, "stock vLLM did not run it"
    assert "two NVIDIA H100 80GB HBM3, vLLM 0.32.0, commit abc1234" in page


def test_requests_that_fit_beside_a_large_shape(tables, section):
    # 4,250 tokens take 266 blocks of 16; 2,250 compressed ones take 141, and full layers 7 blocks of 624.
    assert tables.requests_that_fit(STOCK, 1) == 1000 // 266
    assert tables.requests_that_fit(OURS, 0.5) == 1000 // (7 + 141)
    page = section(**{"70b_decode_step": [*steps(STOCK, **{"8x128": 10.0}), *steps(OURS, **{"8x128": 10.1})]})
    assert "80 layers" in page
    assert "holds 3 requests" in page
    assert "and 3, 6, 11 in vllm-l2kv" in page


def test_one_engine_alone_makes_no_table_of_steps(section):
    page = section(decode_step=steps(OURS, **{"8x128": 10.1}))
    assert "| 8x128" not in page


def test_memory_and_checks(section):
    memory = {
        **OURS,
        "cache_bytes": 16 << 30,
        "keep_ratio": 0.5,
        "mean_running": 27.0,
        "output_tokens_per_s": 2000.0,
        "median_first_token_s": 3.0,
        "preemptions": 0,
    }
    answers = {"num_equal": 3, "num_answers": 4, "of_one_gpu": 0.0312, "of_fp32": 0.04, "bf16_of_fp32": 0.05}
    checks = [
        {**WHERE, "model": "a model", "keep_ratio": 0.5, **answers},
        {**WHERE, "check": "a check", "found": "what it found"},
    ]
    page = section(memory_bound=[memory], checks=checks)
    assert "| l2kv | bf16 | 0.5 | 27.0 | 27.6 | 2,000 | 3.0 | 0 |" in page
    assert "| a model | 0.5 | 3 of 4 | 0.031 | 0.040 | 0.050 |" in page
    assert "- a check: what it found" in page


@pytest.mark.parametrize(("gpus", "gib", "layers"), [(2, 79, 80), (1, 79, 41), (2, 40, 36)])
def test_layers_that_fit(tables, gpus, gib, layers):
    import shapes

    assert shapes.layers_that_fit({**shapes.LLAMA, **shapes.SHAPES["70b"]}, gpus, gib) == layers


def test_too_small_a_gpu_is_refused(tables):
    import shapes

    with pytest.raises(ValueError, match="1 GPUs of 14 GiB hold fewer than 3 layers; raise --gpus or --gpu-gib"):
        shapes.layers_that_fit({**shapes.LLAMA, **shapes.SHAPES["70b"]}, 1, 14)


def test_a_shape_is_written(tables, tmp_path, monkeypatch, capsys):
    import shapes

    monkeypatch.setattr(sys, "argv", ["shapes.py", "8b", str(tmp_path / "8b")])
    shapes.main()
    assert capsys.readouterr().out == "32\n"
    config = json.loads((tmp_path / "8b" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_key_value_heads"]) == (32, 4096, 8)


ONE_GPU_STOCK = {**STOCK, "num_gpus": 1, "groups": [[32, 16]]}
ONE_GPU_OURS = {**OURS, "num_gpus": 1, "groups": [[2, 240], [30, 16]]}
SIZES = {"cache_bytes": 16 << 30, "num_document_tokens": 30_000, "budget": None, "keep_ratio": 1.0}


@pytest.fixture
def documents():
    """Returns the section about documents from the rows of some files, without the others."""
    from benchmarks.speed import document_tables
    from benchmarks.speed.serving import DOCUMENTS, ON_DEMAND

    return lambda waiting=(), **rows: document_tables.documents_section(
        {name: rows.get(name, []) for name in (*DOCUMENTS, *ON_DEMAND)}, list(waiting)
    )


def test_no_documents_section_without_rows(documents):
    assert documents() == ""


def test_questions_and_what_askers_hold(documents):
    question = {"num_document_tokens": 30_000, "num_question_tokens": 200}
    times = {
        **question,
        "first_question_ms": [1100.0, 1090.0, 1200.0],
        "median_second_question_ms": 20.0,
        "cached_tokens": 30_000,
    }
    held = {"num_askers": 32, "held_bytes": 3 << 29, "needed_bytes": 1 << 30}
    page = documents(
        document=[
            {**ONE_GPU_STOCK, "keep_ratio": 1.0, **times},
            {**ONE_GPU_OURS, "keep_ratio": 0.25, **times, "median_second_question_ms": 25.0},
            {**ONE_GPU_OURS, "keep_ratio": 0.25, **held},
        ]
    )
    assert "NVIDIA H100 80GB HBM3, commit abc1234." in page
    assert "A document of 30,000 tokens and questions of 200" in page
    assert "| l2kv | 0.25 | 1,100.0 | 25.0 | 1.25 | 30,000 |" in page
    assert "| engine | keep ratio | 32 requests |" in page
    assert "| l2kv | 0.25 | 1.500 (1.500) |" in page
    assert "### Documents that stay findable" not in page, "nothing was measured"


def test_a_question_found_in_cpu_memory_beside_computing_it(documents, monkeypatch):
    from benchmarks.speed import offload

    class Client:
        """Of three questions the first computes the document, the second finds it, the third loads it."""

        def __init__(self, llm, name):
            self.num_questions = 0

        def ask(self, prompt, num_output_tokens, **asked):
            self.num_questions += 1
            ms, found = ((1000.0, 0), (20.0, 30_000), (70.0, 30_000))[(self.num_questions - 1) % 3]
            return SimpleNamespace(first_token_ms=ms * asked.get("keep_ratio", 1), cached_tokens=found)

    monkeypatch.setattr(offload, "Client", Client)
    monkeypatch.setattr(offload, "reuse_cache", lambda *_: None)
    rows = [{**about, **row} for about in (ONE_GPU_STOCK, ONE_GPU_OURS) for row in offload.rows(None, about, [])]
    assert "### A document in CPU memory" not in documents()
    page = documents(offload=rows)
    assert "second question to a document of 30,000 tokens" in page
    head = "| engine | keep ratio | computed anew | from CPU memory | on the GPU | tokens found in CPU memory |"
    assert head in page
    assert "| stock | 1.0 | 1,000.0 | 70.0 (0.070) | 20.0 (0.020) | 30,000 |" in page
    assert "| l2kv | 0.25 | 250.0 | 17.5 (0.070) | 5.0 (0.020) | 30,000 |" in page


def test_findable_documents_by_full_layers(documents):
    rows = [
        {**ONE_GPU_STOCK, **SIZES, "num_documents": 7, "num_found": 4},
        {**ONE_GPU_OURS, **SIZES, "keep_ratio": 0.25, "budget": 7500, "num_documents": 20, "num_found": 14},
        {**ONE_GPU_OURS, **SIZES, "groups": [[32, 16]], "keep_ratio": 0.25, "num_documents": 20, "num_found": 13},
    ]
    page = documents(findable=rows)
    assert "| stock |  | 1.0 | none | 7 | 4 |" in page
    assert "| l2kv | 2 | 0.25 | 7500 | 20 | 14 |" in page
    assert "| l2kv | none | 0.25 | none | 20 | 13 |" in page


def test_popular_documents_beside_stock(documents):
    load = {**SIZES, "num_documents": 12, "num_clients": 32, "seconds": 60.0}
    stock = {"median_first_token_ms": 20_000.0, "p99_first_token_ms": 30_000.0, "output_tokens_per_s": 80.0}
    ours = {"median_first_token_ms": 100.0, "p99_first_token_ms": 200.0, "output_tokens_per_s": 1600.0}
    page = documents(
        popular=[
            {**ONE_GPU_STOCK, **load, **stock, "hit_rate": 0.4},
            {**ONE_GPU_OURS, **load, **ours, "keep_ratio": 0.25, "budget": 7500, "hit_rate": 0.9934},
        ]
    )
    assert "12 such documents, popularity by Zipf's law, 32 clients" in page
    assert "| l2kv | 0.25 | 7500 | 100 | 200 | 0.005 | 1,600 | 99.3% |" in page


def test_turns_that_stock_vllm_did_not_reach_are_empty(documents):
    talk = {**SIZES, "cache_bytes": 7_864_320_000, "num_conversations": 16, "turn_tokens": 1000}
    page = documents(
        conversation=[
            {**ONE_GPU_STOCK, **talk, "median_first_token_ms": [100.0 * turn for turn in range(1, 8)]},
            {
                **ONE_GPU_OURS,
                **talk,
                "budget": 2048,
                "prompt_interval": 512,
                "median_first_token_ms": [50.0 + turn for turn in range(1, 31)],
            },
        ]
    )
    assert "in a cache of 7.3 GiB" in page
    assert "| turn | stock vLLM | budget 2048 and prompt interval 512 |" in page
    assert "| 5 | 500 | 55 |" in page
    assert "| 30 |  | 80 |" in page


def test_requests_that_wait_by_length(documents):
    rows = [
        {"engine": engine, "waiting": what, "num_prompt_tokens": length, "is_found": False, "num_question_tokens": 2000}
        | {"ms_per_step": ms}
        for engine, what, length, ms in (
            ("stock", "nothing", 10_000, 0.04),
            ("stock", "nothing", 100_000, 0.05),
            ("l2kv", "document", 10_000, 0.09),
            ("l2kv", "document", 100_000, 0.11),
        )
    ]
    page = documents(rows, findable=[{**ONE_GPU_STOCK, **SIZES, "num_documents": 7, "num_found": 4}])
    assert "| engine | asks for | 10000 tokens | 100000 tokens |" in page
    assert "| l2kv | document | 0.090 | 0.110 |" in page
    assert "all but 2,000" in page


@pytest.fixture
def draft(monkeypatch, tmp_path):
    """Runs a variant of the benchmark of speculative decoding without an engine; returns all rows so far."""
    from benchmarks.speed import drafts, engines

    def decode(_llm, counts, num_requests):
        # Three steps of 10 ms. With drafts each gives two tokens a request: one of three drafts is accepted.
        per_step = 2 if drafter else 1
        counts.update(tokens=3 * per_step * num_requests, sampled=3 * num_requests)
        if drafter:
            counts.update(drafts=9 * num_requests, accepted=3 * num_requests)
        yield from (0.01, 0.01, 0.01)

    drafter, path = "", tmp_path / "drafts.jsonl"
    pool = SimpleNamespace(num_gpu_blocks=101, get_num_free_blocks=lambda: 60)
    scheduler = SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=pool))
    for name in ("add_request", "step_until_all_decode", "abort_all"):
        monkeypatch.setattr(engines, name, lambda *_, **__: None)
    monkeypatch.setattr(engines, "scheduler_of", lambda _: scheduler)
    monkeypatch.setattr(drafts, "decode", decode)

    def run(variant, dummy=False):
        nonlocal drafter
        engine, _, drafter = variant.partition("_")
        monkeypatch.setattr(drafts, "start_variant", lambda _: (None, {**WHERE, "engine": engine}))
        monkeypatch.setattr(drafts, "prompts_of", lambda _: [[0] * 3000] * 16)
        drafts.measure(Namespace(inside=variant, model="models/a model", dummy=dummy, out=path, output_tokens=384))
        return [json.loads(line) for line in path.read_text().splitlines()]

    return run


def test_no_section_before_anything_was_drafted():
    from benchmarks.speed.draft_tables import drafts_section

    assert drafts_section([]) == ""


def test_drafts_beside_stock_vllm_without_them(draft):
    from benchmarks.speed.draft_tables import drafts_section

    for variant in ("stock", "l2kv_model"):
        draft(variant)
    page = drafts_section(draft("l2kv_ngrams", dummy=True))
    assert "with 3 drafts each" in page
    assert "NVIDIA H100 80GB HBM3, vLLM 0.32.0, commit abc1234." in page
    assert "| a model | 16x3000 | stock | none | 1.0 | 1,600 | 1,600 to 1,600 | 1.00 | 10.00 | 1.0 |  | 40 |" in page
    drafted = "3,200 | 3,200 to 3,200"
    assert f"| a model | 16x3000 | l2kv | model | 0.25 | {drafted} | 2.00 | 10.00 | 2.0 | 33% | 40 |" in page
    assert f"| a model, made-up weights | 16x3000 | l2kv | n-grams | 0.5 | {drafted} |  | 10.00 | 2.0 | 33% |" in page


HEADS = {**WHERE, "num_gpus": 1, "full_heads": 0.125, "rate": 0.1}


@pytest.fixture
def heads(monkeypatch):
    """Returns the section about full heads, from rows with some fields changed; steps and first tokens by variant."""
    from benchmarks.speed import first_token, heads, heads_tables

    variants = {"one_call": 1.01, "equal": 1.0, "stock": 1.0}
    seeds = []

    def rows_of(slower=variants):
        monkeypatch.setattr(heads, "LENGTHS", {8000: 5, 30_000: 5})
        for variant, factor in slower.items():
            about, first_ms = {**HEADS, "variant": variant}, {8000: 200.0, 30_000: 1000.0}
            for num_requests, num_tokens, is_compacted in heads.DECODE:
                if not (is_compacted and variant == "stock"):
                    ms = factor * (8.0 if is_compacted else 10.0)
                    load = {"load": f"{num_requests}x{num_tokens}", "compacted": is_compacted}
                    yield {**about, "case": "decode", **load, "median_step_ms": ms}

            def run(_llm, num_tokens, ratio, budget, seed, factor=factor, first_ms=first_ms):
                seeds.append(seed)
                # The first of each case is slow, and so is every compacted one.
                is_first = seed % 1000 == 0
                return first_ms[num_tokens] * factor * (9 if is_first else 1.1 if ratio else 1)

            monkeypatch.setattr(first_token, "run", run)
            seeds.clear()
            for row in heads.first_token(None, about, 0.125, 0.1):
                yield {**about, "case": "first_token", **row}
            assert len(seeds) == len(set(seeds)), "an engine would find the prompt"
            load = {"load": "16 GiB", "memory": 1.0 if variant == "stock" else 0.25, "mean_running": 15.0}
            speed = {"output_tokens_per_s": 1000.0 * factor, "median_first_token_s": 3.5, "num_first_tokens": 20}
            yield {**about, "case": "load", **load, **speed, "preemptions": 4, "seconds": 15.1}

    return SimpleNamespace(rows=lambda *args, **named: list(rows_of(*args, **named)), page=heads_tables.heads_section)


def test_full_heads_beside_equal_counts_and_stock(heads):
    from benchmarks.speed.heads_tables import heads_verdict

    rows = heads.rows()
    page = heads.page(rows)
    assert "0.125 of all heads" in page
    assert "One engine of each, NVIDIA H100 80GB HBM3, vLLM 0.32.0, commit abc1234." in page
    assert "| load | memory | stock | equal counts | full heads | of stock | of equal |" in page
    assert "| 64x256 | 1 | 10.00 | 10.00 | 10.10 | 1.010 | 1.010 |" in page
    # 1/8 of the rows whole, and a tenth of the others.
    assert "| 64x256 | 0.21 | 10.00 | 8.00 | 8.08 | 0.808 | 1.010 |" in page
    assert "| full heads | 0.25 | 15.0 | 1,010 | 1.01 | 3.5 | 20 | 4 |" in page
    assert page.index("| stock | 1.0 |") < page.index("| equal counts | 0.25 |") < page.index("| full heads | 0.25 |")
    assert heads_verdict(rows) == (
        "1.010 to 1.010 x stock's decode step with nothing compressed; 1.010 to 1.010 x that of equal counts in the "
        "same memory"
    )


def test_first_tokens_with_full_heads_whole_and_compressed(heads):
    rows = heads.rows()
    of_first_tokens = [row for row in rows if row["case"] == "first_token"]
    assert len(of_first_tokens) == 4 + 4 + 2, "stock vLLM compresses nothing"
    assert all(set(row["first_token_ms"]) == {row["median_first_token_ms"]} for row in of_first_tokens)
    page = heads.page(rows)
    assert "| load | memory | measured | stock | equal counts | full heads | of stock | of equal |" in page
    assert "| 1x8000 | 1 | 5 | 200.00 | 200.00 | 202.00 | 1.010 | 1.010 |" in page
    assert "| 1x30000 | 0.21 | 5 | 1000.00 | 1100.00 | 1111.00 | 1.111 | 1.010 |" in page
    assert "Target: 1.02 x stock.\nMissed in 2 lines." in page


def test_targets_of_full_heads(heads):
    assert "1.08 x equal counts. Met in all lines." in heads.page(heads.rows())
    slow = {"one_call": 1.03, "equal": 1.0, "stock": 1.0}
    assert "Missed in 3 lines." in heads.page(heads.rows(slow)), "more is allowed at 64x256, and where rows are evicted"
    assert "Missed in 7 lines." in heads.page(heads.rows({**slow, "one_call": 1.09}))
