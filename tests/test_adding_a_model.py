"""docs/adding_a_model.md, typed word by word into a copy of the repository."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BLOCK = re.compile(r"^ *```(python|bash)\n(.*?)^ *```\n", re.MULTILINE | re.DOTALL)
SMALLER = ("--config.data.source=sample", "--config.num_epochs=1", "--config.batch_size=40")

pytestmark = pytest.mark.slow


def page() -> str:
    return (REPOSITORY / "docs" / "adding_a_model.md").read_text()


def blocks(text: str, language: str) -> list[tuple[str, str]]:
    """What is said before each block of code, from the block before it on, and the code."""
    found, end = [], 0
    for match in BLOCK.finditer(text):
        if match[1] == language:
            found.append((text[end : match.start()], textwrap.dedent(match[2])))
        end = match.end()
    return found


def follow(folder: Path, said: str, code: str, path: Path | None) -> Path:
    """Does what a step says with its code: a new file, or lines below a line that it names. Returns the file."""
    names = re.findall(r"`([\w/]+\.py)`", said)
    path = folder / names[0] if names else path
    assert path is not None, said
    below = re.search(r"below (?:the line that begins with )?`([^`]+)`", said)
    if not below:
        assert not path.exists(), f"{path} is there already"
        path.write_text(code)
        return path
    lines = path.read_text().splitlines(keepends=True)
    (row,) = [row for row, line in enumerate(lines) if line.startswith(below[1])]
    lines[row + 1 : row + 1] = [code if code.startswith("from ") else f"    {code}"]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository's files without its results, in which the page's steps are done."""
    folder = tmp_path_factory.mktemp("copy") / "fmbench"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith("results/") and (REPOSITORY / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    inside = page().partition("**Without a fork**")[0]
    path = None
    for said, code in blocks(inside, "python"):
        path = follow(folder, said, code, path)
    return folder


def run(folder: Path, *command: str, repository: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(repository)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}"
    return done.stdout


def test_a_model_that_was_added_trains(copy):
    said = page().partition("**Without a fork**")[0]
    ((_, commands),) = blocks(said, "bash")
    training, tests = commands.splitlines()
    assert (training.split()[:3], tests) == (["python", "-m", "fmbench.main"], "./test.sh")
    out = run(copy, *training.split()[1:], *SMALLER, repository=copy)
    assert "little+batch_size=40+data.source=sample+num_epochs=1 seed 0: 7,850 trainable parameters" in out
    assert "test accuracy" in out


def test_what_was_added_is_lint_free(copy):
    run(copy, "-m", "ruff", "check", "--no-cache", "fmbench", "configs", "tests/models", repository=copy)
    run(
        copy,
        "-m",
        "ruff",
        "format",
        "--no-cache",
        "--check",
        "fmbench",
        "configs",
        "tests/models",
        repository=copy,
    )


def test_the_tests_that_know_of_models_and_configs_pass_with_it(copy):
    files = [
        f"tests/{name}.py"
        for name in ("models/test_models", "models/test_outside", "test_config", "commands/test_sweep")
    ]
    chosen = (
        "-k",
        "little or covered or counts or test_outside or test_config or test_sweep",
        "-m",
        "not slow and not full",
    )
    out = run(copy, "-m", "pytest", "-v", "-p", "no:cacheprovider", *files, *chosen, repository=copy)
    assert "test_logits[little" in out
    assert re.search(r"\d+ passed", out)


def test_the_same_model_trains_without_a_fork(tmp_path):
    inside, _, outside = page().partition("**Without a fork**")
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "nets.py").write_text(blocks(inside, "python")[0][1])
    ((said, config),) = blocks(outside, "python")
    assert "`mine.py`" in said and "`nets.py`" in said
    (tmp_path / "mine.py").write_text(config)
    ((_, commands),) = blocks(outside, "bash")
    assert len(commands.splitlines()) == 2
    for command in commands.splitlines():
        out = run(tmp_path, *shlex.split(command)[1:], *SMALLER, repository=REPOSITORY)
        assert "7,850 trainable parameters" in out
    workdir = f"--model=workdirs/{sorted(path.name for path in (tmp_path / 'workdirs').iterdir())[0]}"
    assert "all 200 predictions as in the record" in run(
        tmp_path, "-m", "fmbench.evaluate", workdir, repository=REPOSITORY
    )
