"""Many runs at a time: what is refused, and shares of this machine's cores."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from fake_records import make_record

from fmbench import config as config_lib
from fmbench import entries
from fmbench.errors import UserError
from fmbench.studies import shared_cores, suites

LONG = """
from ml_collections import config_dict
from fmbench.config import base_config

RESOURCES = {"": {"cpus": 3}, "gpu": {"gpus": 1, "minutes": 7}, "odd": {"minutes": 1}, "typo": {"minute": 9}}

def get_config(arg=""):
    config = base_config()
    config.data.source = "sample"
    config.batch_size = 32
    config.num_epochs = 3000
    return config
"""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


@pytest.fixture
def config_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.py").write_text(LONG)
    return tmp_path / "long.py"


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fmbench.suite", *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mlp 0"], "there is no --launcher; expected slurm or local."),
        (
            ["--launcher=slrum", "mlp 0"],
            "there is no launcher 'slrum'; the nearest is slurm; expected slurm or local.",
        ),
        (["--launcher=slurm", "--max_jobs=0", "mlp 0"], "--max_jobs=0: it must be at least 1."),
        (["--launcher=slurm", "--jobs=2", "mlp 0"], "--jobs is for --launcher=local."),
        (["--launcher=local", "mlp 0"], "--launcher=local needs --jobs=N, the number of runs at a time."),
        (["--launcher=slurm", "mlp 0"], "--launcher=slurm: there is no sbatch here; submit from a machine of the"),
    ],
)
def test_mistakes_are_one_line(arguments, expected, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fmbench.suite", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PATH": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"fmbench.suite: {expected}") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["mlp", "mlp 0,x", "mlp 0 stray", "", "mlp 0,0"])
def test_lines_that_make_no_runs_are_refused(line):
    with pytest.raises(UserError):
        suites.plan([line])


def test_a_line_is_a_run_for_each_seed_with_what_the_file_asks_for(config_file):
    runs = suites.plan(["long.py 0,1", "long.py:gpu 7 --config.num_epochs=2"])
    assert [run.name for run in runs] == [
        *("long-float32-seed0", "long-float32-seed1", "long-gpu+num_epochs=2-float32-seed7"),
    ]
    assert runs[2].flags == ["--config=long.py:gpu", "--config.seed=7", "--config.num_epochs=2"]
    assert [tuple(run.resources) for run in runs] == [(3, 0, 120), (3, 0, 120), (2, 1, 7)]


@pytest.mark.parametrize(("argument", "word"), [("odd", "minutes 1"), ("typo", "cannot be read")])
def test_resources_that_no_cluster_gives_are_refused(config_file, argument, word):
    with pytest.raises(UserError, match=word):
        entries.resources(f"long.py:{argument}")


def test_every_shipped_config_can_be_asked_for():
    for spec in entries.specs():
        assert entries.resources(spec) >= (1, 0, 5)


@pytest.mark.skipif(CORES < 2, reason="pinning needs Linux, and two cores")
def test_cores_are_split_evenly_and_none_is_two_runs():
    shares = shared_cores.split_cores(2)
    assert [len(share) for share in shares] == [CORES // 2] * 2
    assert not set(shares[0]) & set(shares[1])
    for jobs in (0, CORES + 1):
        with pytest.raises(
            UserError, match=f"--jobs={jobs}: a run needs a core of its own, and there are {CORES}"
        ):
            shared_cores.split_cores(jobs)


@pytest.mark.slow
@pytest.mark.skipif(CORES < 2, reason="pinning needs Linux, and two cores")
def test_runs_keep_to_their_cores_and_ctrl_c_stops_all_with_a_checkpoint(config_file, tmp_path):
    """The third run fails at once: the others go on, and so does the fourth."""
    wrong = "long.py 2 --config.batch_size=100000"
    process = start("--launcher=local", "--jobs=2", wrong, "long.py 0,1")
    assert process.stdout
    text = ""
    while not all(re.search(rf"seed{seed} \| epoch 2/", text) for seed in (0, 1)):
        text += (line := process.stdout.readline())
        assert line, text
    pids = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
    masks = [os.sched_getaffinity(int(pid)) for pid in pids.stdout.split()]
    assert len(masks) == 2 and not masks[0] & masks[1]

    process.send_signal(signal.SIGTSTP)  # Ctrl-Z
    states = ["ps", "-o", "stat=", "-p", ",".join([str(process.pid), *pids.stdout.split()])]
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = subprocess.run(states, capture_output=True, text=True).stdout.split()
        if all(state.startswith("T") for state in found):
            break
        time.sleep(0.1)
    assert len(found) == 3 and all(state.startswith("T") for state in found)
    process.send_signal(signal.SIGCONT)  # fg

    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text + rest
    assert "float32-seed2 | failed with exit status 2; the others go on." in text
    assert rest.count("| interrupted after step") == 2
    for seed in (0, 1):
        (path,) = (tmp_path / "results" / "runs").glob(f"long-cpu-*-shared2-float32-seed{seed}.json")
        record = json.loads(path.read_text())
        assert record["status"] == "interrupted"
        environment = record["environment"]
        assert (environment["shared_by"], environment["cpu_cores"]) == (2, CORES // 2)


def test_the_plan_counts_records_of_this_kind_of_machine_and_tells_the_hours_of_the_rest():
    def record(seed: int, num_epochs: int = 10, **environment):
        flags = ["--config=mlp", f"--config.seed={seed}", f"--config.num_epochs={num_epochs}"]
        config = config_lib.to_json(entries.from_arguments(flags))
        named = {key: config[key] for key in ("entry", "batch_size", "num_epochs")}
        return make_record(
            seed=seed, config=config, environment=environment, wall_seconds=36.0 * num_epochs, **named
        )

    records = [record(0), record(1, cpu_cores=64), record(2, shared_by=2), record(0, num_epochs=1)]
    runs = suites.plan(["mlp 0,1,2,3 --config.num_epochs=10", "cnn2 0,1"])
    slug = records[0].environment.machine_slug
    mlp, cnn2 = suites.progress(runs, records, slug)
    assert (mlp.here, mlp.elsewhere, mlp.missing) == ([0], [1, 2], [1, 2, 3])
    assert mlp.hours == pytest.approx(0.1)  # 36 s an epoch
    assert (cnn2.here, cnn2.missing, cnn2.hours) == ([], [0, 1], None)
    *_, total, unknown = suites.progress_table([mlp, cnn2]).splitlines()
    assert total == "5 runs are left: 0.3 hours, one after the other."
    assert "Not counted, for no epoch of them was run on this kind of machine: cnn2;" in unknown
