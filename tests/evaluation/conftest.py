"""What evaluations share."""

import sys
from pathlib import Path

# The real server in a process of its own.
sys.path.append(str(Path(__file__).parent.parent / "e2e"))
