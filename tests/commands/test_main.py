"""Whole runs as a user starts, repeats and mistypes them, in processes of their own."""

import json
import re
import time

import pytest

from fmbench import config
from fmbench.models import exported
from fmbench.records import store

QUICK = (
    "--config=configs/mlp.py",
    "--config.data.source=sample",
    "--config.batch_size=80",
    "--config.num_epochs=2",
)


def places(path):
    return f"--workdir={path / 'work'}", f"--results_dir={path / 'results'}"


def test_piped_output_is_plain_lines(run_main, tmp_path):
    done = run_main(*QUICK, *places(tmp_path))
    assert re.search(r"^epoch 2/2: loss [\d.]+, train accuracy [\d.]+%", done.stderr, re.MULTILINE)
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    assert " 2 epochs of " in done.stderr
    assert "convolutions" not in done.stderr  # an MLP has none
    (record,) = (tmp_path / "results" / "runs").glob("*.json")
    assert f"\nrecord: {record}\nmodel: {tmp_path / 'work' / 'model'}\n" in done.stderr
    assert f"\nnext: fmbench evaluate --model={tmp_path / 'work'}\n" in done.stderr


def test_seconds_to_the_first_step_begin_with_the_process(run_main, tmp_path):
    start = time.perf_counter()
    assert run_main(*QUICK, *places(tmp_path)).returncode == 0
    lifetime = time.perf_counter() - start
    (path,) = (tmp_path / "results" / "runs").glob("*.json")
    record = store.read(path)
    assert record.first_step_seconds is not None
    # Loading the libraries comes first, and takes a second at the very least.
    assert record.setup_seconds + record.compile_seconds + 0.5 < record.first_step_seconds < lifetime


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again_but_its_record_comes_back(run_main, tmp_path):
    assert run_main(*QUICK, *places(tmp_path)).returncode == 0
    (path,) = (tmp_path / "results" / "runs").glob("*.json")
    original = path.read_text()
    path.write_text("{}")
    again = run_main(*QUICK, *places(tmp_path))
    assert (again.returncode, path.read_text()) == (0, original)
    assert "already finished" in again.stdout
    # A damaged record in the work directory comes again from the last checkpoint.
    (tmp_path / "work" / "record.json").write_text("{")
    restored = run_main(*QUICK, *places(tmp_path))
    assert restored.returncode == 0, restored.stderr
    assert store.read(path).test_accuracy == json.loads(original)["test_accuracy"]


@pytest.mark.slow
def test_another_config_is_refused_with_the_difference_and_force_starts_anew(run_main, tmp_path):
    assert run_main(*QUICK, *places(tmp_path)).returncode == 0
    other = (*QUICK, "--config.optimizer.learning_rate=0.01", *places(tmp_path))
    refused = run_main(*other)
    assert refused.returncode == 2
    assert "optimizer.learning_rate: 0.001 -> 0.01" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert run_main(*other, "--force").returncode == 0
    assert len(list((tmp_path / "results" / "runs").glob("*.json"))) == 2


def test_a_diverging_run_says_so(run_main, tmp_path):
    done = run_main(*QUICK, "--config.optimizer.learning_rate=1e30", *places(tmp_path))
    assert done.returncode == 3
    (path,) = (tmp_path / "results" / "runs").glob("*.json")
    record = store.read(path)
    assert (record.status, record.test_accuracy) == ("diverged", None)
    assert "diverged" in done.stderr
    assert not path.with_suffix(".npy").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_eight_devices(run_main, tmp_path, mode):
    done = run_main(*QUICK, f"--config.parallel={mode}", *places(tmp_path), devices=8)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results" / "runs").glob("*-cpu-*-x8-float32-seed0.json")
    assert store.read(path).environment.num_devices == 8
    exported.load_model(tmp_path / "work")  # on a single device


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config=configs/mlp.py", "--config.num_epoch=3"), "no field 'num_epoch'; the nearest are num_epochs"),
        (("--config=mlp", "--config.seed=x"), "config.seed is 'x'; it must be a whole number."),
        (("--config=mpl",), "no config 'mpl'; the nearest is mlp."),
        (("--config=speedrun:97",), "there is no argument '97'; there are 93, 94, 95, 94-gpu, 96"),
        (("--config=mlp", "--reslts_dir=x"), "there is no flag --reslts_dir; the nearest are --results_dir"),
        (("--config=mlp", "extra"), "unexpected argument 'extra'"),
        (("--config=mlp", "--seeds=0,x"), "'0,x' is no list of seeds like 0,1,2"),
        (("--config=mlp", "--seeds=4,04"), "'4,04' names a seed twice"),
        (("--config=mlp", "--seeds=4,5", "--config.seed=4"), "--seeds and --config.seed"),
        (("--config=configs/nothing.py",), "no config 'configs/nothing.py'; "),
        ((), "--config is missing"),
        ((*QUICK, "--results_dir=pyproject.toml"), "--results_dir=pyproject.toml cannot be written to"),
        ((*QUICK, "--config.batch_size=481"), "config.batch_size is 481, but the train set has only 480"),
        ((*QUICK, "--config.model.name=lenet"), "config.model.name is 'lenet'; it must be one of "),
        ((*QUICK, "--config.data.dir=/nowhere"), "/nowhere"),
        ((*QUICK, "--machine=a/b"), "the machine's name, by --machine or FMBENCH_MACHINE, is 'a/b'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_end_in_one_line_and_exit_code_2(run_main, tmp_path, flags, message):
    done = run_main(*places(tmp_path), *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_help_and_summary(run_main):
    shown = run_main("--help")
    assert shown.returncode == 0
    assert all(
        flag in shown.stdout for flag in ("--config NAME", "--workdir", "--results_dir", "--summary", "--force")
    )
    words = " ".join(shown.stdout.split())
    for field in config.fields():
        default = f"={field.default}" if field.default else ""
        assert f"--config.{field.key}{default} {field.meaning}" in words
    summary = run_main("--config=configs/cnn3.py", "--summary")
    assert summary.returncode == 0
    assert "241,546" in summary.stdout
    # At 3 x 3 x 128 places: a multiplication and an addition for each of 3 x 3 x 64 inputs, the bias, the ReLU.
    assert f"{3 * 3 * 128 * (2 * 3 * 3 * 64 + 2):,}" in summary.stdout
    assert "\x1b" not in summary.stdout


@pytest.mark.parametrize("spec", ["speedrun:94", "resnet:8"])
def test_a_summary_shows_convolutions_and_their_batch_norms(run_main, spec):
    # Flax calls public methods with what stands for arrays, and can't if one of them is given a layer.
    summary = run_main(f"--config={spec}", "--summary")
    assert summary.returncode == 0, summary.stderr
    assert all(name in summary.stdout for name in ("stem", "conv1", "norm1", "Total Parameters"))


@pytest.mark.parametrize("split", ["all", "default"])
def test_a_loss_that_is_infinite_only_in_evaluation_diverges_too(run_main, tmp_path, split):
    # One step is finite, its update is not.
    done = run_main(
        *QUICK,
        "--config.batch_size=400",
        "--config.num_epochs=1",
        "--config.optimizer.name=sgd",
        "--config.optimizer.learning_rate=1e30",
        f"--config.data.split={split}",
        "--config.watch=validation",
        *places(tmp_path),
    )
    assert done.returncode == 3, done.stderr
    (path,) = (tmp_path / "results" / "runs").glob("*.json")
    assert store.read(path).status == "diverged"
    assert not (tmp_path / "work" / "model").exists()
