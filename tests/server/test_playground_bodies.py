"""The playground's request bodies, made in node."""

import json
import shutil
import subprocess
from typing import Any

import pytest
from vllm_l2kv_server.playground import INDEX, STATIC

TEXT, FIRST, SECOND = "A long text.", "Who?", "When?"
OPTIONS = {"model": "m", "max_tokens": 7}

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")


def bodies(tmp_path, function: str, **typed: Any) -> list[dict[str, Any]]:
    """Returns the two bodies as they are sent."""
    shutil.copy(STATIC / "bodies.js", tmp_path / "bodies.mjs")
    script = f"import {{ {function} }} from './bodies.mjs'; const typed = JSON.parse(process.argv[1]);"
    script += f"console.log(JSON.stringify({function}(typed)));"
    command = [shutil.which("node"), "--input-type=module", "--eval", script, json.dumps({"options": OPTIONS, **typed})]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_questions_have_the_same_document_and_parameters(tmp_path):
    first, second = bodies(tmp_path, "aboutOneDocument", text=TEXT, questions=[FIRST, SECOND], ratio=0.25)
    document, question = first.pop("messages")
    assert second.pop("messages") == [document, {"role": "user", "content": SECOND}]
    assert (document["content"], question["content"]) == (TEXT, FIRST)
    assert len(first.pop("cache_salt")) > 20
    assert first == {**OPTIONS, "temperature": 0, "kv_keep_ratio": 0.25, "kv_prefix_messages": 1}
    assert {name: second[name] for name in first} == first


def test_two_questions_share_a_salt_that_is_new_each_time(tmp_path):
    """So the first finds nothing, whatever was sent before, and the second finds the first one's document."""
    typed = {"text": TEXT, "questions": [FIRST, SECOND], "ratio": 0.25}
    salts = [body["cache_salt"] for _ in range(2) for body in bodies(tmp_path, "aboutOneDocument", **typed)]
    assert salts[0] == salts[1] != salts[2] == salts[3]


@pytest.mark.parametrize("salted", [True, False])
@pytest.mark.parametrize(("name", "values"), [("kv_keep_ratio", [1, 0.5]), ("kv_max_tokens", [100, 200])])
def test_two_values_share_a_prompt_and_no_salt(tmp_path, name, values, salted):
    sent = bodies(tmp_path, "atTwoValues", text=TEXT, question=FIRST, name=name, values=values, salted=salted)
    salts = {body.pop("cache_salt") for body in sent if salted}
    assert len(salts) == (2 if salted else 0)
    messages = [{"role": "user", "content": f"{TEXT}\n\n{FIRST}"}]
    shared = {**OPTIONS, "temperature": 0, "messages": messages}
    assert sent == [{**shared, name: value} for value in values]


def test_a_field_that_was_left_empty_is_not_sent(tmp_path):
    """Then the server uses its default."""
    sent = bodies(tmp_path, "aboutOneDocument", text=TEXT, questions=[FIRST, SECOND])
    assert all("kv_keep_ratio" not in body for body in sent)


@pytest.mark.parametrize("figure", ["found", "cached"])
def test_the_page_has_a_place_for_each_figure(figure):
    assert f'data-figure="{figure}"' in INDEX.read_text()
