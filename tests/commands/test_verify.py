"""A record's run is trained again, and what is not as the record says is found."""

import datetime
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fmbench import verify
from fmbench.config import base_config, flatten, to_json
from fmbench.errors import UserError
from fmbench.pages import leaderboard
from fmbench.records import schema, store, verified
from fmbench.studies import verification
from fmbench.system import runtime
from fmbench.training import parallel
from fmbench.training.run import train_and_evaluate

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Runs everything of this file on one of the fake devices."""
    with pytest.MonkeyPatch.context() as patch:
        mesh = parallel.make_mesh(jax.devices()[:1])
        patch.setattr(parallel, "make_mesh", lambda *devices: mesh)
        patch.setattr(runtime, "set_up", lambda: None)  # it is for a process of its own
        yield


@pytest.fixture(scope="module")
def trained(make_config, tmp_path_factory) -> Path:
    """The record of three epochs under a schedule that knows its end."""
    folder = tmp_path_factory.mktemp("trained")
    config = make_config("configs/fc.py:a", num_epochs=3, schedule__name="cosine")
    record = train_and_evaluate(config, folder / "work", results_dir=folder / "results")
    return folder / "results" / "runs" / f"{record.name}.json"


@pytest.fixture
def record(trained, tmp_path) -> Path:
    """A copy that a test may change."""
    path = tmp_path / "results" / "runs" / trained.name
    store.write(store.read(trained), np.load(trained.with_suffix(".npy")), path.with_suffix(""))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            verify.main()
        return int(end.value.code or 0), *capsys.readouterr()

    return run


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def history_with(path: Path, factor: float) -> list[dict]:
    history = json.loads(path.read_text())["history"]
    return [history[0] | {"train_loss": factor * history[0]["train_loss"]}, *history[1:]]


def test_a_whole_run_repeats_itself_bit_for_bit_and_says_so(run, record):
    code, out, err = run(record, "--write", f"--results_dir={record.parents[1]}")
    assert code == 0, err
    assert out.count("differs by 0 of it") == 3
    assert "predictions: 0 of" in out
    assert out.endswith("verified: bit for bit\n")
    left = json.loads((record.parents[1] / "verified" / record.name).read_text())
    assert (left["record"], left["num_epochs"], left["predictions_that_differ"]) == (record.stem, 3, 0)
    assert (left["train_loss_distances"], left["is_equal"]) == ([0, 0, 0], True)


def test_a_part_is_trained_under_the_whole_runs_schedule(run, record):
    code, out, _ = run(record, "--epochs=2")
    assert code == 0
    assert out.count("differs by 0 of it") == 2
    assert "predictions" not in out
    assert list(record.parents[1].iterdir()) == [record.parent]  # nothing was left


@pytest.mark.parametrize(("factor", "expected"), [(1.02, 0), (1.05, 1), (0.95, 1)])
def test_a_first_loss_beyond_the_stated_distance_is_not_verified(run, record, factor, expected):
    edit(record, history=history_with(record, factor))
    code, out, err = run(record, "--epochs=1")
    assert (code, "bit for bit" in out) == (expected, False)
    assert ("NOT verified" in err) == bool(expected)


def test_predictions_that_were_put_in_their_place_are_found(run, record):
    forged = np.zeros_like(np.load(record.with_suffix(".npy")))
    np.save(record.with_suffix(".npy"), forged)
    edit(record, predictions_sha256=schema.predictions_sha256(forged), test_accuracy=0.1)
    code, out, err = run(record)
    assert code == 1
    assert "the test accuracy within 1.5 points" in err
    assert "differ, accuracy by" in out


def test_what_is_not_the_same_here_is_said(run, record):
    environment = json.loads(record.read_text())["environment"]
    other = {"cpu_cores": 64, "device_kind": "Abacus 9", "versions": environment["versions"] | {"jax": "0.1"}}
    edit(record, environment=environment | other)
    _, out, _ = run(record, "--epochs=1")
    assert "not the same: cpu_cores: 64 there" in out
    assert "not the same: device_kind: Abacus 9 there" in out
    assert "not the same: jax: 0.1 there" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a record, or give --cheap"),
        (["nowhere.json"], "nowhere.json: cannot read the record"),
        (["RECORD", "--epochs=0"], "--epochs=0: the record has 1 to 3"),
        (["RECORD", "--epochs=4"], "--epochs=4: the record has 1 to 3"),
        (["--cheap", "--results_dir=nowhere"], "there is no record with an epoch of a few seconds"),
    ],
    ids=str,
)
def test_a_mistake_is_told_in_a_line(run, record, arguments, said):
    code, _, err = run(*(text.replace("RECORD", str(record)) for text in arguments))
    assert code == 2
    assert said in err


def test_every_committed_config_is_one_of_today():
    records = [*store.read_all(RESULTS).values(), *store.read_all(RESULTS / "cross_validation").values()]
    known = flatten(to_json(base_config()))
    for record in records:
        config = flatten(to_json(verification.config_of(record)))
        there = flatten(record.config)
        assert {key: there[key] for key in there if not key.startswith("data.")} == {
            key: config[key] for key in there if not key.startswith("data.")
        }
        assert known.keys() <= config.keys()


def test_each_day_has_its_cheap_record():
    records = store.read_all(RESULTS)
    days = [datetime.date(2026, 1, 1) + datetime.timedelta(days=day) for day in range(60)]
    drawn = [verification.cheap(records, day) for day in days]
    assert drawn == [verification.cheap(records, day) for day in days]
    assert len(set(drawn)) >= 10
    for path in drawn:
        record = records[path]
        core_seconds = record.train_seconds * record.environment.cpu_cores
        assert core_seconds / record.num_epochs <= 2 * verification.CHEAP_SECONDS


def test_the_leaderboard_says_which_records_were_trained_again(run, record, monkeypatch):
    monkeypatch.setattr(leaderboard, "is_ranked", lambda record: True)  # on the sample as it is
    results_dir = record.parents[1]
    run(record, "--epochs=1", "--write", f"--results_dir={results_dir}")
    records = store.read_all(results_dir)
    ((of, found),) = verified.read_all(results_dir, records)
    pages = leaderboard.render(results_dir, records)
    (line,) = (line for line in pages[results_dir / "leaderboard.md"].splitlines() if "the same bits" in line)
    assert line.startswith(f"| {of.entry} | 0 | 1 of 3 | the same bits | {of.environment.machine_title} | ")
    assert found.predictions_that_differ is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"predictions_sha256": "0" * 64}, "not of the record of that name"),
        ({"record": "mlp"}, "not of the record of that name"),
        ({"num_epochs": "1"}, "not a valid verification, field 'num_epochs'"),
    ],
)
def test_a_verification_of_no_record_is_refused(run, record, changes, said):
    results_dir = record.parents[1]
    run(record, "--epochs=1", "--write", f"--results_dir={results_dir}")
    edit(results_dir / "verified" / record.name, **changes)
    with pytest.raises(UserError, match=said):
        verified.read_all(results_dir, store.read_all(results_dir))
