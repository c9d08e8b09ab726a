"""The pages agree with the code; the built site loads nothing from other hosts, and its search works from files."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from chromium import Page, find_chromium
from prometheus_client import REGISTRY
from vllm_l2kv_server.metrics import PREFIX, EngineMetrics, RequestMetrics
from vllm_l2kv_server.serve_options import INTERVALS

from vllm_l2kv.capacity import Capacity, DoesNotFitError, GroupCapacity
from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.params import FIELDS, REQUEST_FIELDS, SCORERS, CompressionParams, FieldValue
from vllm_l2kv.policy import CompactionPoints, Intervals
from vllm_l2kv.settings import Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FOR_ALL = {
    *("--kv-full-layers", "--kv-full-heads", "--kv-profile", "--kv-memory", "--kv-classes"),
    *("--kv-prompt-interval", "--kv-answer-interval"),
}
"""Options that no request can override."""
BROWSER = find_chromium()
DEFAULTS = CompressionParams().as_fields()
COMPACTIONS = ("request_fields.md", "tokens computed")


def rows(page: str, head: str) -> list[list[str]]:
    """Returns the cells of the table below a head line, without backticks."""
    text = (DOCS / page).read_text()
    (table,) = re.findall(rf"^\| {re.escape(head)} .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table.splitlines()]


def shown(default: FieldValue | None) -> str:
    return "none" if default is None else str(default)


class TestRequestFields:
    def test_every_field_with_type_bounds_and_default(self):
        said = rows("request_fields.md", "field")
        assert said == [
            [field.name, field.type, field.bounds, shown(DEFAULTS.get(field.name)), field.option or "-"]
            for field in REQUEST_FIELDS
        ]

    def test_the_options_exist(self):
        from vllm_l2kv_server.serve_options import own_options

        options = {row[-1] for row in rows("request_fields.md", "field")} - {"-"}
        assert options == {word for word in own_options().format_help().split() if word.startswith("--kv-")} - FOR_ALL

    def test_every_field_has_a_section(self):
        headings = re.findall(r"^### (.*)$", (DOCS / "request_fields.md").read_text(), re.MULTILINE)
        assert re.findall(r"`(\w+)`", " ".join(headings)) == [field.name for field in REQUEST_FIELDS]

    def test_every_scorer_is_explained(self):
        text = " ".join(row[0] for row in rows("request_fields.md", "`kv_scorer`"))
        assert re.findall(r"\w+", text) == list(SCORERS)

    @pytest.mark.parametrize("row", rows("request_fields.md", "asked"), ids=lambda row: row[0])
    def test_what_is_refused(self, row):
        asked, message = row
        with pytest.raises(ParamError) as refused:
            Settings().read(json.loads(asked))
        assert str(refused.value) == message
        assert refused.value.param == next(iter(json.loads(asked)))

    def test_the_intervals(self):
        said = {row[2]: row[3] for row in rows("request_fields.md", "position")}
        assert said == {f"--{option}": str(getattr(Settings, name)) for option, (name, _) in INTERVALS.items()}

    def test_the_compactions_of_the_example(self):
        said = [[int(re.match("[0-9,]+", cell)[0].replace(",", "")) for cell in row] for row in rows(*COMPACTIONS)]
        points = CompactionPoints(10_000, CompressionParams(max_tokens=4096), Intervals())
        assert said == [[each.position, each.num_rows, each.num_keep] for each in points.until(10_512)]

    def test_what_never_fits(self):
        capacity = Capacity(800, (GroupCapacity(448, False), GroupCapacity(32, True)), 131_072)
        with pytest.raises(DoesNotFitError) as refused:
            capacity.max_tokens(30_000, 500, None)
        assert f"`{refused.value}`" in " ".join((DOCS / "request_fields.md").read_text().split())

    def test_what_is_all_document(self):
        with pytest.raises(ParamError) as refused:
            CompactionPoints.of(10, CompressionParams(prefix_tokens=10), Intervals())
        assert f"`{refused.value}`" in " ".join((DOCS / "request_fields.md").read_text().split())

    def test_every_field_is_refused_once(self):
        refused = {name for asked, _ in rows("request_fields.md", "asked") for name in json.loads(asked)}
        assert refused >= {field.name for field in FIELDS}


@pytest.fixture
def registered():
    """Registers the metrics of vllm-l2kv with Prometheus' client, and removes them afterwards."""
    before = set(REGISTRY._collector_to_names)
    config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))
    EngineMetrics(config, [0])
    RequestMetrics(config)
    ours = set(REGISTRY._collector_to_names) - before
    yield ours
    for collector in ours:
        REGISTRY.unregister(collector)


def test_every_metric_of_the_code_is_in_the_page_and_no_other(registered):
    ours = set()
    for collector in registered:
        (metric,) = collector.describe()
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        ours.add((name, metric.type, ", ".join(f"`{label}`" for label in collector._labelnames)))
    page = (DOCS / "metrics.md").read_text()
    assert set(re.findall(rf"^\| `({PREFIX}\w+)` \| (\w+) \| (.*?) \|", page, re.MULTILINE)) == ours
    names = {name for name, *_ in ours}
    mentioned = {re.sub("_bucket$", "", name) for name in re.findall(rf"{PREFIX}\w+", page)}
    assert mentioned == names


class Assets(HTMLParser):
    """Addresses that a browser loads by itself, or submits to."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "a":
            self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "action")]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site."""
    if not (find_spec("mkdocs") and find_spec("material")):
        pytest.skip("needs mkdocs-material: pip install -e .[docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert {page.stem for page in pages} == {page.stem for page in DOCS.glob("*.md")} | {"404"}
    for page in pages:
        assets = Assets()
        assets.feed(page.read_text())
        assert assets.addresses
        assert not [address for address in assets.addresses if re.match(r"(?:https?:)?//", address)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium, such as Debian's package chromium")
def test_the_search_works_from_files(site, tmp_path):
    with Page(BROWSER, tmp_path) as page:
        page.open((site / "index.html").as_uri())
        page.click("label[for=__search]")
        page.wait_for("document.activeElement.matches('.md-search__input')", seconds=60)
        page.fill(".md-search__input", "kv_prefix_messages")
        page.wait_for("document.querySelector('.md-search-result__link')", seconds=60)
        links = "[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
        assert (site / "request_fields.html").as_uri() + "#kv_prefix_messages" in page.evaluate(links)
        assert {urlsplit(url).scheme for url in page.urls} <= {"file", "data"}
        assert page.complaints == []


def prose(page: Path) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the sections of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted((*ROOT.glob("*.md"), *DOCS.glob("*.md"))), ids=lambda page: page.name)
def test_links_on_github(page):
    """Links to files and sections. The site's build checks by its own rules, and only pages of `docs/`."""
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        is_there = ":" in name or (target.exists() and (not anchor or anchor in anchors(target)))
        lost += [] if is_there else [link]
    assert not lost


def test_pages_and_sections_that_comments_name_exist():
    """Comments in `configs/` and `docker/`, such as `docs/quick_start.md, "On a GPU"`."""
    named = []
    for path in (path for folder in ("configs", "docker") for path in (ROOT / folder).rglob("*") if path.is_file()):
        if path.suffix == ".safetensors":
            continue
        text = re.sub(r"\n\s*# ?", " ", path.read_text())
        named += [(path.name, *found) for found in re.findall(r'([\w./]*\w\.md)(?:, "([^"]+)")?', text)]
    assert len(named) > 5
    for name, page, section in named:
        assert (ROOT / page).exists(), f"{name} names {page}"
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text().replace("`", ""), re.MULTILINE)
        assert not section or section in headings, f"{name} names a section {section!r} that {page} does not have"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_the_tests_that_a_page_names_exist(page):
    """Such as `compat/test_lora.py`, or `tests/e2e/test_documents.py::test_a`, `::test_b` for two tests of one file."""
    path, lost = ROOT, []
    for named in re.findall(r"\b(?:tests|compat)/[\w/]+\.py(?:::\w+)*|(?<=`)(?:::\w+)+", page.read_text()):
        name, *tests = named.split("::")
        path = ROOT / "tests" / name.removeprefix("tests/") if name else path
        text = path.read_text() if path.is_file() else ""
        lost += [named] if not all(re.search(rf"\b{test}\b", text) for test in (*tests, "import")) else []
    assert not lost
