"""Checkpoints: the latest and the best stay, an interrupted one is no candidate for the best."""

import jax.numpy as jnp
import numpy as np
import pytest

from fmbench.training.checkpoint import Checkpoints


@pytest.fixture
def save_all(tmp_path):
    def save(accuracies):
        checkpoints = Checkpoints(tmp_path)
        for step, accuracy in enumerate(accuracies, start=1):
            checkpoints.save(step, {"x": jnp.full(3, step)}, {"note": step}, accuracy)
            checkpoints.wait()
        checkpoints.close()
        return {int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()}

    return save


def test_latest_and_best_are_kept(save_all):
    assert save_all([0.5, 0.9, 0.7, 0.8]) == {2, 4}


def test_an_interrupted_step_without_validation_replaces_no_best(save_all):
    assert save_all([0.5, 0.9, 0.7, None]) == {2, 4}


def test_without_validation_only_the_latest_is_kept(save_all):
    assert save_all([None, None, None]) == {3}


def test_restores_the_latest_with_its_progress(save_all, tmp_path):
    save_all([0.9, 0.5])
    restored = Checkpoints(tmp_path).restore({"x": jnp.zeros(3, int)})
    assert restored is not None
    np.testing.assert_array_equal(restored[0]["x"], [2, 2, 2])
    assert restored[1] == {"note": 2}


def test_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path).restore({"x": jnp.zeros(3)}) is None


def test_saving_a_step_again_leaves_it(save_all, tmp_path):
    save_all([0.9])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.zeros(3, int)}, {"note": "again"}, None)
    checkpoints.close()
    restored = Checkpoints(tmp_path).restore({"x": jnp.zeros(3, int)})
    assert restored is not None
    assert restored[1] == {"note": 1}
