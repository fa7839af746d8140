"""Whole runs of what lies outside: somebody's net, optimizer, schedule and augmentation, on their own data."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from fmbench import entries, evaluate, figures
from fmbench.data import sources
from fmbench.errors import UserError
from fmbench.models import exported
from fmbench.pages import drawing, leaderboard
from fmbench.records import store
from fmbench.training.run import train_and_evaluate

CLASS_NAMES = [f"kind {k}" for k in range(10)]
CONFIG = """
from fmbench.config import base_config, stage


def get_config():
    config = base_config()
    config.num_epochs = 2
    config.batch_size = 40
    config.model.name, config.model.width = "outside:Little", 16
    config.optimizer.name, config.optimizer.beta = "outside:momentum", 0.25
    config.optimizer.learning_rate = 0.1
    config.schedule.name, config.schedule.warmup_epochs = "outside:triangle", 0.5
    config.stages.stage1, config.stages.stage2 = stage(1), stage(1)
    config.stages.stage2.augment.function = "outside:noise"
    config.data.source, config.data.unproven = "idx", True
    return config
"""


def write_data(directory: Path, seed: int) -> None:
    """Classes that are bright bars at different heights, on noise: 600 train and 100 test images."""
    directory.mkdir()
    rng = np.random.default_rng(seed)
    for prefix, number in (("train", 600), ("t10k", 100)):
        labels = (np.arange(number) % 10).astype(np.uint8)
        images = rng.integers(0, 60, (number, 28, 28), np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 4 : 2 * label + 6] += 150
        for part, array in ((f"{prefix}-images", images), (f"{prefix}-labels", labels)):
            (directory / sources.FILE_NAMES[part]).write_bytes(sources.idx_header(array) + array.tobytes())
    (directory / "class_names.txt").write_text("\n".join(CLASS_NAMES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the config and all data and runs are."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "tests_mine.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def train(folder):
    """Trains the config above on the data in a folder of this name."""

    def train(data: str, *, work: str = "work", **overrides):
        config = entries.load(str(folder / "tests_mine.py"))
        config.data.dir = str(folder / data)
        config.update_from_flattened_dict(overrides)
        config = entries.finalize(config, str(folder / "tests_mine.py"))
        return train_and_evaluate(config, folder / work, results_dir=folder / "results")

    return train


@pytest.mark.slow
def test_they_train_are_recorded_and_come_back_wherever_the_data_lie(train, folder, capsys, monkeypatch):
    write_data(folder / "theirs", 0)
    record = train("theirs")
    assert record.status == "completed"
    assert record.test_accuracy > 0.5  # of bars that anybody can tell apart
    assert (record.model, record.entry) == ("outside:Little", "tests_mine")
    assert record.name.endswith(f"-{record.data_version}") and "unproven-" in record.name
    assert [stage.augment["function"] for stage in record.stages] == ["", "outside:noise"]
    assert [epoch.learning_rate for epoch in record.history] == pytest.approx([0.1, 0.1])

    # Pages and commands: accuracies from the published labels, names from the folder.
    records = store.read_all(folder / "results")
    leaderboard.verify_accuracies(records)
    pages = leaderboard.render(folder / "results", records)
    assert "tests_mine" in pages[folder / "results" / "other_data.md"]
    assert "tests_mine" not in pages[folder / "results" / "leaderboard.md"]
    model, description = exported.load_model(folder / "work")
    assert list(description["class_names"]) == CLASS_NAMES
    _, dataset = store.read_run(folder / "work")
    found = evaluate.evaluate(model, description, dataset, 1000)
    assert evaluate.compare(found, record, folder / "work" / "record.npy").different_predictions == 0
    matrices = []
    monkeypatch.setattr(drawing, "confusion_matrix", lambda *arguments: matrices.append(arguments[3]))
    (right,) = [figure for name, figure in figures.of_run(folder / "work", "0") if name == "right"]
    assert matrices == [tuple(CLASS_NAMES)]
    assert "kind " in right.axes[0].get_title()

    # The folder moves: the run is finished there, too, and goes on there from its checkpoint.
    (folder / "theirs").rename(folder / "moved")
    capsys.readouterr()
    assert train("moved") == record
    assert "already finished" in capsys.readouterr().out
    (folder / "work" / "record.json").unlink()
    resumed = train("moved")
    assert (resumed.num_resumes, resumed.data_sha256) == (1, record.data_sha256)
    assert resumed.predictions_sha256 == record.predictions_sha256

    # Other data there are other data.
    write_data(folder / "others", 1)
    with pytest.raises(UserError, match="holds a run on other data than these"):
        train("others")
    shutil.rmtree(folder / "moved")
    (folder / "others").rename(folder / "moved")
    (folder / "work" / "record.json").unlink()
    with pytest.raises(UserError, match="holds a run on other data than these"):
        train("moved")
    other = train("moved", work="other", num_epochs=1)
    assert other.data_version != record.data_version


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"model.name": "outside:ReturnsTwo", "model.width": 4}, "returns a tuple"),
        ({"model.name": "outside:TakesNoAxisName", "model.width": 4}, "does not take axis_name, width"),
        ({"optimizer.name": "outside:fails"}, "does not take beta"),
        ({"schedule.name": "outside:returns_two_rates"}, "it must return an optax.Schedule"),
        ({"stages.stage2.augment.function": "outside:upper_half"}, "it must return the image"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_trained(train, folder, override, said):
    data = folder / "wrong"
    if not data.exists():
        write_data(data, 2)
    with pytest.raises(UserError, match=said):
        train("wrong", work="wrong_work", **override)
    assert not list((folder / "wrong_work").glob("checkpoints"))
