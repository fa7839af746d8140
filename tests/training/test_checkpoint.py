"""Checkpoints: the latest stays, and is what a run goes on from."""

import jax.numpy as jnp
import numpy as np
import pytest

from fmbench.training.checkpoint import Checkpoints


@pytest.fixture
def save_all(tmp_path):
    def save(num_steps):
        checkpoints = Checkpoints(tmp_path)
        for step in range(1, num_steps + 1):
            checkpoints.save(step, {"x": jnp.full(3, step)}, {"note": step})
            checkpoints.wait()
        checkpoints.close()
        return {int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()}

    return save


def test_only_the_latest_is_kept(save_all):
    assert save_all(3) == {3}


def test_restores_the_latest_with_its_progress(save_all, tmp_path):
    save_all(2)
    restored = Checkpoints(tmp_path).restore({"x": jnp.zeros(3, int)})
    assert restored is not None
    np.testing.assert_array_equal(restored[0]["x"], [2, 2, 2])
    assert restored[1] == {"note": 2}


def test_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path).restore({"x": jnp.zeros(3)}) is None


def test_saving_a_step_again_leaves_it(save_all, tmp_path):
    save_all(1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.zeros(3, int)}, {"note": "again"})
    checkpoints.close()
    restored = Checkpoints(tmp_path).restore({"x": jnp.zeros(3, int)})
    assert restored is not None
    assert restored[1] == {"note": 1}
