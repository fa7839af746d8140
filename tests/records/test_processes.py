"""The processes that make a run: all of them count, and those under other conditions are refused or told."""

import json

import pytest
from fake_records import ENVIRONMENT

from fmbench import config as config_lib
from fmbench.errors import UserError
from fmbench.records import machine, processes, schema, store
from fmbench.records.processes import ProcessList
from fmbench.records.schema import Environment
from fmbench.training.run import train_and_evaluate

HERE = ENVIRONMENT | {"code_sha256": "c0de"}


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Begins a process of the run in `tmp_path`, under conditions that differ so from HERE."""

    def begin(**changes) -> ProcessList:
        monkeypatch.setattr(machine, "environment", lambda ask_driver=True: Environment(**(HERE | changes)))
        monkeypatch.setattr(machine, "sha256_of_modules", lambda names: (HERE | changes)["code_sha256"])
        return ProcessList(tmp_path, config_lib.base_config())

    return begin


def kill(process_list: ProcessList, wall: float = 0.0) -> None:
    """Leaves behind what a kill does after so many seconds."""
    process_list._pulse.write_text(f"{wall} 0.0\n")


def test_processes_that_were_killed_count_with_their_seconds(begin, tmp_path):
    first = begin()
    first.resume(0, [])
    saved = first.to_json(55)
    first.save()
    kill(first, 70.5)
    second = begin()  # and is killed before it has restored anything
    kill(second, 4.0)
    third = begin()
    third.resume(55, saved)
    assert third.num_resumes == 2
    assert [process.ended for process in third.all] == ["killed", "killed", None]
    assert [(process.first_step, process.last_step) for process in third.all] == [(0, 55), (0, 0), (55, 55)]
    assert [process.wall_seconds for process in third.all[:2]] == [70.5, 4.0]
    assert third.wall_seconds >= 74.5
    third.end("interrupted")
    listed = json.loads((tmp_path / "processes.json").read_text())
    assert [process["ended"] for process in listed] == ["killed", "killed", "interrupted"]


@pytest.mark.parametrize("pulse", ["", "7", "x y", "nan 0", "-3 0", "1e999 0", "\0" * 9])
def test_a_damaged_pulse_is_not_believed(begin, pulse):
    first = begin()
    first.resume(0, [])
    first.save()
    first._pulse.write_text(pulse)
    assert 0 <= begin().all[0].wall_seconds < 1


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text('[{"began": 3')])
def test_without_the_list_the_checkpoint_has_it(begin, damage, tmp_path):
    first = begin()
    first.resume(0, [])
    saved = first.to_json(55)
    damage(tmp_path / "processes.json")
    second = begin(cpu_cores=1)
    with pytest.raises(UserError, match="cpu_cores: 2 -> 1"):
        second.resume(55, saved)
    assert second.num_resumes == 1


OTHERS = [
    ({"code_sha256": "beef"}, "code_sha256: c0de -> beef"),
    ({"versions": {"jax": "0.10.1"}}, "jax: 0.10.0 -> 0.10.1"),
    ({"versions": {"jax": "0.10.0", "onednn-cpu-gomp": "3"}}, "onednn-cpu-gomp: none -> 3"),
    ({"python": "3.14.0"}, "python: 3.13.0 -> 3.14.0"),
    ({"cpu": "Abacus 10", "device_kind": "Abacus 10"}, "cpu: Abacus 9 -> Abacus 10"),
    ({"machine": "desk"}, "machine: none -> desk"),
    ({"instruction_sets": ["avx2"]}, "instruction_sets: none -> avx2"),
    ({"cpu_cores": 1}, "cpu_cores: 2 -> 1"),
    ({"cpu_quota": 1.5}, "cpu_quota: none -> 1.5"),
    ({"num_devices": 8}, "num_devices: 1 -> 8"),
    ({"thread_settings": {"OMP_NUM_THREADS": "1"}}, "OMP_NUM_THREADS: none -> 1"),
    ({"xla_flags": "--xla_x=1"}, "xla_flags: none -> --xla_x=1"),
]


@pytest.mark.parametrize(("changes", "said"), OTHERS)
def test_a_run_is_not_resumed_under_other_conditions_unless_that_is_wanted(
    begin, monkeypatch, tmp_path, changes, said
):
    first = begin()
    first.resume(0, [])
    saved = first.to_json(55)
    first.end("interrupted")
    before = (tmp_path / "processes.json").read_text()
    with pytest.raises(UserError) as refused, processes.listed(tmp_path, config_lib.base_config()):
        begin(**changes).resume(55, saved)
    assert said in str(refused.value)
    assert "--resume_elsewhere" in str(refused.value)
    monkeypatch.setenv(processes.ELSEWHERE, "1")
    (tmp_path / "processes.json").write_text(before)
    second = begin(**changes)
    second.resume(55, saved)
    assert said in schema.unlike(second.all)


def test_a_refused_process_leaves_nothing_of_itself(begin, tmp_path):
    begin()
    with pytest.raises(UserError), processes.listed(tmp_path / ".", config_lib.base_config()):
        raise UserError("no")
    (earlier,) = json.loads((tmp_path / "processes.json").read_text())
    assert earlier["ended"] == "killed"
    (tmp_path / "processes.json").unlink()
    with pytest.raises(UserError), processes.listed(tmp_path, config_lib.base_config()):
        raise UserError("no")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("error", "how"), [(KeyboardInterrupt(), "interrupted"), (OSError("disk"), "failed")])
def test_how_a_process_ends_is_listed(begin, tmp_path, error, how):
    begin()
    with pytest.raises(type(error)), processes.listed(tmp_path, config_lib.base_config()) as process_list:
        process_list.resume(0, [])
        raise error
    assert [one["ended"] for one in json.loads((tmp_path / "processes.json").read_text())] == ["killed", how]
    assert not (tmp_path / ".pulse").exists()


def test_work_that_was_lost_is_of_no_conditions(begin):
    """The second was killed before its first checkpoint, or that one was damaged: nothing of it is left."""
    first = begin()
    first.resume(0, [])
    saved = first.to_json(55)
    first.save()
    second = begin(cpu_cores=1)
    kill(second)
    third = begin()
    third.resume(55, saved)
    assert schema.unlike(third.all) == ""
    assert third.num_resumes == 2


def test_work_that_only_a_damaged_checkpoint_had_is_of_no_conditions(begin, monkeypatch):
    first = begin()
    first.resume(0, [])
    saved = first.to_json(55)
    first.save()
    with monkeypatch.context() as allowed:
        allowed.setenv(processes.ELSEWHERE, "1")
        second = begin(cpu_cores=1)
        second.resume(55, saved)
    second.to_json(110)
    second.save()
    third = begin()
    third.resume(55, saved)  # the older checkpoint
    assert [(process.first_step, process.last_step) for process in third.all] == [(0, 55), (0, 0), (55, 55)]
    assert schema.unlike(third.all) == ""


def test_the_same_code_may_be_of_another_commit_or_of_none_that_git_tells(begin):
    first = begin()
    first.resume(0, [])
    saved = first.to_json(55)
    begin(git_commit="abcdef").resume(55, saved)
    second = begin(git_commit=None, git_dirty=None, git_unknown="git: dubious ownership")
    second.resume(55, saved)
    environment = second.environment()
    assert (environment.git_dirty, environment.git_unknown) == (None, "git: dubious ownership")


def test_code_is_dirty_if_that_of_any_process_was(begin):
    first = begin(git_dirty=True)
    first.resume(0, [])
    second = begin()
    second.resume(0, [])
    assert second.environment().git_dirty is True
    assert second.environment().git_commit == "c0ffee"


def test_a_run_of_two_conditions_is_nobodys_record(make_config, tmp_path, monkeypatch):
    config = make_config("configs/mlp.py", batch_size=240, num_epochs=2)

    def run(**more):
        return train_and_evaluate(config, tmp_path / "work", results_dir=tmp_path / "results", **more)

    stopped = run(stop_after=1)
    assert (stopped.status, len(stopped.processes), stopped.mixture) == ("interrupted", 1, "")
    monkeypatch.setattr(machine, "code_sha256", lambda: "edited")
    with pytest.raises(UserError, match=r"code_sha256: \w{64} -> edited"):
        run()
    monkeypatch.setenv(processes.ELSEWHERE, "1")
    record = run()
    assert record.num_resumes == 1
    assert [(process.ended, process.first_step, process.last_step) for process in record.processes] == [
        ("interrupted", 0, 2),
        ("completed", 2, 4),
    ]
    assert record.wall_seconds == pytest.approx(sum(process.wall_seconds for process in record.processes))
    assert record.mixture.endswith("-> edited")
    assert record.name.endswith("-seed0-mixed")
    assert store.read(tmp_path / "results" / "runs" / f"{record.name}.json") == record


def test_the_hash_of_the_code_is_that_of_its_files(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.py").write_text("2")
    monkeypatch.setattr(machine, "PACKAGE", tmp_path)

    def sha256():
        machine.code_sha256.cache_clear()
        return machine.code_sha256()

    try:
        found = {sha256()}
        (tmp_path / "b" / "c.py").write_text("3")
        found.add(sha256())
        (tmp_path / "b" / "c.py").rename(tmp_path / "c.py")
        found.add(sha256())
        (tmp_path / "notes.txt").write_text("no code")
        assert len(found) == 3 and sha256() in found
    finally:
        machine.code_sha256.cache_clear()
