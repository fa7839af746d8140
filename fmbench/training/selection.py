"""Which examples an epoch visits: all of them, or the hard ones more often, by their last training losses.

A net knows most of the images after a few epochs; a visit to one of these changes it little and costs as much as
any other. So an epoch may leave out some of the examples with the lowest losses, and visit others again in their
place: it has as many steps as ever.

References:
    Jiang et al., 2019, "Accelerating deep learning by focusing on the biggest losers"; Qin et al., 2024,
    "InfoBatch", which goes by the losses of the last visits as is done here, but also rescales gradients and ends
    with epochs that visit all.
"""

import math

import jax
import jax.numpy as jnp


def unknown_losses(num_rows: int) -> dict[str, jax.Array]:
    """The losses of examples never visited, which count as hard: float32 (num_rows,).

    last: of each row's last visit. before_epoch: as these were when the present epoch began; by them its examples
    were chosen, and are chosen again after an interruption.
    """
    return {name: jnp.full(num_rows, jnp.inf) for name in ("last", "before_epoch")}


def update(
    known: dict[str, jax.Array], indices: jax.Array, losses: jax.Array, *, starts_epoch: jax.Array
) -> dict[str, jax.Array]:
    """What is known after a step that found `losses`, (batch_size,), for the rows `indices`, (batch_size,)."""
    return {
        "last": known["last"].at[indices].set(losses, mode="promise_in_bounds"),
        "before_epoch": jnp.where(starts_epoch, known["last"], known["before_epoch"]),
    }


def losses_of_epoch(known: dict[str, jax.Array] | None, *, is_new: bool) -> jax.Array | None:
    """The losses by which the present epoch, which is new or has had some steps, chooses, if it does."""
    return None if known is None else known["last" if is_new else "before_epoch"]


def order(key: jax.Array, rows: jax.Array, losses: jax.Array, *, size: int, easy: float, keep: float) -> jax.Array:
    """The rows that an epoch visits, in the order of their visit.

    Args:
        key: Of the epoch.
        rows: int32 (n,).
        losses: Of these rows, (n,).
        size: Visits, at most n.
        easy: Fraction of the rows, those of the lowest losses, that count as easy; at most half.
        keep: Probability of an easy row to be visited.

    Returns:
        int32 (size,): all that are not left out, shuffled; then, until there are `size`, the same ones once more,
        in another order.
    """
    keep_key, order_key = jax.random.split(key)
    num_rows = len(rows)
    is_easy = losses.argsort().argsort() < math.ceil(easy * num_rows)
    stays = ~is_easy | (jax.random.uniform(keep_key, (num_rows,)) < keep)
    rounds = jnp.arange(2.0)[:, None] + jax.random.uniform(order_key, (2, num_rows))
    places = jnp.where(stays, rounds, jnp.inf).ravel().argsort()[:size]
    return rows[places % num_rows]
