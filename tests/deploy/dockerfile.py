"""Reads the syntax that this project's Dockerfiles use: instructions, without comments, with joined lines."""

from pathlib import Path


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Returns pairs of an instruction's name and its arguments, in order."""
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages(dockerfile: Path) -> list[list[tuple[str, str]]]:
    """Returns the instructions of each stage after its `FROM`."""
    found: list[list[tuple[str, str]]] = []
    for name, rest in instructions(dockerfile):
        if name == "FROM":
            found.append([])
        elif found:
            found[-1].append((name, rest))
    return found
