"""Trackers: what they are told, on resuming too, and that none of them can lose a run."""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fmbench import config as config_lib
from fmbench.errors import UserError
from fmbench.reporting import trackers
from fmbench.training.run import train_seeds


class FakeWandb(types.ModuleType):
    """Stands in for wandb: keeps what it is told by the run's id."""

    __file__ = "wandb.py"

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, dict[str, Any]] = {}
        self.broken = ""  # what raises
        self.settings: list[dict] = []

    def Settings(self, **settings: Any) -> dict:  # noqa: N802
        return settings

    def init(self, **given: Any) -> "FakeWandb":
        self._fail_at("init")
        self.run = self.runs.setdefault(given["id"], {"given": given, "log": [], "files": [], "codes": []})
        self.summary: dict[str, Any] = self.run.setdefault("summary", {})
        return self

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._fail_at("log")
        self.run["log"].append((step, scalars))

    def log_artifact(self, path: str, name: str, type: str) -> None:
        self.run["files"].append((name, type, json.loads(Path(path).read_text())["status"]))

    def finish(self, exit_code: int) -> None:
        self.run["codes"].append(exit_code)

    def _fail_at(self, what: str) -> None:
        if self.broken == what:
            raise RuntimeError("no network\nand more lines")


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def train(make_config, tmp_path):
    """Trains two epochs, a step each, told to `wandb`."""

    def train(**settings: Any):
        config = make_config("configs/mlp.py", batch_size=240, num_epochs=2)
        names = settings.pop("trackers", ("wandb",))
        (record,) = train_seeds(
            config, (0,), tmp_path / "w", results_dir=tmp_path / "r", trackers=names, **settings
        )
        return record

    return train


def test_a_tracker_has_config_epochs_and_record_of_a_run_that_was_resumed(wandb, train):
    train(stop_after=1)
    record = train()
    ((name, run),) = wandb.runs.items()
    assert run["given"]["config"]["optimizer.learning_rate"] == record.config["optimizer"]["learning_rate"]
    assert run["given"]["id"] == name
    epochs = [(step, scalars["run/epoch"]) for step, scalars in run["log"] if "run/epoch" in scalars]
    assert epochs == [(epoch.step, epoch.epoch) for epoch in record.history]
    assert run["log"][0][1]["loss/train"] == record.history[0].train_loss
    assert run["summary"]["test_accuracy"] == record.test_accuracy
    ((artifact, kind, status),) = run["files"]
    assert (kind, status) == ("record", "completed")
    assert artifact.startswith("mlp_")  # of a name that has '+' and '='
    assert run["codes"] == [1, 0]


def test_a_tracker_that_comes_later_is_told_what_it_missed(wandb, train):
    train(stop_after=1, trackers=())
    record = train()
    ((_, run),) = wandb.runs.items()
    assert [step for step, scalars in run["log"] if "run/epoch" in scalars] == [e.step for e in record.history]


@pytest.mark.parametrize("what", ["init", "log"])
def test_a_tracker_that_fails_is_left_out_in_one_line(wandb, train, capsys, what):
    wandb.broken = what
    assert train().status == "completed"
    said = [line for line in capsys.readouterr().err.splitlines() if "tracker" in line]
    assert said == ["--tracker=wandb fails, and the run goes on without it (RuntimeError: no network)"]


@pytest.mark.parametrize("name", trackers.NAMES)
def test_a_missing_package_is_one_line_that_names_the_extra(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"{name} is missing; it comes with pip install 'fmbench\\[{name}\\]'"):
        trackers.require([name])
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / name).mkdir()  # such as wandb makes
    with pytest.raises(UserError, match=f"'fmbench\\[{name}\\]'"):
        trackers.require([name])
    sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore:.*noload:DeprecationWarning")  # SQLAlchemy's, of what MLflow does
@pytest.mark.slow
def test_mlflow_itself_keeps_a_resumed_run(train, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs pip install 'fmbench[mlflow]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    train(stop_after=1, trackers=("mlflow",))
    record = train(trackers=("mlflow",))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("fmbench")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.metrics["accuracy/test"]) == ("FINISHED", record.test_accuracy)
    assert run.data.params["model.name"] == config_lib.flatten(record.config)["model.name"]
    losses = client.get_metric_history(run.info.run_id, "loss/train")
    assert [(m.step, m.value) for m in losses] == [(e.step, e.train_loss) for e in record.history]
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["record.json"]


@pytest.mark.slow
def test_wandb_itself_writes_offline(train, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs pip install 'fmbench[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert train().status == "completed"
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"loss/train" in content and b"optimizer.learning_rate" in content and b"test_accuracy" in content
