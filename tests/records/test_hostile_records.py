"""Records that somebody made to fool or to break the readers: one line, that names the file and the field."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_records import EPOCH, fake_dataset, make_record, predictions_with, publish

from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.pages import cross_validation, leaderboard, reproduction, speedrun
from fmbench.records import plausibility, store
from fmbench.records.schema import Process, RunRecord
from fmbench.studies import verification

PROCESS = Process(began="2026", ended="killed", last_step=5, conditions={"cpu": "Abacus 9"})
STAGE = {"name": "stage1", "num_epochs": 1, "learning_rate": 0.1, "augment": {"flip": 1.0}, "train_seconds": 1.0}
STAGE |= {"train_core_seconds": 1.0, "val_accuracy": 0.8, "test_accuracy": 0.8}
HOSTILE: dict[str, Any] = {
    "text": "100",
    "none": None,
    "negative": -1,
    "zero": 0,
    "huge": 10**400,
    "not a number": float("nan"),
    "infinite": -float("inf"),
    "true": True,
    "list": [[1]],
    "object": {"a": {"b": 1}},
    "absent": ...,
}


def paths_of(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value, and of the first of every list."""
    if path:
        yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths_of(value, (*path, key))


def changed(tree: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    owner: Any = tree
    for key in path[:-1]:
        owner = owner[key]
    if value is ...:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return tree


@pytest.fixture
def read_everything(monkeypatch):
    """Reads a results directory as all pages, compare and verify do."""
    monkeypatch.setattr(fashion_mnist, "load", lambda *_: fake_dataset())

    def read(results_dir: Path) -> None:
        for reader in (leaderboard.files, speedrun.files, reproduction.files, cross_validation.read, _verify):
            try:
                reader(results_dir)
            except UserError as error:
                assert len(str(error).splitlines()) == 1, error

    return read


def _verify(results_dir: Path) -> None:
    for record in store.read_all(results_dir).values():
        plausibility.contradiction(record)
        verification.config_of(record)
        verification.differences(record.environment, record.environment)


@pytest.mark.slow
def test_no_value_of_any_field_breaks_a_reader(read_everything, tmp_path):
    base = json.loads(make_record(processes=[PROCESS]).model_dump_json()) | {"stages": [STAGE]}
    runs = tmp_path / "results" / "runs"
    runs.mkdir(parents=True)
    accepted = 0
    for path in paths_of(base):
        for name, value in HOSTILE.items():
            text = json.dumps(changed(base, path, value))
            (tmp_path / "record.json").write_text(text)
            try:
                record = store.read(tmp_path / "record.json")
            except UserError as error:
                assert len(str(error).splitlines()) == 1, (path, name)
                continue
            accepted += 1
            for left in runs.iterdir():
                left.unlink()
            (runs / f"{record.name}.json").write_text(text)
            np.save(runs / f"{record.name}.npy", predictions_with(20))
            read_everything(tmp_path / "results")
    assert accepted > 100  # what is nowhere computed with may well be absent, or another text


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("config", "num_epochs"), "100", "config.num_epochs is '100'; it must be a whole number"),
        (("config", "num_epochs"), True, "config.num_epochs is True"),
        (("config", "num_epochs"), 10**40, "config.num_epochs is 1000"),
        (("config", "num_epochs"), ..., "config.num_epochs is missing"),
        (("config", "data"), "here", "config.data is 'here'; it must be a group of fields"),
        (("config", "data", "flod"), 1, "there is no config.data.flod; the nearest is fold"),
        (("config", "data", "dir"), 3, "config.data.dir is 3; it must be text"),
        (("config", "data"), ..., "config.data is missing"),
        (("config", "optimizer", "learning_rate"), float("nan"), "config.optimizer.learning_rate is nan"),
        (("config", "optimizer", "name"), None, "config.optimizer.name is None; it must be text"),
        (("config", "schedule", "boundaries"), 1, "config.schedule.boundaries is 1; it must be a list"),
        (("config", "stages"), [1], "config.stages is [1]"),
        (("config", "model", "width"), {"a": 1}, "config.model.width is {'a': 1}"),
        (("history", 0, "train_seconds"), float("inf"), "history.0.train_seconds"),
        (("history", 0, "asleep_seconds"), -1.0, "history.0.asleep_seconds"),
        (("num_steps",), 10**400, "num_steps"),
        (("num_steps",), 2**63, "num_steps"),
        (("wall_seconds",), 1e300, "wall_seconds"),
        (("train_loss",), 10**400, "train_loss"),
        (("data_sha256",), {}, "t10k-labels is missing"),
        (("data_sha256", "t10k-labels"), "../../etc/passwd", "data_sha256.t10k-labels"),
        (("a\nfmbench: verified",), 1, "'a?fmbench: verified'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, path, value, said):
    base = json.loads(make_record().model_dump_json())
    (tmp_path / "record.json").write_text(json.dumps(changed(base, path, value)))
    with pytest.raises(UserError) as error:
        store.read(tmp_path / "record.json")
    assert str(error.value).startswith(f"{tmp_path / 'record.json'}: not a valid record")
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("inner", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '"\\ud800"', '"\xff"'])
def test_json_that_no_reader_should_follow_is_refused(tmp_path, inner):
    text = make_record().model_dump_json().replace('"num_steps":10', f'"num_steps":{inner}')
    (tmp_path / "record.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"record\.json: not a valid record"):
        store.read(tmp_path / "record.json")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _large(path: Path) -> None:
    os.truncate(path, store.LARGEST_RECORD + 1)


@pytest.mark.parametrize("ending", [".json", ".npy"])
@pytest.mark.parametrize(
    ("disguise", "said"),
    [(_pipe, "no plain file"), (_link, "a link"), (_endless, "a link"), (_large, r"67,108,86\d bytes")],
)
def test_only_plain_files_of_a_fair_size_are_read(tmp_path, disguise, said, ending):
    record = make_record()
    path = publish(record, tmp_path)
    disguise(path.with_suffix(ending))
    with pytest.raises(UserError, match=rf"{ending}: cannot read .*{said}"):
        store.read(path) and store.read_predictions(record, path.with_suffix(".npy"))


def test_predictions_that_claim_a_terabyte_are_refused(tmp_path):
    path = publish(make_record(), tmp_path).with_suffix(".npy")
    path.write_bytes(path.read_bytes().replace(b"(200,), }" + b" " * 10, b"(1000000000000,), }"))
    with pytest.raises(UserError, match=r"\.npy: cannot read the predictions"):
        store.read_predictions(make_record(), path)


def test_committed_records_have_what_is_asked_for():
    results = Path(__file__).parents[2] / "results"
    assert len(store.read_all(results)) + len(store.read_all(results / "cross_validation")) > 60


def test_processes_must_be_whole():
    with pytest.raises(ValueError, match="wall_seconds"):
        RunRecord.model_validate(make_record().model_dump() | {"processes": [{"wall_seconds": -1.0}]})
    assert "asleep_seconds" not in EPOCH  # records from before they were noted
