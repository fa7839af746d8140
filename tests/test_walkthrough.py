"""The commands of docs/walkthrough.md, one after the other, on the sample, for one epoch and over two folds."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from fmbench.config import REPOSITORY

SMALLER = ["--config.data.source=sample", "--config.num_epochs=1"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each command printed, in a folder that has of the repository only what they name."""
    folder = tmp_path_factory.mktemp("walkthrough")
    for name in ("configs", "docs"):
        (folder / name).symlink_to(REPOSITORY / name)
    text = (REPOSITORY / "docs" / "walkthrough.md").read_text()
    printed = {}
    for command in "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines():
        program, *arguments = shlex.split(command.replace("--folds=5", "--folds=2"))
        assert program == "python"
        if "--summary" not in arguments and arguments[1] in ("fmbench.main", "fmbench.cross_validate"):
            arguments += SMALLER
        if arguments[1:] == ["fmbench.datasets"] or arguments[1:3] == ["fmbench.figures", "data"]:
            continue  # they need all of the data, and have tests of their own
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=os.environ | {"FMBENCH_CACHE": str(folder / "cache"), "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed[command.partition("fmbench.")[2]] = done.stdout
    return folder, printed


@pytest.mark.slow
def test_every_command_does_what_the_walk_through_says(outputs):
    folder, printed = outputs
    assert len(printed) == 7
    said = "\n".join(printed.values())
    for expected in (
        "542,230",
        "fold 2/2: ",
        "(n=2)",
        " minus baseline+",
        "precision",
        "all 200 predictions",
        '"path": "docs/pullover.png"',
    ):
        assert expected in said
    assert (folder / "prediction.png").stat().st_size > 1000
    assert len(list((folder / "workdirs" / "baseline" / "figures").glob("*.png"))) >= 4
    summary = (folder / "results" / "cross_validation" / "summary.md").read_text()
    assert summary.count("fold") > 3
