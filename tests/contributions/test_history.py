"""What changed among results is told by commit, from what to what, whatever stands in names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fmbench import history

CSV = "data_version,device,num_devices,dtype,entry,rank,test_accuracy\n2017,Abacus,1,float32,mlp,{}\n"


@pytest.fixture
def repository(tmp_path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "results" / "runs").mkdir(parents=True)
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org")
    done = subprocess.run(
        ["git", "-C", folder, *who, *arguments],
        capture_output=True,
        text=True,
        env={"GIT_COMMITTER_DATE": "2026-01-02T03:04:05+01:00", "PATH": "/usr/bin:/bin:/usr/local/bin"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(folder: Path, subject: str) -> str:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", subject)
    return git(folder, "rev-parse", "--short=7", "HEAD")


def told(folder: Path, monkeypatch, capsys, *arguments: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["fmbench", f"--results_dir={folder / 'results'}", *arguments])
    history.main()
    return capsys.readouterr().out.splitlines()


def test_each_change_has_its_commit_and_what_it_was_before(repository, monkeypatch, capsys):
    runs, board = repository / "results" / "runs", repository / "results" / "leaderboard.csv"
    record = {"status": "completed", "test_accuracy": 0.9, "created": "2026", "seed": 0, "history": [1]}
    (runs / "a.json").write_text(json.dumps(record))
    (runs / "a.npy").write_bytes(b"not told")
    board.write_text(CSV.format("1,0.9"))
    first = commit(repository, "First")
    (runs / "a.json").write_text(json.dumps(record | {"test_accuracy": 0.91, "history": [2]}))
    (repository / "elsewhere").touch()
    # A column that came later makes no other row of it.
    board.write_text(CSV.replace("entry,", "num_hosts,entry,").replace("mlp,", "1,mlp,").format("2,0.91"))
    second = commit(repository, "\x1b[31mSecond\tline")
    (runs / "a.json").rename(runs / "b.json")
    (runs / "c\x1b.json").write_text("no JSON")
    third = commit(repository, "Third")
    (runs / "b.json").unlink()
    board.unlink()
    fourth = commit(repository, "Fourth")
    (repository / "elsewhere").write_text("no results")
    commit(repository, "Fifth")

    row = "row mlp (2017, Abacus, float32)"
    assert told(repository, monkeypatch, capsys) == [
        f"2026-01-02T02:04Z {fourth} Fourth",
        "  - record b: status completed, test_accuracy 0.91",
        f"  - {row}: test_accuracy 0.91",
        f"2026-01-02T02:04Z {third} Third",
        "  ~ record a -> b: the same content",
        "  + record c\\x1b: ",
        f"2026-01-02T02:04Z {second} \\x1b[31mSecond\\tline",
        "  ~ record a: test_accuracy 0.9 -> 0.91; also history",
        f"  ~ {row}: rank 1 -> 2; test_accuracy 0.9 -> 0.91",
        f"2026-01-02T02:04Z {first} First",
        "  + record a: status completed, test_accuracy 0.9",
        f"  + {row}: test_accuracy 0.9",
    ]
    assert told(repository, monkeypatch, capsys, "-> b") == [
        f"2026-01-02T02:04Z {third} Third",
        "  ~ record a -> b: the same content",
    ]


def test_a_merge_is_one_change_of_the_branch(repository, monkeypatch, capsys):
    runs = repository / "results" / "runs"
    (runs / "a.json").write_text("{}")
    commit(repository, "First")
    git(repository, "switch", "-q", "-c", "side")
    for accuracy in (0.1, 0.2):
        (runs / "b.json").write_text(json.dumps({"test_accuracy": accuracy}))
        commit(repository, "On the side")
    git(repository, "switch", "-q", "-")
    git(repository, "merge", "-q", "--no-ff", "-m", "Merge", "side")
    said = told(repository, monkeypatch, capsys)
    assert said[0].endswith("Merge")
    assert said[1] == "  + record b: test_accuracy 0.2"
    assert len(said) == 4


def test_a_shallow_clone_says_so_and_no_clone_is_a_users_mistake(repository, tmp_path, monkeypatch, capsys):
    for accuracy in (0.1, 0.2):
        (repository / "results" / "runs" / "a.json").write_text(json.dumps({"test_accuracy": accuracy}))
        commit(repository, "A run")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{repository}", str(clone))
    monkeypatch.setattr(sys, "argv", ["fmbench", f"--results_dir={clone / 'results'}"])
    history.main()
    said = capsys.readouterr()
    assert "git fetch --unshallow" in said.err
    assert said.out.count("\n") == 2
    (repository / ".git").rename(repository / "no git")
    with pytest.raises(SystemExit) as end:
        told(repository, monkeypatch, capsys)
    assert end.value.code == 2
