"""Executes the notebooks of examples/notebooks/ and writes their outputs into them (`make notebooks`).

Outputs are kept because readers on a code host see them without running anything. tests/examples/test_notebooks.py
executes the notebooks again and compares what does not vary: a cell with the tag `varies` prints times or what a model
says, and every other cell prints the same on each machine.
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
"""What a notebook that asks a server reads its address from."""
VARIES = "varies"
PORT = 8765
START_SECONDS, CELL_SECONDS = 900, 3600


def read(path: Path) -> NotebookNode:
    """A notebook of the format that it is written in."""
    return nbformat.read(path, as_version=4)


def asks_a_server(notebook: NotebookNode) -> bool:
    """Whether it needs one."""
    return any(BASE_URL in cell.source for cell in notebook.cells if cell.cell_type == "code")


def execute(notebook: NotebookNode, folder: Path, base_url: str | None = None) -> None:
    """Executes all cells in a kernel of this Python, and puts their outputs into the notebook.

    Args:
        notebook: As read; its outputs are replaced.
        folder: Where the kernel runs, as Jupyter runs it in the notebook's own folder.
        base_url: Address of the server that it asks, ending in `/v1`; `None` if it asks none.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    # The programs of this Python, as in an environment that was activated.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if base_url is not None:
        environment[BASE_URL] = base_url
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=resources)
    client.coalesce_streams = True
    client.execute(env=environment)
    # Neither times, nor the version of Python, nor what libraries say of this machine's processor on standard error.
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


@contextmanager
def demo_server() -> Iterator[str]:
    """A server like that of `make serve`; yields its address, ending in `/v1`."""
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
    """Whether it answers; ends the script if it has ended."""
    if server.poll() is not None:
        sys.exit("The server did not start.")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=10):
            return True
    except urllib.error.URLError:
        return False


def main() -> None:
    """Executes all notebooks, or those that are named."""
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
    """Executes one notebook in its place."""
    notebook = read(path)
    execute(notebook, path.parent, base_url)
    nbformat.write(notebook, path)
    print(path.name)


if __name__ == "__main__":
    main()
