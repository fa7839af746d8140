"""What is told of the machine and its load, and what tells two machines apart."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_records import ENVIRONMENT, EPOCH, make_record, publish

from fmbench.config import REPOSITORY
from fmbench.errors import UserError
from fmbench.records import load, machine, schema, store
from fmbench.system import cgroup
from fmbench.system import load as machine_load

EPYC: dict[str, Any] = {
    "cpu": "AMD EPYC",
    "cpu_stepping": "26.2.1",
    "instruction_sets": ["avx2", "avx512_bf16"],
    "memory_bytes": 25_276_510_208,
    "virtualised": True,
}
CPUINFO = """\
processor\t: 0
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Processor @ 2.10GHz
stepping\t: 8
flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile amx_bf16{}

processor\t: 1
model name\t: another
"""


def environment(**changes) -> schema.Environment:
    return schema.Environment(**ENVIRONMENT | changes)


# The machine.


def test_the_machine_is_told_in_a_line():
    assert environment(**EPYC).machine_title == "AMD EPYC 26.2.1 (2 cores, avx2, avx512_bf16, 24 GiB, virtual)"
    full = environment(
        **EPYC, machine="lab", cpu_cores=1, cpu_quota=0.5, thread_settings={"OMP_NUM_THREADS": "1"}
    ).machine_title
    assert full == (
        "lab: AMD EPYC 26.2.1 (1 core, 0.5 cores' worth of time, avx2, avx512_bf16, 24 GiB, virtual, "
        "OMP_NUM_THREADS=1)"
    )
    assert environment().machine_title == "Abacus 9 (2 cores)"


@pytest.mark.parametrize(
    "other",
    [
        {"cpu": "AMD EPYC 9654"},
        {"cpu_stepping": "25.17.1"},  # Zen 4, which calls itself AMD EPYC too
        {"instruction_sets": ["avx2"]},
        {"cpu_cores": 1},
        {"cpu_quota": 1.5},
        {"memory_bytes": 2**34},
        {"virtualised": False},
        {"thread_settings": {"OMP_NUM_THREADS": "1"}},
        {"machine": "lab"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_no_machine_takes_the_place_of_another(other, tmp_path):
    here, there = make_record(environment=EPYC), make_record(environment=EPYC | other)
    assert here.environment.machine_title != there.environment.machine_title
    for record in (here, there):
        publish(record, tmp_path)
    assert len(store.read_all(tmp_path)) == 2


@pytest.mark.parametrize(
    ("cpu", "slug"),
    [
        ("AMD EPYC", "amd-epyc-2c"),
        ("Intel(R) Xeon(R) Processor", "intel-xeon-2c"),
        ("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", "intel-core-i7-9750h-2-60ghz-2c"),
        ("Apple M2", "apple-m2-2c"),
    ],
)
def test_of_old_records_no_more_is_in_the_name_than_was_recorded(cpu, slug):
    assert environment(cpu=cpu).machine_slug == slug


@pytest.mark.parametrize("known", [{field: value} for field, value in EPYC.items() if field != "cpu"], ids=str)
def test_what_little_is_known_tells_machines_apart(known):
    assert environment(**known).machine_slug != environment().machine_slug


def test_a_machine_that_is_named_has_its_name_and_a_hash():
    named = environment(**EPYC, machine="lab7")
    assert named.machine_slug.startswith("lab7-")
    assert named.machine_slug != environment(**EPYC | {"cpu_stepping": "25.1.1"}, machine="lab7").machine_slug


def test_on_accelerators_the_name_is_theirs():
    assert "epyc" not in make_record(environment=EPYC | {"device_platform": "gpu", "device_kind": "H200"}).name


@pytest.mark.parametrize(("hypervisor", "virtualised"), [(" hypervisor", True), ("", False)])
def test_what_linux_says_of_the_processor(hypervisor, virtualised, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(hypervisor))
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    here = machine.environment()
    assert here.cpu == "Intel(R) Xeon(R) Processor @ 2.10GHz"
    assert (here.cpu_stepping, here.virtualised) == ("6.143.8", virtualised)
    assert here.instruction_sets == ["avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"]


def test_where_nobody_tells_of_the_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    here = machine.environment()
    assert (here.cpu_stepping, here.instruction_sets, here.virtualised) == (None, None, None)


def test_thread_settings_are_those_that_a_person_set(monkeypatch):
    for name in machine.THREAD_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # as fmbench.layers.onednn does
    assert machine.environment().thread_settings == {}
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.environment().thread_settings == {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE"}


def test_the_machine_can_be_named(monkeypatch):
    monkeypatch.setenv("FMBENCH_MACHINE", "lab-7.b")
    assert machine.environment().machine == "lab-7.b"


@pytest.mark.parametrize("name", ["a/b", "..", "a b", "-x", "x" * 41, "ä"])
def test_a_machines_name_fits_a_files(name, monkeypatch):
    monkeypatch.setenv("FMBENCH_MACHINE", name)
    with pytest.raises(UserError, match="the machine's name, by --machine or FMBENCH_MACHINE, is '"):
        machine.environment()


def test_the_software_of_a_row():
    versions = {"jax": "0.12.0", "numpy": "2.5", "onednn-cpu-gomp": "2023.2.0"}
    assert environment(versions=versions).software == ("jax 0.12.0", "onednn-cpu-gomp 2023.2.0")


def test_what_the_seeds_of_a_row_do_not_share_is_told():
    def made(seed, commit, **versions):
        return make_record(seed=seed, environment={"git_commit": commit, "versions": {"jax": "0.12"} | versions})

    assert schema.what_differs([made(0, "a" * 40), made(1, "a" * 40)]) == ""
    runs = [made(0, "c" * 40, numpy="2.5"), made(1, "a" * 40, numpy="2.4"), made(2, None)]
    assert schema.what_differs(runs) == "commits aaaaaaa, ccccccc, not known; numpy 2.4, 2.5, none"


# Control groups.


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes the files of control groups, and of which this process is a member."""

    def write(membership: str, **files: str) -> None:
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cgroup, "MOUNTED", tmp_path)
    return write


def test_the_tightest_quota_counts(groups):
    groups("0::/a/b\n", a__cpu_DOT_max="150000 100000\n", a__b__cpu_DOT_max="max 100000\n")
    assert cgroup.cpu_quota() == 1.5


def test_quotas_of_version_1(groups):
    groups(
        "4:memory:/x\n1:cpu,cpuacct:/\n0::/\n",
        **{"cpu__cpu_DOT_cfs_quota_us": "50000\n", "cpu__cpu_DOT_cfs_period_us": "100000\n"},
    )
    assert cgroup.cpu_quota() == 0.5
    groups("1:cpu:/\n", cpu__cpu_DOT_cfs_quota_us="-1\n")
    assert cgroup.cpu_quota() is None


def test_quotas_of_a_mount_that_is_named_for_all_its_controllers(groups):
    groups(
        "4:cpu,cpuacct:/docker/1\n",
        **{"cpu,cpuacct__cpu_DOT_cfs_quota_us": "250000\n", "cpu,cpuacct__cpu_DOT_cfs_period_us": "100000\n"},
    )
    assert cgroup.cpu_quota() == 2.5


@pytest.mark.parametrize(
    ("quota", "cores"), [("max", 4), (30_000, 1), (100_000, 1), (100_001, 2), (150_000, 2), (900_000, 4)]
)
def test_threads_are_for_the_cores_that_affinity_and_quota_both_allow(groups, monkeypatch, quota, cores):
    groups("0::/a\n", a__cpu_DOT_max=f"{quota} 100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 3, 5})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cgroup.usable_cores() == cores
    with cgroup.threads_within_quota("OMP_NUM_THREADS"):
        assert os.environ.get("OMP_NUM_THREADS") == (None if quota == "max" else str(cores))
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("name", ["PJRT_NPROC", "NPROC"])
def test_threads_that_somebody_has_set_stay(groups, monkeypatch, name):
    groups("0::/a\n", a__cpu_DOT_max="100000 100000\n")
    for variable in ("PJRT_NPROC", "NPROC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "7")
    with cgroup.threads_within_quota("PJRT_NPROC", "NPROC"):
        assert {variable: os.environ.get(variable) for variable in ("PJRT_NPROC", "NPROC")} == {
            "PJRT_NPROC": None,
            "NPROC": None,
        } | {name: "7"}
    assert os.environ[name] == "7"


LIBRARIES = """
import ctypes, os
from pathlib import Path
from fmbench.layers import onednn
from fmbench.system import cgroup, runtime
cgroup.MEMBERSHIP, cgroup.MOUNTED = Path("membership"), Path()
os.sched_getaffinity = lambda pid: {0, 1, 2, 3}
runtime.find_devices()
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
omp = ctypes.CDLL("libgomp.so.1").omp_get_max_threads() if onednn.library() else None
print(threads.count("tf_XLAEigen\\n"), omp)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux tells of threads")
def test_xla_and_onednn_keep_to_the_quota(tmp_path):
    (tmp_path / "membership").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    environment = {name: value for name, value in os.environ.items() if name not in machine.THREAD_SETTINGS}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LIBRARIES]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout in ("3 3\n", "3 None\n")


def test_throttled_time_of_both_versions(groups):
    groups("0::/a\n", a__cpu_DOT_stat="usage_usec 9\nthrottled_usec 2500000\n")
    assert cgroup.throttled_seconds() == 2.5
    groups("1:cpu:/\n", cpu__cpu_DOT_stat="nr_throttled 3\nthrottled_time 1500000000\n")
    assert cgroup.throttled_seconds() == 1.5


def test_without_control_groups_there_is_no_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "none")
    assert (cgroup.cpu_quota(), cgroup.throttled_seconds()) == (None, 0.0)


# The load.


def test_what_happened_between_two_readings():
    start = machine_load.Reading(1.0, 10.0, 2.0, 5)
    assert machine_load.between(start, machine_load.Reading(2.0, 13.0, 2.5, 9)) == (1.5, 3.0, 0.5, 4)
    # Ticks of the system's clock are coarser than those of the process's.
    assert machine_load.between(start, machine_load.Reading(2.0, 9.99, 2.0, 5))[1] == 0.0
    nothing = machine_load.Reading(None, None, None, 5)
    assert machine_load.between(nothing, nothing) == (None, None, None, 0)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells")
def test_other_processes_are_told_from_this_one(monkeypatch):
    ticks = [type("Core", (), dict.fromkeys(("nice", "irq", "softirq", "steal"), 0.0) | core) for core in (
        {"user": 5.0, "system": 1.0, "steal": 0.25}, {"user": 70.0, "system": 0.0}, {"user": 3.0, "system": 1.0}
    )]  # fmt: skip
    used = type("Used", (), {"ru_utime": 6.0, "ru_stime": 1.5, "ru_nivcsw": 7})
    monkeypatch.setattr(machine_load.psutil, "cpu_times", lambda percpu: ticks)
    monkeypatch.setattr(machine_load.resource, "getrusage", lambda who: used)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2})
    monkeypatch.setattr(cgroup, "throttled_seconds", lambda: 0.5)
    assert machine_load.read()[1:] == (2.5, 0.75, 7)


def epochs(*core_seconds: float, **load_of_each) -> list[dict]:
    return [EPOCH | {"train_seconds": 10.0, "train_core_seconds": c} | load_of_each for c in core_seconds]


STAGES: list[dict[str, Any]] = [
    {
        "name": f"stage{number}",
        "num_epochs": 2,
        "learning_rate": 0.1,
        "augment": {},
        "train_seconds": 20.0,
        "train_core_seconds": 20.0,
        "val_accuracy": None,
        "test_accuracy": 0.9,
    }
    for number in (1, 2)
]


@pytest.mark.parametrize(
    ("history", "busy"),
    [
        (epochs(18, 20), False),
        (epochs(8.3, 13.9), True),  # mlp-best's, before anything was noted
        (epochs(0.1, 0.2), False),  # too short to say anything
        (epochs(19, 19, other_core_seconds=0.9), False),  # of 20 core-seconds each
        (epochs(19, 19, other_core_seconds=1.1), True),
        (epochs(19, 19, stolen_core_seconds=0.19), False),
        (epochs(19, 19, stolen_core_seconds=0.21), True),
        (epochs(19, 19, asleep_seconds=0.0), False),
        (epochs(19, 19, asleep_seconds=3.0), True),
        (epochs(19, 19, load_average=2.3), False),  # 1.9 threads of its own
        (epochs(19, 19, load_average=2.5), True),
        (epochs(19, 19, load_average=9.0, other_core_seconds=0.0), False),  # what is counted is known better
    ],
)
def test_a_busy_machine_is_told_from_a_quiet_one(history, busy):
    config = {"num_epochs": len(history)}
    record = make_record(config=config, num_epochs=len(history), history=history)
    assert load.is_busy(record) is busy


def test_stages_do_unequal_work():
    history = epochs(10, 11, 20, 21)
    record = make_record(config={"num_epochs": 4}, num_epochs=4, history=history)
    assert load.core_seconds_spread(record) == 2.1
    staged = make_record(config={"num_epochs": 4}, num_epochs=4, history=history, stages=STAGES)
    assert load.core_seconds_spread(staged) == 1.1


def test_a_run_without_an_epoch_is_not_busy():
    record = make_record(history=[], num_epochs=0)
    assert (load.core_seconds_spread(record), load.is_busy(record)) == (1.0, False)


# From schema 1 to 2.


@pytest.fixture
def old(tmp_path) -> Path:
    """Results with a record under the name that it had in schema 1, and numbers of many digits."""
    path = publish(make_record(train_loss=0.1 + 0.2, train_seconds=5e-324), tmp_path)
    for file in (path, path.with_suffix(".npy")):
        file.rename(file.with_stem("mlp-cpu-float32-seed0"))
    return path.with_stem("mlp-cpu-float32-seed0")


def move(*directories: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "results" / "to_schema_2.py"), *map(str, directories)]
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, env=environ)


def test_a_record_moves_and_loses_nothing(old, tmp_path):
    with pytest.raises(UserError, match=r"must keep its name, which results/to_schema_2\.py gives"):
        store.read_all(tmp_path)
    before = old.read_bytes(), old.with_suffix(".npy").read_bytes()
    assert move(tmp_path).stdout == f"{tmp_path}: moved 1 records\n"
    (path,) = store.read_all(tmp_path)
    assert path.name == "mlp-cpu-abacus-9-2c-float32-seed0.json"
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".json", ".npy"]
    there, here = json.loads(path.read_bytes()), json.loads(before[0])
    assert there == here | {"schema_version": 2}
    assert path.read_bytes() == before[0].replace(b'"schema_version": 1', b'"schema_version": 2')
    assert path.with_suffix(".npy").read_bytes() == before[1]
    assert move(tmp_path).stdout == f"{tmp_path}: moved 0 records\n"


def test_a_record_moves_over_no_other(old, tmp_path):
    there = publish(make_record(schema_version=2), tmp_path)
    before = old.read_bytes(), there.read_bytes()
    done = move(tmp_path)
    assert (done.returncode, "is there already; move one of them away" in done.stderr) == (1, True)
    assert (old.read_bytes(), there.read_bytes()) == before


def test_the_committed_records_are_of_schema_2():
    for results_dir in (REPOSITORY / "results", REPOSITORY / "results" / "cross_validation"):
        assert {record.schema_version for record in store.read_all(results_dir).values()} == {2}
