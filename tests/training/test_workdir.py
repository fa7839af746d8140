"""Who may use a work directory, and what --force throws away."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damage import DAMAGE
from fake_records import fake_dataset, make_record, make_unfinished, predictions_with

from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.records import store
from fmbench.training import checkpoint, workdir
from fmbench.training.checkpoint import Checkpoints

CONFIG = make_record().config


def contents(directory: Path) -> dict[str, str]:
    """Every file below `directory`, but for the lock."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != workdir.LOCK]
    return {path.relative_to(directory).as_posix(): path.read_text() for path in files}


@pytest.fixture
def run(tmp_path) -> Path:
    """A work directory with something in it."""
    directory = tmp_path / "nested" / "run"
    with workdir.claim(directory, CONFIG, force=False):
        (directory / "checkpoints").mkdir()
        (directory / "checkpoints" / "5").write_text("weights")
        (directory / "metrics.jsonl").write_text("lines")
    return directory


def claim(directory: Path, config=CONFIG, *, force: bool = False) -> None:
    with workdir.claim(directory, config, force=force):
        pass


def test_the_first_run_stores_its_config(run):
    assert json.loads(contents(run)["config.json"]) == CONFIG


def test_the_same_config_may_come_back_to_what_it_left(run):
    before = contents(run)
    claim(run)
    assert contents(run) == before


def test_another_config_is_refused_with_the_difference(run):
    before = contents(run)
    with pytest.raises(UserError, match=r"another config \(num_epochs: 1 -> 2, seed: 0 -> 5\)"):
        claim(run, CONFIG | {"seed": 5, "num_epochs": 2})
    assert contents(run) == before


def test_the_data_may_have_moved_but_not_changed(run):
    moved = CONFIG | {"data": CONFIG["data"] | {"dir": "elsewhere"}}
    claim(run, moved)
    claim(run, moved, force=True)
    claim(run)
    (run / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"data\.split: default -> all"):
        claim(run, CONFIG | {"data": CONFIG["data"] | {"split": "all"}})


FOLDER = CONFIG | {"data": CONFIG["data"] | {"source": "idx", "dir": "here"}}
MOVED = FOLDER | {"data": FOLDER["data"] | {"dir": "there"}}


@pytest.fixture
def run_on_a_folder(tmp_path) -> Path:
    """A work directory of a run on idx files with hashes 'abc'."""
    with workdir.claim(tmp_path / "run", FOLDER, force=False):
        workdir.check_same_data(tmp_path / "run", {"train-images": "abc"})
        (tmp_path / "run" / "metrics.jsonl").write_text("lines")
    return tmp_path / "run"


def hold(monkeypatch, sha256: str) -> None:
    """Lets any folder hold data of this hash."""
    dataset = dataclasses.replace(fake_dataset(), sha256={"train-images": sha256})
    monkeypatch.setattr(fashion_mnist, "load", lambda source, data_dir, unproven, mapped: dataset)


def test_a_folder_that_was_moved_is_no_other_config(run_on_a_folder, monkeypatch):
    hold(monkeypatch, "abc")
    claim(run_on_a_folder, MOVED)
    workdir.check_same_data(run_on_a_folder, {"train-images": "abc"})
    with pytest.raises(UserError, match=r"another config \(seed: 0 -> 5\)"):
        claim(run_on_a_folder, MOVED | {"seed": 5})


def test_a_folder_with_other_data_is_refused(run_on_a_folder, monkeypatch):
    hold(monkeypatch, "other")
    before = contents(run_on_a_folder)
    with pytest.raises(UserError, match=r"holds a run on other data than these.*--force"):
        claim(run_on_a_folder, MOVED)
    claim(run_on_a_folder, FOLDER)  # nothing is read where nothing was moved ...
    with pytest.raises(UserError, match="holds a run on other data than these"):
        workdir.check_same_data(run_on_a_folder, {"train-images": "other"})  # ... but what is, is compared
    assert contents(run_on_a_folder) == before
    claim(run_on_a_folder, MOVED, force=True)
    workdir.check_same_data(run_on_a_folder, {"train-images": "other"})


def test_a_moved_folder_of_a_run_without_hashes_is_refused(run_on_a_folder, monkeypatch):
    (run_on_a_folder / "data.json").unlink()
    with pytest.raises(UserError, match=r"another config \(data\.dir: here -> there\)"):
        claim(run_on_a_folder, MOVED)


def test_a_run_that_ended_before_it_began_is_in_nobodys_way(tmp_path):
    claim(tmp_path, FOLDER)
    workdir.check_same_data(tmp_path, {"train-images": "abc"})
    claim(tmp_path, MOVED | {"seed": 5})
    workdir.check_same_data(tmp_path, {"train-images": "other"})
    assert json.loads(contents(tmp_path)["config.json"])["seed"] == 5


def test_fields_that_came_later_are_no_other_config(run):
    older = {key: value for key, value in CONFIG["augment"].items() if key != "function"}
    (run / "config.json").write_text(json.dumps(CONFIG | {"augment": older}))
    claim(run)
    with pytest.raises(UserError, match=r"augment\.function:  -> a\.b:c"):
        claim(run, CONFIG | {"augment": older | {"function": "a.b:c"}})


def test_force_starts_anew_with_another_config(run):
    other = CONFIG | {"seed": 5}
    claim(run, other, force=True)
    assert {name: json.loads(text) for name, text in contents(run).items()} == {"config.json": other}


@pytest.mark.parametrize("name", ["checkpoints", "model", "seed3", "metrics.jsonl", "data.json"])
def test_a_link_in_the_place_of_a_runs_files_is_not_followed(run, tmp_path, name):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    if name == "checkpoints":
        shutil.rmtree(run / name)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(precious / "file" if "." in name else precious)
    with pytest.raises(
        UserError, match=rf"a link where a run has files of its own \({name}\); --force removes it"
    ):
        claim(run)
    assert (run / name).is_symlink()
    claim(run, force=True)
    assert not (run / name).is_symlink()
    assert contents(precious) == {"file": "precious"}


def test_a_link_to_a_directory_is_refused(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = contents(run)
    for name, target in (("link", run), ("dangling", tmp_path / "nowhere")):
        for force in (False, True):
            with pytest.raises(UserError, match=f"{name} is a link; name what it leads to, {target}"):
                claim(tmp_path / name, force=force)
    assert contents(run) == before
    assert not (tmp_path / "nowhere").exists()
    claim(tmp_path / "link" / "deeper")  # workdirs/ itself may lie on another disk


@pytest.mark.parametrize("force", [False, True])
def test_what_is_not_a_runs_stays_when_all_else_is_thrown_away(run, force):
    (run / "notes.txt").write_text("mine")
    (run / ".lock").touch()  # of runs before their lock had a name of its own
    if not force:
        (run / "metrics.jsonl").unlink()
        shutil.rmtree(run / "checkpoints")
    claim(run, CONFIG | {"seed": 5}, force=force)
    assert contents(run).keys() == {"notes.txt", "config.json"}
    assert json.loads(contents(run)["config.json"])["seed"] == 5


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_a_run_that_fails_before_it_begins_leaves_nothing(tmp_path, error):
    (tmp_path / "there").mkdir()
    for name in ("new/nested", "there"):
        with pytest.raises(error), workdir.claim(tmp_path / name, FOLDER, force=False):
            workdir.check_same_data(tmp_path / name, {"train-images": "abc"})
            raise error
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_a_run_that_fails_later_keeps_what_it_did(run):
    before = contents(run)
    with pytest.raises(UserError), workdir.claim(run, CONFIG, force=False):
        raise UserError("no room")
    assert contents(run) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "foreign",
    [
        {"thesis.tex": "ten years of work"},
        {".lock": ""},  # another program's
        {".lockfile": "4711"},
        {".config.json.bak": "{}"},
        {"config.json": '{"hidden_size": 768}'},  # another program's
        {"config.json": "[]"},
        {"config.json": "{"},
        {"config.json": "", "thesis.tex": "ten years of work"},
    ],
)
def test_a_foreign_directory_is_refused_and_left_alone(tmp_path, foreign, force):
    for name, text in foreign.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="holds files that are not a run's"):
        claim(tmp_path, force=force)
    assert {path.name for path in tmp_path.iterdir()} == set(foreign)
    assert contents(tmp_path) == foreign


def test_an_empty_directory_will_do(tmp_path):
    claim(tmp_path)
    assert list(contents(tmp_path)) == ["config.json"]


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
def test_a_place_where_no_directory_can_be_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="--workdir="):
        claim(tmp_path / name)
    assert contents(tmp_path) == {"file": "a file"}


def test_a_second_process_is_kept_out_until_the_first_ends_or_dies(run):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import json, sys, pathlib\n"
            "from fmbench.training import workdir\n"
            "with workdir.claim(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), force=False):\n"
            "    print('claimed', flush=True)\n"
            "    sys.stdin.read()\n",
            run,
            json.dumps(CONFIG),
        ],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "claimed\n"
        before = contents(run)
        for force in (False, True):
            with pytest.raises(UserError, match="in use by another run"):
                claim(run, force=force)
        assert contents(run) == before
        holder.kill()
    claim(run)


def test_a_run_is_finished_when_its_record_and_predictions_are_whole(tmp_path):
    assert not workdir.is_finished(tmp_path)
    store.write(make_unfinished("interrupted"), None, tmp_path / "record")
    assert not workdir.is_finished(tmp_path)
    store.write(make_record(status="interrupted"), predictions_with(wrong=20), tmp_path / "record")
    assert not workdir.is_finished(tmp_path)
    store.write(make_record(), predictions_with(wrong=20), tmp_path / "record")
    assert workdir.is_finished(tmp_path)


@pytest.mark.parametrize("name", ["record.json", "record.npy"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"damaged")])
def test_a_run_with_a_damaged_record_is_not_finished(tmp_path, name, damage):
    store.write(make_record(), predictions_with(wrong=20), tmp_path / "record")
    damage(tmp_path / name)
    assert not workdir.is_finished(tmp_path)


# Damage.


@pytest.fixture
def trained(tmp_path) -> Path:
    """A work directory with a checkpoint."""
    with workdir.claim(tmp_path / "run", CONFIG, force=False):
        workdir.check_same_data(tmp_path / "run", {"t10k-labels": "abc"})
        progress = {"config": CONFIG, "data_sha256": {"t10k-labels": "abc"}}
        Checkpoints(tmp_path / "run" / "checkpoints").save(5, {"x": np.zeros(3)}, progress)
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["config.json", "data.json"])
@pytest.mark.parametrize("mode", DAMAGE)
def test_what_says_whose_run_it_is_comes_again_from_a_checkpoint(trained, capsys, name, mode):
    whole = (trained / name).read_bytes()
    DAMAGE[mode](trained / name)
    claim(trained)
    workdir.check_same_data(trained, {"t10k-labels": "abc"})
    if mode == "extend":  # a newline behind JSON is no damage
        return
    assert (trained / name).read_bytes() == whole
    err = capsys.readouterr().err
    if (name, mode) != ("data.json", "delete"):
        assert err.startswith(f"{trained / name}: ")
        assert err.endswith("; written anew.\n")


def test_a_damaged_config_is_no_leave_to_go_on_with_another(trained):
    DAMAGE["zero"](trained / "config.json")
    with pytest.raises(
        UserError, match=r"config\.json: is no JSON: .*no checkpoint is good and of this config\. .*--f"
    ):
        claim(trained, CONFIG | {"seed": 5})
    DAMAGE["flip"](trained / "checkpoints" / "5" / "progress.json")
    with pytest.raises(
        UserError, match=r"config\.json: is no JSON: .*no checkpoint is good and of this config\. .*--f"
    ):
        claim(trained)
    claim(trained, force=True)
    assert list(contents(trained)) == ["config.json"]


def test_damaged_hashes_are_no_leave_to_go_on_with_other_data(trained):
    with pytest.raises(UserError, match="holds a run on other data than these"):
        workdir.check_same_data(trained, {"t10k-labels": "other"})
    progress = checkpoint.read_progress(trained / "checkpoints" / "5")
    assert workdir.misfit(progress, CONFIG, {"t10k-labels": "abc"}) == ""
    assert workdir.misfit(progress, CONFIG, {"t10k-labels": "other"}) == "is of a run on other data"
    other = CONFIG | {"seed": 5}
    assert workdir.misfit(progress, other, {"t10k-labels": "abc"}) == "is another run's (seed: 0 -> 5)"
    assert workdir.misfit({}, CONFIG, {"t10k-labels": "abc"}).startswith("is another run's (")


def test_force_works_where_nothing_is_whole(trained):
    for path in trained.rglob("*"):
        if path.is_file():
            DAMAGE["zero"](path)
    with pytest.raises(UserError, match=r"config\.json: is no JSON: .*--force to start anew there\."):
        claim(trained)
    claim(trained, force=True)
    assert list(contents(trained)) == ["config.json"]


def test_leftovers_of_killed_processes_are_swept(trained):
    (trained / "seed1").mkdir()
    leftovers = [
        trained / ".metrics.jsonl.abcdefgh.unfinished",
        trained / "seed1" / ".record.npy.abcdefgh.unfinished",
    ]
    for leftover in leftovers:
        leftover.write_text("half")
    claim(trained)
    assert not any(leftover.exists() for leftover in leftovers)
