"""One column of the playground in node, with a fake page and a made-up stream."""

import json
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from usages import usage
from vllm_l2kv_server.playground import INDEX, STATIC

from vllm_l2kv.messages.usage import KeptWhole

PAGE = """
import { Answer } from "./answer.js";

const parts = {};
const part = (name) => (parts[name] ??= { textContent: "", style: {}, append(text) { this.textContent += text; },
                                          setAttribute() {} });
const names = ["prompt", "kept", "evicted", "compactions", "found", "cached", "generated", "first", "speed"];
const figures = names.map((figure) => Object.assign(part(figure), { dataset: { figure } }));
const root = { querySelectorAll: () => figures, querySelector: part, setAttribute() {} };
const chunks = JSON.parse(process.argv[2]);
const stream = chunks.map((chunk) => `data: ${JSON.stringify(chunk)}\\n\\n`).join("") + "data: [DONE]\\n\\n";
globalThis.fetch = async () => new Response(stream);
const answer = new Answer(root);
answer.reset("Answer A");
parts.returned = { textContent: await answer.run({}, "", { aborted: false }, [{ layers: ["a"], compressed: true }]) };
const texts = Object.entries(parts).map(([name, { textContent }]) => [name, textContent]);
console.log(JSON.stringify(Object.fromEntries(texts)));
"""

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")


def shown(tmp_path: Path, *numbers: dict[str, Any], cached: int | None = None) -> dict[str, Any]:
    """Returns the texts of the column after a stream with one chunk for each `usage.kv_cache`, and `run`'s result.

    Args:
    cached: `cached_tokens` of a chunk at the end; `None` for a server that does not report them.
    """
    for script in STATIC.glob("*.js"):
        shutil.copy(script, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "page.js").write_text(PAGE)
    chunks = [
        {
            "choices": [{"delta": {"content": "word "}, "finish_reason": None}],
            "usage": {"prompt_tokens": 40, "completion_tokens": place, "kv_cache": kv_cache},
        }
        for place, kv_cache in enumerate(numbers, start=1)
    ]
    details = None if cached is None else {"cached_tokens": cached}
    chunks.append({"choices": [], "usage": {**chunks[-1]["usage"], "prompt_tokens_details": details}})
    command = [shutil.which("node"), "page.js", json.dumps(chunks)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


NO_LAYER = Fraction(0)
WHOLE = usage(40, 1, full_share=NO_LAYER)
HALF = usage(40, 1, evicted=20, full_share=NO_LAYER)
BUDGET = usage(40, 81, evicted=90, compactions=3, full_share=NO_LAYER)


def test_a_prompt_that_is_kept_whole_says_why(tmp_path):
    parts = shown(tmp_path, {**WHOLE, "reason": KeptWhole.PROTECTED.value})
    assert parts[".reason"] == f"Kept whole: {KeptWhole.PROTECTED}"
    assert (parts["kept"], parts["evicted"]) == ("40", "0")


def test_the_reason_disappears_once_the_prompt_is_compressed(tmp_path):
    """A prompt has a reason until its first token."""
    parts = shown(tmp_path, {**WHOLE, "reason": KeptWhole.FIRST_TOKEN.value}, HALF)
    assert (parts[".reason"], parts["evicted"]) == ("", "20")


def test_without_a_reason_none_is_shown(tmp_path):
    assert shown(tmp_path, WHOLE)[".reason"] == ""


def test_rows_of_prompt_and_answer_are_counted(tmp_path):
    """The answer of 81 tokens evicts more tokens than its prompt has."""
    parts = shown(tmp_path, BUDGET)
    assert (parts["kept"], parts["evicted"], parts["compactions"]) == ("30", "90", "3")
    assert parts[".caption"] == "Memory of the whole KV cache: 25.0% of uncompressed"


def test_what_was_found_and_cached(tmp_path):
    """A document of 1,200 tokens was found; the request that finds it counts its compaction too."""
    parts = shown(tmp_path, {**HALF, "found_tokens": 1200}, cached=1216)
    assert (parts["found"], parts["cached"]) == ("1,200", "1,216")


NOTHING = "\N{EN DASH}"


def test_zero_is_shown_and_an_unknown_number_is_not(tmp_path):
    parts = shown(tmp_path, {**HALF, "found_tokens": 0})
    assert (parts["found"], parts["cached"]) == ("0", NOTHING)
    parts = shown(tmp_path, HALF, cached=0)
    assert (parts["found"], parts["cached"]) == (NOTHING, "0")


def test_the_time_to_the_first_token_is_shown_and_returned(tmp_path):
    parts = shown(tmp_path, HALF)
    assert parts["first"] == f"{parts['returned']:.2f} s"


def test_the_page_has_a_place_for_it():
    assert '<p class="reason" role="status"></p>' in INDEX.read_text()
