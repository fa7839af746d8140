"""What a run leaves for TensorBoard: tags, hyperparameters, pictures; after a resume, and of several seeds."""

import io
import json
import struct
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from fmbench.reporting import tensorboard
from fmbench.reporting.names import tag
from fmbench.training import input_pipeline, parallel, steps
from fmbench.training.run import train_and_evaluate, train_seeds


def events(folder: Path) -> list[Event]:
    """All events of a run, in the order of their files."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = file.read_bytes()
        while content:  # a record: length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def values(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def picture(folder: Path, name: str) -> np.ndarray:
    (image,) = [v.image for event in events(folder) for v in event.summary.value if v.tag == name]
    return np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))


def test_one_rule_groups_all_names():
    names = {"train_loss": "loss/train", "val_accuracy": "accuracy/val", "test_loss": "loss/test"}
    names |= {"train_images_per_sec": "images_per_sec/train", "learning_rate": "run/learning_rate"}
    assert {name: tag(name) for name in (*names, "epoch")} == names | {"epoch": "run/epoch"}


def test_attempts_within_one_second_leave_a_file_each(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorboardX.event_file_writer.time.time", lambda: 1_800_000_000.0)
    for epoch in (1, 2):
        written = tensorboard.Events(tmp_path / "tensorboard", epoch)
        written.add_scalars(epoch, {"run/epoch": epoch})
        written.close()
    assert values(tmp_path)["run/epoch"] == [(1, 1), (2, 2)]


def test_a_resumed_run_has_all_epochs_once_its_settings_and_its_pictures(make_config, tmp_path):
    config = make_config("configs/mlp.py", batch_size=80, num_epochs=3, seed=1)
    work, results = tmp_path / "work", tmp_path / "results"
    assert train_and_evaluate(config, work, results_dir=results, stop_after=1).status == "interrupted"
    record = train_and_evaluate(config, work, results_dir=results)
    found = values(work)
    assert [value for _, value in found["run/epoch"]] == [1, 2, 3]
    assert found["loss/train"] == [(e.step, pytest.approx(e.train_loss, rel=1e-6)) for e in record.history]
    assert found["accuracy/test"] == [(record.num_steps, pytest.approx(record.test_accuracy, rel=1e-6))]
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert "train_loss" in lines[0] and "loss/train" not in lines[0]

    infos = [
        HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in events(work)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    ]
    starts = [info.session_start_info.hparams for info in infos if info.HasField("session_start_info")]
    assert {(s["optimizer.learning_rate"].number_value, s["model.name"].string_value) for s in starts} == {
        (config.optimizer.learning_rate, config.model.name)
    }
    assert [info.HasField("session_end_info") for info in infos] == [False, False, True]
    assert picture(work, "first_batch").shape[:2] == (720, 720)
    assert picture(work, "confusion_matrix").shape[:2] == (710, 730)


def test_each_seed_has_its_own_first_batch(make_config, tmp_path):
    config = make_config("configs/mlp.py", batch_size=80, num_epochs=1)
    train_seeds(config, (0, 1), tmp_path / "both", results_dir=tmp_path)
    train_and_evaluate(
        make_config("configs/mlp.py", batch_size=80, num_epochs=1, seed=1), tmp_path / "one", results_dir=tmp_path
    )
    first, second = (picture(tmp_path / "both" / f"seed{seed}", "first_batch") for seed in (0, 1))
    assert (second == picture(tmp_path / "one", "first_batch")).all()
    assert (first != second).any()


def test_the_first_batch_is_what_the_first_step_takes(make_config, tmp_path):
    """The mean loss of these images under the initial weights is that of the first step."""
    config = make_config(
        "configs/fc.py:a", batch_size=384, num_epochs=1, augment__flip=True, augment__crop_padding=3
    )
    with config.unlocked():
        config.model.num_dropouts = 0
    record = train_and_evaluate(config, tmp_path / "work", results_dir=tmp_path)
    mesh = parallel.make_mesh(jax.devices()[:1])
    data = input_pipeline.load(config, mesh)
    seen = steps.first_images(data, config.augment.to_dict(), 0, most=384)
    rows = np.asarray(data.epoch_order(0))
    assert (seen != np.asarray(data.train_rows["image"])[rows].reshape(-1, 28, 28)).any()
    graphdef, state = steps.init_state(config, optax.identity(), mesh, data.seed)
    logits = nnx.merge(graphdef, state.params, state.model_state)(
        input_pipeline.normalize(seen, config.data.normalization), train=False
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, np.asarray(data.train_rows["label"])[rows])
    np.testing.assert_allclose(losses.mean(), record.history[0].train_loss, rtol=1e-5)
    few = steps.first_images(data, config.augment.to_dict(), 0, most=8)
    assert (few == seen[:8]).all()


def test_the_grid_is_read_row_by_row():
    images = np.stack([np.full((28, 28), value, np.uint8) for value in range(1, 11)])
    found = tensorboard.grid(images)
    assert found.shape == (2 * 90, 8 * 90)
    centres = found[45::90, 45::90]
    assert centres.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 0, 0, 0, 0, 0, 0]]


def test_the_confusion_matrix_is_dark_where_classes_are_predicted():
    found = tensorboard.confusion_matrix(np.array([0, 0, 1]), np.array([1, 1, 1]), ("left", "right"))
    corner = tensorboard.MARGIN + 3
    cells = found[corner :: tensorboard.CELL, corner :: tensorboard.CELL][:2, :2]
    assert cells.tolist() == [[255, 0], [255, 0]]  # true rows, predicted columns
