"""Tool calls together with compression, over HTTP: grammars on a compressed context."""

import json
from typing import Any

import jsonschema
import openai
import pytest
from http_server import Server, expected_usage

from vllm_l2kv.policy import Intervals

MODEL = "SmolLM2-135M-Instruct"
# The demo model's own template does not support tools.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}
A call looks so: <tool_call>{"name": "...", "arguments": {...}}</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SCHEMAS: dict[str, dict[str, Any]] = {
    "count_ships": {
        "type": "object",
        "properties": {"day": {"type": "integer", "minimum": 0, "maximum": 11}, "at_night": {"type": "boolean"}},
        "required": ["day", "at_night"],
        "additionalProperties": False,
    },
    "light_the_lamp": {
        "type": "object",
        "properties": {"colour": {"enum": ["white", "red"]}},
        "required": ["colour"],
        "additionalProperties": False,
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "strict": True, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
PROTECT_LAST = 64  # the question
INTERVALS = Intervals(100, 3)
RULES = [
    pytest.param(None, id="nothing asked"),
    pytest.param({"keep_ratio": 0.5}, id="ratio"),
    pytest.param({"max_tokens": 200}, id="budget"),
]
NAMED = {"type": "function", "function": {"name": "light_the_lamp"}}


def turn(day: int, ships: int) -> list[dict[str, Any]]:
    """A question, the call of a tool, the tool's result, the answer."""
    function = {"name": "count_ships", "arguments": json.dumps({"day": day, "at_night": False})}
    return [
        {"role": "user", "content": f"How many ships on day {day}?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": f"call-{day}", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": f"call-{day}", "content": json.dumps({"ships": ships})},
        {"role": "assistant", "content": f"He saw {ships} ships."},
    ]


# Turns that even a model with 135 million parameters continues by itself.
TURNS = [message for day in range(3) for message in turn(day, day * 7 % 11)]
QUESTION, CALL, RESULT, _ = turn(3, 10)


@pytest.fixture(scope="module")
def client(demo_model, tmp_path_factory):
    """A client of a server with short intervals: a budget compacts prompts before their end, and during calls."""
    words = "--max-model-len 4096 --enforce-eager --dtype float32 --enable-auto-tool-choice --tool-call-parser hermes"
    words += " --trust-request-chat-template --kv-prompt-interval {} --kv-answer-interval {}".format(*INTERVALS)
    log = tmp_path_factory.mktemp("server") / "server.log"
    with (
        Server(log, *words.split()) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        yield client


def ask(client, messages: list[dict[str, Any]], rule: dict[str, float] | None, **fields: Any) -> Any:
    fields = {"tools": TOOLS, "max_tokens": 200, "temperature": 0, "parallel_tool_calls": False, **fields}
    asked = {} if rule is None else {**rule, "protect_last": PROTECT_LAST}
    extra = {"chat_template": TEMPLATE, **{f"kv_{name}": value for name, value in asked.items()}}
    return client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra, **fields)


def call_of_stream(chunks: list[Any]) -> tuple[str, str]:
    """Returns the name and the joined arguments of the one call in a stream."""
    deltas = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert {call.index for call in deltas} == {0}
    names, arguments = ([getattr(call.function, field) or "" for call in deltas] for field in ("name", "arguments"))
    return "".join(names), "".join(arguments)


def check_call(name: str, arguments: str, tool_choice: Any) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    if tool_choice == NAMED:
        assert name == NAMED["function"]["name"]


def check_usage(usage: Any, rule: dict[str, float] | None) -> None:
    assert usage.prompt_tokens > 300
    numbers = usage.to_dict().get("kv_cache")
    if rule is None:
        assert numbers is None
        return
    lengths = usage.prompt_tokens, usage.completion_tokens
    found = numbers.get("found_tokens", 0)
    assert numbers == expected_usage(*lengths, INTERVALS, found, **rule, protect_last=PROTECT_LAST)
    assert (numbers["compactions"] > 2) is ("max_tokens" in rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tool_choice", ["required", NAMED, "auto"], ids=["required", "named", "auto"])
class TestACall:
    def test_at_once(self, client, tool_choice, rule):
        answer = ask(client, [*TURNS, QUESTION], rule, tool_choice=tool_choice)
        (call,) = answer.choices[0].message.tool_calls
        check_call(call.function.name, call.function.arguments, tool_choice)
        check_usage(answer.usage, rule)

    def test_streamed(self, client, tool_choice, rule):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(ask(client, [*TURNS, QUESTION], rule, tool_choice=tool_choice, **options))
        check_call(*call_of_stream(chunks), tool_choice)
        check_usage(chunks[-1].usage, rule)


@pytest.mark.parametrize("rule", RULES)
def test_a_tools_result_is_answered(client, rule):
    answer = ask(client, [*TURNS, QUESTION, CALL, RESULT], rule, tool_choice="none")
    assert answer.choices[0].message.content == "He saw 10 ships."
    assert not answer.choices[0].message.tool_calls
    check_usage(answer.usage, rule)
