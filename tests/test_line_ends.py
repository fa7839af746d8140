"""Text comes out of git as it was written, whatever line ends a machine's git is set to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clone as Git for Windows makes it, and as some have set it elsewhere."""
    clone = tmp_path_factory.mktemp("clone") / "fmbench"
    command = [
        "git",
        "-c",
        "core.autocrlf=true",
        "clone",
        "--quiet",
        "--no-hardlinks",
        str(REPOSITORY),
        str(clone),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot be cloned: {done.stderr.strip()}")
    return clone


def test_no_file_has_other_line_ends_than_in_git(clone):
    lines = subprocess.run(["git", "ls-files", "--eol"], cwd=clone, capture_output=True, text=True, check=True)
    for line in lines.stdout.splitlines():
        in_git, in_the_clone, *_ = line.split()
        assert in_git.removeprefix("i/") == in_the_clone.removeprefix("w/"), line
        assert in_git in ("i/lf", "i/-text", "i/none"), line


@pytest.mark.parametrize("script", ["run_all.sh", "test.sh", "setup_env.sh", ".ci/run"])
def test_scripts_are_scripts(clone, script):
    subprocess.run(["bash", "-n", script], cwd=clone, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["leaderboard", "speedrun", "cross_validate", "reproduction", "benchmark"])
def test_pages_are_checked_as_they_are(clone, command):
    done = subprocess.run(
        [sys.executable, "-m", f"fmbench.{command}", "--check"],
        cwd=clone,
        env=os.environ | {"PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
