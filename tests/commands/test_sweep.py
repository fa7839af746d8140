"""Grids and seeds: planned, run in processes of their own, interrupted, and ranked by validation accuracy."""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_records import EPOCH, make_record, make_unfinished, publish

from fmbench import config as config_lib
from fmbench import entries
from fmbench import sweep as command
from fmbench.errors import UserError
from fmbench.records import store
from fmbench.studies import sweep
from fmbench.system import interrupt
from fmbench.training import preflight

# ml_collections loads config files in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

LITTLE = """
from fmbench.config import base_config


def get_config(num_epochs="1"):
    config = base_config()
    config.model.name = "fully_connected"
    config.model.widths, config.model.num_dropouts = (16,), 0
    config.data.source = "sample"
    config.batch_size = 80
    config.num_epochs = int(num_epochs)
    config.optimizer.name = "sgd"
    return config
"""


@pytest.fixture
def little(tmp_path) -> Path:
    """A config file whose argument is the number of epochs."""
    path = tmp_path / "tests_little.py"
    path.write_text(LITTLE)
    return path


@pytest.fixture
def run(monkeypatch, capsys, little, tmp_path):
    """Runs `fmbench.sweep` on the little config, in the folder of the test: exit code, output and error output."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, config: str = "tests_little.py") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sweep", f"--config={config}", *map(str, arguments)])
        code = 0
        try:
            command.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


class FakeMain:
    """Stands in for the processes: leaves records as `fmbench.main` would, or fails.

    `outcomes` has, by (learning rate, seed), the changes of a completed record or an exit code other than 0, of
    which -SIGTERM is a stop during set-up; without one the run is completed with a validation accuracy of 85 %.
    """

    def __init__(self, capsys) -> None:
        self.capsys = capsys
        self.outcomes: dict[tuple[float, int], dict | int] = {}
        self.commands: list[list[str]] = []
        self.said_before: list[str] = []
        self.checked: list[Sequence[sweep.Run]] = []

    def __call__(self, command: list[str], log: Path, stop: interrupt.StopRequest, *rest: Any) -> int:
        self.commands.append(command)
        self.said_before.append(self.capsys.readouterr().out)
        log.write_text("what it prints")
        *flags, workdir, results_dir = command[3:]
        config = entries.from_arguments(flags)
        outcome = self.outcomes.get((config.optimizer.learning_rate, config.seed), {})
        arguments = {"entry": config.entry, "seed": config.seed, "config": config_lib.to_json(config)}
        if outcome == -signal.SIGTERM:
            stop.signum = signal.SIGTERM
        if isinstance(outcome, int) and outcome not in (3, 130):
            return outcome
        if isinstance(outcome, int):
            record = make_unfinished({3: "diverged", 130: "interrupted"}[outcome], **arguments)
        else:
            record = make_record(**arguments, **outcome)
        path = publish(record, Path(results_dir.removeprefix("--results_dir=")))
        copy = Path(workdir.removeprefix("--workdir=")) / "record.json"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
        return outcome if isinstance(outcome, int) else 0

    def trained(self) -> list[tuple[str, str]]:
        """Learning rate and seed of the runs since the last call."""
        pattern = re.compile(r"learning_rate=(\S+) --config.seed=(\d+) ")
        commands, self.commands = self.commands, []
        return [pattern.search(" ".join(command)).groups() for command in commands]  # type: ignore[union-attr, misc]


@pytest.fixture
def fake_main(monkeypatch, capsys) -> FakeMain:
    fake = FakeMain(capsys)
    monkeypatch.setattr(sweep, "run_process", fake)
    monkeypatch.setattr(sweep, "check", fake.checked.append)
    return fake


def rows(text: str) -> list[list[str]]:
    """The cells of the table's rows."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# From the command line to runs.


def test_every_combination_and_seed_is_a_process_of_its_own(run, fake_main):
    arguments = (
        "--grid=optimizer.learning_rate=1e-3,3e-3",
        "--grid=batch_size=40,80",
        "--seeds=0,7",
        "--out=here",
    )
    code, out, err = run(*arguments, "--config.label_smoothing=0.1", "--config.data.random_state", "3")
    assert code == 0, err
    names = []
    for rate in ("1e-3", "3e-3"):
        for size in ("40", "80"):
            for seed in ("0", "7"):
                command = fake_main.commands.pop(0)
                assert command[:3] == [sys.executable, "-m", "fmbench.main"]
                assert command[3:7] == [
                    "--config=tests_little.py",
                    "--config.label_smoothing=0.1",
                    "--config.data.random_state",
                    "3",
                ]
                assert command[7:10] == [
                    f"--config.optimizer.learning_rate={rate}",
                    f"--config.batch_size={size}",
                    f"--config.seed={seed}",
                ]
                names.append(command[10].removeprefix("--workdir=here/workdirs/"))
                assert command[11:] == ["--results_dir=here"]
                said = fake_main.said_before.pop(0)
                assert said.endswith(
                    f"[{len(names)}/8] optimizer.learning_rate={rate} batch_size={size} seed={seed}: "
                )
    assert fake_main.commands == []
    assert len(set(names)) == 8
    assert sorted(f"{name}.log" for name in names) == sorted(path.name for path in Path("here/logs").iterdir())
    assert out.startswith("validation 85.00 %, 10.0 s\n\n| overrides")
    assert sorted(path.name for path in Path().iterdir()) == ["here", "tests_little.py"]


def test_commas_in_parentheses_split_no_values(little):
    fixed = [f"--config={little}"]
    axes = sweep.axes_of(["model.widths=(16,32), (32,),(64,32,16)", "dtype=float32"], "0", fixed)
    runs = sweep.plan(fixed, axes)
    assert [run.config.model.widths for run in runs] == [(16, 32), (32,), (64, 32, 16)]
    assert runs[1].point == "model.widths=(32,) dtype=float32"


def test_records_go_to_a_folder_of_the_entrys_name(run, fake_main):
    assert run("--grid=batch_size=40", "--config.label_smoothing=0.1", config="tests_little.py:2")[0] == 0
    (record,) = Path("sweeps/tests_little-2+label_smoothing=0.1/runs").glob("*.json")
    assert record.stem == "tests_little-2+batch_size=40+label_smoothing=0.1-cpu-abacus-9-2c-float32-seed0"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--grid is missing"),
        (["--grid=batch_size"], "'batch_size' lacks a value"),
        (["--grid=batch_size="], "'batch_size=' lacks a value"),
        (["--grid=batch_size=40,,80"], "'batch_size=40,,80' lacks a value"),
        (["--grid=batch_size=40", "--seeds="], "'seed=' lacks a value"),
        (["--grid=batch_size=40", "--grid=batch_size=80"], "'batch_size' is given twice"),
        (["--grid=batch_size=40", "--config.batch_size=80"], "'batch_size' is given twice"),
        (["--grid=optimizer.nesterov=1", "--noconfig.optimizer.nesterov"], "'optimizer.nesterov' is given twice"),
        (["--grid=seed=1,2"], "'seed' is given twice, by --grid or --config.seed; seeds are for --seeds alone"),
        (["--grid=batch_size=40", "--config.seed=1"], "seeds are for --seeds alone"),
        (["--grid=batch_size=40,80", "--grid=batchsize=1"], "config has no field 'batchsize'; the nearest are"),
        (["--grid=batch_size=40,80,x"], "batch_size"),
        (["--grid=batch_size=40,80,0"], "config.batch_size is 0; it must be at least 1"),
        (["--grid=batch_size=40", "--seeds=0,x"], "seed"),
        (["--grid=batch_size=40", "--seeds=0,-1"], "config.seed is -1; it must be at least 0"),
        (["--grid=batch_size=40", "--seed=1"], "there is no flag --seed; the nearest are --seeds"),
        (
            ["--grid=label_smoothing=0.1,0.10"],
            "'label_smoothing=0.1 seed=0' and 'label_smoothing=0.10 seed=0' are",
        ),
        (
            ["--grid=batch_size=40", "--seeds=0,0"],
            "'batch_size=40 seed=0' and 'batch_size=40 seed=0' are the same",
        ),
        (["--grid=data.split=default,all"], "give --config.data.split=train_test_split"),
        (["--grid=batch_size=40", "--config=nowhere.py"], "no config 'nowhere.py'"),
        (["--grid=batch_size=40", "--config="], "--config is missing"),
        (["--grid=batch_size=40", f"--out={config_lib.REPOSITORY}/results/x"], "for the leaderboard's records"),
        (
            ["--grid=batch_size=40", "--out=tests_little.py"],
            "tests_little.py/logs: Not a directory; name another place",
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2_before_anything_is_trained(run, fake_main, arguments, said):
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("fmbench.sweep: ")
    assert said in err
    assert fake_main.commands == []
    assert [path.name for path in Path().iterdir()] == ["tests_little.py"]


def test_records_of_another_config_are_refused(run, fake_main, little):
    arguments = ("--grid=batch_size=40", "--seeds=0,1")
    assert run(*arguments)[0] == 0
    little.write_text(LITTLE.replace('"sgd"', '"adam"'))
    code, _, err = run("--grid=batch_size=20,40", "--seeds=2,1")
    assert (code, err.count("\n")) == (2, 1)
    assert "tests_little+batch_size=40-float32-seed1 of another config (optimizer.name: sgd -> adam)" in err
    assert len(fake_main.commands) == 2


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("batch_size=40,80000", "batch_size=80000 cannot be trained: config.batch_size is 80000, but the train"),
        (
            "model.widths=(16,),(-1,)",
            "model.widths=(-1,) cannot be trained: model 'fully_connected' cannot",
        ),
        (
            "schedule.warmup_epochs=0,3",
            "schedule.warmup_epochs=3 cannot be trained: config.schedule.",
        ),
        ("augment.function=os:getcwd", "augment.function=os:getcwd cannot be trained: config.augment.function is"),
    ],
)
def test_what_only_a_runs_set_up_can_know_is_known_before_the_first(little, grid, said):
    """As `sweep.check` has it done in another process; here, where JAX has begun, in this one."""
    fixed = [f"--config={little}"]
    runs = sweep.plan(fixed, sweep.axes_of([grid], "0", fixed))
    with pytest.raises(UserError) as caught:
        preflight.check({run.point: run.config for run in runs})
    assert str(caught.value).startswith(said)


def test_a_combination_that_cannot_be_trained_ends_the_sweep_before_it_begins(run, monkeypatch):
    monkeypatch.setattr(sweep, "run_process", None)
    code, out, err = run("--grid=batch_size=40,80000", "--out=here")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("fmbench.sweep: batch_size=80000 cannot be trained: ")


def test_only_what_is_left_is_checked(run, fake_main):
    assert run("--grid=batch_size=40", "--out=here")[0] == 0
    assert run("--grid=batch_size=40,80", "--out=here")[0] == 0
    assert run("--grid=batch_size=40,80", "--out=here")[0] == 0
    assert [[run.point for run in runs] for runs in fake_main.checked] == [["batch_size=40"], ["batch_size=80"]]


def test_several_at_a_time_have_cores_of_their_own_and_say_so(run, monkeypatch):
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("this machine gives one core, and two runs at a time need two")
    environments: dict[str, tuple[set[int], str]] = {}
    both = threading.Barrier(2, timeout=60)

    def run_process(command: list[str], log: Path, stop: Any, environment: dict[str, str], *rest: Any) -> int:
        environments[" ".join(command)] = os.sched_getaffinity(0), environment["FMBENCH_SHARED_BY"]
        both.wait()  # or the two don't run at a time
        return 1

    monkeypatch.setattr(sweep, "run_process", run_process)
    monkeypatch.setattr(sweep, "check", lambda runs: None)
    monkeypatch.setattr(sweep.shared_cores, "split_cores", lambda jobs: [[core] for core in sorted(cores)[:jobs]])
    code, out, _ = run("--grid=batch_size=40,80", "--jobs=2", "--out=here")
    assert code == 1
    assert sorted(environments.values(), key=str) == [({core}, "2") for core in sorted(cores)[:2]]
    assert out.count("failed with exit code 1") == 2
    assert os.sched_getaffinity(0) == cores


# A search.


@pytest.fixture
def search(run, fake_main):
    """Runs a search of two trials over learning rates, in which the rate decides over validation accuracy."""
    pytest.importorskip("optuna", reason="needs pip install 'fmbench[optuna]'")

    def search(*arguments: str, num_trials: int = 2) -> tuple[int, str, str]:
        grid = "--grid=optimizer.learning_rate=1e-3..1e-1:log"
        return run(grid, "--sampler=tpe", f"--num_trials={num_trials}", "--out=here", *arguments)

    return search


def test_a_search_goes_on_where_it_was_and_draws_from_its_ranges(search, fake_main):
    code, out, err = search("--grid=batch_size=20..80", "--grid=model.widths=(16,),(8,)")
    assert (code, err) == (0, "")
    assert len(rows(out)) == 2
    code, out, _ = search("--grid=batch_size=20..80", "--grid=model.widths=(16,),(8,)", num_trials=5)
    assert "2 trials are done, 3 are left." in "".join(fake_main.said_before) + out
    assert len({row[0] for row in rows(out)}) == 5
    for words in fake_main.commands:
        config = entries.from_arguments(words[3:-2])
        assert 1e-3 <= config.optimizer.learning_rate <= 1e-1
        assert 20 <= config.batch_size <= 80
    assert len(fake_main.commands) == 5
    assert rows(search("--grid=batch_size=20..80", "--grid=model.widths=(16,),(8,)", "--table")[1]) == rows(out)


def test_a_stopped_trial_is_taken_up_again(search, fake_main, monkeypatch):
    monkeypatch.setattr(sweep, "run_process", lambda *arguments: 130)
    code, out, _ = search()
    assert code == 130
    ((point, *_),) = rows(out)
    monkeypatch.setattr(sweep, "run_process", fake_main)
    code, out, err = search()
    assert (code, err) == (0, "")
    assert [row[1] for row in rows(out)] == ["1", "1"]
    assert f"--config.{point}" in fake_main.commands[0]


def test_a_trial_below_the_median_is_stopped_and_says_so(search, fake_main, monkeypatch):
    """Six trials of two epochs; the last is worse than all before after its first."""
    trained: list[str] = []

    def run_process(command, log, stop, environment, is_hopeless) -> int:
        workdir = Path(command[-2].removeprefix("--workdir="))
        workdir.mkdir(parents=True)
        trained.append(command[-3])
        accuracy = 0.5 if len(trained) == 6 else 0.8
        (workdir / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "val_accuracy": accuracy}) + "\n")
        fate = is_hopeless()
        config = entries.from_arguments(command[3:-2])
        fake_main.outcomes[config.optimizer.learning_rate, 0] = 130 if fate else {}
        return fake_main(command, log, stop)

    monkeypatch.setattr(sweep, "run_process", run_process)
    code, out, err = search("--config.num_epochs=2", num_trials=6)
    assert (code, err) == (0, "")
    assert [row[-1] for row in rows(out)] == [""] * 5 + ["seed 0 pruned"]
    assert "pruned after epoch" in out or "pruned after epoch" in "".join(fake_main.said_before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid=batch_size=20..80"], "'batch_size=20..80' is a range, which is for --sampler=tpe"),
        (["--grid=batch_size=20", "--num_trials=3"], "--sampler=tpe and --num_trials=N go together"),
        (["--grid=batch_size=20", "--sampler=tpe"], "--sampler=tpe and --num_trials=N go together"),
        (["--grid=batch_size=20", "--sampler=tpe", "--num_trials=0"], "--num_trials=0: it must be at least 1"),
        (["--grid=batch_size=20", "--jobs=0"], "--jobs=0: it must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(run, fake_main, arguments, said):
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_a_space_that_cannot_be_searched_is_one_line(search):
    for arguments, said in (
        (["--grid=batch_size=80..20"], "is no range"),
        (["--grid=batch_size=-1..20"], "config.batch_size is -1; it must be at least 1"),
        (["--grid=batch_size=20", "--seeds=0,1"], "trains each trial with one seed"),
    ):
        code, _, err = search(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err


# What became of the runs.


def test_the_table_ranks_by_validation_accuracy_and_has_no_test_accuracy(run, fake_main):
    for seed, (low, high) in enumerate([(0.80, 0.91), (0.82, 0.93), (0.90, 0.92)]):
        times = {"train_seconds": (1.0, 2.0, 6.0)[seed], "train_core_seconds": (3.0, 4.0, 11.0)[seed]}
        loss = {"history": [EPOCH, EPOCH | {"epoch": 2, "train_loss": (0.25, 0.5, 0.15)[seed]}], "num_epochs": 2}
        # The one with the worse test accuracy, 75.5 against 95.5 %, has the better validation accuracy.
        fake_main.outcomes[0.01, seed] = {"val_accuracy": low, "wrong": 9, **times, **loss}
        fake_main.outcomes[0.1, seed] = {"val_accuracy": high, "wrong": 49, **times, **loss}
        fake_main.outcomes[1.0, seed] = {"val_accuracy": 0.70, "train_seconds": 1234.5}
    arguments = ("--grid=optimizer.learning_rate=0.01,1,0.1", "--config.num_epochs=2", "--out=here")
    assert run(*arguments, "--seeds=0,1,2")[0] == 0
    code, out, err = run(*arguments, "--seeds=0")
    assert code == 0, err
    assert [row[:4] for row in rows(out)] == [
        ["optimizer.learning_rate=0.1", "1", "91.00", "0.2500"],
        ["optimizer.learning_rate=0.01", "1", "80.00", "0.2500"],
        ["optimizer.learning_rate=1", "1", "70.00", "0.5000"],
    ]
    assert rows(out)[2][4] == "1,234.5"
    code, out, err = run(*arguments, "--seeds=0,1,2", "--table")
    summary = Path("here/summary.md").read_text()
    assert rows(out) == rows(summary)
    best, second, _ = rows(out)
    assert best == ["optimizer.learning_rate=0.1", "3", "92.00 ± 1.00", "0.3000", "2.0", "4.0", "2", ""]
    assert second == ["optimizer.learning_rate=0.01", "3", "84.00 ± 5.29", "0.3000", "2.0", "4.0", "2", ""]
    for text in (out, summary):
        assert "Test accuracy is left out on purpose: choose by validation." in text
        assert not re.search(r"75\.5|95\.5|0\.755|0\.955", text)


def test_without_a_device_no_run_is_tried(run, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "wrong")
    code, out, err = run("--grid=optimizer.learning_rate=1,0.1", "--out=here")
    assert (code, out) == (2, "")
    assert err.startswith("fmbench.sweep: JAX_PLATFORMS is 'wrong', and JAX has no device")
    assert len(err.splitlines()) == 1


def test_the_others_are_still_run_after_one_that_fails_or_diverges(run, fake_main):
    fake_main.outcomes |= {(1.0, 0): 2, (1.0, 1): 3, (0.1, 0): -9}
    arguments = ("--grid=optimizer.learning_rate=1,0.1,0.01", "--seeds=0,1", "--out=here")
    code, out, _ = run(*arguments)
    assert code == 1
    all_runs = [(rate, seed) for rate in ("1", "0.1", "0.01") for seed in "01"]
    assert fake_main.trained() == all_runs
    name = "here/logs/tests_little+optimizer.learning_rate={}-float32-seed{}.log"
    said = "".join(fake_main.said_before)
    assert f"learning_rate=1 seed=0: failed with exit code 2, see {name.format('1.0', 0)}\n" in said
    assert f"learning_rate=1 seed=1: diverged, see {name.format('1.0', 1)}\n" in said
    assert f"learning_rate=0.1 seed=0: failed with exit code -9, see {name.format('0.1', 0)}\n" in said
    table = {row[0].removeprefix("optimizer.learning_rate="): row[1:] for row in rows(out)}
    assert list(table) == ["0.1", "0.01", "1"]
    lacking = f"seed 0 failed ({name.format('1.0', 0)}), seed 1 diverged ({name.format('1.0', 1)})"
    assert table["1"] == ["0", "-", "-", "-", "-", "-", lacking]
    assert table["0.1"][:2] == ["1", "85.00"]
    assert table["0.1"][-1] == f"seed 0 failed ({name.format('0.1', 0)})"
    assert table["0.01"][-1] == ""

    # Once more: what failed may have been mended; what diverged would do so again.
    fake_main.outcomes[1.0, 0] = {}
    code, out, _ = run(*arguments)
    assert code == 1
    assert fake_main.trained() == [("1", "0"), ("0.1", "0")]
    assert f"seed=1: diverged, see {name.format('1.0', 1)} (trained before)\n" in "".join(fake_main.said_before)
    assert "seed=1: validation 85.00 %, 10.0 s (trained before)\n" in out

    fake_main.outcomes[0.1, 0] = {}
    assert run("--grid=optimizer.learning_rate=0.1,0.01", "--seeds=0,1", "--out=here")[0] == 0


@pytest.mark.parametrize(("code", "said"), [(130, "interrupted"), (-signal.SIGTERM, "not trained")])
def test_an_interruption_ends_the_sweep_with_the_table_so_far(run, fake_main, code, said):
    fake_main.outcomes[0.1, 1] = code
    arguments = ("--grid=optimizer.learning_rate=0.1,0.01", "--seeds=0,1")
    code, out, err = run(*arguments)
    assert code == 130
    assert err == "fmbench.sweep: interrupted; the same command goes on from there.\n"
    assert fake_main.trained() == [("0.1", "0"), ("0.1", "1")]
    assert out.startswith("interrupted\n")
    assert [(row[1], row[-1]) for row in rows(out)] == [
        ("1", f"seed 1 {said}"),
        ("0", "seed 0 not trained, seed 1 not trained"),
    ]

    del fake_main.outcomes[0.1, 1]
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert fake_main.trained() == [("0.1", "1"), ("0.01", "0"), ("0.01", "1")]
    assert [(row[1], row[-1]) for row in rows(out)] == [("2", ""), ("2", "")]


def test_table_trains_nothing(run, fake_main):
    code, out, err = run("--grid=batch_size=40,80", "--table", "--out=a/b")
    assert (code, err) == (0, "")
    assert [row[-1] for row in rows(out)] == ["seed 0 not trained"] * 2
    assert fake_main.commands == []
    assert rows(Path("a/b/summary.md").read_text()) == rows(out)


def test_of_two_devices_records_the_newer_one_counts(run, fake_main, little):
    assert run("--grid=batch_size=40", "--out=here")[0] == 0
    (old,) = store.read_all(Path("here")).values()
    created = "2025-12-31T00:00:00+00:00"
    older = make_unfinished(
        "interrupted", old.entry, config=old.config, created=created, environment={"num_devices": 2}
    )
    publish(older, Path("here"))
    _, out, _ = run("--grid=batch_size=40", "--out=here", "--table")
    assert rows(out)[0][1] == "1"


# Processes.


PRELUDE = """
import os, signal, sys, time
signal.alarm(60)  # no test waits for ever
"""


def run_python(code: str, log: Path) -> int:
    with interrupt.stop_on_signals() as stop:
        return sweep.run_process([sys.executable, "-c", f"{PRELUDE}{code}"], log, stop)


def test_a_processs_output_is_added_to_its_log(tmp_path, capfd):
    log = tmp_path / "log"
    assert run_python("print('first')", log) == 0
    assert run_python("print('second', file=sys.stderr); sys.exit(3)", log) == 3
    assert log.read_text() == "first\nsecond\n"
    assert capfd.readouterr() == ("", "")


STOPPABLE = """
def save(signum, frame):
    print("told to stop, apart from the terminal:", os.getpgrp() == os.getpid(), flush=True)
    {then}

signal.signal(signal.SIGTERM, save)
os.kill(os.getppid(), signal.{signal})
while True:
    time.sleep(0.01)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_request_to_stop_is_passed_on_once_and_waited_for(tmp_path, name):
    then = "time.sleep(0.5); print('saved', flush=True); sys.exit(130)"
    assert run_python(STOPPABLE.format(then=then, signal=name), tmp_path / "log") == 130
    assert (tmp_path / "log").read_text() == "told to stop, apart from the terminal: True\nsaved\n"


def test_a_second_ctrl_c_leaves_no_process_behind(tmp_path):
    then = "print(os.getpid(), flush=True); os.kill(os.getppid(), signal.SIGINT)"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background may ignore it
    with pytest.raises(KeyboardInterrupt):
        run_python(STOPPABLE.format(then=then, signal="SIGINT"), tmp_path / "log")
    signal.signal(signal.SIGINT, before)
    pid = int((tmp_path / "log").read_text().split()[-1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_a_real_run_is_interrupted_and_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FMBENCH_CACHE", str(tmp_path / "cache"))
    arguments = ("--grid=batch_size=8", "--out=out")
    ended = threading.Event()

    def interrupt_soon() -> None:
        while not ended.wait(0.01):
            if any("epoch 1/20" in log.read_text() for log in Path("out/logs").glob("*.log")):
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=interrupt_soon)
    thread.start()
    try:
        code, out, err = run(*arguments, config="tests_little.py:20")
    finally:
        ended.set()
        thread.join()
    assert code == 130, err
    assert rows(out)[0][-1] == "seed 0 interrupted"
    (path,) = Path("out/runs").glob("*.json")
    done = store.read(path).num_epochs
    assert 1 <= done < 20

    code, out, err = run(*arguments, config="tests_little.py:20")
    assert code == 0, err
    record = store.read(path)
    assert (record.status, record.num_resumes, record.num_epochs) == ("completed", 1, 20)
    accuracy = f"{100 * (record.val_accuracy or 0):.2f}"
    line = f"[1/1] batch_size=8 seed=0: validation {accuracy} %, {record.train_seconds:.1f} s"
    assert out.startswith(f"{line}\n")
    assert rows(out)[0][1:3] == ["1", accuracy]
    (log,) = Path("out/logs").iterdir()
    before, _, after = log.read_text().partition("resumed from")
    assert f"epoch {done}/20" in before
    assert "epoch 20/20" in after

    monkeypatch.setattr(sweep, "run_process", None)  # nothing is left to be run
    code, out, err = run(*arguments, config="tests_little.py:20")
    assert code == 0, err
    assert out.startswith(f"{line} (trained before)\n")
