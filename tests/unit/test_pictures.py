"""Pictures in docs/img that are drawn from the code are up to date."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICTURES = runpy.run_path(str(ROOT / "scripts" / "pictures.py"))


@pytest.mark.parametrize("name", ["rows", "pool", "life"])
def test_a_picture_is_up_to_date(name, tmp_path):
    path = tmp_path / "picture.svg"
    PICTURES[f"draw_{name}"]().savefig(path, metadata={"Date": None})
    assert path.read_text() == (ROOT / "docs" / "img" / f"{name}.svg").read_text(), "run scripts/pictures.py"


def test_a_budget_and_an_interval_bound_the_rows():
    corners = list(PICTURES["held_rows"](PICTURES["REQUESTS"]["kv_max_tokens 2048"]))
    assert max(rows for _, rows in corners) == 2_048 + 2_048
    assert corners[-1][1] <= 2_048 + 256
