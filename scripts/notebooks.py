"""Executes the notebooks of examples/notebooks/ and writes their outputs into them (`make notebooks`).

Outputs are kept so that readers on a code host see them without running anything. tests/examples/test_notebooks.py
executes the notebooks again and compares outputs, except those of cells with the tag `varies`, which print times or a
model's words. All other cells print the same on each machine.
"""

import argparse
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
BASE_URL = "OPENAI_BASE_URL"
"""Variable from which a notebook reads the address of its server."""
VARIES = "varies"
PORT = 8765
START_SECONDS, CELL_SECONDS = 900, 3600


def read(path: Path) -> NotebookNode:
    """Returns a notebook in the format in which it is written."""
    return nbformat.read(path, as_version=4)


def asks_a_server(notebook: NotebookNode) -> bool:
    """Whether a notebook needs a server."""
    return any(BASE_URL in cell.source for cell in notebook.cells if cell.cell_type == "code")


def execute(notebook: NotebookNode, folder: Path, base_url: str | None = None) -> None:
    """Executes all cells in a kernel of this Python, and puts their outputs into the notebook.

    Args:
        notebook: As read; its outputs are replaced.
        folder: Where the kernel runs, as Jupyter runs it in the notebook's own folder.
        base_url: Address of the notebook's server, ending in `/v1`; `None` if it needs none.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    # This Python's programs come first, as in an activated environment.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if base_url is not None:
        environment[BASE_URL] = base_url
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=resources)
    client.coalesce_streams = True
    client.execute(env=environment)
    # Remove times, the version of Python, and standard error, where libraries report this machine's processor.
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


@contextmanager
def demo_server() -> Iterator[str]:
    """Runs a server like that of `make serve`; yields its address, ending in `/v1`."""
    config = ROOT / "configs" / "demo-cpu.yaml"
    command = [sys.executable, "-m", "vllm_l2kv.cli", "serve", "--config", str(config), "--port", str(PORT)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_healthy(server):
            if time.monotonic() > deadline:
                sys.exit(f"The server did not start within {START_SECONDS} seconds.")
            time.sleep(1)
        yield f"http://127.0.0.1:{PORT}/v1"
    finally:
        server.terminate()
        server.wait()


def is_healthy(server: subprocess.Popen[bytes]) -> bool:
    """Whether the server answers; ends the script if the server has ended."""
    if server.poll() is not None:
        sys.exit("The server did not start.")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=10):
            return True
    except urllib.error.URLError:
        return False


def main() -> None:
    """Executes all notebooks, or those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS, help="files (default: all)")
    paths = parser.parse_args().notebooks
    asking = [path for path in paths if asks_a_server(read(path))]
    if asking:
        with demo_server() as base_url:
            for path in asking:
                write(path, base_url)
    for path in paths:
        if path not in asking:
            write(path)


def write(path: Path, base_url: str | None = None) -> None:
    """Executes one notebook and writes it back."""
    notebook = read(path)
    execute(notebook, path.parent, base_url)
    nbformat.write(notebook, path)
    print(path.name)


if __name__ == "__main__":
    main()
