"""The notebooks run, and print the outputs that they contain."""

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="nbclient is not installed: run make setup")

from scripts.notebooks import NOTEBOOKS, VARIES, asks_a_server, execute, read

ROOT = Path(__file__).parents[2]
ASKING = [path for path in NOTEBOOKS if asks_a_server(read(path))]
ALONE = [path for path in NOTEBOOKS if path not in ASKING]


def name(path: Path) -> str:
    return path.stem


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def run(path: Path, folder: Path, base_url: str | None = None) -> None:
    """Executes a copy, and compares it with the original."""
    there = folder / "examples" / "notebooks"
    there.mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "lighthouse.txt", folder / "examples")
    (folder / "configs").symlink_to(ROOT / "configs")
    written, notebook = read(path), read(path)
    execute(notebook, there, base_url)
    for before, after in zip(code_cells(written), code_cells(notebook), strict=True):
        assert [output.output_type for output in after.outputs] == [output.output_type for output in before.outputs]
        if VARIES not in before.metadata.get("tags", ()):
            assert printed(after) == printed(before), f"run make notebooks: {before.source}"


@pytest.mark.engine
@pytest.mark.parametrize("path", ASKING, ids=name)
def test_notebooks_that_need_a_server(server, path, tmp_path):
    run(path, tmp_path, f"{server.url}/v1")


@pytest.mark.slow  # starts one or two engines
@pytest.mark.engine
@pytest.mark.parametrize("path", ALONE, ids=name)
def test_notebooks_without_a_server(demo_model, path, tmp_path):
    run(path, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
class TestWhatIsWritten:
    def test_every_cell_was_executed_in_order(self, path):
        cells = code_cells(read(path))
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run make notebooks"

    def test_outputs_are_those_of_a_reader(self, path):
        """They contain no errors, no warnings, and no path of the machine that made them."""
        for cell in code_cells(read(path)):
            assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs)
            assert not re.search(r"/(?:root|home|tmp|work|Users)/", printed(cell))

    def test_files_named_in_a_notebook_exist(self, path):
        text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
        linked = re.findall(r"\]\((\S+?)\)", text)
        named = re.findall(r"`((?:docs|examples|configs)/[\w./-]*)`", text)
        assert linked or named
        for file in [*(path.parent / each for each in linked), *(ROOT / each for each in named)]:
            assert file.exists(), file


def test_there_are_notebooks_of_both_kinds():
    assert [len(ASKING), len(ALONE)] == [2, 3]
