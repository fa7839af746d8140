"""The page is what its outcomes say; verdicts are told apart; with -m faults, a twentieth of all is tried."""

import datetime
import random
import subprocess
import sys

import page
import pytest
import soak
from children import Result
from damage_faults import MODES
from scene import refused, trouble

from fmbench.pages import generated


def result(code=0, out="", err="", memory=0):
    return Result(code, out, err, memory)


def test_the_page_is_what_the_outcomes_say():
    assert not generated.stale(page.pages(page.read())), "run python tests/faults/soak.py --write"


def test_what_the_page_must_show():
    conditions, *outcomes = page.read()
    faults = [outcome for outcome in outcomes if not outcome["kind"].startswith("fuzzing")]
    assert len(faults) >= 500
    # Of a folder in the place of record.npy the error named the file beside it; it was mended after this run.
    failed = {(outcome["case"], outcome["outcome"]) for outcome in outcomes if outcome["outcome"] != "survived"}
    assert failed <= {("42 record.npy folder", "traceback")}
    assert {outcome["kind"] for outcome in outcomes} | conditions["not_caused"].keys() == soak.KINDS.keys()
    of_kind = [outcome["kind"] for outcome in faults]
    assert sum("kill -9" in kind for kind in of_kind) >= 100
    assert sum("Ctrl-C in a convolution" in kind for kind in of_kind) >= 50


def test_a_table_has_a_row_for_each_kind_and_counts_fuzzing_apart():
    def outcome(kind, outcome, inputs=1):
        return {
            "kind": kind,
            "outcome": outcome,
            "inputs": inputs,
            "order": list(soak.KINDS).index(kind),
            "seconds": 1,
        }

    kill, idx = "kill -9 in the export", "fuzzing: idx files"
    outcomes = [{}, outcome(idx, "survived", 100), outcome(kill, "lost"), outcome(kill, "survived")]
    assert page.table(outcomes)[2:] == [
        "| kill -9 in the export | 2 | 1 | 1 | 0 | 0 | 0 |",
        "| **all faults** | 2 | 1 | 1 | 0 | 0 | 0 |",
        "| fuzzing: idx files | 100 | 100 | 0 | 0 | 0 | 0 |",
    ]


@pytest.mark.parametrize(
    ("ended", "outcome"),
    [
        (result(0), None),
        (result(2, err="fmbench.main: no.\n"), None),
        (result(None), "hung"),
        (result(-6, err="free(): invalid size"), "traceback"),
        (result(2, err="Traceback (most recent call last):\nValueError: x"), "traceback"),
        (result(2, err="usage: main\nsomething else"), "traceback"),
        (result(1, err="fmbench.main: no."), "traceback"),
        (result(2, err="fmbench.main: no.", memory=2 << 30), "traceback"),
    ],
)
def test_trouble(ended, outcome):
    verdict = trouble(ended, 0, 2)
    assert (verdict and verdict.outcome) == outcome


def test_what_should_have_been_refused_and_was_not_is_wrongly_believed():
    assert refused(result(0, out="test accuracy 99 %")).outcome == "believed"
    assert refused(result(2, err="fmbench.main: a.json: no."), "a.json").outcome == "survived"
    assert refused(result(2, err="fmbench.main: something is wrong."), "a.json").outcome == "traceback"


def test_every_mode_damages(tmp_path):
    for mode, damage in MODES.items():
        path, foreign = tmp_path / mode, tmp_path / "foreign"
        path.write_bytes(b"0123456789")
        foreign.write_bytes(b"abc")
        damage(path, random.Random(0), foreign)
        assert not path.is_file() or path.read_bytes() != b"0123456789", mode


def test_a_twentieth_is_drawn_by_the_date():
    faults = [("a", str(number)) for number in range(100)]
    assert len({*soak.twentieth(faults, "2026-01-01")}) == 5
    assert soak.twentieth(faults, "2026-01-01") == soak.twentieth(faults, "2026-01-01")
    assert soak.twentieth(faults, "2026-01-01") != soak.twentieth(faults, "2026-01-02")


@pytest.mark.faults
@pytest.mark.full
def test_a_twentieth_of_all_faults_is_survived():
    done = subprocess.run([sys.executable, soak.__file__, "--twentieth", f"--date={datetime.date.today()}"])
    assert done.returncode == 0
