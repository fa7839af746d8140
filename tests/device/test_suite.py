"""The suite for an accelerator: its order, its clock, what it keeps, and a real one that is killed and goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_records import ENVIRONMENT, make_record, predictions_with

from fmbench import config as config_lib
from fmbench import entries
from fmbench.device import suite
from fmbench.device.suite import Entry
from fmbench.records import store
from fmbench.records.schema import Environment

TINY = ("--config.data.source=sample", "--config.batch_size=40")


@pytest.fixture
def device(monkeypatch, tmp_path):
    """Runs that take as long as the test says, by a clock of their own."""
    return Device(monkeypatch, tmp_path)


class Device:
    def __init__(self, monkeypatch, results_dir):
        self.results_dir, self.now, self.trained, self.takes, self.fails = results_dir, 1000.0, [], {}, {}
        monkeypatch.setattr(suite.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(suite.machine, "environment", lambda ask_driver: Environment(**ENVIRONMENT))
        monkeypatch.setattr(suite.runtime, "set_up", lambda: None)
        monkeypatch.setattr(suite.api, "run", self.train)

    def train(self, config, workdir, results_dir):
        self.trained.append((config.entry, config.seed, config.dtype))
        if error := self.fails.pop(config.entry, None):
            raise error
        self.now += self.takes.get(config.entry, 10)
        status = "interrupted" if self.now > self.deadline else "completed"
        workdir.mkdir(parents=True)
        return [make_record(config.entry, config.seed, config=config_lib.to_json(config), status=status)]

    def run(self, *suite_lines, seconds):
        self.deadline = self.now + seconds
        report = suite.run(suite_lines, {"data.source": "sample"}, self.results_dir, self.deadline, False)
        return report, [
            (result.entry.name, len(result.ran), result.kept, result.left) for result in report.results
        ]


def test_what_is_worth_most_comes_first_and_what_cannot_end_is_not_begun(device):
    mlp, fc, cnn1 = Entry("mlp", 3, 10), Entry("fc:a", 2, 40), Entry("cnn1", 1, 10, "bfloat16")
    report, lines = device.run(mlp, fc, cnn1, seconds=60)
    assert lines == [("mlp", 3, 0, 0), ("fc-a", 0, 0, 2), ("cnn1", 1, 0, 0)]
    assert [seed for _, seed, _ in device.trained] == [0, 1, 2, 0]
    assert device.trained[-1][2] == "bfloat16"
    assert report.results[1].why == "a run takes about 40 s, 25 s are left"
    assert not report.interrupted
    assert list((device.results_dir / "unfinished").iterdir()) == []


def test_speed_records_have_the_seeds_of_the_rule(device):
    device.run(Entry("speedrun:95", 3, 10), seconds=60)
    recipe = entries.resolve("speedrun:95", {"data.source": "sample"})
    assert [seed for _, seed, _ in device.trained] == entries.seeds_of(config_lib.to_json(recipe), 3)


def test_a_device_that_is_slower_than_predicted_is_expected_to_stay_so(device):
    device.takes = {"mlp+data.source=sample": 30}
    _, lines = device.run(Entry("mlp", 1, 10), Entry("fc:a", 1, 12), seconds=30 + suite.MARGIN + 35)
    assert lines == [("mlp", 1, 0, 0), ("fc-a", 0, 0, 1)]  # 36 s are expected


def test_after_its_first_run_an_entry_is_expected_to_take_what_it_took(device):
    device.takes = {"mlp+data.source=sample": 30}
    _, lines = device.run(Entry("mlp", 3, 10), seconds=80)
    assert lines == [("mlp", 2, 0, 1)]


def test_finished_records_of_this_device_are_kept_and_those_of_other_configs_are_not(device):
    for seed, factor in ((0, 1), (1, 2)):
        config = entries.resolve("mlp", {"data.source": "sample", "seed": seed, "data.dir": "/elsewhere"})
        stored = config_lib.to_json(config) | {"batch_size": factor * config.batch_size}
        record = make_record(config.entry, seed, config=stored, batch_size=factor * config.batch_size)
        store.write(record, predictions_with(20), device.results_dir / "runs" / record.name)
    _, lines = device.run(Entry("mlp", 3, 10), seconds=100)
    assert lines == [("mlp", 2, 1, 0)]
    assert [seed for _, seed, _ in device.trained] == [1, 2]


def test_a_long_run_is_stopped_and_goes_on_in_the_next_stay(device):
    device.takes = {"mlp+data.source=sample": 500}
    report, lines = device.run(Entry("mlp", 1, 10_000, is_long=True), seconds=200)
    assert lines == [("mlp", 0, 0, 1)]
    assert "it goes on from there" in report.results[0].why
    assert not report.interrupted
    assert len(list((device.results_dir / "unfinished").iterdir())) == 1
    _, lines = device.run(Entry("mlp", 1, 10_000, is_long=True), seconds=50)
    assert lines == [("mlp", 0, 0, 1)]
    assert len(device.trained) == 1  # too little time to be worth it


def test_one_that_fails_costs_the_others_nothing(device, capsys):
    device.fails = {"mlp+data.source=sample": RuntimeError("INTERNAL: cuDNN\nmore")}
    report, lines = device.run(Entry("mlp", 2, 10), Entry("fc:a", 1, 10), seconds=100)
    assert lines == [("mlp", 0, 0, 2), ("fc-a", 1, 0, 0)]
    assert [(result.failed, result.why) for result in report.results] == [
        (True, "RuntimeError: INTERNAL: cuDNN"),
        (False, ""),
    ]


def test_the_suite_has_every_entry_once_and_all_exist():
    names = [entry.name for entry in suite.SUITE]
    assert len(names) == len(set(names))
    for entry in suite.SUITE:
        assert entries.resolve(entry.spec, {}).entry == entry.name
    assert names[:3] == ["speedrun-94", "speedrun-95", "speedrun-93"]


# ---------------------------------------------------------------------------- the real command


def start(results_dir: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fmbench.accelerator", *flags, *TINY, f"--results_dir={results_dir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_killed_it_goes_on_where_it_was_and_keeps_what_was_finished(tmp_path):
    flags = ("mlp", "--minutes=3", "--config.num_epochs=60")
    process = start(tmp_path, *flags)
    second = "unfinished/mlp+batch_size=40+data.source=sample+num_epochs=60-cpu-*-float32-seed1/checkpoints/*"
    while process.poll() is None and not any(path.name.isdigit() for path in tmp_path.glob(second)):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    first = store.read_all(tmp_path)
    assert [record.seed for record in first.values()] == [0]

    process = start(tmp_path, *flags)
    out, err = process.communicate(timeout=170)
    assert process.returncode == 0, err
    assert "resumed from" in err
    records = store.read_all(tmp_path)
    assert [(record.seed, record.num_resumes) for record in records.values()] == [(0, 0), (1, 1), (2, 0)]
    assert [record.first_step_seconds is not None for record in records.values()] == [True, True, False]
    assert records[next(iter(first))] == next(iter(first.values()))  # not made again
    assert list((tmp_path / "unfinished").iterdir()) == []
    assert "| mlp | 2: " in out
    assert (tmp_path / "accelerator.md").read_text() in out


@pytest.mark.slow
def test_what_it_started_ends_with_it(tmp_path):
    process = start(tmp_path, "mlp", "--minutes=3", "--config.num_epochs=5000")
    while process.poll() is None and not list(tmp_path.glob("unfinished/*/checkpoints/*")):
        time.sleep(0.01)
    process.kill()  # and not its worker
    process.communicate(timeout=60)  # which has the same standard output
    (record,) = store.read_all(tmp_path).values()
    assert record.status == "interrupted"


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_a_report(tmp_path):
    process = start(tmp_path, "mlp", "--minutes=3", "--config.num_epochs=5000")
    while process.poll() is None and not list(tmp_path.glob("unfinished/*/checkpoints/*")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "it goes on from there" in out
    assert "Traceback" not in err


def test_mistakes_are_said_in_one_line(tmp_path):
    for flags, said in (
        (("mlpp",), "there is no part 'mlpp'; the nearest is mlp"),
        (("--minutes=0",), "--minutes=0: it must be more than 0"),
        (("--config=mlp",), "there is no flag --config"),
        (("--config.num_epoch=1", "mlp"), "no field 'num_epoch'"),
    ):
        process = start(tmp_path, *flags)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, len(err.splitlines())) == (2, 1), err
        assert said in err
