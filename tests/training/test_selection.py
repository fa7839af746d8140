"""The choice of examples by their losses: what an epoch visits, what is known after a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmbench.errors import UserError
from fmbench.training import input_pipeline, parallel, selection

pytestmark = pytest.mark.usefixtures("strict_dtypes")

ROWS = np.arange(1000, 3000, dtype=np.int32)
LOSSES = np.random.default_rng(0).permutation(2000).astype(np.float32)  # ROWS[LOSSES < 800] are the easy 40 %


def visits(keep, size=2000, seed=0):
    order = selection.order(
        jax.random.key(seed), jnp.asarray(ROWS), jnp.asarray(LOSSES), size=size, easy=0.4, keep=keep
    )
    assert order.dtype == jnp.int32
    assert len(order) == size
    return np.asarray(order)


def test_hard_rows_are_all_visited_and_easy_ones_are_not():
    order = visits(keep=0.0)
    hard = ROWS[LOSSES >= 800]
    assert sorted(order[:1200]) == sorted(hard)  # all of them once
    assert len(set(order[1200:])) == 800  # then some of them once more
    assert set(order[1200:]) < set(hard)
    assert not np.array_equal(order[:800], order[1200:])


def test_an_easy_row_stays_with_the_given_probability():
    order = visits(keep=0.25)
    easy = set(ROWS[LOSSES < 800])
    stayed = easy & set(order)
    assert 160 < len(stayed) < 240  # 200 expected, standard deviation 12
    assert set(ROWS) - easy < set(order)
    assert stayed != easy & set(visits(keep=0.25, seed=1))  # others in another epoch
    assert sorted(visits(keep=1.0)) == sorted(ROWS)


def test_rows_never_visited_are_hard():
    losses = jnp.where(LOSSES < 100, jnp.inf, LOSSES)
    order = selection.order(jax.random.key(0), jnp.asarray(ROWS), losses, size=2000, easy=0.4, keep=0.0)
    assert set(ROWS[LOSSES < 100]) < set(np.asarray(order).tolist())


def test_what_is_known_after_a_step():
    known = {"last": jnp.arange(4.0), "before_epoch": jnp.full(4, 9.0)}
    indices, losses = jnp.array([3, 1]), jnp.array([0.5, 0.25])
    first = selection.update(known, indices, losses, starts_epoch=jnp.bool(True))
    np.testing.assert_array_equal(first["last"], [0, 0.25, 2, 0.5])
    np.testing.assert_array_equal(first["before_epoch"], [0, 1, 2, 3])  # not yet with this step's
    later = selection.update(first, jnp.array([0, 2]), losses, starts_epoch=jnp.bool(False))
    np.testing.assert_array_equal(later["last"], [0.5, 0.25, 0.25, 0.5])
    np.testing.assert_array_equal(later["before_epoch"], [0, 1, 2, 3])
    np.testing.assert_array_equal(selection.losses_of_epoch(first, is_new=True), first["last"])
    np.testing.assert_array_equal(selection.losses_of_epoch(first, is_new=False), [0, 1, 2, 3])


def test_the_first_epochs_visit_all_and_the_next_ones_select(make_config):
    config = make_config(
        "configs/mlp.py", batch_size=60, data__split="default", selection__easy=0.5, selection__after_epochs=2
    )
    data = input_pipeline.load(config, parallel.make_mesh(jax.devices()[:1]))
    train = np.asarray(data.train_indices)
    losses = jnp.zeros(480).at[train[:200]].set(1.0)  # the validation rows have the lowest, too
    assert data.steps_per_epoch == 7
    assert len(set(np.asarray(data.epoch_order(1, losses)))) == 420
    selected = np.asarray(data.epoch_order(2, losses))
    assert len(selected) == 420
    assert len(set(selected)) < 420
    assert set(selected) <= set(train)
    assert set(train[:200]) < set(selected)
    np.testing.assert_array_equal(data.epoch_order(2), data.epoch_order(2, None))  # without losses, all


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"selection__easy": 0.6}, r"selection\.easy is 0\.6.*between 0 and 0\.5"),
        ({"selection__keep": -0.1}, r"selection\.keep is -0\.1.*between 0 and 1"),
        ({"selection__after_epochs": 0}, r"selection\.after_epochs is 0.*at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make_config, overrides, message):
    with pytest.raises(UserError, match=message):
        make_config("configs/mlp.py", **overrides)
