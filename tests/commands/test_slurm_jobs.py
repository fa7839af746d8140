"""What is submitted, with stand-ins for SLURM's commands; tests/distributed/test_slurm.py has a real one."""

import json
import os
from pathlib import Path

import pytest

from fmbench.errors import UserError
from fmbench.studies import slurm, suites

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'fmbench[slurm]'")

CONFIG = """
from fmbench.config import base_config

RESOURCES = {"": {"cpus": 1, "minutes": 9}, "long": {"cpus": 1, "minutes": 30}, "gpu": {"gpus": 1}}

def get_config(arg=""):
    return base_config()
"""


class Stand:
    """A folder with a config, and SLURM's commands: sbatch counts, squeue tells what it is told to tell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "mine.py").write_text(CONFIG)
        (folder / "bin").mkdir()
        (folder / "scripts").mkdir()
        self.tell_queue("")
        for name, text in {
            "sbatch": f'cd {folder}/scripts; n=$(ls | wc -l); cp "$1" $n; echo Submitted batch job 1$n',
            "squeue": f"cat {folder}/queue",
            "srun": "",
        }.items():
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / "bin" / name).chmod(0o755)

    def tell_queue(self, text: str) -> None:
        (self.folder / "queue").write_text(text)

    def submit(self, *lines: str, max_jobs: int | None = None, force: bool = False) -> dict[str, str]:
        return slurm.submit(suites.plan(lines), Path("results"), max_jobs, force=force)

    def scripts(self) -> list[set[str]]:
        """The flags of each."""
        texts = [path.read_text() for path in sorted((self.folder / "scripts").iterdir())]
        return [{line.removeprefix("#SBATCH ") for line in text.splitlines()} for text in texts]


@pytest.fixture
def stand(tmp_path, monkeypatch) -> Stand:
    stand = Stand(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    return stand


def test_runs_of_like_nodes_are_an_array_with_the_most_minutes_and_what_is_queued_is_not_submitted_again(stand):
    jobs = stand.submit("mine.py 0,1", "mine.py:long 0", "mine.py:gpu 5", max_jobs=2)
    names = ("mine-float32-seed0", "mine-float32-seed1", "mine-long-float32-seed0", "mine-gpu-float32-seed5")
    assert jobs == dict(zip(names, ("10_0", "10_1", "10_2", "11"), strict=True))
    on_cpus, on_gpus = stand.scripts()
    assert {"--array=0-2%2", "--cpus-per-task=1", "--time=30", "--job-name=fmbench"} <= on_cpus
    assert {"--cpus-per-task=2", "--gpus-per-node=1", "--time=120"} <= on_gpus
    assert not any(line.startswith("--gpus") for line in on_cpus)

    stand.tell_queue("10_0|RUNNING|0:04|node1\n10_2|PENDING|0:00|(None)\n9_1|RUNNING|1:00|node2\n")
    assert stand.submit("mine.py 0,1", "mine.py:long 0") == {names[0]: "10_0", names[1]: "12", names[2]: "10_2"}
    assert json.loads((stand.folder / "workdirs" / "slurm" / "jobs.json").read_text())[names[1]] == "12"
    assert len(stand.scripts()) == 3

    with pytest.raises(UserError, match=f"--force: {names[0]} is in the queue; `scancel 10_0` first"):
        stand.submit("mine.py 0", force=True)


def test_a_queue_that_does_not_answer_submits_nothing(stand):
    (stand.folder / "bin" / "squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: no contact' >&2; exit 1\n"
    )
    with pytest.raises(UserError, match=r"squeue does not answer \(slurm_load_jobs error: no contact\)"):
        stand.submit("mine.py 0")
    assert stand.scripts() == []
