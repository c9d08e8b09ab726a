"""Memory of a server on this machine, in bytes."""

import ipaddress
import shutil
import socket
import subprocess
from collections.abc import Callable
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]

MIB = 2**20


def process_of(url: str) -> int | None:
    """Id of the process that listens at a URL, the oldest if several do; `None` if it is not on this machine."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        if not is_local(parts.hostname or ""):
            return None
        listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        pids = {one.pid for one in listening if one.laddr.port == port and one.pid is not None}
        oldest = min(map(psutil.Process, pids), key=lambda process: process.create_time(), default=None)
        return None if oldest is None else int(oldest.pid)
    except (OSError, psutil.Error):
        return None


def is_local(host: str) -> bool:
    """Whether a host name or address belongs to this machine.

    Raises:
        OSError: The name cannot be resolved.
    """
    own = {address.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for address in addresses}
    found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    return any(ipaddress.ip_address(address).is_loopback or address in own for address in found)


def counter(pid: int | None) -> Callable[[], dict[str, int]]:
    """A function that returns the memory of a process, of its process tree, and of the machine's GPUs, in bytes.

    Args:
        pid: The process id; with `None` the function returns an empty dict.
    """
    has_gpu = pid is not None and shutil.which("nvidia-smi") is not None

    def count() -> dict[str, int]:
        counted = {}
        if pid is not None and (tree := _tree_bytes(pid)):
            counted["tree"] = tree
        if has_gpu and (gpus := _gpu_bytes()):
            counted["gpus"] = gpus
        return counted

    return count


def _tree_bytes(pid: int) -> int:
    """Resident bytes of a process and all its descendants; shared pages count once for each process."""
    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue  # the process has ended
    return total


def _gpu_bytes() -> int:
    """Bytes in use on all GPUs, by any process: in a container, the driver reports other process ids."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return MIB * sum(int(line) for line in done.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0
