"""Every printed example request sets the temperature, and every command can be pasted.

At vLLM's default temperature of 1 a small model invents facts, and readers would blame compression.
"""

import ast
import json
import re
import shlex
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_l2kv_server.welcome import LAST_LINE, welcome_text

from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.params import FIELDS, CompressionParams

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".mjs", ".sh"))
STATIC = sorted((ROOT / "server/vllm_l2kv_server/static").glob("*.js"))
SETTINGS = sorted(
    path
    for folder in ("configs", "docker")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix not in (".json", ".safetensors")
)
BLOCK = re.compile(r"^(?:<!-- .*? -->\n)?```(?P<language>\w+)\n(?P<code>(?:.*\n)*?)```$", re.MULTILINE)
ASKING = {"create", "SamplingParams", "ChatOpenAI", "OpenAILike"}
"""Last parts of the names of Python calls that set how an answer is sampled."""
HERE_DOCUMENT = re.compile(r"<<(?P<end>\w+)\n(?P<document>.*?)^(?P=end)$", re.MULTILINE | re.DOTALL)
"""A here-document, which a shell command reads from the lines after it."""
PLACEHOLDER = re.compile(r"(?<![\w$./{-])[A-Z][A-Z0-9_]{2,}\b(?!=)")
"""A word in capitals that the reader must replace, but not a variable that a command sets."""


def python_requests(code: str) -> Iterator[tuple[str, bool]]:
    """Yields each call that requests an answer, and whether it sets its temperature."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ASKING:
            yield ast.unparse(node), any(keyword.arg == "temperature" for keyword in node.keywords)


def is_refused(body: dict[str, Any]) -> bool:
    """Whether a body is an example of an error, which has no answer."""
    try:
        CompressionParams().override({field.name: body.get(field.name) for field in FIELDS})
    except ParamError:
        return True
    return False


def shell_requests(code: str) -> Iterator[tuple[str, bool]]:
    """Yields the same for each JSON body of a curl that requests an answer."""
    documents = [found["document"] for found in HERE_DOCUMENT.finditer(code)]
    for command in re.findall(r"^\s*curl (?:[^'\n\\]|\\\n|\\.|'[^']*')*", code, re.MULTILINE):
        words = shlex.split(command)
        for sent in (words[i + 1] for i, word in enumerate(words) if word in ("-d", "--data", "--json")):
            body = json.loads(documents.pop(0) if sent == "@-" else sent)
            assert "extra_body" not in body, "extra_body is an argument of the Python client: the fields go in the body"
            if not is_refused(body) and "/tokenize" not in command:
                yield command, "temperature" in body


def javascript_requests(code: str) -> Iterator[tuple[str, bool]]:
    """Yields the same for each object literal with `messages` or `prompt`."""
    opened: list[int] = []
    for position, sign in enumerate(code):
        if sign == "{":
            opened.append(position)
        elif sign == "}":
            literal = code[opened.pop() : position + 1]
            if re.match(r"\{[^{}]*\b(?:messages|prompt):", literal):
                yield literal, "temperature:" in literal


REQUESTS_OF = {
    "python": python_requests,
    "bash": shell_requests,
    "console": lambda code: shell_requests(re.sub(r"^\$ ", "", code, flags=re.MULTILINE)),
    "py": python_requests,
    "sh": shell_requests,
    "mjs": javascript_requests,
    "js": javascript_requests,
}


def printed_when_ready() -> str:
    return welcome_text(Namespace(host=None, port=8000, api_key=None, ssl_certfile=None, uds=None), "a model")


def sources() -> Iterator[tuple[str, str, str]]:
    """Yields name, language and text of each source that a reader may copy a request from."""
    for page in PAGES:
        text = page.read_text()
        for block in BLOCK.finditer(text):
            if block["language"] in REQUESTS_OF:
                yield f"{page.name}:{text.count(chr(10), 0, block.start()) + 1}", block["language"], block["code"]
    for path in (*EXAMPLES, *STATIC):
        yield path.name, path.suffix[1:], path.read_text()
    for path in SETTINGS:
        comments = re.findall(r"^\s*# ?(.*)$", path.read_text(), re.MULTILINE)
        yield str(path.relative_to(ROOT)), "bash", "\n".join(comments)
    printed = printed_when_ready()
    yield "printed curl", "bash", printed
    yield "printed Python", "python", printed[printed.index("from openai") : printed.index(LAST_LINE)]


FOUND = [
    pytest.param(request, says, id=f"{name}-{number}")
    for name, language, text in sources()
    for number, (request, says) in enumerate(REQUESTS_OF[language](text))
]


@pytest.mark.parametrize(("request_", "says"), FOUND)
def test_every_request_sets_its_temperature(request_, says):
    assert says, f"set temperature=0, or the reader blames compression for what chance does:\n{request_}"


def test_requests_are_found_in_every_kind_of_source():
    names = {param.id.rsplit("-", 1)[0].split(":")[0] for param in FOUND}
    asking = {path.name for path in EXAMPLES}
    assert names >= {"README.md", "quick_start.md", "request_fields.md", "bodies.js", *asking}
    assert names >= {"printed curl", "printed Python"}


@pytest.mark.parametrize(
    ("language", "code", "says"),
    [
        ("python", "client.chat.completions.create(messages=[], temperature=0)", [True]),
        ("python", "client.completions.create(prompt='')\nSamplingParams(temperature=0)", [False, True]),
        ("bash", 'curl URL -d \'{\n"prompt": "a"}\'', [False]),
        ("console", '$ curl URL \\\n  -d \'{"prompt": "a", "temperature": 0}\'', [True]),
        ("bash", 'curl URL -d \'{"prompt": "a", "kv_keep_ratio": 2}\'', []),
        ("bash", "curl URL/metrics | grep a", []),
        ("bash", 'curl URL -d @- <<END\n{"prompt": "a"}\nEND', [False]),
        ("mjs", "create({ model, messages: [{ role: 'user' }], max_tokens: 1 })", [False]),
        ("mjs", "create({ model, messages: [{ role: 'user' }], temperature: 0 })", [True]),
    ],
)
def test_requests_are_recognized(language, code, says):
    assert [said for _, said in REQUESTS_OF[language](code)] == says


COMMANDS = [
    pytest.param(block, text, id=f"{page.name}:{text.count(chr(10), 0, block.start()) + 1}")
    for page in PAGES
    for text in [page.read_text()]
    for block in BLOCK.finditer(text)
    if block["language"] in ("bash", "console")
]


def typed(block: re.Match[str]) -> str:
    """Returns the commands of a block, without prompts, output and here-documents."""
    code = HERE_DOCUMENT.sub("", block["code"])
    if block["language"] == "bash":
        return code
    return "\n".join(re.findall(r"^\$ ((?:.*\\\n)*.*)$", code, re.MULTILINE))


@pytest.mark.parametrize(("block", "text"), COMMANDS)
def test_a_command_can_be_pasted(block, text):
    commands = typed(block)
    assert not re.search(r"\\[ \t]+$", commands, re.MULTILINE), "a blank after a backslash ends the command"
    read = subprocess.run(["bash", "-n"], input=commands, capture_output=True, text=True, check=False)
    assert not read.returncode, read.stderr
    for word in shlex.split(re.sub(r"'[^']*'|\"[^\"]*\"", "quoted", commands), comments=True):
        # zsh, the default shell of macOS, fails if such a pattern matches no file.
        assert not set(word) & set("[]{}*?<>"), f"quote {word}"


@pytest.mark.parametrize(("block", "text"), COMMANDS)
def test_a_placeholder_is_explained(block, text):
    """By a comment of the command, or by the paragraph before or after the block."""
    commands = typed(block)
    without_comments = re.sub(r"(?m)(?:^|\s)#.*$", "", commands)
    before, after = text[: block.start()].rstrip().split("\n\n")[-1], text[block.end() :].lstrip().split("\n\n")[0]
    shown = " ".join([before, after, *re.findall(r"(?m)(?:^|\s)#.*$", commands)])
    for word in set(PLACEHOLDER.findall(without_comments)):
        assert re.search(rf"\b{word}\b", shown), f"explain {word}"
