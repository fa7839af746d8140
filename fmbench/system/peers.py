"""Scripts of benchmarks/ that run in the Python environments of other libraries, and what is told meanwhile."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from fmbench import config
from fmbench.errors import UserError

BENCHMARKS = config.REPOSITORY / "benchmarks"
PEERS = ("torch", "keras")


def interpreter(peer: str) -> Path:
    """What FMBENCH_TORCH_PYTHON and its like name for a peer, or the interpreter that setup_peers.sh made."""
    if not peer:
        return Path(sys.executable)
    if named := os.environ.get(f"FMBENCH_{peer.upper()}_PYTHON"):
        return Path(shutil.which(named) or named)
    return Path(os.environ.get("FMBENCH_PEERS_DIR") or BENCHMARKS).absolute() / f".venv-{peer}" / "bin" / "python"


def check(peers: Sequence[str], what_for: str) -> None:
    """Looks whether there are the scripts and these peers' interpreters, which `what_for` ('measuring') takes.

    Raises:
        UserError: If not.
    """
    if not BENCHMARKS.is_dir():
        raise UserError(f"{what_for} takes the benchmarks/ of fmbench's repository; clone it, and do so there.")
    for peer in peers:
        python = interpreter(peer)
        if not python.exists():
            raise UserError(
                f"{peer} has no environment at {python}; run benchmarks/setup_peers.sh {peer}, or name an "
                f"interpreter that has it in FMBENCH_{peer.upper()}_PYTHON."
            )


def say(line: str) -> None:
    """Tells whoever waits how far it is, on standard error."""
    print(line, file=sys.stderr, flush=True)


def last_line(text: str) -> str:
    """The last line that is not blank: what a process that failed said was wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
