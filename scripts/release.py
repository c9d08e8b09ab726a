"""Writes and checks the version in all files that have it, for a release.

    python scripts/release.py prepare 0.2.0    # writes it, before the commit that is tagged
    python scripts/release.py check v0.2.0     # fails unless all files have the version of this tag
    python scripts/release.py notes v0.2.0     # prints the changelog's section
    python scripts/release.py next 0.3.0.dev0  # writes the next version, without a section

pyproject.toml has the version of the package, files in docker/ the tags of its images, and CHANGELOG.md a section.
Standard library only: .github/workflows/release.yml runs it before anything is installed.
"""

import argparse
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION = r"\d+\.\d+\.\d+(?:(?:a|b|rc|\.dev)\d+)?"
UNRELEASED = "## [Unreleased]\n"


def prepare(root: Path, version: str) -> None:
    """Writes a version everywhere; the unreleased changes become its section, with today's date.

    Raises:
        ValueError: There are no unreleased changes, or the version has a section already.
    """
    changelog = (root / "CHANGELOG.md").read_text()
    head, unreleased, body = changelog.partition(UNRELEASED)
    if not unreleased or not re.match(r"\s*[^\s#]|\s*###", body):
        raise ValueError("CHANGELOG.md has no changes under [Unreleased].")
    if f"## [{version}]" in changelog:
        raise ValueError(f"CHANGELOG.md has a section [{version}] already.")
    today = datetime.now(UTC).date().isoformat()
    (root / "CHANGELOG.md").write_text(f"{head}{UNRELEASED}\n## [{version}] - {today}\n{body}")
    write(root, version)


def write(root: Path, version: str) -> None:
    """Writes a version everywhere except into the changelog."""
    for path, place in places(root).items():
        path.write_text(place.sub(rf"\g<1>{version}", path.read_text()))


def check(root: Path, version: str) -> None:
    """Checks every file.

    Raises:
        ValueError: A file has another version, or the changelog has no section.
    """
    for path, place in places(root).items():
        found = {match[2] for match in place.finditer(path.read_text())}
        if found != {version}:
            raise ValueError(f"{path.relative_to(root)} names {', '.join(sorted(found))}, not {version}.")
    notes(root, version)


def notes(root: Path, version: str) -> str:
    """Returns the changelog's section of a version, without its heading.

    Raises:
        ValueError: There is no section, or it is empty.
    """
    sections = re.split(r"^## \[(.+?)\].*\n", (root / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    found = dict(zip(sections[1::2], sections[2::2], strict=True)).get(version, "").strip()
    if not found:
        raise ValueError(f"CHANGELOG.md has no section [{version}].")
    return f"{found}\n"


def places(root: Path) -> dict[Path, re.Pattern[str]]:
    """Returns a pattern for each file: group 1 is the text before a version, group 2 the version."""
    image = re.compile(r"(^ +image: vllm-l2kv:)([^\s-]+)", re.MULTILINE)
    docker = root / "docker"
    return {
        root / "pyproject.toml": re.compile(r'(^version = ")([^"]+)', re.MULTILINE),
        docker / "compose.yaml": image,
        docker / "kubernetes" / "server.yaml": image,
        docker / "kubernetes" / "production-stack-values.yaml": re.compile(r"(^ +tag: )(\S+)", re.MULTILINE),
    }


COMMANDS: dict[str, Callable[[Path, str], str | None]] = {
    "prepare": prepare,
    "check": check,
    "notes": notes,
    "next": write,
}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("version", help="such as 0.2.0, or a tag: v0.2.0")
    options = parser.parse_args()
    version = options.version.removeprefix("v")
    if not re.fullmatch(VERSION, version):
        parser.error(f"argument version: must be such as 0.2.0 or 0.3.0rc1, got {options.version!r}.")
    try:
        sys.stdout.write(COMMANDS[options.what](ROOT, version) or "")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
