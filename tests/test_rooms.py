"""The house's order, as pyproject.toml words it: which room may use which."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def test_a_room_uses_only_the_rooms_below_it():
    check = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("room", [path.parent for path in sorted((REPOSITORY / "fmbench").glob("*/__init__.py"))])
def test_a_room_can_be_looked_over(room):
    assert len(list(room.glob("[!_]*.py"))) <= 12
