"""One training over several processes, on loopback: real ones, on the sample."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from fmbench.pages import leaderboard
from fmbench.records import store

SAMPLE = ("--config.data.source=sample", "--config.batch_size=48", "--config.eval_batch_size=120")


@pytest.fixture(scope="session")
def start_several(tmp_path_factory):
    """Starts `python -m fmbench.main` in several processes, which meet; all share one compile cache."""
    cache = tmp_path_factory.mktemp("cache")

    def start(size, *flags, devices=1, own=None, only=None, timeout=60, by_variables=False):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        def place(index):
            return {"coordinator_address": f"127.0.0.1:{port}", "num_processes": size, "process_id": index}

        def as_flags(index):
            return () if by_variables else [f"--{name}={value}" for name, value in place(index).items()]

        def as_variables(index):
            return {f"JAX_{name.upper()}": str(value) for name, value in place(index).items() if by_variables}

        return [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "fmbench.main", "--distributed", f"--timeout={timeout}"),
                    *(*as_flags(index), *flags, *(own or {}).get(index, ())),
                ],
                cwd=REPOSITORY,
                env=os.environ
                | {"FMBENCH_CACHE": str(cache), "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
                | as_variables(index),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in (range(size) if only is None else only)
        ]

    return start


def end(processes, timeout=240):
    """The exit code and standard error of each; what they say on standard output is nothing."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [stdout for stdout, _ in said] == [""] * len(said)
    return [(process.returncode, stderr) for process, (_, stderr) in zip(processes, said, strict=True)]


def folders(path: Path):
    return f"--workdir={path / 'w'}", f"--results_dir={path / 'r'}"


def read(path: Path):
    record = store.read(path / "w" / "record.json")
    return record, np.load(path / "w" / "record.npy")


def wait_for(path: Path, processes, seconds=120):
    limit = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < limit
        assert all(process.poll() is None for process in processes), end(processes)
        time.sleep(0.05)


def model(path: Path):
    """What tells a trained model to the bit: the digest of its arrays."""
    return json.loads((path / "w" / "model" / "model.json").read_text())["sha256"]


def test_two_processes_train_as_one(start_several, run_main, tmp_path):
    flags = ("--config=configs/mlp.py", "--config.num_epochs=2", *SAMPLE)
    # They meet where variables say; in the other tests, where flags do.
    results = end(start_several(2, *flags, *folders(tmp_path / "two"), by_variables=True))
    assert [code for code, _ in results] == [0, 0], results
    assert results[1][1] == ""  # process 0 speaks for all
    assert "test accuracy" in results[0][1]
    alone = run_main(*flags, *folders(tmp_path / "one"), devices=2)
    assert alone.returncode == 0, alone.stderr
    (record, _), (expected, _) = read(tmp_path / "two"), read(tmp_path / "one")
    assert model(tmp_path / "two") == model(tmp_path / "one")
    assert record.predictions_sha256 == expected.predictions_sha256
    assert [epoch.train_loss for epoch in record.history] == [epoch.train_loss for epoch in expected.history]
    environment = record.environment
    assert (environment.num_processes, environment.num_devices, environment.num_hosts) == (2, 2, 1)
    assert expected.environment.num_hosts is None
    (path,) = (tmp_path / "two" / "r" / "runs").glob("*.json")
    assert path.stem == record.name
    assert "-x2-p2-" in record.name
    condition = leaderboard.condition_of(record)
    assert condition != leaderboard.condition_of(expected)
    assert " in 2 processes, float32" in condition.title
    assert len(record.processes) == 1
    assert record.peak_memory_bytes > 1e8


@pytest.mark.slow
def test_two_processes_that_read_their_images_from_disk_train_as_one_that_has_them(
    start_several, run_main, tmp_path
):
    pytest.importorskip("grain", reason="grain is not installed: pip install '.[grain]'")
    flags = ("--config=configs/mlp.py", "--config.data.remainder=keep", "--config.num_epochs=2", *SAMPLE)
    grain = ("--config.data.pipeline=grain", "--config.batch_size=64")  # the last step has 32 images
    results = end(start_several(2, *flags, *grain, *folders(tmp_path / "two")))
    assert [code for code, _ in results] == [0, 0], results
    alone = run_main(*flags, "--config.batch_size=64", *folders(tmp_path / "one"), devices=2)
    assert alone.returncode == 0, alone.stderr
    (record, predictions), (expected, expected_predictions) = read(tmp_path / "two"), read(tmp_path / "one")
    assert model(tmp_path / "two") == model(tmp_path / "one")
    np.testing.assert_array_equal(predictions, expected_predictions)
    assert [epoch.train_loss for epoch in record.history] == [epoch.train_loss for epoch in expected.history]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "size", "devices", "mode"),
    [
        ("mlp", 2, 2, "pmap"),
        ("mlp", 4, 1, "jit"),
        ("cnn4", 2, 1, "pmap"),
        ("cnn4", 2, 2, "jit"),
        ("vgg_like", 2, 1, "jit"),
    ],
)
def test_layouts_give_what_one_process_gives(start_several, run_main, tmp_path, net, size, devices, mode):
    """To the bit, where two numbers are added; gloo adds four as they come.

    By small steps of SGD: Adam's first divides noise by noise. Where a ReLU or a pooling has a kink within
    rounding, which cnn4 has now and then, gradients still differ.
    """
    rate = 1e-5 if net == "cnn4" else 0.01
    sgd = ("--config.optimizer.name=sgd", f"--config.optimizer.learning_rate={rate}")
    flags = (f"--config=configs/{net}.py", "--config.num_epochs=2", *sgd, *SAMPLE)
    results = end(
        start_several(size, *flags, f"--config.parallel={mode}", *folders(tmp_path / "several"), devices=devices)
    )
    assert [code for code, _ in results] == [0] * size, results
    assert run_main(*flags, *folders(tmp_path / "one"), devices=size * devices).returncode == 0
    if size * devices == 2:
        assert model(tmp_path / "several") == model(tmp_path / "one")
    (record, _), (expected, _) = read(tmp_path / "several"), read(tmp_path / "one")
    losses = [[epoch.train_loss for epoch in run.history] for run in (record, expected)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6 if net == "mlp" else 1e-3)


@pytest.mark.parametrize(
    ("flags", "own", "message"),
    [
        (
            (),
            {1: ("--config.num_epochs=3",)},
            r"process 1 differs from process 0 in config.num_epochs: 3 instead of",
        ),
        (("--config.batch_size=49",), {}, "config.batch_size is 49, which 2 devices cannot share equally"),
    ],
    ids=["other config", "batch"],
)
def test_what_cannot_be_is_said_once_by_each_and_leaves_nothing(start_several, tmp_path, flags, own, message):
    results = end(
        start_several(2, "--config=configs/mlp.py", *SAMPLE, *flags, *folders(tmp_path), own=own, timeout=30)
    )
    for code, stderr in results:
        assert code == 2
        (line,) = stderr.splitlines()
        assert re.match(rf"fmbench\.main: (process 0: )?{message}", line), results
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_only_one_process_sees_all_say(start_several, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "mine.txt").write_text("not a run's")
    for code, stderr in end(start_several(2, "--config=configs/mlp.py", *SAMPLE, *folders(tmp_path))):
        assert code == 2
        (line,) = stderr.splitlines()
        assert "holds files that are not a run's" in line
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["mine.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_the_restart_goes_on(start_several, tmp_path, victim):
    flags = ("--config=configs/mlp.py", "--config.num_epochs=20", *SAMPLE)
    processes = start_several(2, *flags, *folders(tmp_path / "killed"))
    wait_for(tmp_path / "killed" / "w" / "checkpoints" / "20", processes)
    processes[victim].kill()
    killed = time.monotonic()
    results = end(processes)
    assert time.monotonic() - killed < 60
    assert results[victim][0] == -signal.SIGKILL
    code, stderr = results[1 - victim]
    assert code not in (0, None)
    line = stderr.splitlines()[-1]
    assert re.match(r"fmbench\.main: .*process.* has ended without a word", line), stderr
    assert [line for line in stderr.splitlines() if not re.match(r"mlp|epoch|fmbench", line)] == []
    results = end(start_several(2, *flags, *folders(tmp_path / "killed")))
    assert [code for code, _ in results] == [0, 0], results
    assert [code for code, _ in end(start_several(2, *flags, *folders(tmp_path / "whole")))] == [0, 0]
    assert model(tmp_path / "killed") == model(tmp_path / "whole")
    assert read(tmp_path / "killed")[0].processes[0].ended == ("killed", "failed")[victim]


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_at_any_process_ends_all_with_one_checkpoint(start_several, tmp_path, asked):
    flags = ("--config=configs/mlp.py", "--config.num_epochs=20", *SAMPLE)
    processes = start_several(2, *flags, *folders(tmp_path))
    wait_for(tmp_path / "w" / "checkpoints" / "20", processes)
    processes[asked].terminate()
    results = end(processes)
    assert [code for code, _ in results] == [130, 130], results
    (step,) = map(int, re.findall(r"interrupted after step (\d+) of 200", results[0][1]))
    assert max(int(path.name) for path in (tmp_path / "w" / "checkpoints").iterdir()) == step
    record = store.read(tmp_path / "w" / "record.json")
    assert (record.status, record.num_steps) == ("interrupted", step)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(start_several, run_main, tmp_path):
    flags = ("--config=configs/mlp.py", *SAMPLE, *folders(tmp_path), "--config.num_epochs=40")
    steps: list[int] = []
    for size in (2, 1, 4):
        if size == 2:
            processes = start_several(2, *flags)
            wait_for(tmp_path / "w" / "checkpoints" / "20", processes)
        else:
            refused = end(start_several(size, *flags))
            assert all(code == 2 and "give --resume_elsewhere" in stderr for code, stderr in refused), refused
            processes = start_several(size, *flags, "--resume_elsewhere")
            wait_for(tmp_path / "w" / "checkpoints" / str(steps[-1] // 10 * 10 + 20), processes)
        if size < 4:
            processes[0].terminate()
        results = end(processes)
        assert [code for code, _ in results] == [130 if size < 4 else 0] * size, results
        steps.append(store.read(tmp_path / "w" / "record.json").num_steps)
    record = store.read(tmp_path / "w" / "record.json")
    assert "num_processes: 2 -> 1 -> 4" in record.mixture
    assert [process.first_step for process in record.processes] == [0, *steps[:2]]


def test_flags_of_several_need_distributed(run_main, tmp_path):
    result = run_main("--config=configs/mlp.py", "--process_id=1", *folders(tmp_path))
    assert (result.returncode, result.stderr) == (
        2,
        "fmbench.main: --process_id means nothing without --distributed.\n",
    )
