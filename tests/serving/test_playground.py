"""The playground in a real browser, against the real server, as behind a proxy that gives it a path of its own."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from chromium import PATIENCE_SECONDS, Page, find_chromium
from http_server import KEY, Server, expected_usage
from PIL import Image
from vllm_l2kv_server.start_phases import PHASES, cache_size
from vllm_l2kv_server.welcome import READY

from vllm_l2kv.params import FIELDS, CompressionParams

PREFIX = "/llm"
MODEL = "SmolLM2-135M-Instruct"
TEXT = " ".join(f"On day {day} the keeper of the lighthouse saw {day * 7 % 11} ships." for day in range(40))
QUESTION = "How many ships did the keeper see on day 3?"
PROTECTED = {name: getattr(CompressionParams, name) for name in ("protect_first", "protect_last")}
COLUMNS = (0, 1)
NUM_COLORS = 64
"""Of a picture: fewer make a smaller file."""
ENDED = "document.querySelector('#stop').disabled"
BROWSER = find_chromium()
AXE = "axe_playwright_python"
"""The package that has axe-core; the rest of it is for another driver of browsers."""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium, such as Debian's package chromium")


@pytest.fixture(scope="module")
def server(demo_model, tmp_path_factory):
    words = ["--served-model-name", MODEL, "--max-model-len", "4096", "--enforce-eager", "--dtype", "float32"]
    words += ["--root-path", PREFIX, "--no-verbose"]
    # What a server protects without options; `Server` has others.
    words += [f"--kv-{name.replace('_', '-')}={value}" for name, value in PROTECTED.items()]
    words += ["--enable-prompt-tokens-details", "--api-key", KEY]
    folder = tmp_path_factory.mktemp("playground")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(folder))  # its log goes there
        server = Server(folder / "terminal", str(demo_model), *words)
    with server:
        yield server


@pytest.fixture
def page(server, tmp_path) -> Iterator[Page]:
    """The playground, its key given."""
    with Page(BROWSER, tmp_path) as page:
        page.open(f"{server.url}{PREFIX}/playground")
        page.wait_for("document.querySelector('#key-error').textContent")
        give_key(page, KEY)
        page.wait_for("!document.querySelector('#compare').disabled")
        page.complaints.clear()  # that the page was refused without the key
        yield page
        assert page.complaints == []


def give_key(page: Page, key: str) -> None:
    page.fill("#key", key)
    page.press("Enter")


def ask(page: Page, ratios: tuple[str, str] = ("1.0", "0.3"), max_tokens: int = 24, **options: str) -> None:
    """Pastes, chooses and presses."""
    ratio_fields = dict(zip(("kv_keep_ratio-A", "kv_keep_ratio-B"), ratios, strict=True))
    values = {"text": TEXT, "question": QUESTION, **ratio_fields, "max_tokens": str(max_tokens), **options}
    page.click("summary")
    for field, value in values.items():
        page.fill(f"#{field}", value)
    page.click("summary")
    page.click("#compare")


def figures(page: Page, column: int) -> dict[str, str]:
    return page.evaluate(
        f"Object.fromEntries([...document.querySelectorAll('section')[{column}].querySelectorAll('[data-figure]')]"
        ".map(figure => [figure.dataset.figure, figure.textContent]))"
    )


def of_column(page: Page, column: int, part: str) -> str:
    return page.evaluate(f"document.querySelectorAll('section')[{column}].querySelector('{part}').textContent")


def answer_of(server: Server, max_tokens: int = 24, **fields: float) -> dict:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"{TEXT}\n\n{QUESTION}"}],
        "temperature": 0,
        "max_tokens": max_tokens,
        **fields,
    }
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE_SECONDS).json()


@pytest.mark.parametrize("order", ["at-once", "in-turn"])
def test_two_answers_and_their_numbers(server, page, order):
    page.evaluate(f"document.querySelector('#order').value = '{order}'")
    ask(page)
    page.wait_for(ENDED)
    compare_with_server(server, page, [{"keep_ratio": 1.0}, {"keep_ratio": 0.3}])


def compare_with_server(server: Server, page: Page, asked: Sequence[Mapping[str, float]]) -> None:
    """What the columns show, with what the server answers to the same requests."""
    for column, fields in zip(COLUMNS, asked, strict=True):
        answer = answer_of(server, **{f"kv_{name}": value for name, value in fields.items()})
        usage, shown = answer["usage"], figures(page, column)
        expected = expected_usage(usage["prompt_tokens"], usage["completion_tokens"], **fields, **PROTECTED)
        assert usage["kv_cache"] == expected
        numbers = {name: f"{name}_tokens" for name in ("prompt", "kept", "evicted")} | {"compactions": "compactions"}
        assert {figure: int(shown[figure].replace(",", "")) for figure in numbers} == {
            figure: expected[name] for figure, name in numbers.items()
        }
        assert int(shown["generated"]) == usage["completion_tokens"]
        assert of_column(page, column, ".text") == answer["choices"][0]["message"]["content"]
        assert float(shown["first"].removesuffix(" s")) > 0
        assert float(shown["speed"].replace(",", "")) > 0
        share = expected["memory_ratio"]
        bar = f"document.querySelectorAll('.bar')[{column}]"
        assert float(page.evaluate(f"{bar}.ariaValueNow")) == pytest.approx(100 * share, abs=0.06)
        drawn = f"[...{bar}.children].map(part => part.getBoundingClientRect().width).reduce((a, b) => a + b)"
        assert page.evaluate(f"{drawn} / {bar}.clientWidth") == pytest.approx(share, abs=0.01)


def test_two_budgets(server, page):
    """One that is longer than the prompt, and one that compacts it."""
    choose(page, "budgets")
    for field, value in {
        "text": TEXT,
        "question": QUESTION,
        "kv_max_tokens-A": "2000",
        "kv_max_tokens-B": "100",
    }.items():
        page.fill(f"#{field}", value)
    page.click("summary")
    page.fill("#max_tokens", "24")
    page.click("summary")
    page.click("#compare")
    page.wait_for(ENDED)
    compare_with_server(server, page, [{"max_tokens": 2000}, {"max_tokens": 100}])
    assert figures(page, 0)["evicted"] == "0" != figures(page, 1)["evicted"]
    titles = page.evaluate("[...document.querySelectorAll('h2')].map(title => title.textContent)")
    assert titles == ["Answer A: budget 2000", "Answer B: budget 100"]


def choose(page: Page, mode: str) -> None:
    """What the page compares."""
    page.evaluate(f"void (document.querySelector('#mode').value = '{mode}')")
    page.evaluate("void document.querySelector('#mode').dispatchEvent(new Event('change'))")


def ask_twice(page: Page, **values: str) -> None:
    """Two questions about one document."""
    choose(page, "document")
    typed = {"text": TEXT, "question": QUESTION, "second": "And on day 5?", "kv_keep_ratio-document": "0.3"}
    for field, value in {**typed, **values}.items():
        page.fill(f"#{field}", value)
    page.click("#compare")


def test_the_second_question_finds_the_document(page, tokenizer):
    document = tokenizer.apply_chat_template([{"role": "system", "content": TEXT}], return_dict=False)
    for _ in range(2):  # by its salt the first question finds nothing the second time either
        ask_twice(page)
        page.wait_for("document.querySelector('#how').textContent.startsWith('The first answer began after')")
        first, second = (figures(page, column) for column in COLUMNS)
        assert (first["found"], first["cached"]) == ("0", "0")
        assert second["found"] == second["cached"] == str(len(document))
        assert first["evicted"] == second["evicted"] == str(len(document) - math.ceil(0.3 * len(document)))
        for shown in (first, second):
            assert shown["first"] in page.text("#how")
        assert of_column(page, 0, ".text") != of_column(page, 1, ".text")


def test_each_mode_shows_its_own_fields(page):
    sent = {"order", "salted"}
    own = {"ratios": {"kv_keep_ratio-A", "kv_keep_ratio-B", "kv_max_tokens", *sent}}
    own["budgets"] = {"kv_max_tokens-A", "kv_max_tokens-B", "kv_keep_ratio", *sent}
    own["document"] = {"second", "kv_keep_ratio-document", "kv_max_tokens"}
    for mode in ("document", "budgets", "ratios"):
        choose(page, mode)
        page.evaluate("void document.querySelector('#more').setAttribute('open', '')")
        for name in set().union(*own.values()):
            seen = page.evaluate(f"document.getElementById('{name}').getClientRects().length > 0")
            assert seen is (name in own[mode]), (mode, name)
    assert not page.evaluate("document.querySelectorAll('[id^=kv_prefix_]').length")


def test_two_questions_need_a_document_and_both_questions(page):
    for field, message in {"text": "Paste a document.", "second": "Ask something else."}.items():
        ask_twice(page, **{field: " "})
        assert page.text(f"#{field}-error") == message
        assert page.evaluate("document.activeElement.id") == field
        page.fill(f"#{field}", "Something.")
        assert page.text(f"#{field}-error") == ""
    assert not [url for url in page.urls if url.endswith("/chat/completions")]


def test_a_bad_ratio_of_a_document_is_told_at_its_field(page):
    ask_twice(page, **{"kv_keep_ratio-document": "7"})
    page.wait_for(ENDED)
    assert page.text("#kv_keep_ratio-document-error").startswith("kv_keep_ratio must satisfy 0 < kv_keep_ratio <= 1")
    assert not page.text("#how").startswith("The first answer began")
    take_refusals(page, 400)


def module(page: Page, name: str, call: str):
    """What a function of one of the page's modules returns."""
    return page.evaluate(f"import('{PREFIX}/playground/{name}').then(module => module.{call})")


def test_memory_of_layers_that_slide(page):
    """6 layers of a window of 100 tokens, 1 full one, 2 compressed ones."""
    groups = [
        {"layers": ["a"] * 6, "compressed": False, "sliding_window": 100},
        {"layers": ["b"], "compressed": False, "sliding_window": None},
        {"layers": ["c"] * 2, "compressed": True, "sliding_window": None},
    ]
    numbers = {"memory_ratio": 0.5}
    shares = module(page, "memory.js", f"sharesOf({json.dumps(groups)}, {json.dumps(numbers)})")
    assert shares == pytest.approx({"uncompressed": 1 / 3, "compressed": 1 / 6})


def test_bounds_are_read_as_the_server_writes_them(page):
    for field in FIELDS:
        bounds = module(page, "fields.js", f"boundsOf({json.dumps(field.bounds)})")
        assert bounds.keys() == ({"choices"} if field.type == "string" else {"min", "max"}), field
    assert module(page, "fields.js", "boundsOf('one of a, b').choices") == ["a", "b"]


def test_everything_is_asked_of_this_server_under_its_prefix(server, page):
    ask(page, max_tokens=2)
    page.wait_for(ENDED)
    page.click("#sample")
    page.wait_for("document.querySelector('#text').value.startsWith('The Lighthouse')")
    assert page.urls
    for url in page.urls:
        parts = urlsplit(url)
        assert parts.netloc == urlsplit(server.url).netloc, url
        assert parts.path.startswith(f"{PREFIX}/"), url


def test_the_key_is_kept_nowhere(page):
    ask(page, max_tokens=2)
    page.wait_for(ENDED)
    assert KEY not in " ".join(page.urls)
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_answers_stream(page):
    """Text is there while the answer goes on."""
    ask(page, max_tokens=400, question="Tell a long story about the keeper.")
    page.wait_for("[...document.querySelectorAll('.text')].every(text => text.textContent.length > 20)")
    assert not page.evaluate(ENDED)
    assert {of_column(page, column, ".state") for column in COLUMNS} == {"Streaming …"}
    page.click("#stop")
    page.wait_for(ENDED)
    assert {of_column(page, column, ".state") for column in COLUMNS} == {"Stopped."}
    assert {of_column(page, column, ".error") for column in COLUMNS} == {""}


def test_a_bad_ratio_is_told_at_its_field(page):
    ask(page, ratios=("7", "0.3"))
    page.wait_for(ENDED)
    assert page.text("#kv_keep_ratio-A-error").startswith("kv_keep_ratio must satisfy 0 < kv_keep_ratio <= 1, got 7.")
    assert page.evaluate("document.activeElement.id") == "kv_keep_ratio-A"
    assert page.text("#kv_keep_ratio-B-error") == ""
    # One bad request does not hold up the other.
    assert of_column(page, 0, ".state") == "Failed."
    assert of_column(page, 1, ".state").startswith("Done")
    take_refusals(page, 400)
    # It was about another value.
    page.fill("#kv_keep_ratio-A", "0.7")
    assert page.text("#kv_keep_ratio-A-error") == ""
    assert page.evaluate("document.querySelector('#kv_keep_ratio-A').ariaInvalid") == "false"


def test_a_bad_option_opens_its_place(page):
    assert page.evaluate("document.querySelector('#more').open") is False
    ask(page, kv_protect_last="-1")
    page.wait_for(ENDED)
    assert page.text("#kv_protect_last-error").startswith("kv_protect_last must satisfy 0 <= kv_protect_last")
    assert page.evaluate("document.querySelector('#more').open") is True
    take_refusals(page, 400)


def test_what_cannot_be_sent_is_told_before_anything_is(page):
    ask(page, ratios=("-", "0.3"))
    assert page.text("#kv_keep_ratio-A-error") == "kv_keep_ratio must be a number."
    ask(page, question=" ")
    assert page.text("#question-error") == "Ask something."
    assert not [url for url in page.urls if url.endswith("/chat/completions")]


def test_bodies_hold_what_was_chosen_and_nothing_else(page):
    """Two comparisons, the second one with a scorer and salts."""
    page.evaluate(
        "void (window.bodies = [], window.fetch = async (_, options) =>"
        " (window.bodies.push(JSON.parse(options.body)), new Response('data: [DONE]\\n\\n')))"
    )
    ask(page, ratios=("", "0.3"), max_tokens=7)
    page.wait_for(ENDED)
    page.evaluate("document.querySelector('#kv_scorer').value = 'keydiff'")
    page.click("#salted")
    page.click("#compare")
    page.wait_for(ENDED)
    plain_a, plain_b, salted_a, salted_b = page.evaluate("window.bodies")
    shared = {"model", "messages", "temperature", "max_tokens", "stream", "stream_options"}
    assert plain_a.keys() == shared  # an empty field is the server's to fill
    assert plain_b.keys() == shared | {"kv_keep_ratio"}
    assert plain_b["messages"] == [{"role": "user", "content": f"{TEXT}\n\n{QUESTION}"}]
    assert (plain_b["kv_keep_ratio"], plain_b["max_tokens"], plain_b["temperature"]) == (0.3, 7, 0)
    assert salted_a["kv_scorer"] == salted_b["kv_scorer"] == "keydiff"
    assert len({salted_a["cache_salt"], salted_b["cache_salt"]}) == 2


def test_a_prompt_that_is_too_long_is_told_at_the_answers(page):
    page.fill("#text", TEXT * 12)
    page.fill("#question", QUESTION)
    page.click("#compare")
    page.wait_for(ENDED)
    assert all("4096" in of_column(page, column, ".error") for column in COLUMNS)
    take_refusals(page, 400)
    page.fill("#text", TEXT)
    assert {of_column(page, column, ".error") for column in COLUMNS} == {""}


def test_a_short_prompt_that_is_kept_whole_says_why(page):
    ask(page, text="", question="What is a KV cache?", max_tokens=4)
    page.wait_for(ENDED)
    assert of_column(page, 0, ".reason") == "", "a ratio of 1 asks for nothing"
    assert of_column(page, 1, ".reason").startswith("Kept whole: ")
    assert "kv_protect_last" in of_column(page, 1, ".reason")


def test_a_wrong_key_is_told_at_its_field(page):
    page.fill("#key", "pepper")
    ask(page)
    page.wait_for(ENDED)
    assert page.text("#key-error") == "The server does not take this API key (401 Unauthorized)."
    give_key(page, "salt")
    page.wait_for("document.querySelector('#key-error').textContent")
    give_key(page, KEY)
    page.wait_for("!document.querySelector('#compare').disabled")
    assert page.text("#key-error") == ""
    take_refusals(page, 401)


def test_a_late_refusal_of_a_wrong_key_says_nothing_of_the_next(page):
    page.evaluate(
        "void (window.fetch = (fetch => async (...request) => {"
        " const answer = await fetch(...request);"
        " if (answer.status === 401) await new Promise(resolve => (window.letThrough = resolve));"
        " return answer; })(window.fetch))"
    )
    give_key(page, "pepper")
    page.wait_for("window.letThrough")
    give_key(page, KEY)
    page.wait_for("document.querySelector('#server').textContent.endsWith('layers are compressed.')")
    page.evaluate("letThrough(), new Promise(resolve => setTimeout(resolve))")
    assert page.text("#key-error") == ""
    assert page.text("#server").endswith("layers are compressed.")
    take_refusals(page, 401)


def test_without_a_key_the_page_says_that_one_is_needed(server, tmp_path):
    with Page(BROWSER, tmp_path) as page:
        page.open(f"{server.url}/playground/")  # which sends on to the page
        page.wait_for("document.querySelector('#key-error').textContent")
        assert page.text("#key-error") == "This server asks for an API key (401 Unauthorized)."
        assert page.evaluate("document.querySelector('#compare').disabled") is True
        take_refusals(page, 401)
        assert page.complaints == []


def test_an_answer_is_text_whatever_it_holds(page):
    """The page's own code, given a stream that holds HTML."""
    html = "<img src=x onerror=alert(1)><script>alert(1)</script>"
    event = json.dumps({"choices": [{"delta": {"content": html}}], "usage": {"completion_tokens": 1}})
    stream = f"data: {event}\n\ndata: [DONE]\n\n"
    page.evaluate(f"void (window.fetch = async () => new Response({json.dumps(stream)}))")
    ask(page)
    page.wait_for(ENDED)
    assert of_column(page, 0, ".text") == html
    assert page.evaluate("document.querySelectorAll('section img, section script').length") == 0


def test_a_stream_that_breaks_off_is_an_error(page):
    event = json.dumps({"choices": [{"delta": {"content": "Once"}}], "usage": {"completion_tokens": 1}})
    page.evaluate(f"void (window.fetch = async () => new Response({json.dumps(f'data: {event}')} + '\\n\\n'))")
    ask(page)
    page.wait_for(ENDED)
    assert of_column(page, 0, ".text") == "Once"
    assert of_column(page, 0, ".error") == "The connection ended before the answer did."


def test_by_keyboard_alone(page):
    """From the text on: the question, both ratios, the button, in the order in which they are read."""
    page.fill("#text", TEXT)
    visited = []
    while visited[-1:] != ["compare"] and len(visited) < 12:
        page.press("Tab")
        visited.append(page.evaluate("document.activeElement.id"))
        if visited[-1] == "question":
            page.command("Input.insertText", text=QUESTION)
    assert [name for name in visited if name] == [
        "sample",
        "question",
        "kv_keep_ratio-A",
        "kv_keep_ratio-B",
        "compare",
    ]
    page.press("Enter")
    page.wait_for("document.querySelector('.text').textContent")
    # A disabled button would lose the focus.
    assert page.evaluate("document.activeElement.id") == "stop"
    page.press("Enter")
    page.wait_for(ENDED)
    assert page.evaluate("document.activeElement.id") == "compare"


def test_answers_are_in_view_on_a_small_laptop(page):
    """All of both, with their numbers, and the button, while nothing is scrolled; also beside a form that is longer."""
    resize(page, 1280, 900)
    page.click("#sample")
    page.wait_for("document.querySelector('#question').value")
    page.click("#compare")
    page.wait_for(ENDED)
    assert page.evaluate("scrollY") == 0
    assert not out_of_view(page, ".answer, #compare")
    page.click("summary")
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    assert page.evaluate("scrollY") > 0
    assert not out_of_view(page, ".answer")


def out_of_view(page: Page, selector: str) -> list[list[float]]:
    """Top and bottom of the parts that are not wholly seen."""
    boxes = f"[...document.querySelectorAll('{selector}')].map(part => part.getBoundingClientRect())"
    return page.evaluate(f"{boxes}.filter(b => b.top < 0 || b.bottom > innerHeight).map(b => [b.top, b.bottom])")


@pytest.mark.skipif(not find_spec(AXE), reason=f"needs {AXE}")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page, scheme):
    """The rules of axe-core, for all modes, with answers and with errors."""
    page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.evaluate(f"void {(files(AXE) / 'axe.min.js').read_text()}")
    page.click("summary")
    for mode in ("ratios", "budgets", "document"):
        choose(page, mode)
        assert violations(page) == [], mode
    ask_twice(page, **{"kv_keep_ratio-document": "7"})
    page.wait_for("document.querySelector('#kv_keep_ratio-document-error').textContent")
    assert violations(page) == [], "an error"
    page.wait_for(ENDED)
    take_refusals(page, 400)
    page.fill("#max_tokens", "4")
    ask_twice(page)
    page.wait_for(ENDED)
    assert violations(page) == [], "answers"


def violations(page: Page) -> list[str]:
    """Rules that the page breaks, and where."""
    found = "axe.run().then(({ violations }) => violations.map(({ id, nodes }) => [id, nodes.map(node => node.html)]))"
    return [f"{rule}: {places}" for rule, places in page.evaluate(found)]


def resize(page: Page, width: int, height: int) -> None:
    page.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_on_a_phone_and_in_the_dark(page, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.command("Emulation.setEmulatedMedia", features=features)
    page.command("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    left = "[...document.querySelectorAll('section')].map(column => column.getBoundingClientRect().left)"
    assert len(set(page.evaluate(left))) == 1  # below each other
    background, ink = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    assert (brightness(background) > brightness(ink)) is (scheme == "light")
    assert abs(brightness(background) - brightness(ink)) > 150


def brightness(color: str) -> float:
    return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))) / 3


def take_refusals(page: Page, status: int) -> None:
    """Takes from the page's complaints what Chromium itself writes of an answer that the test has asked for."""
    expected = f"network: Failed to load resource: the server responded with a status of {status} "
    assert any(complaint.startswith(expected) for complaint in page.complaints)
    page.complaints[:] = [complaint for complaint in page.complaints if not complaint.startswith(expected)]


def test_the_start_was_quiet(server):
    """What a terminal shows of this server, whose log is in a file."""
    lines = server.log.read_text().splitlines()
    log = Path(lines[0].removeprefix("Log: ").partition(" (")[0])
    assert "Starting vLLM server" in log.read_text()
    assert [line.split("  ")[-1] for line in lines if line.startswith("  ")][:6] == [
        *(phase.done for phase in PHASES[:3]),
        next(size for line in log.read_text().splitlines() if (size := cache_size(line))),
        *(phase.done for phase in PHASES[4:]),
    ]
    assert any(line.startswith(f"{READY} at http://localhost:{server.port}") for line in lines)
    assert not any("INFO" in line or "WARNING" in line for line in lines)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_picture(page, request, scheme):
    """Draws the pictures of docs/playground.md, if it is told where."""
    folder: Path | None = request.config.getoption("--playground-pictures")
    if folder is None:
        pytest.skip("draws pictures with --playground-pictures FOLDER")
    resize(page, 1280, 900)
    page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.evaluate("void document.querySelector('#key-form').setAttribute('hidden', '')")
    page.click("#sample")
    page.wait_for("document.querySelector('#question').value")
    page.click("#compare")
    page.evaluate("document.activeElement.blur()")
    page.wait_for("[...document.querySelectorAll('.text')].every(text => text.textContent.length > 60)")
    file = folder / f"playground_{scheme}.png"
    page.screenshot(file)
    Image.open(file).quantize(NUM_COLORS).save(file, optimize=True)
    assert not page.evaluate(ENDED)
    page.click("#stop")
    page.wait_for(ENDED)
