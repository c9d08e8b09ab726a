"""Variants of a benchmark, each in a process of its own: an engine leaves the GPU only when its process ends."""

import subprocess
import sys
import time
from collections.abc import Sequence


def run_each(module: str, variants: Sequence[str], seconds: float) -> None:
    """Runs a benchmark once for each variant, with this process's arguments and `--inside VARIANT`.

    Args:
        module: The benchmark; with `--inside` it measures one variant.
        variants: The variants, in the order to run.
        seconds: Expected seconds of one variant.

    Raises:
        SystemExit: Some variants failed; all were run.
    """
    sys.stdout.write(f"{len(variants)} engines, about {len(variants) * seconds:.0f} seconds\n")
    failed = []
    for variant in variants:
        begin = time.monotonic()
        command = [sys.executable, "-m", module, *sys.argv[1:], "--inside", variant]
        if subprocess.run(command, check=False).returncode:
            failed.append(variant)
        sys.stdout.write(f"{variant}: {time.monotonic() - begin:.0f} seconds\n")
        sys.stdout.flush()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
