"""Files that appear whole or not at all, and what is left of those that did not."""

import signal
import subprocess
import sys

import pytest

from fmbench.system.files import atomic_file

WRITE_AND_WAIT = """
import sys
from pathlib import Path
from fmbench.system.files import atomic_file
with atomic_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that writes `a.json` and waits amid it."""
    started = []

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", WRITE_AND_WAIT, str(tmp_path / "a.json")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_what_a_killed_process_left_goes_with_the_next_file_and_what_is_being_written_stays(start, tmp_path):
    killed, living = start(), start()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(list(tmp_path.glob(".a.json.*.unfinished"))) == 2
    with atomic_file(tmp_path / "b.json") as file:
        file.write(b"whole")
    assert len(list(tmp_path.glob(".a.json.*.unfinished"))) == 1
    living.communicate(b"")
    assert living.returncode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.json": b"half", "b.json": b"whole"}


def test_git_ignores_what_is_unfinished(tmp_path, request):
    root = request.config.rootpath
    names = ["results/runs/.a.json.k3j2x_1a.unfinished", "out/.unfinished-k3j2x_1a/"]
    done = subprocess.run(["git", "check-ignore", "--no-index", *names], cwd=root, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip(f"no git repository: {done.stderr.strip()}")
    assert done.stdout.splitlines() == names


@pytest.mark.parametrize("in_the_way", ["a folder", "a folder that is not there"])
def test_an_error_names_the_file_that_was_meant(tmp_path, in_the_way):
    path = tmp_path / "record.npy" if in_the_way == "a folder" else tmp_path / "none" / "record.npy"
    if in_the_way == "a folder":
        path.mkdir()
    with pytest.raises(OSError) as refused, atomic_file(path):
        pass
    assert (refused.value.filename, refused.value.filename2) == (str(path), None)
