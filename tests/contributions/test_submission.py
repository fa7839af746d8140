"""A record from a second clone is checked, packed and merged; what does not hold or means harm is refused."""

import gzip
import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import fake_records
import numpy as np
import pytest
from fake_records import ENVIRONMENT, SHA256, fake_dataset, predictions_with, publish

from fmbench import history, submit
from fmbench import leaderboard as leaderboard_command
from fmbench.contributions import bundle
from fmbench.data import fashion_mnist, proof
from fmbench.pages import leaderboard
from fmbench.records import machine, store
from fmbench.records.schema import RunRecord

IDENTITY = {"memory_bytes": 8 << 30, "thread_settings": {}, "instruction_sets": ["avx2"]}


def make_record(seed: int = 1, **changes: Any) -> RunRecord:
    return fake_records.make_record(seed=seed, **{"schema_version": 2, **changes})


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "init.defaultBranch=main")
    done = subprocess.run(["git", "-C", folder, *who, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command in this process: exit code, standard output, standard error."""

    def call(command, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fmbench", *map(str, arguments)])
        try:
            command.main()
        except SystemExit as end:
            return int(end.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    return call


@pytest.fixture
def clones(tmp_path, monkeypatch, call) -> tuple[Path, Path]:
    """The maintainers' clone, with code, a config and a record; and a second one, which is the current folder."""
    monkeypatch.setattr(fashion_mnist, "load", lambda *arguments, **settings: fake_dataset())
    monkeypatch.setitem(proof.SHA256, proof.STANDARD, SHA256)
    first, second = tmp_path / "first", tmp_path / "second"
    for name in ("configs/mlp.py", "configs/speedrun.py", "fmbench/b.py", "fmbench/a/c.py"):
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        (first / name).write_text(f"# {name}\n")
    publish(make_record(0, environment=IDENTITY), first / "results")
    call(leaderboard_command, f"--results_dir={first / 'results'}")
    git(tmp_path, "init", "-q", str(first))
    git(first, "add", ".")
    git(first, "commit", "-q", "-m", "Begin")
    git(tmp_path, "clone", "-q", str(first), str(second))
    monkeypatch.chdir(second)
    return first, second


def write_run(clone: Path, record: RunRecord, *, wrong: int = 20, name: str = "work") -> Path:
    """A work directory as a run leaves it."""
    workdir = clone.parent / name
    store.write(record, predictions_with(wrong), workdir / "record")
    lines = [epoch.model_dump_json(exclude_none=True) for epoch in record.history]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return workdir


def environment(clone: Path, **changes: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:  # as a run in that clone would have it
        patch.setattr(machine, "PACKAGE", clone / "fmbench")
        code = machine.code_sha256.__wrapped__()
    return ENVIRONMENT | IDENTITY | {"git_commit": git(clone, "rev-parse", "HEAD"), "code_sha256": code} | changes


def test_a_first_submission_from_a_second_clone_is_merged(clones, call, tmp_path):
    first, second = clones
    record = make_record(wrong=15, environment=environment(second))
    workdir = write_run(second, record, wrong=15)
    code, said, _ = call(submit, workdir, f"--output={tmp_path / 'sent.tar.gz'}")
    assert code == 0, said
    assert "  no " not in said
    call(submit, workdir, "--output=again.tar.gz")
    assert (tmp_path / "sent.tar.gz").read_bytes() == (second / "again.tar.gz").read_bytes()

    git(second, "switch", "-q", "-c", "results-of-mine")
    assert call(submit, f"--accept={tmp_path / 'sent.tar.gz'}")[0] == 0
    assert call(leaderboard_command, "--check")[0] == 1  # not rendered yet
    assert call(leaderboard_command)[0] == 0
    git(second, "add", "results")
    git(second, "commit", "-q", "-m", "mlp, seed 1")
    git(second, "push", "-q", "origin", "results-of-mine")
    git(first, "merge", "-q", "--no-ff", "-m", "Merge: mlp, seed 1", "results-of-mine")

    assert call(leaderboard_command, f"--results_dir={first / 'results'}", "--check")[0] == 0
    assert store.read(first / "results" / "runs" / f"{record.name}.json") == record
    assert not list((first / "results").rglob("*.jsonl"))
    code, said, _ = call(history, f"--results_dir={first / 'results'}")
    assert said.splitlines()[0].endswith("Merge: mlp, seed 1")
    assert f"+ record {record.name}: status completed, test_accuracy 0.925" in said
    assert "num_seeds 1 -> 2; test_accuracy 0.9 -> 0.9125" in said


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "completed": ({"status": "interrupted"}, {}),
    "standard data": ({"data_version": "old"}, {}),
    "predictions": ({"test_accuracy": 0.95}, {}),
    "commit, dirty": ({}, {"git_dirty": True}),
    "commit, not known": ({}, {"git_commit": None, "git_dirty": None, "git_unknown": "no git"}),
    "commit, elsewhere": ({}, {"git_commit": "0" * 40}),
    "commit, an option": ({}, {"git_commit": "--help"}),
    "commit, other code": ({}, {"code_sha256": "0" * 64}),
    "commit, no config": ({"config": {"config_file": "configs/none.py"}}, {}),
    "machine": ({}, {"memory_bytes": None}),
    "seed": ({"entry": "speedrun-94", "config": {"config_file": "configs/speedrun.py"}}, {}),
    "recipe": ({"config": {"batch_size": 512}}, {}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_hold_is_named(what, clones, call):
    _, second = clones
    changes, of_environment = REFUSED[what]
    record = make_record(**changes, environment=environment(second, **of_environment))
    code, said, _ = call(submit, write_run(second, record))
    found = [line.split()[1].strip(":") for line in said.splitlines() if line.startswith("  no")]
    assert code == 1
    assert what.split(",")[0].split()[0] in found
    assert not (second / "submission.tar.gz").exists()


def test_implausible_beside_the_committed_ones(clones, call, monkeypatch):
    _, second = clones
    workdir = write_run(second, make_record(environment=environment(second)))
    # What is marked is marked by what else is there.
    monkeypatch.setattr(
        leaderboard, "implausible", lambda records: {path: f"one of {len(records)}" for path in records}
    )
    code, said, _ = call(submit, workdir)
    assert code == 1
    assert "  no   plausible: one of 2\n" in said


def test_a_log_of_another_run_is_refused(clones, call):
    _, second = clones
    workdir = write_run(second, make_record(environment=environment(second)))
    log = workdir / "metrics.jsonl"
    log.write_text(json.dumps(json.loads(log.read_text()) | {"train_loss": 0.25}) + "\n")
    code, said, _ = call(submit, workdir)
    assert code == 1
    assert "  no   log: " in said


def test_another_runs_name_is_not_taken(clones, call):
    _, second = clones
    first_run = make_record(environment=environment(second))
    assert call(submit, write_run(second, first_run), "--output=a.tar.gz")[0] == 0
    assert call(submit, "--accept=a.tar.gz")[0] == 0
    code, said, _ = call(submit, "--accept=a.tar.gz")
    assert code == 0
    assert "is there already" in said
    later = make_record(environment=environment(second), created="2026-02-02T00:00:00+00:00")
    content, _ = bundle.pack([(submit.checks.candidate(write_run(second, later, name="later")), later)])
    Path("b.tar.gz").write_bytes(content)
    code, said, _ = call(submit, "--accept=b.tar.gz")
    there = second / "results" / "runs" / f"{later.name}.json"
    assert code == 1
    assert "  no   name: " in said
    assert store.read(there) == first_run
    assert call(submit, "--accept=b.tar.gz", "--force")[0] == 0
    assert store.read(there) == later


def packed(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


HARMFUL = {
    "a path": packed((member("../a.json"), b"{}")),
    "an absolute path": packed((member("/tmp/a.json"), b"{}")),
    "a folder's file": packed((member("runs/a.json"), b"{}")),
    "a hidden file": packed((member(".a.json"), b"{}")),
    "a symbolic link": packed((member("a.json", tarfile.SYMTYPE, "/etc/passwd"), b"")),
    "a hard link": packed((member("a.json"), b"{}"), (member("a.npy", tarfile.LNKTYPE, "a.json"), b"")),
    "a pipe": packed((member("a.json", tarfile.FIFOTYPE), b"")),
    "a device": packed((member("a.json", tarfile.CHRTYPE), b"")),
    "a file twice": packed((member("a.json"), b"{}"), (member("A.json"), b"{}")),
    "another file": packed((member("a.json"), b"{}"), (member("b.npy"), b"")),
    "a script": packed((member("a.json"), b"{}"), (member("a.py"), b"")),
    "nothing": packed(),
    "no archive": b"PK\3\4",
    "cut short": packed((member("a.json"), b"{}" * 4000))[:-40],
    "cut inside": gzip.compress(gzip.decompress(packed((member("a.json"), b"{}" * 4000)))[:2000]),
    "a bomb": gzip.compress(bytes(2 << 20)),
}


@pytest.mark.parametrize("what", HARMFUL)
def test_a_submission_made_to_harm_is_one_line(what, call, monkeypatch, tmp_path):
    monkeypatch.setattr(bundle, "LARGEST", 1 << 20)
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    Path("sent.tar.gz").write_bytes(HARMFUL[what])
    before = sorted(tmp_path.rglob("*"))
    code, said, error = call(submit, "--accept=sent.tar.gz")
    assert (code, said, error.count("\n")) == (2, "", 1)
    assert "sent.tar.gz: not a submission (" in error
    assert ("too large" in error) == (what == "a bomb")
    assert sorted(tmp_path.rglob("*")) == before


class Bomb:
    """Leaves a file where it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_nothing_is_unpickled(clones, call):
    _, second = clones
    record = make_record(environment=environment(second))
    array = io.BytesIO()
    np.save(array, np.array([Bomb()], dtype=object), allow_pickle=True)
    for predictions in (array.getvalue(), pickle.dumps(Bomb())):
        files = {".json": record.model_dump_json().encode(), ".npy": predictions}
        sent = packed(*[(member(record.name + ending), content) for ending, content in files.items()])
        Path("sent.tar.gz").write_bytes(sent)
        code, said, _ = call(submit, "--accept=sent.tar.gz")
        assert code == 1
        assert "  no   predictions: " in said
        assert not Path("unpickled").exists()


def test_bad_input_is_a_users_mistake(clones, call, tmp_path):
    assert call(submit)[0] == 2
    assert call(submit, "none.json")[0] == 2
    assert call(submit, "none.json", "--accept=a.tar.gz")[0] == 2
    outside = tmp_path / "outside"
    (outside / "runs").mkdir(parents=True)
    code, _, error = call(submit, clones[1] / "results/runs", f"--results_dir={outside}")
    assert code == 2
    assert error.count("\n") == 1
    (outside / "record.json").write_text("{}")
    code, said, _ = call(submit, outside)
    assert code == 1
    assert "  no   schema: " in said


def test_a_commit_of_another_branch_does_not_do(clones, call):
    _, second = clones
    git(second, "switch", "-q", "-c", "elsewhere")
    git(second, "commit", "-q", "--allow-empty", "-m", "Elsewhere")
    workdir = write_run(second, make_record(environment=environment(second)))
    git(second, "switch", "-q", "main")
    code, said, _ = call(submit, workdir)
    assert code == 1
    assert "is not in the history of this branch" in said
    git(second, "switch", "-q", "elsewhere")
    assert call(submit, workdir)[0] == 0
