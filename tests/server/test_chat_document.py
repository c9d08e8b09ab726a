"""Documents that a chat names by messages: vLLM's real endpoints and renderer, with a fake engine."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from usages import usage
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import ChatParams, TokenizeParams
from vllm_l2kv_server import chat_document
from vllm_l2kv_server.chat_document import DocumentFinder, TokenizedDocument, end_of_document
from vllm_l2kv_server.context import ChatDocument, Compression, current
from vllm_l2kv_server.last_line import Outcome

from vllm_l2kv.capacity import Capacity, GroupCapacity
from vllm_l2kv.field_kinds import ParamError

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
CAPACITY = Capacity(1000, (GroupCapacity(32, True),), 8192)
DOCUMENT, QUESTION = "A lighthouse has a keeper and a lamp. ", "Who keeps it?"
USERS = [{"role": "user", "content": DOCUMENT}, {"role": "user", "content": QUESTION}]
OPTIONS = ("--served-model-name=m", "--dtype=float32", "--enforce-eager", "--trust-request-chat-template")

SMOLLM = "<|im_start|>{role}\n{content}<|im_end|>\n"
SMOLLM_SYSTEM = SMOLLM.format(
    role="system", content="You are a helpful AI assistant named SmolLM, trained by Hugging Face"
)


class FakeEngine:
    """Takes prompts like vLLM's engine client, and keeps them."""

    errored = is_stopped = False
    is_running = True
    logger_manager = None

    def __init__(self, config: Any) -> None:
        from vllm.renderers import renderer_from_config
        from vllm.v1.engine.input_processor import InputProcessor

        self.vllm_config, self.model_config = config, config.model_config
        self.renderer = renderer_from_config(config)
        self.input_processor = InputProcessor(config, self.renderer)
        self.asked: list[tuple[list[int], dict[str, Any]]] = []

    async def collective_rpc(self, method):
        return [{"kv_cache_groups": [], "kv_capacity": CAPACITY.as_plain()}[method]]

    async def is_tracing_enabled(self) -> bool:
        return False

    def check_admission(self, *args) -> None:
        """Admits everything."""

    async def generate(self, prompt, sampling_params, request_id, **kwargs):
        tokens = prompt["prompt_token_ids"]
        self.asked.append((tokens, sampling_params.extra_args))
        answer = CompletionOutput(0, "a", [1], None, None, finish_reason="stop")
        numbers = {"kv_cache": usage(len(tokens), 1)}
        yield RequestOutput(request_id, None, tokens, None, [answer], True, kv_transfer_params=numbers)

    def shutdown(self, timeout=None) -> None:
        """Does nothing."""


class Served:
    """vLLM's app with the plugin of vllm-l2kv, and the engine's tokenizer."""

    def __init__(self, model: str) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.openai.api_server import build_app
        from vllm.usage.usage_lib import UsageContext
        from vllm_l2kv_server.serve import make_parser, parse

        args = parse(make_parser(), [model, *OPTIONS])
        args.outcome = Outcome()
        engine_args = AsyncEngineArgs.from_cli_args(args)
        self.engine = FakeEngine(engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER))
        self.app = build_app(args, ("generate",), self.engine.model_config)
        asyncio.run(init_app_state(self.engine, self.app.state, args, ("generate",)))
        self.tokenizer = self.engine.renderer.get_tokenizer()

    def post(self, path: str, **body: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                return await client.post(path, json={"model": "m", "kv_keep_ratio": 0.5, **body})

        self.engine.asked.clear()
        return asyncio.run(run())

    def documents(self, path: str, **body: Any) -> list[str]:
        """Returns the document of each prompt that reaches the engine, as text."""
        answer = self.post(path, **body)
        assert answer.status_code == 200, answer.text
        found = []
        for tokens, asked in self.engine.asked:
            assert set(asked) == {"kv_keep_ratio", "kv_prefix_tokens"}, "kv_prefix_messages is no word of the engine"
            end = asked["kv_prefix_tokens"]
            text = self.tokenizer.decode(tokens[:end])
            assert 0 < end < len(tokens)
            assert tokens[:end] == self.tokenizer.encode(text, add_special_tokens=False)
            found.append(text)
        return found

    def refused(self, path: str, **body: Any) -> str:
        """Returns the message of an answer with status 400; checks that nothing reached the engine."""
        answer = self.post(path, **body)
        assert answer.status_code == 400, answer.text
        error, message = answer.json()["error"], answer.json()["error"]["message"]
        assert message.endswith(" (parameter=kv_prefix_messages)")
        assert path == MESSAGES or error["param"] == "kv_prefix_messages"
        assert self.engine.asked == []
        return message


@pytest.fixture(scope="module")
def served(demo_model):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("VLLM_PLUGINS", "l2kv")
        yield Served(str(demo_model))


class TestEndpoints:
    """All endpoints render the demo model's template, which adds a system message if there is none."""

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("path", [CHAT, "/invocations"])
    def test_chat(self, served, path, stream):
        expected = SMOLLM_SYSTEM + SMOLLM.format(role="user", content=DOCUMENT)
        assert served.documents(path, messages=USERS, kv_prefix_messages=1, stream=stream) == [expected]

    def test_the_generation_prompt_may_be_all_that_follows(self, served):
        expected = SMOLLM_SYSTEM + "".join(SMOLLM.format(**message) for message in USERS)
        assert served.documents(CHAT, messages=USERS, kv_prefix_messages=2) == [expected]

    def test_content_in_parts(self, served):
        parts = [{"type": "text", "text": "A lamp."}, {"type": "text", "text": "A keeper."}]
        expected = SMOLLM_SYSTEM + SMOLLM.format(role="user", content="A lamp.\nA keeper.")
        messages = [{"role": "user", "content": parts}, USERS[1]]
        assert served.documents(CHAT, messages=messages, kv_prefix_messages=1) == [expected]

    def test_several_chats_in_one_request(self, served):
        chats = [USERS, [{"role": "system", "content": "Be brief."}, *USERS]]
        expected = [
            SMOLLM_SYSTEM + SMOLLM.format(role="user", content=DOCUMENT),
            SMOLLM.format(role="system", content="Be brief."),
        ]
        assert served.documents(f"{CHAT}/batch", messages=chats, kv_prefix_messages=1) == expected

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(("num", "given"), [(1, {}), (2, {"system": "Be brief."})])
    def test_messages_count_the_system(self, served, num, given, stream):
        system = SMOLLM.format(role="system", content="Be brief.") if given else SMOLLM_SYSTEM
        expected = system + SMOLLM.format(role="user", content=DOCUMENT)
        body = {"messages": USERS, "max_tokens": 8, "kv_prefix_messages": num, "stream": stream, **given}
        assert served.documents(MESSAGES, **body) == [expected]

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("num", "given"),
        [
            (1, {"input": USERS}),
            (2, {"input": USERS, "instructions": "Be brief."}),
            (1, {"input": DOCUMENT}),
        ],
    )
    def test_responses_count_the_instructions(self, served, num, given, stream):
        system = SMOLLM.format(role="system", content="Be brief.") if "instructions" in given else SMOLLM_SYSTEM
        expected = system + SMOLLM.format(role="user", content=DOCUMENT)
        assert served.documents(RESPONSES, kv_prefix_messages=num, stream=stream, **given) == [expected]

    def test_in_xargs(self, served):
        assert len(served.documents(CHAT, messages=USERS, vllm_xargs={"kv_prefix_messages": 1})) == 1

    def test_a_chat_without_a_document_is_rendered_once(self, served):
        assert served.post(CHAT, messages=USERS).status_code == 200
        assert [asked for _, asked in served.engine.asked] == [{"kv_keep_ratio": 0.5}]

    def test_chats_that_vllm_renders_for_itself(self, served):
        """To learn how a template uses an effort, vLLM renders one message, fewer than the document has."""
        body = {"messages": USERS, "max_tokens": 8, "kv_prefix_messages": 2, "thinking": {"type": "disabled"}}
        assert len(served.documents(MESSAGES, **body)) == 1


class TestRefused:
    @pytest.mark.parametrize("value", [0, -1, 1.5, "1", True, [], 2**31])
    def test_bad_values(self, served, value):
        assert "kv_prefix_messages must" in served.refused(CHAT, messages=USERS, kv_prefix_messages=value)

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("path", "body", "most"),
        [
            (CHAT, {"messages": USERS}, 2),
            (f"{CHAT}/batch", {"messages": [USERS, USERS[:1]]}, 1),
            (MESSAGES, {"messages": USERS, "system": "Be brief.", "max_tokens": 8}, 3),
            (RESPONSES, {"input": USERS}, 2),
            (RESPONSES, {"input": DOCUMENT}, 1),
        ],
    )
    def test_beyond_the_last_message(self, served, path, body, most, stream):
        """Refused before the status, also for streams."""
        body |= {"stream": stream} if "batch" not in path else {}
        words = f"kv_prefix_messages must be at most {most}, the number of messages, got {most + 1}."
        assert words in served.refused(path, kv_prefix_messages=most + 1, **body)

    def test_nothing_follows(self, served):
        words = served.refused(CHAT, messages=USERS, kv_prefix_messages=2, add_generation_prompt=False)
        assert "covers the whole prompt, but at least one token must follow the document" in words

    def test_an_answer_that_goes_on(self, served):
        """Rendered alone, the last answer would be closed."""
        messages = [*USERS, {"role": "assistant", "content": "The"}]
        more = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
        assert "gives the first 3 messages other tokens alone" in served.refused(CHAT, kv_prefix_messages=3, **more)
        assert len(served.documents(CHAT, kv_prefix_messages=2, **more)) == 1

    def test_beside_tokens(self, served):
        words = served.refused(CHAT, messages=USERS, kv_prefix_messages=1, kv_prefix_tokens=9)
        assert "kv_prefix_messages and kv_prefix_tokens both say where the document ends; give one of them" in words

    @pytest.mark.parametrize("body", [{"kv_prefix_messages": 1}, {"vllm_xargs": {"kv_prefix_messages": 1}}])
    def test_without_a_chat(self, served, body):
        words = served.refused("/v1/completions", prompt="A document.", **body)
        assert f"works on POST {CHAT}, {CHAT}/batch, {RESPONSES}, {MESSAGES} and /invocations only" in words
        assert "give kv_prefix_tokens instead" in words
        words = served.refused("/invocations", prompt="A document.", **body)
        assert "needs a chat that vLLM renders by a chat template; give kv_prefix_tokens instead" in words

    def test_beam_search(self, served):
        body = {"messages": USERS, "use_beam_search": True, "n": 2, "kv_keep_ratio": None}
        assert "leave out use_beam_search or kv_prefix_messages" in served.refused(CHAT, kv_prefix_messages=1, **body)

    def test_messages_that_vllm_converts(self, served):
        """Results of two tools in one message become two messages, two calls in a row become one."""
        results = [{"type": "tool_result", "tool_use_id": name, "content": "1"} for name in "ab"]
        uses = [{"type": "tool_use", "id": name, "name": "f", "input": {}} for name in "ab"]
        messages = [USERS[0], {"role": "assistant", "content": uses}, {"role": "user", "content": results}]
        words = served.refused(MESSAGES, messages=messages, max_tokens=8, kv_prefix_messages=1)
        assert "vLLM makes a chat of 4 messages from the 3 of this request, including the system message" in words
        calls = [{"type": "function_call", "call_id": name, "name": "f", "arguments": "{}"} for name in "ab"]
        outputs = [{"type": "function_call_output", "call_id": name, "output": "1"} for name in "ab"]
        words = served.refused(RESPONSES, input=[USERS[0], *calls, *outputs], kv_prefix_messages=1)
        assert "vLLM makes a chat of 4 messages from the 5 of this request, including the system message" in words


LLAMA = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n\n' + message.content | trim + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif -%}"""
"""Trims messages, as Llama 3's template does."""

QWEN = """\
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{%- endfor -%}
{%- for message in messages -%}
{%- set content = message.content.split('</think>')[-1] if loop.index0 < last.user else message.content -%}
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""
"""Leaves out the thinking of earlier turns, as Qwen 3's template does."""

NO_LONE_SYSTEM = """\
{%- if messages | selectattr('role', 'equalto', 'user') | list | length == 0 -%}
{{- raise_exception('No user query found in messages.') -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""

JOINED = "{%- for message in messages %}{{ message.content }}{% endfor -%}{{ '!' if add_generation_prompt }}"
"""Has no separator between messages, so a token may contain the end of one and the beginning of the next."""

WITH_ALL = """\
{%- for tool in tools or [] %}{{ tool.function.name + ' ' }}{% endfor -%}
{%- for document in documents or [] %}{{ document.text + ' ' }}{% endfor -%}
{{- mood -}}
{%- for message in messages -%}{{ '<|im_start|>' + message.content + '<|im_end|>' }}{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>' }}{% endif -%}"""

SYSTEM = {"role": "system", "content": "  Be brief.  "}
THOUGHT = {"role": "assistant", "content": "<think>Hm.</think>A lamp."}


def turn(role: str, content: str, space: str = "\n") -> str:
    return f"<|im_start|>{role}{space}{content}<|im_end|>"


class TestTemplates:
    """Each template comes with the request, which a server may allow."""

    @pytest.mark.parametrize(
        ("template", "messages", "num", "expected"),
        [
            (LLAMA, [SYSTEM, *USERS], 1, turn("system", "Be brief.", "\n\n")),
            (LLAMA, USERS, 1, turn("user", DOCUMENT.strip(), "\n\n")),
            (QWEN, [SYSTEM, USERS[0], THOUGHT, USERS[1]], 2, turn("system", "  Be brief.  ") + turn("user", DOCUMENT)),
            (QWEN, [USERS[0], THOUGHT], 2, turn("user", DOCUMENT) + turn("assistant", THOUGHT["content"])),
            (NO_LONE_SYSTEM, [SYSTEM, *USERS], 2, turn("system", "  Be brief.  ") + turn("user", DOCUMENT)),
        ],
    )
    def test_a_beginning(self, served, template, messages, num, expected):
        more = {"chat_template": template, "kv_prefix_messages": num}
        assert served.documents(CHAT, messages=messages, **more) == [expected]

    @pytest.mark.parametrize(
        ("template", "messages", "num", "words"),
        [
            # another turn follows, so the thinking of the document's turn is left out
            (QWEN, [USERS[0], THOUGHT, USERS[1]], 2, "gives the first 2 messages other tokens alone"),
            (
                NO_LONE_SYSTEM,
                [SYSTEM, *USERS],
                1,
                "refuses the first 1 messages alone (No user query found in messages.)",
            ),
            (JOINED, [{"role": "user", "content": text} for text in ("light", "house")], 1, "other tokens alone"),
        ],
    )
    def test_no_beginning(self, served, template, messages, num, words):
        said = served.refused(CHAT, messages=messages, chat_template=template, kv_prefix_messages=num)
        assert words in said
        assert "give kv_prefix_tokens instead, or let the document end with" in said

    def test_both_renderings_have_the_same_arguments(self, served):
        function = {"name": "look", "parameters": {"type": "object", "properties": {}}}
        more = {
            "tools": [{"type": "function", "function": function}],
            "tool_choice": "none",
            "documents": [{"title": "t", "text": "paper"}],
            "chat_template_kwargs": {"mood": "calm"},
        }
        body = {"messages": USERS, "chat_template": WITH_ALL, "kv_prefix_messages": 1, **more}
        assert served.documents(CHAT, **body) == [f"look paper calm<|im_start|>{DOCUMENT}<|im_end|>"]


class FakeRenderer:
    """Makes one token for each message and one for the answer's beginning; counts the messages that it renders."""

    def __init__(self) -> None:
        self.num_renders = 0
        self.finder = DocumentFinder(self.render_chat_async)

    async def render_chat_async(self, conversations, chat_params, tok_params, *, prompt_extras):
        self.num_renders += 1
        prompts = [{"type": "token", "prompt_token_ids": [len(m["content"]) for m in c]} for c in conversations]
        if chat_params.chat_template_kwargs["add_generation_prompt"]:
            for prompt in prompts:
                prompt["prompt_token_ids"].append(7)
        return conversations, prompts

    def prompt(self, *messages: dict, num_messages: int = 1, max_tokens: int = 8, salt: str | None = None) -> dict:
        """Returns the prompt of a request with this document."""
        params = ChatParams(chat_template_kwargs={"add_generation_prompt": True})

        async def run():
            current.set(Compression({}, ChatDocument(num_messages)))
            limits = TokenizeParams(max_total_tokens=100, max_output_tokens=max_tokens)
            extras = {} if salt is None else {"cache_salt": salt}
            return (await self.finder.render([list(messages)], params, limits, prompt_extras=extras))[1][0]

        return asyncio.run(run())


IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}


def test_images_in_the_document():
    """Tokens of images are placeholders, and a second rendering would load the images again."""
    renderer = FakeRenderer()
    prompt = renderer.prompt(USERS[0], IMAGE, USERS[1], num_messages=2)
    assert renderer.num_renders == 1
    with pytest.raises(ParamError, match="counts text only, and the first 2 messages hold more; give kv_prefix_tokens"):
        end_of_document(prompt)


def test_images_after_the_document():
    assert end_of_document(FakeRenderer().prompt(USERS[0], IMAGE)) == 1


def test_a_known_document_is_not_rendered_again():
    """With another salt, or in other messages, it is rendered."""
    renderer = FakeRenderer()
    asked = [(USERS[1], None, 2), (USERS[0], None, 3), (USERS[1], "a", 5), (USERS[0], "a", 6)]
    for question, salt, num_renders in asked:
        prompt = renderer.prompt(USERS[0], question, max_tokens=num_renders, salt=salt)
        assert (end_of_document(prompt), renderer.num_renders) == (1, num_renders)
    assert end_of_document(renderer.prompt(USERS[1], USERS[0])) == 1
    assert renderer.num_renders == 8


def test_a_known_document_that_has_other_tokens_now():
    """For example with another date."""
    renderer = FakeRenderer()
    for num_renders in (2, 4):
        renderer.finder._known = dict.fromkeys(renderer.finder._known, TokenizedDocument.of([5]))
        assert end_of_document(renderer.prompt(*USERS)) == 1
        assert renderer.num_renders == num_renders


def test_the_least_recently_used_document_is_forgotten(monkeypatch):
    monkeypatch.setattr(chat_document, "MAX_KNOWN", 2)
    renderer = FakeRenderer()
    documents = [{"role": "user", "content": "a" * length} for length in (1, 2, 3)]
    asked = []
    for which in (0, 1, 0, 2, 0, 1):
        before = renderer.num_renders
        renderer.prompt(documents[which], USERS[1])
        asked.append(renderer.num_renders - before - 1)
    assert asked == [1, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("prompt", ["text", {"type": "token", "prompt_token_ids": [1]}, SimpleNamespace()])
def test_a_prompt_that_no_template_rendered(prompt):
    """For example one of gpt-oss, for which vLLM has a special renderer."""
    with pytest.raises(ParamError, match="needs a chat that vLLM renders") as caught:
        end_of_document(prompt)
    assert caught.value.param == "kv_prefix_messages"
