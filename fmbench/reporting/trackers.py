"""Trackers of experiments: Weights & Biases, MLflow. One that fails is left out, and the run goes on.

Where they send what they are told, or write it, their own variables say: WANDB_MODE, MLFLOW_TRACKING_URI.
"""

import contextlib
import importlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fmbench.records.schema import RunRecord
from fmbench.reporting.names import tagged
from fmbench.system import command_line, files

NAMES = ("wandb", "mlflow")  # of the package and of the extra
PROJECT = "fmbench"
FILE = "trackers.json"  # in the work directory: by tracker, its name for the run
QUIETLY = {
    # Where no server answers, the default is to try for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
SUMMARY = ("status", "test_accuracy", "val_accuracy", "train_seconds", "train_core_seconds", "num_params")


def require(names: Sequence[str]) -> None:
    """Imports the packages.

    Raises:
        UserError: If one is not installed; names the extra.
    """
    for variable, value in QUIETLY.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # that a request is tried again
    for name in names:
        with command_line.needs_extra(name):
            # A folder of that name, which wandb makes where it runs, can be imported, too.
            if importlib.import_module(name).__file__ is None:
                raise ImportError(name=name)


class Tracker(Protocol):
    """A run in a tracker; `run_id` is what it is called there."""

    run_id: str

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def end(self, record: RunRecord, path: Path) -> None: ...


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, name: str, config: Mapping[str, Any], run_id: str | None) -> None:
        """Begins it, or goes on with `run_id`."""
        import wandb

        self.run_id = run_id or secrets.token_hex(4)
        # Neither its samples of the machine's load nor its view of the terminal: both cost time.
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        self._run = wandb.init(
            project=PROJECT, name=name, id=self.run_id, resume="allow", config=dict(config), settings=settings
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def end(self, record: RunRecord, path: Path) -> None:
        self._run.summary.update(_summary(record))
        if record.status == "completed":
            name = re.sub(r"[^A-Za-z0-9_.-]", "_", record.name)[:128]
            self._run.log_artifact(str(path), name=name, type="record")
        self._run.finish(exit_code=0 if record.status == "completed" else 1)


class MLflow:
    """A run of MLflow, in the experiment 'fmbench' unless MLFLOW_EXPERIMENT_NAME says otherwise."""

    def __init__(self, name: str, config: Mapping[str, Any], run_id: str | None) -> None:
        """Begins it, or goes on with `run_id`."""
        import mlflow
        from mlflow import entities

        self._metric = entities.Metric
        self._client = mlflow.MlflowClient()
        if run_id:
            self._client.update_run(run_id, status="RUNNING")
            self.run_id = run_id
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
        self.run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
        params = [entities.Param(key, str(value)[:6000]) for key, value in config.items()]
        for start in range(0, len(params), 100):  # as many as it takes at once
            self._client.log_batch(self.run_id, params=params[start : start + 100])

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        now = time.time_ns() // 10**6
        metrics = [self._metric(key, value, now, step) for key, value in scalars.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def end(self, record: RunRecord, path: Path) -> None:
        for key, value in _summary(record).items():
            self._client.set_tag(self.run_id, key, value)
        if record.status == "completed":
            self._client.log_artifact(self.run_id, str(path))
        ends = {"completed": "FINISHED", "interrupted": "KILLED", "diverged": "FAILED"}
        self._client.set_terminated(self.run_id, ends[record.status])


def _summary(record: RunRecord) -> dict[str, Any]:
    found = {name: getattr(record, name) for name in SUMMARY}
    return {name: value for name, value in found.items() if value is not None}


TRACKERS: dict[str, Callable[..., Tracker]] = {"wandb": Wandb, "mlflow": MLflow}


class Trackers:
    """All that are told of a run, in turn; none for nobody."""

    def __init__(self) -> None:
        """Nobody is told."""
        self._there: dict[str, Tracker] = {}
        self._say: Callable[[str], None] = print

    @classmethod
    def begin(
        cls,
        names: Sequence[str],
        workdir: Path,
        run_name: str,
        config: Mapping[str, Any],
        history: Sequence[Mapping[str, float]],
        say: Callable[[str], None],
    ) -> "Trackers":
        """Begins a run in each, or goes on with the one that the work directory names.

        Args:
            names: Of NAMES.
            workdir: The run's.
            run_name: What people may call it.
            config: The run's, flat.
            history: What a tracker that is new to the run has missed: epochs as metrics.jsonl has them.
            say: Prints a line to people.

        Raises:
            UserError: As `require`.
        """
        require(names)
        trackers = cls()
        trackers._say = say
        known: dict[str, str] = {}
        if names:
            with contextlib.suppress(OSError, ValueError):  # not there, or damaged
                known = files.read_json(workdir / FILE)
        for name in names:
            with trackers._held(name):
                trackers._there[name] = TRACKERS[name](run_name, config, known.get(name))
                for epoch in [] if name in known else history:
                    trackers._there[name].write(int(epoch["step"]), tagged(epoch))
                known[name] = trackers._there[name].run_id
        if known:
            with files.atomic_file(workdir / FILE) as file:
                file.write(json.dumps(known).encode())
        return trackers

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Tells each of measurements, by the names that `names.tag` gives."""
        for name, tracker in list(self._there.items()):
            with self._held(name):
                tracker.write(step, scalars)

    def end(self, record: RunRecord, path: Path) -> None:
        """Tells each of the run's end, with the file of its record."""
        for name, tracker in list(self._there.items()):
            with self._held(name):
                tracker.end(record, path)

    @contextlib.contextmanager
    def _held(self, name: str) -> Any:
        """Whatever a tracker raises is told in one line; from then on nobody asks it any more."""
        try:
            yield
        except Exception as error:
            self._there.pop(name, None)
            first_line, *_ = str(error).splitlines() or [""]
            said = f"{type(error).__name__}: {command_line.in_one_line(first_line)[:300]}"
            self._say(f"--tracker={name} fails, and the run goes on without it ({said})")
