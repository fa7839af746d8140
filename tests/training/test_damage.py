"""Whole runs whose work directory has come to harm: they go on from what is proven, or name what isn't."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from damage import DAMAGE

from fmbench.errors import UserError
from fmbench.models import exported, split_model
from fmbench.records import store
from fmbench.training.run import train_and_evaluate


@pytest.fixture(scope="module")
def config(make_config):
    return make_config("configs/mlp.py", batch_size=120, num_epochs=3)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> Path:
    """A folder with the work directory of a run that was not disturbed, and its results; tests work on copies."""
    path = tmp_path_factory.mktemp("finished")
    run(config, path)
    return path


@pytest.fixture(scope="module")
def stopped(config, tmp_path_factory) -> Path:
    """Likewise of one that was stopped after two epochs."""
    path = tmp_path_factory.mktemp("stopped")
    assert run(config, path, stop_after=2).status == "interrupted"
    return path


@pytest.fixture
def copy(tmp_path):
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def run(config, path: Path, **arguments):
    return train_and_evaluate(config, path / "work", results_dir=path / "results", **arguments)


def params_of(path: Path):
    return split_model(exported.load_model(path / "work")[0])[1:]


def same_outcome(path: Path, finished: Path) -> None:
    jax.tree.map(np.testing.assert_array_equal, params_of(path), params_of(finished))
    ours, theirs = (store.read(folder / "work" / "record.json") for folder in (path, finished))
    assert ours.predictions_sha256 == theirs.predictions_sha256
    steps = [json.loads(line)["step"] for line in (path / "work" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 12]


def damage_to_the_latest(path: Path) -> None:
    DAMAGE["flip"](next((path / "work" / "checkpoints" / "8").rglob("d/*")))


def test_a_flipped_bit_costs_an_epoch_and_changes_none(config, stopped, finished, copy, capsys):
    path = copy(stopped)
    damage_to_the_latest(path)
    run(config, path)
    err = capsys.readouterr().err
    assert "its content is not what was written; an older checkpoint is taken, 4." in err
    assert "resumed from" in err
    same_outcome(path, finished)


@pytest.mark.slow
def test_a_foreign_run_s_checkpoint_is_not_taken(config, make_config, stopped, finished, copy, tmp_path, capsys):
    path = copy(stopped)
    run(make_config("configs/mlp.py", batch_size=120, num_epochs=3, seed=5), tmp_path / "other", stop_after=1)
    shutil.rmtree(path / "work" / "checkpoints" / "8")
    shutil.copytree(tmp_path / "other" / "work" / "checkpoints" / "4", path / "work" / "checkpoints" / "8")
    capsys.readouterr()
    run(config, path)
    assert (
        "checkpoints/8: progress.json: is of step 4; an older checkpoint is taken, 4." in capsys.readouterr().err
    )
    same_outcome(path, finished)


@pytest.mark.slow
def test_a_foreign_run_s_checkpoint_of_the_same_step_is_not_taken(config, make_config, stopped, copy, tmp_path):
    path = copy(stopped)
    run(make_config("configs/mlp.py", batch_size=120, num_epochs=3, seed=5), tmp_path / "other", stop_after=2)
    shutil.rmtree(path / "work" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "work" / "checkpoints", path / "work" / "checkpoints")
    with pytest.raises(
        UserError, match=r"no checkpoint is good: .*/8: is another run's \(seed: 5 -> 0\); .*/4: is "
    ):
        run(config, path)


@pytest.mark.slow
def test_if_no_checkpoint_is_good_force_starts_anew(config, stopped, finished, copy):
    path = copy(stopped)
    damage_to_the_latest(path)
    (path / "work" / "checkpoints" / "4" / "fmbench.json").unlink()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(
        UserError, match=r"^no checkpoint is good: .*/8: arrays/.*; .*/4: fmbench\.json: is missing"
    ):
        run(config, path)
    unchanged = {file: file.read_bytes() for file in before if "tensorboard" not in str(file)}
    assert unchanged.items() <= before.items()
    run(config, path, force=True)
    same_outcome(path, finished)


@pytest.mark.parametrize("mode", ["flip", *(pytest.param(mode, marks=pytest.mark.slow) for mode in DAMAGE)])
def test_a_finished_run_s_export_comes_anew_and_its_record_stays(config, finished, copy, capsys, mode):
    path = copy(finished)
    DAMAGE[mode](next((path / "work" / "model").rglob("d/*")))
    record = (path / "work" / "record.json").read_bytes()
    run(config, path)
    assert "work/model: arrays/state/" in (err := capsys.readouterr().err)
    assert "exported anew" in err
    assert (path / "work" / "record.json").read_bytes() == record
    same_outcome(path, finished)
    run(config, path)
    assert "already finished" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_good_checkpoint_the_export_cannot_come_anew(config, finished, copy):
    path = copy(finished)
    shutil.rmtree(path / "work" / "model")
    for step in ("8", "12"):
        DAMAGE["flip"](path / "work" / "checkpoints" / step / "progress.json")
    with pytest.raises(UserError, match=r"no checkpoint is good: .*--force starts anew\."):
        run(config, path)
    assert (path / "work" / "record.json").exists()


def test_the_metrics_of_a_finished_run_come_anew(config, finished, copy, capsys):
    path = copy(finished)
    DAMAGE["zero"](path / "work" / "metrics.jsonl")
    run(config, path)
    assert "work/metrics.jsonl: " in capsys.readouterr().err
    same_outcome(path, finished)
