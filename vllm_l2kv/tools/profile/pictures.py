"""Pictures for a vision-language model: those of a folder, or four that are drawn here and never change."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
SIDE = 448
"""Width and height of a drawn picture, in pixels."""
LINES = (
    "Opening hours of the museum",
    "Monday to Friday: 9 to 17",
    "Saturday: 10 to 20",
    "Sunday: 10 to 16",
    "Tickets: adults 12, children 5",
    "The tower is closed in winter.",
    "Guided tours start at 11 and 15.",
)


def of_folder(folder: Path) -> list[Any]:
    """The pictures in a folder as RGB, sorted by file name.

    Raises:
        OSError: The folder or a picture cannot be read.
        ValueError: The folder has no picture.
    """
    from PIL import Image

    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"argument --images: {folder} must have a file that ends in {', '.join(SUFFIXES)}.")
    return [Image.open(path).convert("RGB") for path in paths]


def drawn() -> list[Any]:
    """A bar chart, lines of text, a landscape and a table of numbers."""
    from PIL import Image, ImageDraw

    kinds: tuple[Callable[[Any, random.Random], None], ...] = (_chart, _lines, _landscape, _table)
    pictures = []
    for seed, kind in enumerate(kinds):
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        kind(ImageDraw.Draw(picture), random.Random(seed))
        pictures.append(picture)
    return pictures


def _chart(draw: Any, numbers: random.Random) -> None:
    for column, year in enumerate(range(2016, 2024)):
        left, height = 24 + 52 * column, numbers.randint(40, 340)
        draw.rectangle((left, 400 - height, left + 36, 400), fill=("steelblue", "orange")[column % 2])
        draw.text((left, 410), str(year), fill="black")
        draw.text((left, 384 - height), str(height), fill="black")


def _lines(draw: Any, _numbers: random.Random) -> None:
    for row, line in enumerate(LINES):
        draw.text((24, 24 + 56 * row), line, fill="black", font_size=24)


def _landscape(draw: Any, numbers: random.Random) -> None:
    for y in range(SIDE):
        draw.line((0, y, SIDE, y), fill=(90 + y // 4, 140 + y // 6, 250 - y // 3))
    draw.ellipse((320, 40, 390, 110), fill="gold")
    for left in range(-80, SIDE, 90):
        draw.polygon([(left, SIDE), (left + 110, numbers.randint(160, 300)), (left + 220, SIDE)], fill="darkgreen")


def _table(draw: Any, numbers: random.Random) -> None:
    for row in range(12):
        for column in range(6):
            left, top = 16 + 70 * column, 16 + 35 * row
            draw.rectangle((left, top, left + 70, top + 35), outline="grey")
            draw.text((left + 12, top + 10), str(numbers.randint(100, 9999)), fill="black")
