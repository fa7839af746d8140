"""A suite on a real SLURM of two nodes, whose jobs are cancelled, preempted and driven from a drained node."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import slurm_cluster
from conftest import REPOSITORY

SHORT = """
from ml_collections import config_dict
from fmbench.config import base_config

RESOURCES = {"": {"cpus": 1, "minutes": 20}}

def get_config():
    config = base_config()
    config.data.source = "sample"
    config.batch_size = 8
    config.num_epochs = 80
    return config
"""
WHY_NOT = slurm_cluster.why_not() or ("" if importlib.util.find_spec("submitit") else "submitit is not installed")
pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(WHY_NOT), reason=f"no SLURM: {WHY_NOT}")]


class Cluster:
    """A cluster, and a folder to run suites in."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = os.environ | environment | {"PYTHONPATH": str(REPOSITORY)}

    def run(self, *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | changes,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def suite(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "fmbench.suite", "--launcher=slurm", *arguments, **changes)

    def start_suite(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "fmbench.suite", "--launcher=slurm", *arguments]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_training(self, seed: int, not_in: str = "") -> str:
        """Until an epoch is done; returns the job."""
        jobs = self.folder / "workdirs" / "slurm" / "jobs.json"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            job = json.loads(jobs.read_text())[f"short-float32-seed{seed}"] if jobs.exists() else ""
            log = self.folder / "workdirs" / "slurm" / "jobs" / f"{job}_0_log.err"
            if log.exists() and job != not_in and "\nepoch " in log.read_text():
                return job
            time.sleep(0.05)
        raise TimeoutError(f"seed {seed} does not train")

    def record(self, seed: int, results: str) -> tuple[dict, np.ndarray]:
        (path,) = (self.folder / results / "runs").glob(f"short-*-seed{seed}.json")
        return json.loads(path.read_text()), np.load(path.with_suffix(".npy"))


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "short.py").write_text(SHORT)
    with slurm_cluster.started(tmp_path / "slurm") as environment:
        yield Cluster(folder, environment)


def test_a_suite_ends_complete_whatever_becomes_of_its_jobs_and_nodes(cluster):
    refused = cluster.suite("short.py 0", SBATCH_PARTITION="other")
    assert refused.returncode == 2
    assert re.fullmatch(r"fmbench.suite: sbatch refuses the jobs: .*other.*\n", refused.stderr)
    assert not list((cluster.folder / "workdirs").rglob("*.pkl"))

    suite = cluster.start_suite("--max_jobs=2", "short.py 0,1,2")
    cancelled = cluster.wait_for_training(0)
    assert cluster.run("scancel", cancelled).returncode == 0
    moved = cluster.wait_for_training(1)
    node = cluster.run("squeue", "--noheader", "--format=%N", f"--jobs={moved}").stdout.strip()
    assert cluster.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=test").returncode == 0
    assert cluster.run("scontrol", "requeue", moved).returncode == 0
    preempted = cluster.wait_for_training(2)
    assert cluster.run("scancel", "--signal=USR2", preempted).returncode == 0
    log, _ = suite.communicate(timeout=300)
    print(log)
    assert suite.returncode == 1
    assert re.search(r"short-float32-seed0 failed: interrupted after epoch \d+ of 80", log)
    assert "2 of 3 runs have their record in results/runs." in log
    assert log.count(" PENDING ") >= 5  # three at first, and the two that were queued again

    again = cluster.start_suite("--max_jobs=2", "short.py 0,1,2")
    asked_to_end = cluster.wait_for_training(0, not_in=cancelled)  # as preemption with GraceTime does
    assert cluster.run("scancel", "--signal=TERM", asked_to_end).returncode == 0
    log, _ = again.communicate(timeout=300)
    print(log)
    assert again.returncode == 0
    assert "3 runs: 2 have their record, 1 are jobs." in log
    assert "3 of 3 runs have their record" in log

    for seed, num_resumes in enumerate((2, 1, 1)):
        main = [sys.executable, "-m", "fmbench.main", "--config=short.py", f"--config.seed={seed}"]
        undisturbed = cluster.run(*main, f"--workdir=alone{seed}", "--results_dir=alone")
        assert undisturbed.returncode == 0, undisturbed.stderr
        record, predictions = cluster.record(seed, "results")
        expected, expected_predictions = cluster.record(seed, "alone")
        assert (record["num_resumes"], expected["num_resumes"]) == (num_resumes, 0)
        assert np.array_equal(predictions, expected_predictions)
        assert record["test_loss"] == expected["test_loss"]

    # Nothing is left to do, and nothing is submitted.
    assert "3 runs: 3 have their record, 0 are jobs." in cluster.suite("short.py 0,1,2").stdout
