"""How the arrays of a call lie over the devices."""

import jax
import jax.numpy as jnp


def is_on_one_device() -> bool:
    """Whether what is being traced runs on one device at a time.

    It does in a process with one device, and in a region of `jax.shard_map` or `jax.pmap` that is manual in all
    axes of its mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 or (bool(mesh.manual_axes) and set(mesh.manual_axes) == set(mesh.axis_names))


def is_explicitly_sharded(x: jax.Array) -> bool:
    """Whether the type of x says how it is sharded (`jax.sharding.AxisType.Explicit`)."""
    return bool(jax.typeof(x).sharding.mesh.explicit_axes)


def vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, for a primitive or a derivative of our own.

    Inside `jax.shard_map` the type of an array has the axes over which it varies, and those of a primitive must be
    the same for all its arguments. JAX's own functions see to that themselves, which adds up the gradients of
    parameters over the axes; here `where` does.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return list(arrays)
    of_all = jnp.stack([jax.lax.stop_gradient(array).sum() for array in arrays]).sum()  # XLA removes it again
    return [jnp.where(True, array, of_all.astype(array.dtype)) for array in arrays]
