"""Checkpoints: the latest good one is what a run goes on from, and nothing damaged is believed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from damage import DAMAGE, cases
from orbax.checkpoint import v1 as ocp

from fmbench.errors import UserError
from fmbench.system import sealed
from fmbench.training import checkpoint
from fmbench.training.checkpoint import Checkpoints


def state_of(step: int) -> dict:
    params = {"x": jnp.full(3, step, jnp.float32), "y": jnp.ones((2, 2), jnp.bfloat16)}
    return {"params": params, "opt_state": optax.adam(0.1).init(params), "step": jnp.int32(step)}


def save(directory: Path, *steps: int, run: str = "ours") -> None:
    checkpoints = Checkpoints(directory)
    for step in steps:
        checkpoints.save(step, state_of(step), {"note": step, "run": run})


def restored_step(directory: Path) -> int:
    restored = Checkpoints(directory).restore(
        state_of(0), lambda progress: "" if progress["run"] == "ours" else "is another's"
    )
    if restored is None:
        return 0
    state, progress = restored
    jax.tree.map(np.testing.assert_array_equal, state, state_of(progress["note"]))
    return progress["note"]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints of steps 2 and 3; tests work on copies."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(directory, 1, 2, 3)
    return directory


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_the_latest_two_are_kept(saved):
    assert names(saved) == {"2", "3"}


def test_restores_the_latest_with_its_progress(saved):
    assert restored_step(saved) == 3


def test_nothing_to_restore(tmp_path):
    assert restored_step(tmp_path) == 0
    assert restored_step(tmp_path / "absent") == 0


def test_saving_the_restored_step_again_leaves_it(copied):
    checkpoints = Checkpoints(copied)
    assert checkpoints.restore(state_of(0))
    checkpoints.save(3, state_of(0), {"note": "again"})
    assert restored_step(copied) == 3


# Damage.


@pytest.mark.parametrize("all_of_it", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_damage_of_any_file_leads_back_to_the_older_one(saved, tmp_path, capsys, all_of_it):
    tried = 0
    for name, mode in cases(saved / "3"):
        if (name, mode) == ("fmbench.json", "extend"):
            continue  # a newline behind JSON is none
        if not (all_of_it or mode == "flip" or name == "progress.json"):
            continue
        directory = Path(shutil.copytree(saved, tmp_path / str(tried)))
        DAMAGE[mode](directory / "3" / name)
        assert restored_step(directory) == 2, (name, mode)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{directory}/3: {name}"), (name, mode)
        assert line.endswith("an older checkpoint is taken, 2.")
        tried += 1
    assert tried > (90 if all_of_it else 15)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: (path / "arrays" / "more").write_text(""), "arrays/more: was not there"),
        (lambda path: shutil.rmtree(path / "arrays"), "arrays/_CHECKPOINT_METADATA: is missing"),
        (lambda path: (shutil.rmtree(path), path.write_text("")), "is no folder"),
        (
            lambda path: (shutil.rmtree(path), path.mkdir()),
            "fmbench.json: is missing, as it is where an older ver",
        ),
        (lambda path: shutil.move(path, path.with_name("999")), "is of step 3"),
        (lambda path: shutil.copytree(path.with_name("2"), path, dirs_exist_ok=True), "was not there when it was"),
        (lambda path: (path.rename(path.parents[1] / "p"), path.symlink_to("../p")), "is a symbolic link, which"),
        (lambda path: (path / "progress.json").write_text("[" * 100_000), "progress.json: has 100,000 bytes inst"),
        (lambda path: (path / "fmbench.json").write_text("[" * 100_000), "fmbench.json: is no JSON of ours: too "),
        (lambda path: (path / "fmbench.json").write_text('{"a": 5}'), "was not there when it was written"),
    ],
)
def test_what_is_not_as_it_was_sealed_is_not_believed(copied, capsys, harm, said):
    harm(copied / "3")
    assert restored_step(copied) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_link_in_a_file_s_place_is_not_followed(copied, tmp_path, capsys):
    path = copied / "3" / "progress.json"
    path.symlink_to(path.rename(tmp_path / "elsewhere"))
    assert restored_step(copied) == 2
    assert "progress.json: is no plain file" in capsys.readouterr().err


def test_junk_and_other_runs_checkpoints_are_passed_over(copied, tmp_path, capsys):
    save(tmp_path / "other", 400, run="theirs")
    shutil.move(tmp_path / "other" / "400", copied)
    (copied / "999").mkdir()
    (copied / "999" / "junk").write_text("junk")
    (copied / "notes").write_text("left alone")
    (copied / "²").mkdir()
    assert restored_step(copied) == 3
    junk, theirs = capsys.readouterr().err.splitlines()
    assert "/999: fmbench.json: is missing" in junk
    assert "/400: is another's; an older checkpoint is taken, 3." in theirs


def test_arrays_that_load_but_are_others_are_not_believed(copied, capsys):
    # As if Orbax had written other numbers than it was given: the seal is of the files, the digest of the arrays.
    shutil.rmtree(copied / "3" / "arrays")
    ocp.save(copied / "3" / "arrays", state_of(5))
    sealed.seal(copied / "3")
    assert restored_step(copied) == 2
    assert "/3: arrays: they are not those that were saved" in capsys.readouterr().err


def test_another_layout_is_not_believed(copied, capsys):
    shutil.rmtree(copied / "3" / "arrays")
    ocp.save(copied / "3" / "arrays", {"params": jnp.zeros((1 << 20,))})
    sealed.seal(copied / "3")
    assert restored_step(copied) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "/3: arrays: " in line


def test_if_none_is_good_one_line_says_so_and_nothing_is_touched(copied):
    for step in "23":
        DAMAGE["flip"](copied / step / "progress.json")
    with pytest.raises(UserError) as error:
        restored_step(copied)
    assert str(error.value) == (
        f"no checkpoint is good: {copied}/3: progress.json: its content is not what was written; "
        f"{copied}/2: progress.json: its content is not what was written. --force starts anew."
    )
    assert names(copied) == {"2", "3"}


def test_linked_checkpoints_are_not_followed(copied, tmp_path):
    (tmp_path / "link").symlink_to(copied)
    with pytest.raises(UserError, match=r"link is a symbolic link, which is not followed; --force starts anew\."):
        restored_step(tmp_path / "link")


def test_the_next_save_replaces_what_is_damaged_and_keeps_what_was_good(copied):
    DAMAGE["flip"](copied / "3" / "progress.json")
    (copied / "999").mkdir()
    (copied / ".7.partial").mkdir()  # of a process that was killed
    checkpoints = Checkpoints(copied)
    assert checkpoints.restore(state_of(0))
    checkpoints.save(3, state_of(3), {"note": 3, "run": "ours"})
    assert names(copied) == {"2", "3"}
    assert restored_step(copied) == 3
    checkpoints.save(4, state_of(4), {"note": 4, "run": "ours"})
    assert names(copied) == {"3", "4"}


# Disks that are full, and power that goes.


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("FSIZE, 100_000", "File too large"),
        *((f"NOFILE, used + {left}", "Too many open files") for left in (2, 5)),
    ],
)
def test_where_there_is_no_room_the_older_ones_stay(copied, limit, said):
    """One line, and nothing after it: Orbax leaves event loops and threads behind."""
    name, number = limit.split(",")
    program = (
        "import os, resource, sys; from pathlib import Path; import jax.numpy as jnp\n"
        "from fmbench.errors import UserError; from fmbench.training.checkpoint import Checkpoints\n"
        "import numpy as np; state = {'x': jnp.asarray(np.random.default_rng(0).normal(size=10**5))}\n"
        "used = os.open(os.devnull, os.O_RDONLY); os.close(used)\n"
        f"resource.setrlimit(resource.RLIMIT_{name}, ({number}, {number}))\n"
        "try: Checkpoints(Path(sys.argv[1])).save(4, state, {})\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, copied], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith(f"{copied}/")
    assert said in done.stdout
    assert done.stdout.endswith("; when that is mended, the same command goes on.\n")
    assert done.stdout.count("\n") == 1
    assert names(copied) == {"2", "3"}
    save(copied, 4)
    assert restored_step(copied) == 4


def test_an_interrupted_load_says_nothing_of_its_event_loop(tmp_path):
    """A task that ends with another error while the loop is closed, and one that nobody waits for any more."""
    program = (
        "import asyncio, sys; from pathlib import Path; from fmbench.system import sealed\n"
        "async def fails():\n"
        "    try: await asyncio.sleep(9)\n"
        "    finally: raise ValueError('closed')\n"
        "async def load():\n"
        "    tasks.append(asyncio.create_task(fails())); await asyncio.sleep(0); raise KeyboardInterrupt\n"
        "tasks = []\n"
        "sealed.ocp.load = lambda *_: asyncio.run(load())\n"
        "try: sealed.load_arrays(Path('x'), {}, '')\n"
        "except KeyboardInterrupt: tasks.clear(); print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)


def test_all_is_on_disk_before_the_name_and_before_the_older_one_goes(saved, tmp_path, monkeypatch):
    """First every file and folder, then the new name, then the folder with it; only then the older one goes."""
    directory = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    calls: list[tuple[str, Path]] = []

    def note(name, function):
        def noted(path, *arguments, **more):
            calls.append((name, Path(path)))
            return function(path, *arguments, **more)

        return noted

    monkeypatch.setattr(sealed.files, "sync", note("sync", sealed.files.sync))
    monkeypatch.setattr(sealed.files, "remove", note("remove", sealed.files.remove))
    monkeypatch.setattr(Path, "rename", note("rename", Path.rename))
    synced = set()
    fsync = os.fsync

    def noted_fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    checkpoints = Checkpoints(directory)
    assert checkpoints.restore(state_of(0))
    checkpoints.save(4, state_of(4), {"note": 4, "run": "ours"})

    named = calls.index(("rename", directory / ".4.partial"))
    gone = calls.index(("remove", directory / "2"))
    before = {path.relative_to(directory / ".4.partial") for name, path in calls[:named] if name == "sync"}
    everything = {path.relative_to(directory / "4") for path in (directory / "4").rglob("*")}
    assert before == everything | {Path()}
    assert {path.stat().st_ino for path in (directory / "4").rglob("*")} <= synced
    assert ("sync", directory) in calls[named:gone]


def test_a_checkpoint_s_progress_is_read_without_its_arrays(saved):
    assert checkpoint.read_progress(saved / "3") == {"note": 3, "run": "ours"}
