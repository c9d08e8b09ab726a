"""What `vllm-l2kv serve` prints: the log of all its processes or, on a terminal, the progress of the start."""

import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from vllm_l2kv.log import MARK
from vllm_l2kv.tools.engine_log import first_error, last_lines, send_output_to, where_the_log_is
from vllm_l2kv.tools.progress import Progress, duration
from vllm_l2kv.tools.user_cache import default_cache
from vllm_l2kv_server.start_phases import PHASES, cache_size
from vllm_l2kv_server.welcome import LAST_LINE, READY

READ_SECONDS = 0.1
"""Time between two reads of the log."""
REQUEST = re.compile(r'"(?P<method>[A-Z]+) (?P<path>\S+) HTTP/[\d.]+" (?P<status>\d{3})')
"""A request in a line of uvicorn's access log."""
NOTICE = re.compile(rf"(?:^| (?:WARNING|ERROR) [^\]]*\] )({MARK} .+)")
"""A line that vllm-l2kv prints, or a warning that it logs."""
BAR = re.compile(r"^(?P<what>[^:|]+): +(?P<percent>\d+)%(?:\|| Completed)")
"""A progress bar of tqdm, with its description."""
LINE_END = re.compile(r"\r\n|\r|\n")


def open_screen(verbose: bool | None, port: int) -> "Screen":
    """Returns a screen that shows progress on a terminal, and the log everywhere else.

    The output of a container, a service or a pipe is read by programs, or later to find the cause of an error.

    Args:
        verbose: Whether the log is printed; `None` if the user has not chosen.
        port: The server's port, which is part of the log's name.
    """
    if verbose is None:
        verbose = not (sys.stdout.isatty() and sys.stderr.isatty())
    if not verbose:
        log = default_cache() / f"serve-{port}.log"
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            return QuietScreen(log, send_output_to(log))
        except OSError as error:
            sys.stderr.write(f"{MARK} {log} cannot be written ({error.strerror}), so the log is printed here.\n")
    return Screen()


class Screen:
    """Leaves the output of all processes as it is.

    Attributes:
        log: Where the log is, as error messages name it.
    """

    log = "the log above"

    def close(self, sentence: str, failed: bool = False) -> None:
        """Prints the last line.

        Args:
            sentence: What happened.
            failed: Whether the log has the reason.
        """
        sys.stderr.write(sentence)
        sys.stderr.flush()


class QuietScreen(Screen):
    """Sends all output to a file, and shows the phases of the start, requests and the warnings of vllm-l2kv.

    It reads them from the file, since the engine, its workers and some API servers are other processes.

    Args:
        log: The file.
        terminal: Where to show them.
    """

    def __init__(self, log: Path, terminal: TextIO) -> None:
        self.log = str(log)
        self._path = log
        self._terminal = terminal
        self._progress = Progress(terminal)
        self._begun = self._phase_begun = time.monotonic()
        self._phase = 0
        self._is_ready = self._in_welcome = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        terminal.write(where_the_log_is(log))
        self._progress.__enter__()
        self._progress.begin(PHASES[0].doing)
        self._thread.start()

    def close(self, sentence: str, failed: bool = False) -> None:
        """Shows the rest of the log, its first error if the server failed, and the last line."""
        self._over.set()
        self._thread.join()
        self._progress.__exit__(None, None, None)
        if failed:
            self._terminal.write(first_error(self._path) or last_lines(self._path))
        self._terminal.write(sentence)
        self._terminal.flush()

    def _follow(self) -> None:
        for line in self._lines():
            self._read(line)

    def _lines(self) -> Iterator[str]:
        """Yields the lines of the log as they come, until the end."""
        with self._path.open(encoding="utf-8", errors="replace", newline="") as file:
            unread = ""
            is_last = False
            while not is_last:
                is_last = self._over.wait(READ_SECONDS)
                *lines, unread = LINE_END.split(unread + file.read())
                yield from lines

    def _read(self, line: str) -> None:
        if self._in_welcome:
            self._progress.say(line)
            self._in_welcome = line != LAST_LINE
        elif line.startswith(READY):
            self._end_start()
            self._progress.say(f"\n{line}")
            self._in_welcome = True
        elif notice := NOTICE.search(line):
            self._progress.say(notice[1])
        elif self._is_ready:
            self._read_request(line)
        else:
            self._read_start(line)

    def _read_start(self, line: str) -> None:
        later = range(self._phase + 1, len(PHASES))
        reached = next((number for number in later if PHASES[number].begins.search(line)), None)
        if reached is not None:
            self._end_phase(cache_size(line))
            self._phase = reached
            self._progress.begin(PHASES[reached].doing)
        elif bar := BAR.match(line):
            self._progress.part(f"{PHASES[self._phase].doing} ({bar['what'].strip()}: {bar['percent']} %)")

    def _read_request(self, line: str) -> None:
        """Shows a POST and a request that fails; the others are of `/health`, `/metrics` and pages."""
        request = REQUEST.search(line)
        if request and (request["method"] == "POST" or int(request["status"]) >= 400):
            self._progress.say(f"{time.strftime('%H:%M:%S')} {' '.join(request.groups())}")

    def _end_start(self) -> None:
        if not self._is_ready:
            self._end_phase()
            self._progress.end()
            self._progress.say(f"{duration(time.monotonic() - self._begun):>12}  in all")
        self._is_ready = True

    def _end_phase(self, done: str | None = None) -> None:
        now = time.monotonic()
        self._progress.say(f"{duration(now - self._phase_begun):>12}  {done or PHASES[self._phase].done}")
        self._phase_begun = now
