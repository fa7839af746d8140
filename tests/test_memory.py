"""Where memory ends: one line that says which batch would fit, and nothing that was there is lost."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmbench import api
from fmbench.errors import UserError
from fmbench.studies import memory
from fmbench.system import command_line
from fmbench.training import run, steps


def exhaust() -> None:
    """Asks XLA for more than any machine has."""
    jnp.zeros(10**15, jnp.uint8).block_until_ready()


@pytest.fixture
def little(make_config):
    return lambda **overrides: make_config(
        "configs/mlp.py", **{"batch_size": 80, "eval_batch_size": 400, "num_epochs": 2} | overrides
    )


def train(config, tmp_path):
    (record,) = api.run(config, tmp_path / "work", tmp_path / "results")
    return record


def test_what_xla_raises_is_known():
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        exhaust()


def test_an_evaluation_larger_than_this_machine(little, tmp_path):
    with pytest.raises(UserError) as error:
        train(little(eval_batch_size=8 * 10**12), tmp_path)
    said = str(error.value)
    assert said.startswith(
        "out of memory with config.eval_batch_size=8000000000000 on 8 x cpu (Unable to allocate "
    )
    assert said.endswith("; config.eval_batch_size=7448 may fit: how much memory there is, is not known here.")
    assert "\n" not in said


def test_a_model_larger_than_this_machine(run_main, tmp_path):
    """On one device: of several CPU devices that all run out of memory, XLA waits for each other's answers."""
    flags = ("--config=fc:a", "--config.data.source=sample", "--config.batch_size=80")
    done = run_main(*flags, "--config.model.widths=(1000000000000,)", f"--workdir={tmp_path / 'work'}")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "fmbench.main: out of memory for the model alone on 1 x cpu (RESOURCE_EXHAUSTED: Out of memory"
    )
    assert line.endswith("); take a smaller one.")


def test_a_run_that_ran_out_of_memory_goes_on_from_where_it_was(little, tmp_path, monkeypatch):
    train_epoch, calls = run._train_epoch, []

    def fails_in_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            exhaust()
        return train_epoch(*arguments)

    monkeypatch.setattr(run, "_train_epoch", fails_in_the_second)
    with pytest.raises(UserError) as error:
        train(little(), tmp_path)
    assert str(error.value).startswith(
        "out of memory with config.batch_size=80 on 8 x cpu (RESOURCE_EXHAUSTED: Out of"
    )
    assert "; config.batch_size=40 may fit: " in str(error.value)
    assert not (tmp_path / "results" / "runs").exists()
    record = train(little(), tmp_path)
    assert (record.status, record.num_resumes, record.num_epochs) == ("completed", 1, 2)
    assert record.train_loss == train(little(), tmp_path / "whole").train_loss


def test_in_an_evaluation_its_batch_is_named(little, tmp_path, monkeypatch):
    monkeypatch.setattr(
        steps, "np", SimpleNamespace(**vars(np) | {"concatenate": lambda outputs, axis: exhaust()})
    )
    with pytest.raises(UserError, match=r"out of memory with config\.eval_batch_size=400 .*=200 may fit"):
        train(little(), tmp_path)


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (240_000, "config.batch_size=240 is predicted to fit, with 0.0 GiB."),
        (239_999, "config.batch_size=120 is predicted to fit, with 0.0 GiB."),
        (56_000, "config.batch_size=56 is predicted to fit, with 0.0 GiB."),  # 60, which 8 devices cannot share
        (7_999, "no smaller batch down to 8 is predicted to fit; take a smaller model."),
    ],
)
def test_the_largest_part_of_a_batch_that_fits_is_found(little, monkeypatch, limit, said):
    monkeypatch.setattr(memory, "_needed_bytes", lambda config, seeds: 1000 * config.batch_size)
    monkeypatch.setattr(memory, "_memory_of_device", lambda: limit / memory.SHARE)
    with pytest.raises(UserError) as error, memory.explained(little(batch_size=480)):
        exhaust()
    assert str(error.value).endswith(f"; {said}")
    assert "480 on 8 x cpu with 0.0 GiB for JAX (RESOURCE_EXHAUSTED: " in str(error.value)


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_what_a_run_needs_is_what_its_programs_and_its_data_take(little, parallel):
    config = little(parallel=parallel)
    configs = (little(parallel=parallel, eval_batch_size=size) for size in (6400, 3200))
    large, small = (memory._needed_bytes(config, ()) for config in configs)
    assert large is not None
    assert small is not None
    rows = 480 * (784 + 4)
    parameters = 3 * 4 * 384_854  # and Adam's two moments
    assert small > rows + parameters
    padding = 3200 * (784 + 4 + 4)  # of the only batch of the test set
    assert large - small >= padding
    assert config.batch_size == 80


def test_other_errors_are_left_as_they_are(little):
    with pytest.raises(RuntimeError, match=r"^boom$"), memory.explained(little()):
        raise RuntimeError("boom")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")])
def test_any_command_that_runs_out_of_memory_ends_in_one_line(capsys, error):
    with pytest.raises(SystemExit) as end, command_line.plain_errors("predict"):
        raise error
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fmbench.predict: out of memory, which others may hold, too (")
