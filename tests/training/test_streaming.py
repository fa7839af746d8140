"""Images that stay on disk: the same batches, losses and predictions as with all of them on the devices."""

import functools
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from fmbench.data import fashion_mnist, sources
from fmbench.errors import UserError
from fmbench.models import exported
from fmbench.records import store
from fmbench.training import checkpoint, input_pipeline, parallel, run, steps

needs_grain = functools.partial(
    pytest.importorskip, "grain", reason="grain is not installed: pip install '.[grain]'"
)
SMALL = {"batch_size": 64, "eval_batch_size": 48, "num_epochs": 2}
GRAIN = {"data__pipeline": "grain"}


def write_sample(directory: Path) -> str:
    """The sample as idx files that are not gzipped."""
    sample = fashion_mnist.load("sample")
    for field, part in fashion_mnist.PARTS.items():
        array = getattr(sample, field)
        (directory / sources.FILE_NAMES[part]).write_bytes(sources.idx_header(array) + array.tobytes())
    return str(directory)


# The batches.


@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_each_call_has_the_resident_images_in_their_order(make_config, tmp_path, monkeypatch, steps_per_call):
    needs_grain()
    monkeypatch.setattr(input_pipeline, "MOST_BATCHES", 2)
    fields = SMALL | {
        "data__split": "default",
        "data__remainder": "keep",
        "steps_per_call": steps_per_call,
        "seed": 7,
    }
    mesh = parallel.make_mesh()
    resident = input_pipeline.load(make_config("configs/mlp.py", **fields), mesh)
    files = {"data__source": "idx", "data__dir": write_sample(tmp_path), **GRAIN}
    streamed = input_pipeline.load(make_config("configs/mlp.py", **fields, **files), mesh)
    assert streamed.sha256 == resident.sha256
    lengths = [steps_per_call] * (6 // steps_per_call) + [0]  # 440 images: six batches, and 56 more
    orders = []
    for epoch in range(2):
        orders.append(resident.epoch_order(epoch))
        arguments = streamed.feed(epoch * 7)
        shown: dict[str, list[np.ndarray]] = {"image": [], "label": []}
        for length in lengths:
            rows, no_order, _ = arguments(length)
            assert no_order is None
            assert len({shard.data.shape for shard in rows["image"].addressable_shards}) == 1
            assert rows["image"].addressable_shards[0].data.size * len(jax.devices()) == rows["image"].size
            for name, array in rows.items():
                shown[name].append(np.reshape(array, (-1, *array.shape[1 + (length > 1) :])))
        for name, array in input_pipeline.gather(resident.train_rows, orders[-1]).items():
            np.testing.assert_array_equal(np.concatenate(shown[name]), array)
    assert not np.array_equal(orders[0], orders[1])
    for split, calls in streamed.eval_batches.items():
        for name in ("image", "label", "mask"):
            together = [
                np.concatenate([np.reshape(call[name], (-1, *call[name].shape[2:])) for call in whose])
                for whose in (calls, resident.eval_batches[split])
            ]
            np.testing.assert_array_equal(together[0], together[1])
    assert [len(call["label"]) for call in streamed.eval_batches["test"]] == (
        [1] * 5 if steps_per_call == 1 else [2, 2, 1]
    )


def test_a_call_on_accelerators_has_no_whole_epoch_of_images(make_config, monkeypatch):
    monkeypatch.setattr(parallel, "loops_on_devices", lambda steps_per_call: True)
    assert steps.choose_steps_per_call(make_config("configs/mlp.py", **GRAIN), 3840) == input_pipeline.MOST_BATCHES
    assert steps.choose_steps_per_call(make_config("configs/mlp.py"), 3840) == 3840


def test_a_process_reads_the_rows_of_its_devices_alone(monkeypatch):
    devices = np.array([SimpleNamespace(process_index=index) for index in (0, 1, 1, 0)])
    mesh: Any = SimpleNamespace(size=4, devices=devices)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    np.testing.assert_array_equal(parallel.own_part(np.arange(10, 18), mesh), [12, 13, 14, 15])
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    np.testing.assert_array_equal(parallel.own_part(np.arange(10, 18), mesh), [10, 11, 16, 17])


# Whole runs.


def outcome(directory: Path):
    record = store.read(directory / "record.json")
    losses = [(epoch.train_loss, epoch.train_accuracy, epoch.val_loss) for epoch in record.history]
    return (
        losses,
        record.test_loss,
        record.predictions_sha256,
        exported.check_export(directory / "model")["sha256"],
    )


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        # Calls of four steps, of one and, with what is left over, of none.
        (
            "configs/mlp.py",
            {"steps_per_call": 4, "data__remainder": "keep", "data__split": "default", "ema_decay": 0.9},
        ),
        pytest.param(
            "configs/cnn1.py",
            {"stages__stage1__num_epochs": 1, "stages__stage2__augment__cutmix": 1.0},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_gives_the_bits_of_the_resident_one(make_config, tmp_path, spec, fields):
    needs_grain()
    for name, pipeline in (("resident", {}), ("grain", GRAIN)):
        config = make_config(spec, **SMALL, **fields, **pipeline)
        run.train_and_evaluate(config, tmp_path / name, results_dir=tmp_path / "r")
    assert outcome(tmp_path / "grain") == outcome(tmp_path / "resident")


def test_a_run_goes_on_in_the_middle_of_an_epoch_to_the_same_bits(make_config, tmp_path, monkeypatch):
    needs_grain()
    config = make_config("configs/mlp.py", **SMALL, **GRAIN)  # seven steps an epoch
    train = functools.partial(run.train_and_evaluate, config, results_dir=tmp_path / "r")
    train(tmp_path / "whole")
    asked = run._is_asked_to_stop
    answers = iter([False] * 11 + [True] * 2)  # before each call, and after the epoch
    monkeypatch.setattr(run, "_is_asked_to_stop", lambda stop: next(answers))
    stopped = train(tmp_path / "halves")
    assert (stopped.status, stopped.num_steps) == ("interrupted", 10)
    progress = checkpoint.read_progress(tmp_path / "halves" / "checkpoints" / "10")
    assert progress["data_position"] == {"next_index": 10}
    monkeypatch.setattr(run, "_is_asked_to_stop", asked)
    assert train(tmp_path / "halves").num_resumes == 1
    assert outcome(tmp_path / "halves") == outcome(tmp_path / "whole")


def test_a_position_that_is_not_the_steps_is_refused(make_config):
    needs_grain()
    data = input_pipeline.load(make_config("configs/mlp.py", **SMALL, **GRAIN), parallel.make_mesh())
    data.check_position(9, {"next_index": 9})
    for position in ({"next_index": 8}, None):
        with pytest.raises(UserError, match=re.escape(f"step 9 has {position} as its position in the data")):
            data.check_position(9, position)


# Files.


def test_a_mapped_file_is_proven_like_one_that_is_read(tmp_path):
    directory = Path(write_sample(tmp_path))
    read, mapped = (fashion_mnist.load("idx", str(directory), mapped=mapped) for mapped in (False, True))
    assert isinstance(mapped.train_images, np.memmap) and not isinstance(read.train_images, np.memmap)
    np.testing.assert_array_equal(mapped.train_images, read.train_images)
    assert (mapped.version, mapped.sha256) == (read.version, read.sha256)


def test_a_set_beyond_what_is_read_is_mapped(tmp_path, monkeypatch):
    directory = write_sample(tmp_path)
    monkeypatch.setattr(sources, "MOST_BYTES", 1000)
    assert fashion_mnist.load("idx", directory, mapped=True).version == "sample"
    with pytest.raises(UserError, match=r"must not be gzipped, and needs --config\.data\.pipeline=grain"):
        fashion_mnist.load("idx", directory)


@pytest.mark.parametrize(("change", "said"), [(b"x", "more follow it"), (None, "376319 follow it")])
def test_a_mapped_file_of_another_size_is_named(tmp_path, change, said):
    path = Path(write_sample(tmp_path), "train-images-idx3-ubyte")
    content = path.read_bytes()
    path.write_bytes(content + change if change else content[:-1])
    with pytest.raises(UserError, match=rf"train-images\S* is (damaged|truncated): .*{said}"):
        fashion_mnist.load("idx", str(tmp_path), mapped=True)


# What does not go together.


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"selection__easy": 0.3}, "config.selection.easy"),
        ({"parallel": "pmap"}, "config.parallel=pmap"),
    ],
)
def test_what_needs_all_images_is_refused_by_name(make_config, fields, said):
    with pytest.raises(UserError, match=f"config.data.pipeline=grain does not do {said}; drop it, or give"):
        make_config("configs/mlp.py", **fields, **GRAIN)


def test_features_are_refused(make_config):
    with pytest.raises(UserError, match=r"does not do config\.features\.backbone"):
        make_config("configs/transfer.py:efficientnet_lite0", **GRAIN)


def test_several_seeds_and_a_lack_of_grain_are_said_before_anything_compiles(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "compile_programs", None)
    config = make_config("configs/mlp.py", **SMALL, **GRAIN)
    with pytest.raises(UserError, match="reads the batches of one seed"):
        run.train_seeds(config, (0, 1), tmp_path / "w", results_dir=tmp_path / "r")
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(
        UserError, match=re.escape("grain is missing; it comes with pip install 'fmbench[grain]'.")
    ):
        run.train_and_evaluate(config, tmp_path / "w", results_dir=tmp_path / "r")
