"""Throughput beside peers: who takes part and when, what becomes of failures, what is kept and shown."""

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_records import ENVIRONMENT, make_record, publish
from pydantic import ValidationError

from fmbench import benchmark
from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.pages import throughput
from fmbench.records.calibration import Calibration
from fmbench.records.schema import Environment
from fmbench.system import peers
from fmbench.throughput import measure, overheads, race, targets, workers
from fmbench.throughput.measurements import (
    Conditions,
    Measurements,
    ModelThroughput,
    Overheads,
    Row,
    Run,
    Sweep,
    better_ways,
    read_measurements,
)
from fmbench.throughput.workers import XLA_ONEDNN, choose_systems

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = ("fmbench_itself", "peer_flax", "peer_torch", "peer_keras")
MLP, CNN1 = (str(REPOSITORY / "configs" / name) for name in ("mlp.py", "cnn1.py"))
CONDITIONS = Conditions(
    created="2026-01-01T00:00:00+00:00",
    environment=Environment(**ENVIRONMENT | {"versions": {"jax": "0.12.0"}}),
    matmul_flops_per_sec={"float32": 1e11, "bfloat16": 5e10},
    memory_bytes_per_sec=5e10,
    rounds=3,
    seconds=2.0,
)


@pytest.fixture
def results_dir(tmp_path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def run(tmp_path, results_dir, monkeypatch, capsys):
    """Runs `fmbench.benchmark` with fake workers, data and machine: exit code, standard output and error."""
    scripts, cache = tmp_path / "benchmarks", tmp_path / "cache"
    for script in SCRIPTS:
        scripts.mkdir(exist_ok=True)
        (scripts / f"{script}.py").symlink_to(Path(__file__).with_name("fake_worker.py"))
    for peer in ("torch", "keras"):
        (scripts / f".venv-{peer}" / "bin").mkdir(parents=True)
        (scripts / f".venv-{peer}" / "bin" / "python").symlink_to(sys.executable)
    (cache / "xla").mkdir(parents=True)
    sample = fashion_mnist.load("sample")
    monkeypatch.setattr(fashion_mnist, "load", lambda source, data_dir: sample)
    for module in (peers, workers):
        monkeypatch.setattr(module, "BENCHMARKS", scripts)
    monkeypatch.setattr(race, "PAUSE", 0.0)
    monkeypatch.setenv("FMBENCH_CACHE", str(cache))
    monkeypatch.setenv("FAKE_WORKERS_LOG", str(tmp_path / "log"))
    for name in ("FMBENCH_PEERS_DIR", "OMP_WAIT_POLICY", "XLA_FLAGS"):  # the suite may have set the second
        monkeypatch.delenv(name, raising=False)

    def run(
        *arguments: str, misbehaving: dict[str, tuple[str, str]] | None = None, platform: str = "cpu"
    ) -> tuple[int, str, str]:
        device = {} if platform == "cpu" else {"device_platform": platform, "device_kind": "Fake H200"}
        machine = CONDITIONS.environment.model_copy(update=device)
        monkeypatch.setattr(
            measure,
            "_in_fresh_process",
            lambda function: (
                machine,
                Calibration(
                    {str(d): f for d, f in CONDITIONS.matmul_flops_per_sec.items()},
                    CONDITIONS.memory_bytes_per_sec or 0.0,
                ),
            ),
        )
        monkeypatch.setenv("FAKE_WORKERS", json.dumps(misbehaving or {}))
        monkeypatch.setattr(sys, "argv", ["benchmark", f"--results_dir={results_dir}", *arguments])
        code = 0
        try:
            benchmark.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def log(tmp_path):
    """What the workers did, in its order."""
    return lambda: [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def models(*flags: str, configs: str = MLP) -> tuple[str, ...]:
    return "--sections=models", f"--configs={configs}", "--rounds=3", *flags


ALL_FLOAT32 = models("--peers=torch,keras", "--dtype=float32")
FLOAT32 = models("--dtype=float32")


def table(results_dir: Path, title: str) -> dict[str, list[str]]:
    """The cells of a section's table, by the first of each line."""
    (section,) = re.findall(
        rf"^### {title}\n(.*?)(?=^##|\Z)", (results_dir / "throughput.md").read_text(), re.MULTILINE | re.DOTALL
    )
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("|")][2:]
    return {line[0].strip().strip("*"): [cell.strip() for cell in line[1:]] for line in lines}


def sections(results_dir: Path) -> dict[str, list[list[str]]]:
    """The cells of each table of the page's last kind of device, without its two first lines, by its title."""
    last = (results_dir / "throughput.md").read_text().rpartition("\n## ")[2]
    return {
        section.partition("\n")[0]: [
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in section.splitlines()
            if line.startswith("|")
        ][2:]
        for section in last.split("\n### ")[1:]
    }


# A race.


def test_systems_take_turns_in_an_order_that_rotates(run, log):
    assert run(*models("--peers=torch", "--dtype=float32"))[0] == 0
    names = [
        ("fmbench_itself float32", "", ""),
        ("peer_flax float32", "", ""),
        ("peer_flax float32", "", XLA_ONEDNN),
        ("peer_torch eager-float32", "", ""),
        ("peer_torch eager-float32", "PASSIVE", ""),
        ("peer_torch compile-float32", "", ""),
        ("peer_torch compile-float32", "PASSIVE", ""),
    ]
    for do, seconds, size in (("train", 2.0, 0), ("infer", 1.0, 1000), ("infer", 0.25, 1), ("infer", 0.25, 32)):
        turns = [
            ((entry["who"], entry["OMP_WAIT_POLICY"], entry["XLA_FLAGS"]), entry["seconds"])
            for entry in log()
            if (entry["do"], entry["size"]) == (do, size)
        ]
        expected = names + names[1:] + names[:1] + names[2:] + names[:2]
        assert turns == [(name, seconds) for name in expected]
    done = [(entry["do"], entry["size"]) for entry in log()][-56:-7]
    infer = [("infer", size) for size in (1000, 1, 32)] * 7
    assert done == infer + [("train", 0)] * 7 + infer
    assert [entry["do"] for entry in log()][-7:] == ["memory"] * 7


def test_a_peer_has_the_better_numbers_of_both_ways_to_wait(run, results_dir):
    misbehaving = {"peer_torch eager-float32": ("", "spin")}
    assert run(*models("--peers=torch", "--dtype=float32"), misbehaving=misbehaving)[0] == 0
    measured = read_measurements(results_dir).models["mlp"]
    (row,) = (row for row in measured.rows if row.system == "PyTorch eager")
    assert (row.wait_policy, row.train_images_per_sec) == ("", [3000, 9000, 6000])
    assert row.train_core_seconds_per_1000 == [1 / 3, 1 / 9, 1 / 6]  # of threads that sleep
    ways = [way for way in measured.ways if way.system == "PyTorch eager"]
    assert [(way.wait_policy, way.train_images_per_sec[0]) for way in ways] == [("", 3000), ("PASSIVE", 2400)]
    assert [way.train_core_seconds_per_1000[0] for way in ways] == [2 / 3, 1 / 3]
    assert not any(way.wait_policy for way in measured.ways if way.system in ("fmbench", "stock Flax"))


def test_small_batches_have_columns_of_their_own_where_they_were_measured(run, results_dir):
    assert run(*FLOAT32)[0] == 0
    measured = read_measurements(results_dir)
    model = measured.models["mlp"]
    assert model.rows[0].small_infer_images_per_sec == {1: [6000] * 3, 32: [30000] * 3}
    page = throughput.render({"cpu": measured})
    assert "| in batches of 1 | fmbench is | in batches of 32 | fmbench is |" in page
    assert "| 2,000 (2,000-2,000) | 3.00x | 10,000 (10,000-10,000) | 3.00x |" in page
    old = [row.model_copy(update={"small_infer_images_per_sec": {}}) for row in model.rows]
    both = measured.model_copy(update={"models": {"mlp": model, "old": model.model_copy(update={"rows": old})}})
    tables = throughput.render({"cpu": both}).partition("### old")
    assert "in batches of 1 |" in tables[0] and "in batches of 1 |" not in tables[2]
    for table_of in tables[::2]:
        lines = [
            line
            for line in table_of.splitlines()
            if line.startswith(("| system", "|:--|--:|--:|--:|--:|--:|--:", "| stock"))
        ]
        assert len({line.count("|") for line in lines}) == 1


def test_a_peer_has_the_better_of_both_ways_at_each_batch_size(run, results_dir):
    assert run(*models("--peers=keras", "--dtype=float32"))[0] == 0
    keras = [row for row in read_measurements(results_dir).models["mlp"].ways if row.system == "Keras"]
    speeds = ({1: [10.0], 32: [9.0]}, {1: [8.0], 32: [11.0]})
    ways = [row.model_copy(update={"small_infer_images_per_sec": s}) for row, s in zip(keras, speeds, strict=True)]
    assert better_ways(ways)[0].small_infer_images_per_sec == {1: [10.0], 32: [11.0]}


def test_a_peer_that_fails_one_way_has_the_other(run, results_dir, monkeypatch):
    monkeypatch.setattr(workers, "WAIT_POLICIES", ("PASSIVE", ""))
    assert run(*models("--peers=keras", "--dtype=float32"))[0] == 0
    keras = [row for row in read_measurements(results_dir).models["mlp"].ways if row.system == "Keras"]
    failed = keras[0].model_copy(update={"failure": "boom", "train_images_per_sec": []})
    assert better_ways([failed, keras[1]]) == [keras[1]]
    assert better_ways([failed, failed]) == [failed]


def test_a_jaxlib_without_onednn_says_so(run, results_dir):
    misbehaving = {"peer_flax float32": (f"job {XLA_ONEDNN}", "flag")}
    assert run(*FLOAT32, misbehaving=misbehaving)[0] == 0
    rows = table(results_dir, "mlp")
    assert rows["stock Flax, oneDNN float32"][0].startswith("ended with exit code 1: F1 parse.cc:1\\] Unknown")
    assert rows["stock Flax float32"][0] == "4,000 (2,000-6,000)"


def test_on_accelerators_nobody_waits_for_openmp():
    systems = choose_systems(("torch",), ("float32",), "gpu")
    assert [system.name for system in systems] == [
        *("fmbench", "stock Flax", "PyTorch eager", "PyTorch compile", "PyTorch graph")
    ]
    assert not any(system.wait_policy for system in systems)


def test_a_persons_own_policy_is_fmbenchs_alone():
    systems = choose_systems(("torch",), ("float32",))
    own = {"OMP_WAIT_POLICY": "ACTIVE", "XLA_FLAGS": "--xla_one=1"}
    policies = {system.title: system.environ(own).get("OMP_WAIT_POLICY") for system in systems}
    assert policies["fmbench float32"] == "ACTIVE"
    assert (policies["PyTorch eager float32"], policies["PyTorch eager float32 (passive waiting)"]) == (
        None,
        "PASSIVE",
    )
    assert systems[2].environ(own)["XLA_FLAGS"] == f"--xla_one=1 {XLA_ONEDNN}"


def test_all_are_ready_and_proven_equal_before_the_first_compiles(run, log):
    assert run(*ALL_FLOAT32)[0] == 0
    dos = [entry["do"] for entry in log()]
    assert dos[:19] == ["job"] * 9 + ["logits"] * 9 + ["job"]  # the last is the first to compile cold
    jobs = {entry["who"]: entry for entry in log()[:9]}
    assert jobs["peer_torch eager-float32"]["optimizer"]["eps"] == 1e-7
    for job in jobs.values():
        assert (job["model"], job["arguments"], job["batch_size"], job["infer_batch_size"]) == (
            "mlp",
            {},
            1000,
            1000,
        )
        assert (job["normalization"], job["config"], job["copies"]) == ("symmetric", MLP, 1)


def test_jobs_say_what_a_step_does(run, log):
    configs = f"{REPOSITORY / 'configs' / 'speedrun.py'}:94,{CNN1}"
    assert run(*FLOAT32, f"--configs={configs}", "--rounds=1")[0] == 0
    jobs = {entry["model"]: entry for entry in log() if entry["do"] == "job"}
    recipe = jobs["speedrun"]
    assert (recipe["label_smoothing"], recipe["ema_decay"], recipe["grad_clip_norm"]) == (0.1, 0.0, 0.0)
    assert recipe["selection"] == {"easy": 0.5, "keep": 0.2, "after_epochs": 1}
    assert {name: value for name, value in recipe["augment"].items() if value} == {"flip": True, "crop_padding": 1}
    assert recipe["optimizer"]["keep_norm"] is True
    assert not any(jobs["cnn1"]["augment"].values())  # in its first stage; in its second there is some


def test_row_has_medians_spread_and_ratios_of_medians(run, results_dir):
    assert run(*ALL_FLOAT32)[0] == 0
    rows = table(results_dir, "mlp")
    assert list(rows)[:2] == ["fmbench float32", "stock Flax float32"]
    # 12,000 images/s at 1 MFLOP are 12 GFLOP/s of 100; at 2 MB 24 GB/s of 50, which is the nearer limit.
    assert rows["fmbench float32"] == [
        *("12,000 (6,000-18,000)", "1.00x", "60,000 (60,000-60,000)", "1.00x"),
        *("6,000 (6,000-6,000)", "1.00x", "30,000 (30,000-30,000)", "1.00x", "0.167"),
        *("12", "12.0", "24", "48.0", "100", "8.0 / 1.0", "-"),
    ]
    assert rows["stock Flax float32"][:4] == ["4,000 (2,000-6,000)", "3.00x", "20,000 (20,000-20,000)", "3.00x"]
    assert rows["PyTorch compile float32"][14] == "8.0 / -"  # its cache is as new as the others', and not kept


def test_dtypes_and_peers_that_were_asked_for_and_always_the_yardstick(run, results_dir):
    assert run(*models("--dtype=bfloat16", "--peers=keras"))[0] == 0
    flax = ["stock Flax bfloat16", "stock Flax, oneDNN bfloat16"]
    names = ["fmbench float32", "fmbench bfloat16", *flax, "Keras bfloat16"]
    rows = table(results_dir, "mlp")
    assert list(rows) == names
    assert rows["fmbench bfloat16"][10] == "24.0"  # of the bfloat16 product


def test_caches_of_the_workers_are_copies_without_compiled_programs(tmp_path, monkeypatch):
    for name in ("2017-08-31", "xla"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    monkeypatch.setenv("FMBENCH_CACHE", str(tmp_path / "cache"))
    environ = workers.fresh_caches(tmp_path / "copy")
    assert environ["FMBENCH_CACHE"] == str(tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["2017-08-31"]
    assert (tmp_path / "copy" / "2017-08-31").resolve() == tmp_path / "cache" / "2017-08-31"


# Kinds of devices.


def test_a_gpu_has_its_own_file_and_its_own_part_of_the_page(run, results_dir, log):
    assert run(*FLOAT32)[0] == 0
    on_cpus = (results_dir / "throughput.json").read_bytes()
    page = (results_dir / "throughput.md").read_text()
    assert "## GPU\n\nNot measured yet." in page
    code, _, stderr = run(*ALL_FLOAT32, platform="gpu")
    assert code == 0
    assert (
        "keras is left out: benchmarks/setup_peers.sh makes it a TensorFlow for CPUs, and this is a gpu.\n"
        in stderr
    )
    assert (results_dir / "throughput.json").read_bytes() == on_cpus
    both = (results_dir / "throughput.md").read_text()
    assert both.startswith(page.partition("## GPU")[0])
    assert "## GPU: Fake H200\n" in both
    assert [line[0] for line in sections(results_dir)["mlp"]] == [
        *("**fmbench float32**", "stock Flax float32"),
        *(f"PyTorch {mode} float32" for mode in ("eager", "compile", "graph")),
    ]
    platforms = [(entry["who"].partition(" ")[0], entry["platform"]) for entry in log() if entry["do"] == "job"]
    assert ("peer_torch", "cpu") not in platforms and ("peer_torch", "gpu") in platforms
    (results_dir / "throughput-gpu.json").unlink()
    assert run("--check")[0] == 1
    assert run("--render")[0] == 0
    assert (results_dir / "throughput.md").read_text() == page


@pytest.mark.parametrize(("platform", "count"), [("cpu", 5), ("gpu", 7), ("tpu", 7)])
def test_sections_by_default(run, monkeypatch, platform, count):
    monkeypatch.setattr(benchmark, "measure_overheads", lambda scratch: [])
    monkeypatch.setattr(measure, "measure_layers", lambda *of: None)
    _, stdout, _ = run(f"--configs={MLP}", "--dtype=float32", "--rounds=1", platform=platform)
    assert stdout.partition(": ")[0] == ", ".join(benchmark.SECTIONS[:count])


def test_a_named_interpreter_is_taken_for_a_peer(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FMBENCH_PEERS_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("FMBENCH_TORCH_PYTHON", sys.executable)
    assert run(*models("--peers=torch", "--dtype=float32"))[0] == 0
    monkeypatch.setenv("FMBENCH_TORCH_PYTHON", "python-that-is-not-there")
    code, _, stderr = run(*models("--peers=torch"))
    assert code == 2 and "torch has no environment at python-that-is-not-there" in stderr
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "python-that-is-not-there").symlink_to(sys.executable)
    assert peers.interpreter("torch") == tmp_path / "python-that-is-not-there"


# Failures.


@pytest.mark.parametrize(
    ("misbehaviour", "reason"),
    [
        (("train", "die"), "ended with exit code 1: out of \\| memory"),
        (("compile", "die"), "ended with exit code 1: out of \\| memory"),
        (("train", "killed"), "was killed, perhaps for want of memory: all systems' processes are there at once"),
        (("memory", "error"), "no such layer"),
        (("job", "error"), "no such layer"),
        (("train", "hang"), "no answer to 'train' within 1 s"),
        (("train", "nonsense"), 'answered \'{"images": "many"}\''),
        (("job", "params"), "another net: 11 parameters, fmbench has 10"),
        (("shift", "0.0025"), "another net: its logits differ from fmbench's by up to 0.0025"),
        (("shift", "nan"), "its logits are not 64 x 10 finite numbers"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_system_that_fails_says_why_and_the_rest_goes_on(run, results_dir, monkeypatch, misbehaviour, reason):
    monkeypatch.setattr(workers, "TIMEOUT", 1.0)
    start = time.perf_counter()
    code, _, stderr = run(*FLOAT32, "--seconds=0.1", misbehaving={"peer_flax float32": misbehaviour})
    assert code == 0
    assert time.perf_counter() - start < 30  # fake workers hang for a minute
    rows = table(results_dir, "mlp")
    assert rows["stock Flax float32"] == [reason, *[""] * 15]
    assert rows["fmbench float32"][0] == "12,000 (6,000-18,000)"
    assert f"stock Flax float32 failed: {reason}".replace("\\", "") in stderr


def test_bfloat16_may_differ_by_a_tenth_of_the_range(run, results_dir):
    misbehaving = {"fmbench_itself bfloat16": ("shift", "0.09"), "peer_flax bfloat16": ("shift", "0.11")}
    assert run(*models("--dtype=bfloat16"), misbehaving=misbehaving)[0] == 0
    rows = table(results_dir, "mlp")
    assert rows["fmbench bfloat16"][-1] == "9e-02"
    assert rows["stock Flax bfloat16"][0].startswith("another net")


def test_nothing_is_compared_with_a_yardstick_that_fails_before(run, results_dir):
    assert run(*FLOAT32, misbehaving={"fmbench_itself float32": ("logits", "die")})[0] == 0
    assert (
        table(results_dir, "mlp")["stock Flax float32"][0] == "nothing to compare it with: fmbench float32 failed"
    )


def test_a_yardstick_that_fails_later_leaves_speeds_without_ratios(run, results_dir):
    assert run(*FLOAT32, misbehaving={"fmbench_itself float32": ("train", "die")})[0] == 0
    assert table(results_dir, "mlp")["stock Flax float32"][:2] == ["4,000 (2,000-6,000)", "-"]


def test_without_weights_nothing_is_replaced(run, results_dir, monkeypatch):
    assert run(*FLOAT32)[0] == 0
    before = read_measurements(results_dir)
    monkeypatch.setenv("FAKE_WEIGHTS", "fail")
    code, _, stderr = run(*FLOAT32)
    assert code == 2
    assert stderr.splitlines()[-1].endswith("no weights to start from: no weights today.")
    assert read_measurements(results_dir) == before


# What is kept.


def test_what_is_not_measured_again_stays(run, results_dir):
    assert run(*FLOAT32, f"--configs={MLP},{CNN1}")[0] == 0
    assert run("--sections=dataset_sizes", "--rounds=1")[0] == 0
    before = read_measurements(results_dir)
    assert run(*models("--dtype=bfloat16", "--rounds=1"))[0] == 0
    after = read_measurements(results_dir)
    assert (after.models["cnn1"], after.dataset_sizes) == (before.models["cnn1"], before.dataset_sizes)
    assert [row.dtype for row in after.models["mlp"].rows] == ["float32", *["bfloat16"] * 3]
    assert (after.models["mlp"].conditions.rounds, after.models["cnn1"].conditions.rounds) == (1, 3)


def test_ctrl_c_keeps_finished_models_and_leaves_no_worker(run, results_dir, log):
    interrupting = {"peer_flax float32": ("train cnn1", "interrupt")}
    code, _, stderr = run(*FLOAT32, f"--configs={MLP},{CNN1}", misbehaving=interrupting)
    assert (code, stderr.splitlines()[-1]) == (130, "fmbench.benchmark: interrupted; what was complete is kept.")
    assert list(read_measurements(results_dir).models) == ["mlp"]
    measured = {"cpu": read_measurements(results_dir)}
    assert (results_dir / "throughput.md").read_text() == throughput.render(measured)
    for pid in {entry["pid"] for entry in log()}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_json_goes_to_standard_output_alone_and_to_no_file(run, results_dir):
    code, stdout, _ = run("--json", f"--configs={MLP}", "--rounds=3", "--dtype=float32", "--peers=keras")
    assert code == 0
    rows = [json.loads(line) for line in stdout.splitlines()]
    assert [(row["model"], row["system"], row["dtype"]) for row in rows] == [
        ("mlp", system, "float32") for system in ("fmbench", "stock Flax", "stock Flax, oneDNN", "Keras")
    ]
    keras = {
        "batch_size": 1000,
        "train_images_per_sec": 8000,
        "train_images_per_sec_min": 4000,
        "train_images_per_sec_max": 12000,
        "train_ratio": 1.5,
        "infer_images_per_sec": 40000,
        "infer_ratio": 1.5,
        "small_infer_images_per_sec": {"1": 4000, "32": 20000},
        "small_infer_ratio": {"1": 1.5, "32": 1.5},
        "core_seconds_per_1000": 0.25,
        "train_flops_per_sec": 8e9,
        "matmul_share": 0.08,
        "peak_memory_bytes": 10**8,
        "failure": None,
    }
    assert {key: rows[3][key] for key in keras} == keras
    assert not results_dir.exists()


def test_json_tells_of_failures(run):
    _, stdout, _ = run("--json", *FLOAT32, misbehaving={"peer_flax float32": ("train", "die")})
    row = json.loads(stdout.splitlines()[1])
    assert (row["train_images_per_sec"], row["failure"]) == (None, "ended with exit code 1: out of | memory")


# The other sections.


def test_sweeps(run, results_dir, log):
    assert run("--sections=batch_sizes,dataset_sizes", "--rounds=1", "--seconds=1")[0] == 0
    trained = [(entry["model"], entry["batch_size"], entry["copies"]) for entry in log() if entry["do"] == "train"]
    sizes = (32, 64, 128, 256, 512, 1024, 2048)
    assert trained == [(model, size, 1) for model in ("cnn1", "mlp") for size in sizes] + [
        ("mlp", 1000, copies) for copies in (1, 4, 16)
    ]
    measured = read_measurements(results_dir)
    assert measured.dataset_sizes and measured.batch_sizes
    assert [row.peak_memory_bytes for row in measured.dataset_sizes.rows] == [10**8, 4 * 10**8, 16 * 10**8]
    assert [row.batch_size for row in measured.batch_sizes.rows] == [*sizes, *sizes]
    assert {entry["do"] for entry in log()} == {"job", "compile", "train", "memory"}


def test_seeds_together(run, results_dir, log):
    assert run("--sections=seeds_together", "--rounds=1", platform="gpu")[0] == 0
    assert [entry["seeds"] for entry in log() if entry["do"] == "train"] == [1, 2, 5, 10, 20]
    shown = sections(results_dir)["Seeds together"]
    assert [line[2:] for line in shown] == [
        [str(seeds), "6,000 (6,000-6,000)", "0.333", f"{100 * seeds:,}"] for seeds in (1, 2, 5, 10, 20)
    ]


def test_arms_differ_in_one_thing_each_and_share_no_cache(run, results_dir, log, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    assert run("--sections=arms", "--rounds=1", f"--configs={CNN1}", platform="gpu")[0] == 0
    trained = {entry["pid"]: entry for entry in log() if entry["do"] == "train"}.values()
    assert len({entry["FMBENCH_CACHE"] for entry in trained}) == len(trained) == 18
    assert all(entry["XLA_FLAGS"].startswith("--xla_dump_to=x") for entry in trained)
    ways = [
        (
            entry["dtype"],
            entry["steps_per_call"],
            entry["XLA_FLAGS"].removeprefix("--xla_dump_to=x").strip(),
            entry["JAX_DEFAULT_MATMUL_PRECISION"],
        )
        for entry in trained
    ]
    assert [entry["pipeline"] for entry in trained] == ["resident"] * 5 + ["grain"] + ["resident"] * 12
    default = ("float32", 0, "", "")
    assert ways[:8] == [
        default,
        *(("float32", steps, "", "") for steps in (1, 100, 234, 702)),  # 60,000 // 256 are an epoch
        default,
        ("bfloat16", 0, "", ""),
        ("float32", 0, "", "highest"),
    ]
    assert [way[:2] + way[3:] for way in ways[8:]] == [("float32", 0, "")] * 10
    assert len({way[2] for way in ways[8:]}) == 10 and all(way[2].startswith("--xla_gpu_") for way in ways[8:])


def test_an_arm_whose_flag_is_unknown_says_so_and_the_rest_is_kept(run, results_dir):
    flag = "--xla_gpu_experimental_enable_conv_fusion=true"
    misbehaving = {"fmbench_itself float32": (f"compile {flag}", "flag")}
    flags = ("--sections=arms", "--rounds=3", f"--configs={CNN1}")
    assert run(*flags, misbehaving=misbehaving, platform="gpu")[0] == 0
    shown = {line[1]: line[2:] for line in sections(results_dir)["Arms"]}
    assert shown["default"] == ["float32", "12,000 (6,000-18,000)", "1.00x", "8.0", "100"]
    assert shown["cuDNN graph fusion"] == [
        "float32",
        f"ended with exit code 1: F1 parse.cc:1\\] Unknown flag in XLA_FLAGS: {flag}",
        *("-", "-", "-"),
    ]
    assert shown["NHWC forced"][2] == "1.00x"
    # The arms of another model are put beside them.
    assert run("--sections=arms", "--rounds=1", f"--configs={MLP}", platform="gpu")[0] == 0
    assert list(read_measurements(results_dir, "gpu").arms) == ["cnn1", "mlp"]


def test_overheads_are_read_from_the_record(tmp_path, monkeypatch):
    record = make_record(wall_seconds=20.0, train_seconds=18.0)
    publish(record, tmp_path / "made")
    copy = f"cp -r {shlex.quote(str(tmp_path / 'made'))}"
    monkeypatch.setattr(overheads, "_main_command", lambda *at: ["sh", "-c", f"{copy} {at[-1] / 'results'}"])
    run = overheads._run_main("mlp", 5, "warm", tmp_path, dict(os.environ))
    assert (run.entry, run.num_epochs, run.compile_cache, run.train_share) == ("mlp", 5, "warm", 0.9)
    assert (run.setup_seconds, run.first_step_seconds) == (1.0, getattr(record, "first_step_seconds", None))
    assert 0 < run.process_seconds < 10
    monkeypatch.setattr(overheads, "_main_command", lambda *at: ["sh", "-c", "echo out of disk >&2; exit 3"])
    with pytest.raises(UserError, match="failed: out of disk"):
        overheads._run_main("mlp", 5, "warm", tmp_path, dict(os.environ))


def test_runs_are_cold_then_warm_with_one_new_cache(tmp_path, monkeypatch):
    calls: list[tuple] = []
    one = Run(**RUN)

    def note(*call: Any) -> Run:
        calls.append(call[:3] if call[2] in ("cold", "warm") else ("fill", *call[:2]))
        assert call[-1]["FMBENCH_CACHE"] == str(tmp_path / "scratch" / "overheads-cache")
        return one

    (tmp_path / "scratch").mkdir()
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("FMBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(overheads, "_run_main", note)
    monkeypatch.setattr(overheads, "_fill_compile_cache", note)
    assert overheads.measure_overheads(tmp_path / "scratch") == [one] * 3
    assert calls == [("mlp", 5, "cold"), ("mlp", 5, "warm"), ("fill", "vgg_like", 1), ("vgg_like", 1, "warm")]


def test_filling_the_compile_cache_stops_a_run_that_has_compiled(tmp_path, monkeypatch):
    training = "trap 'exit 130' TERM; echo 'mlp seed 0: 7 trainable parameters' >&2; while :; do sleep 0.05; done"
    monkeypatch.setattr(overheads, "_main_command", lambda *at: ["sh", "-c", training])
    overheads._fill_compile_cache("mlp", 1, tmp_path, dict(os.environ))
    monkeypatch.setattr(overheads, "_main_command", lambda *at: ["sh", "-c", "echo no data >&2; exit 2"])
    with pytest.raises(UserError, match="no data"):
        overheads._fill_compile_cache("mlp", 1, tmp_path, dict(os.environ))


# What is shown.

RUN: dict[str, Any] = {
    "entry": "vgg_like",
    "num_epochs": 1,
    "compile_cache": "warm",
    "process_seconds": 110.0,
    "first_step_seconds": 4.0,
    "wall_seconds": 100.0,
    "train_seconds": 97.0,
    "eval_seconds": 1.0,
    "checkpoint_seconds": 0.5,
    "compile_seconds": 0.5,
    "setup_seconds": 1.0,
}


def make_measurements(
    speeds: dict[tuple[str, str], float | None], *, jax: str = "0.12.0", **run: Any
) -> Measurements:
    """vgg_like at the given images/s (None: failed), one warm run of it, and the same of mlp."""
    rows = [
        Row(
            model="vgg_like",
            system=system,
            dtype=dtype,  # type: ignore[arg-type]
            batch_size=500,
            failure=None if speed else "no\nluck",
            train_images_per_sec=[speed] * 3 if speed else [],
        )
        for (system, dtype), speed in speeds.items()
    ]
    environment = CONDITIONS.environment.model_copy(update={"versions": {"jax": jax}})
    conditions = CONDITIONS.model_copy(update={"environment": environment})
    model = ModelThroughput(
        conditions=conditions,
        config_file="configs/vgg_like.py",
        batch_size=500,
        infer_batch_size=1000,
        flops_per_image=1e8,
        rows=rows,
    )
    runs = [Run(**RUN | run | {"entry": entry}) for entry in ("vgg_like", "mlp")]
    return Measurements(
        models={"vgg_like": model},
        overheads=Overheads(conditions=conditions, runs=runs),
        batch_sizes=Sweep(conditions=CONDITIONS, rows=rows[:1]),
    )


def of_targets(measurements: Measurements, platform: str = "cpu") -> dict[str, tuple[str, str]]:
    """Measured value and verdict of each target, in the order of the tables."""
    section = throughput.render({platform: measurements}).partition(f"\n## {platform.upper()}")[2]
    lines = section.partition("### Targets")[2].partition("\n##")[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    rows = [row for row in cells if row[2] != "measured"]
    return {f"{what} {bound}": (measured, verdict) for what, bound, measured, verdict in rows}


FASTER: dict[tuple[str, str], float | None] = {
    ("fmbench", "float32"): 300.0,
    ("fmbench", "bfloat16"): 330.0,
    ("stock Flax", "float32"): 120.0,
    ("PyTorch eager", "float32"): 200.0,
    ("PyTorch compile", "float32"): 310.0,
    ("Keras", "float32"): 250.0,
    ("PyTorch eager", "bfloat16"): 340.0,
    ("PyTorch compile", "bfloat16"): 300.0,
}


def test_targets_are_met_missed_or_open():
    shown = of_targets(make_measurements(FASTER))
    assert list(shown.values())[:4] == [
        ("2.50x", "met"),  # exactly the bound
        ("1.50x", "met"),
        ("1.20x", "met"),
        ("0.97x", "**missed**"),  # the better of each: bfloat16 against eager
    ]
    assert shown[
        "vgg_like: fmbench in float32 / the best of PyTorch eager, PyTorch compile, Keras in float32 ≥ 1.0x"
    ] == ("0.97x", "**missed**")
    assert [value for what, value in shown.items() if what.startswith("cnn1")] == [("-", "-")]
    assert list(shown.values())[5:7] == [("4.0 s", "**missed**"), ("97.0 %", "met")]
    (of_another_jax,) = (value for what, value in shown.items() if "on jax 0.10" in what)
    assert of_another_jax == ("-", "-")


def test_targets_stand_by_the_machine_that_measured_them():
    measured = make_measurements(FASTER)
    assert measured.overheads
    environment = CONDITIONS.environment.model_copy(update={"cpu": "Slide rule", "cpu_cores": 1})
    conditions = CONDITIONS.model_copy(update={"environment": environment})
    overheads = measured.overheads.model_copy(update={"conditions": conditions})
    text = throughput.render({"cpu": measured.model_copy(update={"overheads": overheads})})
    parts = (
        text.partition("### Targets")[2]
        .partition("\n##")[0]
        .split("| | target | measured | |\n|:--|--:|--:|:--|\n")
    )
    heads = [part.strip().splitlines()[-1] for part in parts[:-1]]
    here = CONDITIONS.environment
    assert heads == [f"On {here.cpu} ({here.cpu_cores} cores):", "On Slide rule (1 core):", "Not measured:"]
    tables = [part.split("\n\n")[0].splitlines() for part in parts[1:]]
    assert [line.split(":")[0] for line in tables[0]] == ["| vgg_like"] * 5
    assert [line.split(":")[0] for line in tables[1]] == ["| mlp", "| vgg_like", "| vgg_like"]
    assert all(line.endswith("| - | - |") for line in tables[2])
    assert sum(map(len, tables)) == len(targets.SPEED) + len(targets.RUN)
    # A machine's table of speeds names it, too.
    assert f"\n\n[vgg_like](../configs/vgg_like.py); {here.cpu} ({here.cpu_cores} cores); batch 500" in text


def test_a_gpu_has_its_own_targets():
    best: dict[tuple[str, str], float | None] = FASTER | {
        ("PyTorch graph", "float32"): 100.0,
        ("PyTorch graph", "bfloat16"): 220.0,
    }
    shown = of_targets(make_measurements(best), "gpu")
    assert len(shown) == 8
    what = "vgg_like: fmbench in its better dtype / the best of PyTorch eager, PyTorch compile, PyTorch graph in "
    assert shown[f"{what}float32 or bfloat16 ≥ 1.0x"] == ("0.97x", "**missed**")  # 330 / 340
    best[("fmbench", "bfloat16")] = 510.0
    assert list(of_targets(make_measurements(best), "gpu").values())[:2] == [("1.50x", "met"), ("1.50x", "met")]
    assert of_targets(Measurements(), "gpu") == dict.fromkeys(shown, ("-", "-"))


@pytest.mark.parametrize(
    ("bandwidth", "bytes_per_image", "share"),
    [(1e10, 1e6, 0.3), (1e9, 1e6, 0.3), (1e9, 2e6, 0.6), (None, 1e6, None), (1e9, None, None)],
)
def test_the_roofline_is_the_nearer_limit(bandwidth, bytes_per_image, share):
    """300 images/s of 100 MFLOP are 0.3 of 100 GFLOP/s; those of 2 MB are 0.6 of 1 GB/s."""
    model = make_measurements(FASTER).models["vgg_like"]
    conditions = model.conditions.model_copy(update={"memory_bytes_per_sec": bandwidth})
    own = model.rows[0].model_copy(update={"bytes_per_image": bytes_per_image})
    other = model.rows[2].model_copy(update={"train_images_per_sec": [150.0]})  # without bytes of its own
    model = model.model_copy(update={"conditions": conditions, "rows": [own, other]})
    assert model.roofline_share(own) == (share and pytest.approx(share))
    assert model.roofline_share(other) == (share and pytest.approx(share / 2))


def test_the_older_jax_has_its_own_target():
    shown = of_targets(make_measurements(FASTER, jax="0.10.2"))
    values = [next(value for what, value in shown.items() if f"on jax {jax}" in what) for jax in ("0.12", "0.10")]
    assert values == [("-", "-"), ("2.50x", "**missed**")]


@pytest.mark.parametrize("speed", [None, "absent"])
def test_beating_some_peers_is_not_beating_the_best(speed):
    speeds = FASTER | {("PyTorch compile", "float32"): None}
    if speed == "absent":
        del speeds["PyTorch compile", "float32"]
    shown = of_targets(make_measurements(speeds))
    assert [value for what, value in shown.items() if "PyTorch compile, Keras" in what] == [("-", "-")] * 10


def test_runs_without_first_step_or_warm_cache_leave_targets_open():
    def of_runs(**run: Any) -> list[tuple[str, str]]:
        shown = of_targets(make_measurements(FASTER, **run)).items()
        return [value for what, value in shown if "wall time" in what or "caches warm" in what]

    assert of_runs(first_step_seconds=None).count(("-", "-")) == 1
    assert of_runs(compile_cache="cold") == [("-", "-")] * 3


def test_rendering_depends_on_the_measurements_alone(results_dir):
    measurements = make_measurements(FASTER | {("Keras", "bfloat16"): None})
    throughput.write(measurements, results_dir)
    first = (results_dir / "throughput.md").read_bytes()
    assert read_measurements(results_dir) == measurements
    assert throughput.render({"cpu": read_measurements(results_dir)}).encode() == first


def test_a_row_has_either_speeds_or_a_failure():
    fields: dict[str, Any] = {"model": "mlp", "system": "Keras", "dtype": "float32", "batch_size": 500}
    wrongs: list[dict[str, Any]] = [{}, {"failure": "no luck", "train_images_per_sec": [1.0]}]
    for wrong in wrongs:
        with pytest.raises(ValidationError, match="either train_images_per_sec or a failure"):
            Row(**fields, **wrong)


def test_check_and_render(run, results_dir):
    throughput.write(make_measurements(FASTER), results_dir)
    path = results_dir / "throughput.md"
    good = path.read_text()
    assert run("--check")[0] == 0
    path.write_text(good.replace("120", "110"))
    code, _, stderr = run("--check")
    assert (code, len(stderr.splitlines())) == (1, 1)
    assert run("--render")[0] == 0
    assert path.read_text() == good
    path.unlink()
    assert run("--check")[0] == 1


# Mistakes.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--peers=tensorflow",), "--peers=tensorflow: there is no such choice; choose from torch, keras."),
        (("--sections=models,speed",), "--sections=speed: there is no such choice; choose from models, overheads"),
        (("--dtype=float16",), "--dtype=float16: there is no such choice; choose from float32, bfloat16."),
        (("--dtype=",), "--dtype is empty."),
        (("--rounds=0",), "--rounds=0"),
        (("--seconds=nan",), "--seconds=nan"),
        (("--configs=configs/lenet.py",), "no config 'configs/lenet.py'"),
        (("--configs=configs/resnet.py",), "needs an argument, as in resnet:20"),
        (("--json", "--sections=overheads"), "--json prints the section models only"),
        (("--render",), "throughput.json does not exist; measure first."),
        (("--results_dir=pyproject.toml",), "--results_dir=pyproject.toml cannot be written to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_end_in_one_line_and_exit_code_2(run, results_dir, monkeypatch, flags, message):
    monkeypatch.chdir(REPOSITORY)
    code, stdout, stderr = run(*flags)
    assert (code, stdout, len(stderr.splitlines())) == (2, "", 1)
    assert message in stderr
    assert not results_dir.exists()


def test_a_peer_without_environment_names_the_command_that_makes_it(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FMBENCH_PEERS_DIR", str(tmp_path / "elsewhere"))
    code, _, stderr = run(*models("--peers=torch"))
    assert code == 2
    python = tmp_path / "elsewhere" / ".venv-torch" / "bin" / "python"
    assert stderr == (
        f"fmbench.benchmark: torch has no environment at {python}; run benchmarks/setup_peers.sh torch, or name "
        "an interpreter that has it in FMBENCH_TORCH_PYTHON.\n"
    )


def test_damaged_measurements_are_named_before_anything_is_measured(run, results_dir, tmp_path):
    throughput.write(make_measurements(FASTER), results_dir)
    path = results_dir / "throughput.json"
    path.write_text(path.read_text().replace('"batch_size": 500', '"batch_size": "500"'))
    code, _, stderr = run(*FLOAT32)
    assert code == 2
    assert f"{path}: not valid measurements, field 'models.vgg_like.batch_size'" in stderr
    assert not (tmp_path / "log").exists()


def test_workers_find_this_fmbench_first_and_what_their_caller_finds(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("FMBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", "/site")
    assert workers.fresh_caches(tmp_path / "a")["PYTHONPATH"] == f"{REPOSITORY}{os.pathsep}/site"
    monkeypatch.delenv("PYTHONPATH")
    assert workers.fresh_caches(tmp_path / "b")["PYTHONPATH"] == str(REPOSITORY)
