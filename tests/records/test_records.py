"""What a record may say, how it is written and read, and what is noticed."""

import dataclasses
import inspect
import json
import os
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_records import LABELS, fake_dataset, make_record, make_unfinished, predictions_with, publish
from pydantic import ValidationError

from fmbench.data import fashion_mnist, proof
from fmbench.errors import UserError
from fmbench.records import machine, schema, store
from fmbench.records.schema import RunRecord
from fmbench.system import files


@pytest.fixture
def stem(tmp_path) -> Path:
    """A completed run's record and predictions, less their endings."""
    stem = tmp_path / "run.with.dots" / "record-0.5"
    store.write(make_record(), predictions_with(wrong=20), stem)
    return stem


def edit(path: Path, **changes) -> None:
    """Changes fields of a record behind our backs; '...' removes one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def json_of(stem: Path) -> Path:
    return stem.with_name(stem.name + ".json")


def npy_of(stem: Path) -> Path:
    return stem.with_name(stem.name + ".npy")


# Writing and reading.


def test_a_record_and_its_predictions_come_back_as_they_were(stem):
    record = store.read(json_of(stem))
    assert record == make_record()
    np.testing.assert_array_equal(store.read_predictions(record, npy_of(stem)), predictions_with(wrong=20))


def test_an_invalid_record_is_not_written(tmp_path):
    record = make_record().model_copy(update={"test_accuracy": 1.5})
    with pytest.raises(ValueError, match="test_accuracy"):
        store.write(record, predictions_with(wrong=20), tmp_path / "record")
    assert list(tmp_path.iterdir()) == []


def test_files_are_everyones_to_read(stem):
    for path in (json_of(stem), npy_of(stem)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"runs: cannot write the record"):
        store.write(make_record(), None, tmp_path / "runs" / "mlp")


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_while_writing_leaves_the_old_file_and_no_other(tmp_path, failure):
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(failure), files.atomic_file(path) as file:
        file.write(b"half of the ne")
        file.flush()
        assert path.read_text() == "old"
        raise failure
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    assert path.read_text() == "old"


def test_a_new_file_appears_whole(tmp_path):
    path = tmp_path / "record.json"
    with files.atomic_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 1


# What is refused.


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tset_accuracy": 0.9}, "tset_accuracy"),  # unknown
        ({"test_accuracy": "0.9"}, "test_accuracy"),  # wrong type
        ({"test_accuracy": 1.01}, "test_accuracy"),
        ({"val_accuracy": -0.01}, "val_accuracy"),
        ({"train_seconds": -1.0}, "train_seconds"),
        ({"num_params": 1.5}, "num_params"),
        ({"num_params": True}, "num_params"),
        ({"seed": "0"}, "seed"),
        ({"test_loss": float("nan")}, "test_loss"),
        ({"flops_per_image": float("inf")}, "flops_per_image"),
        ({"status": "finished"}, "status"),
        ({"watched": "train"}, "watched"),
        ({"schema_version": 3}, "schema_version"),
        ({"time_to_target": {"90": 1.0, "92": 2.0}}, "time_to_target"),
        ({"time_to_target": {"90": 1.0, "92": 2.0, "94": 3.0, "99": 4.0}}, "time_to_target"),
        ({"history": [{"epoch": 1}]}, "history.0.step"),
        ({"environment": {}}, "environment.device_platform"),
        ({"test_accuracy": None}, "test_accuracy is missing from a completed run"),
        ({"predictions_sha256": None}, "predictions_sha256 is missing from a completed run"),
        # What the record says twice it must say the same.
        ({"entry": "vgg_like"}, "entry is vgg_like, but config.entry mlp"),
        ({"config_file": "configs/vgg_like.py"}, "config_file is"),
        ({"seed": 1}, "seed is 1, but config.seed 0"),
        ({"dtype": "bfloat16"}, "dtype is"),
        ({"parallel": "pmap"}, "parallel is"),
        ({"batch_size": 1}, "batch_size is"),
        ({"num_epochs": 2}, "num_epochs is 2"),
        ({"config": {}}, "config.entry None"),
    ],
)
def test_a_wrong_field_is_named(stem, change, field):
    edit(json_of(stem), **change)
    with pytest.raises(UserError) as error:
        store.read(json_of(stem))
    assert f"{json_of(stem)}: " in str(error.value)
    assert field in str(error.value)


def test_a_missing_field_is_named(stem):
    whole = json_of(stem).read_text()
    for name, field in schema.RunRecord.model_fields.items():
        if field.is_required():
            edit(json_of(stem), **{name: ...})
            with pytest.raises(UserError, match=f"field '{name}'"):
                store.read(json_of(stem))
            json_of(stem).write_text(whole)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"status": "comp'])
def test_a_damaged_file_is_named(stem, content):
    json_of(stem).write_bytes(content)
    with pytest.raises(UserError, match="not a valid record, field 'file'"):
        store.read(json_of(stem))


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: cannot read the record"):
        store.read(tmp_path / "absent.json")


# Predictions.


def test_one_flipped_prediction_is_noticed(stem):
    predictions = predictions_with(wrong=20)
    predictions[150] ^= 1
    np.save(npy_of(stem), predictions)
    with pytest.raises(UserError, match=r"record-0\.5\.npy: not the predictions of record-0\.5\.json"):
        store.read_predictions(make_record(), npy_of(stem))


@pytest.mark.parametrize(
    "disguise",
    [
        lambda predictions: predictions.astype(np.float64) + 0.5,  # the same after rounding down to bytes
        lambda predictions: predictions.astype(np.int64) + 256,  # the same in the lowest byte
        lambda predictions: predictions.reshape(10, 20),
        lambda predictions: predictions[None],
        lambda predictions: predictions[:-1],
    ],
)
def test_other_arrays_of_the_same_bytes_are_no_predictions(stem, disguise):
    np.save(npy_of(stem), disguise(predictions_with(wrong=20)))
    with pytest.raises(UserError, match=r"record-0\.5\.npy"):
        store.read_predictions(make_record(), npy_of(stem))


@pytest.mark.parametrize(
    "content", [None, b"", b"not numpy", b"PK\x03\x04 not a zip", b"\x93NUMPY\x01\x00v\x00{'de"]
)
def test_damaged_predictions_are_named(stem, content):
    if content is None:
        npy_of(stem).unlink()
    else:
        npy_of(stem).write_bytes(content)
    with pytest.raises(UserError, match=r"record-0\.5\.npy: cannot read the predictions"):
        store.read_predictions(make_record(), npy_of(stem))


def test_predictions_in_a_damaged_header_are_named(stem):
    whole = npy_of(stem).read_bytes()
    for position in range(len(whole) - len(LABELS)):
        npy_of(stem).write_bytes(whole[:position] + b"'" + whole[position + 1 :])
        try:
            predictions = store.read_predictions(make_record(), npy_of(stem))
        except UserError:
            continue
        np.testing.assert_array_equal(predictions, predictions_with(wrong=20))


# Publishing.


def test_publish_copies_record_and_predictions_under_the_records_name(stem, tmp_path):
    store.publish(stem, tmp_path / "results")
    target = tmp_path / "results" / "runs" / "mlp-cpu-abacus-9-2c-float32-seed0"
    assert json_of(target).read_bytes() == json_of(stem).read_bytes()
    assert npy_of(target).read_bytes() == npy_of(stem).read_bytes()


def test_publish_checks_the_predictions(stem, tmp_path):
    np.save(npy_of(stem), predictions_with(wrong=21))
    with pytest.raises(UserError, match="not the predictions"):
        store.publish(stem, tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("status", ["interrupted", "diverged"])
def test_an_unfinished_record_replaces_no_completed_one(stem, tmp_path, status):
    store.publish(stem, tmp_path / "results")
    store.write(make_unfinished(status), None, tmp_path / "again")
    assert store.publish(tmp_path / "again", tmp_path / "results").status == status
    (kept,) = store.read_all(tmp_path / "results").values()
    assert kept == make_record()


def test_otherwise_the_newer_record_replaces_the_older(stem, tmp_path):
    store.write(make_unfinished("interrupted"), None, tmp_path / "half")
    store.write(make_unfinished("diverged"), None, tmp_path / "bad")
    for stem_of_run, status in [
        (tmp_path / "half", "interrupted"),
        (tmp_path / "bad", "diverged"),
        (stem, "completed"),
    ]:
        store.publish(stem_of_run, tmp_path / "results")
        (record,) = store.read_all(tmp_path / "results").values()
        assert record.status == status


# The true labels of the old data.


@pytest.fixture
def old(tmp_path, monkeypatch) -> RunRecord:
    """A record on old data, which lie where its config says; written to <tmp_path>/old."""
    sha256 = {"t10k-labels": proof.sha256(LABELS)}
    dataset = dataclasses.replace(fake_dataset("old"), sha256=sha256)
    monkeypatch.setattr(
        fashion_mnist, "load", lambda *arguments: {("csv", "kaggle", False, False): dataset}[arguments]
    )
    data = make_record().config["data"] | {"source": "csv", "dir": "kaggle"}
    record = make_record(data_version="old", data_sha256=sha256, config={"data": data})
    store.write(record, predictions_with(wrong=20), tmp_path / "old")
    return record


def test_the_labels_of_old_data_are_published_with_the_first_record(old, tmp_path, monkeypatch):
    store.publish(tmp_path / "old", tmp_path / "results")
    np.testing.assert_array_equal(store.read_labels(old, tmp_path / "results"), LABELS)
    monkeypatch.setattr(fashion_mnist, "load", None)
    store.publish(tmp_path / "old", tmp_path / "results")


def test_the_labels_of_other_data_are_not_published(stem, tmp_path):
    store.publish(stem, tmp_path / "results")
    assert not (tmp_path / "results" / "labels").exists()


def test_data_that_changed_since_give_no_labels(old, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "load", lambda source, place, unproven, mapped: fake_dataset("old"))
    with pytest.raises(
        UserError, match="kaggle no longer holds the data of mlp-cpu-abacus-9-2c-float32-seed0-old"
    ):
        store.publish(tmp_path / "old", tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (None, "cannot read the true labels"),
        (predictions_with(wrong=1), "not the labels its name says"),
        (LABELS.astype(np.int64), "not the labels its name says"),
        (LABELS[:-1], "not the labels its name says"),
    ],
)
def test_missing_or_altered_labels_are_named(old, tmp_path, labels, said):
    store.publish(tmp_path / "old", tmp_path / "results")
    (path,) = (tmp_path / "results" / "labels").iterdir()
    path.unlink()
    if labels is not None:
        np.save(path, labels)
    with pytest.raises(UserError, match=f"{path}: {said}"):
        store.read_labels(old, tmp_path / "results")


def test_labels_for_another_number_of_predictions_are_refused(old, tmp_path):
    store.publish(tmp_path / "old", tmp_path / "results")
    with pytest.raises(UserError, match="not the labels its name says"):
        store.read_labels(old.model_copy(update={"num_test": 100}), tmp_path / "results")


def test_a_place_where_labels_cannot_be_written_is_named(old, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "labels").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"labels/\w+\.npy: cannot write the true labels"):
        store.publish(tmp_path / "old", tmp_path / "results")


# Names.


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "resnet-20-cpu-abacus-9-2c-float32-seed3"),
        ({"num_devices": 8}, "resnet-20-cpu-abacus-9-2c-x8-float32-seed3"),
        (
            {"device_platform": "gpu", "device_kind": "NVIDIA A100-SXM4-40GB"},
            "resnet-20-nvidia-a100-sxm4-40gb-float32-seed3",
        ),
        (
            {"device_platform": "tpu", "device_kind": "TPU v5 lite", "num_devices": 4},
            "resnet-20-tpu-v5-lite-x4-float32-seed3",
        ),
    ],
)
def test_name(changes, name):
    assert make_record("resnet-20", 3, environment=changes).name == name


def test_a_run_on_the_old_data_has_another_name():
    assert make_record(data_version="old").name == "mlp-cpu-abacus-9-2c-float32-seed0-old"
    other = make_record(data_version="unproven-0a1b2c3d")
    assert other.name == "mlp-cpu-abacus-9-2c-float32-seed0-unproven-0a1b2c3d"


def test_a_renamed_record_is_refused(tmp_path):
    path = publish(make_record(), tmp_path)
    path.rename(path.with_name("vgg_like-cpu-abacus-9-2c-float32-seed0.json"))
    with pytest.raises(
        UserError,
        match=r"vgg_like-cpu-abacus-9-2c-float32-seed0\.json: its content says mlp-cpu-abacus-9-2c-float32-seed0",
    ):
        store.read_all(tmp_path)


def test_read_all_goes_by_name(tmp_path):
    for seed in (2, 0, 1):
        publish(make_record(seed=seed), tmp_path)
    assert [record.seed for record in store.read_all(tmp_path).values()] == [0, 1, 2]


def test_where_nothing_ran_there_are_no_records(tmp_path):
    assert store.read_all(tmp_path) == {}


# The environment.


def test_environment_describes_this_process():
    environment = machine.environment()
    assert environment.device_platform == jax.default_backend()
    assert environment.num_devices == jax.device_count()
    assert environment.versions["jax"] == jax.__version__
    assert environment.cpu_cores <= (os.cpu_count() or 1)
    assert schema.Environment.model_validate(environment.model_dump()) == environment


def test_peak_memory_is_in_bytes():
    assert 5e7 < machine.peak_memory_bytes() < 1e12


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A git repository of one commit, taken for fmbench's."""
    checkout = tmp_path / "checkout"
    (checkout / "results").mkdir(parents=True)
    for name in ("README.md", "train.py", "results/leaderboard.md"):
        (checkout / name).write_text("as committed")
    for command in (
        "init -q",
        "add .",
        "-c user.name=x -c user.email=x@example.org -c commit.gpgsign=false commit -q -m x",
    ):
        subprocess.run(["git", "-C", checkout, *command.split()], check=True)
    monkeypatch.setattr(machine, "REPOSITORY", checkout)
    return checkout


def test_a_clean_checkout_is_its_commit(checkout):
    head = subprocess.check_output(["git", "-C", checkout, "rev-parse", "HEAD"], text=True).strip()
    assert (machine.environment().git_commit, machine.environment().git_dirty) == (head, False)


@pytest.mark.parametrize(
    ("path", "dirty"),
    [("train.py", True), ("new.py", True), ("results/leaderboard.md", False), ("README.md", False)],
)
def test_what_makes_a_checkout_dirty(checkout, path, dirty):
    (checkout / path).write_text("changed")
    assert machine.environment().git_dirty is dirty


def test_somebody_elses_repository_around_us_is_not_ours(checkout, monkeypatch):
    monkeypatch.setattr(machine, "REPOSITORY", checkout / "results")
    assert machine._git() == (None, None, "fmbench is not in a checkout of its own")


def test_a_hooks_environment_points_to_no_other_repository(checkout, tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path / "other"], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert machine._git().commit is not None


def _no_repository(checkout):
    shutil.rmtree(checkout / ".git")


def _no_commit(checkout):
    shutil.rmtree(checkout / ".git")
    subprocess.run(["git", "init", "-q", checkout], check=True)


def _damaged_index(checkout):
    (checkout / ".git" / "index").write_bytes(b"no index")


@pytest.mark.parametrize(
    ("damage", "reason", "has_commit"),
    [(_no_repository, "git: not a git repository", 0), (_no_commit, "git: ", 0), (_damaged_index, "git: ", 1)],
)
def test_what_git_cannot_say_is_not_known_with_its_reason(checkout, damage, reason, has_commit):
    damage(checkout)
    commit, dirty, unknown = machine._git()
    assert (commit is not None, dirty) == (has_commit, None)
    assert unknown and unknown.startswith(reason) and len(unknown.splitlines()) == 1


def test_without_git_nothing_is_known_of_the_commit_and_the_code_has_its_hash(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine._git() == (None, None, "git cannot be run (No such file or directory)")
    assert len(machine.code_sha256()) == 64


@pytest.mark.parametrize(("file", "counts"), [("here.py", True), ("layers/there.cpp", True), ("page.html", False)])
def test_the_hash_of_the_code_is_that_of_all_that_computes(tmp_path, monkeypatch, file, counts):
    (tmp_path / "layers").mkdir()
    monkeypatch.setattr(machine, "PACKAGE", tmp_path)
    hash_now = inspect.unwrap(machine.code_sha256)
    before = hash_now()
    (tmp_path / file).write_text("")
    assert (hash_now() != before) == counts


def test_git_that_does_not_answer_is_not_waited_for(checkout, tmp_path, monkeypatch):
    (tmp_path / "git").write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "GIT_TIMEOUT", 0.2)
    assert machine._git() == (None, None, "git gave no answer in 0.2 s")


def test_of_two_machines_that_finish_one_record_its_files_are_of_one(tmp_path, monkeypatch):
    """Each writes predictions, then the record: in turns, the predictions of one would lie beside the other's."""
    results = tmp_path / "results"
    for wrong in (20, 30):
        store.write(make_record(wrong=wrong), predictions_with(wrong), tmp_path / str(wrong) / "record")
    has_written, other_is_done = threading.Event(), threading.Event()
    save = np.save

    def save_slowly(file, predictions, **settings):
        save(file, predictions, **settings)
        if threading.current_thread() is slow:
            has_written.set()
            other_is_done.wait(1.0)  # in vain, if the other waits in its turn

    monkeypatch.setattr(np, "save", save_slowly)
    slow = threading.Thread(target=store.publish, args=(tmp_path / "20" / "record", results))
    slow.start()
    assert has_written.wait(10)
    store.publish(tmp_path / "30" / "record", results)
    other_is_done.set()
    slow.join()
    ((path, record),) = store.read_all(results).items()
    assert np.array_equal(store.read_predictions(record, path.with_suffix(".npy")), predictions_with(30))


def test_a_run_that_shared_its_machine_has_another_name_and_only_of_two_or_more(monkeypatch):
    alone, shared = make_record(), make_record(environment={"shared_by": 2})
    assert (alone.name, shared.name) == (
        "mlp-cpu-abacus-9-2c-float32-seed0",
        "mlp-cpu-abacus-9-2c-shared2-float32-seed0",
    )
    assert schema.workdir_name("mlp", shared.environment, "float32", 0) == "mlp-cpu-shared2-float32-seed0"
    assert shared.environment.conditions["shared_by"] == "2" and "shared_by" not in alone.environment.conditions
    with pytest.raises(ValidationError):
        make_record(environment={"shared_by": 1})
    monkeypatch.setenv("FMBENCH_SHARED_BY", "3")
    assert machine.environment().shared_by == 3
    monkeypatch.setenv("FMBENCH_SHARED_BY", "one")
    with pytest.raises(UserError, match="FMBENCH_SHARED_BY is 'one'"):
        machine.environment()
