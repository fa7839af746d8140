"""One step on many devices: a mesh of one axis, jit or pmap, compiled ahead of time."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fmbench.errors import UserError

AXIS = "data"


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices in a row."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every leaf on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def check_batch_size(field: str, batch_size: int, mesh: Mesh) -> None:
    """Refuses a batch that cannot be cut into equal parts.

    Raises:
        UserError: If the number of devices doesn't divide it.
    """
    if batch_size % mesh.size:
        raise UserError(
            f"config.{field} is {batch_size}, which {mesh.size} devices cannot share equally; "
            f"take a multiple of {mesh.size}."
        )


class Shard(NamedTuple):
    """The part of the global batch that one call of a step function works on."""

    size: int  # examples
    start: jax.Array  # int32 scalar: where it begins in the global batch
    axis_name: str | None  # mapped axis over which to reduce (pmap), or None (jit)
    sharding: NamedSharding | None  # how to lay the examples over the devices (jit), or None (pmap)

    def constrain(self, indices: jax.Array) -> jax.Array:
        """Lays per-example values out over the devices."""
        if self.sharding is None:
            return indices
        return jax.lax.with_sharding_constraint(indices, self.sharding)

    def mean(self, tree: Any) -> Any:
        """Mean over the parts of the batch."""
        return tree if self.axis_name is None else jax.lax.pmean(tree, self.axis_name)

    def sum(self, tree: Any) -> Any:
        """Sum over the parts of the batch."""
        return tree if self.axis_name is None else jax.lax.psum(tree, self.axis_name)

    def concatenate(self, x: jax.Array) -> jax.Array:
        """Per-example values of the whole batch, (size, ...) -> (global batch, ...)."""
        return x if self.axis_name is None else jax.lax.all_gather(x, self.axis_name, tiled=True)


_cache_hits: list[str] = []


@jax.monitoring.register_event_listener
def _note_cache_hit(event: str, **kwargs: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _cache_hits.append(event)


class Program(NamedTuple):
    """A compiled step."""

    run: Callable[..., Any]
    flops: float  # of one step on the whole batch, counted by XLA before optimisation
    cached: bool  # came from the persistent compile cache


def compile_step(
    step: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    mesh: Mesh,
    parallel: str,
    batch_size: int,
    donate_first: bool = False,
) -> Program:
    """Compiles `step(shard, *arguments)`, in which `arguments` are replicated, and so are its results.

    With 'jit' one program sees the whole batch and XLA splits it along the mesh; with 'pmap' each device runs the
    step on its part and reduces over the axis by itself. Both give the same numbers.
    """
    size = batch_size if parallel == "jit" else batch_size // mesh.size
    if parallel == "jit":
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        make_shard = functools.partial(Shard, size, axis_name=None, sharding=sharding)
        replicated = NamedSharding(mesh, PartitionSpec())
        starts = replicate(np.int32(0), mesh)
        transform = functools.partial(jax.jit, out_shardings=replicated)
    else:
        make_shard = functools.partial(Shard, size, axis_name=AXIS, sharding=None)
        starts = jax.device_put(
            np.arange(mesh.size, dtype=np.int32) * size, NamedSharding(mesh, PartitionSpec(AXIS))
        )
        transform = functools.partial(
            jax.pmap,
            axis_name=AXIS,
            in_axes=(0, *(None for _ in arguments)),
            out_axes=None,
            devices=list(mesh.devices.flat),
        )

    def whole_step(start: jax.Array, *arguments: Any) -> Any:
        return step(make_shard(jnp.asarray(start)), *arguments)

    mapped = transform(whole_step, donate_argnums=(1,) if donate_first else ())
    hits = len(_cache_hits)
    compiled = mapped.lower(starts, *arguments).compile()
    # XLA does not count in custom calls, which the program may have on CPUs, and never has on TPUs.
    for_tpu = jax.jit(mapped).trace(starts, *arguments).lower(lowering_platforms=("tpu",))
    costs = for_tpu.cost_analysis() or {}
    flops = costs.get("flops", 0.0) * batch_size / size
    return Program(functools.partial(compiled, starts), flops, cached=len(_cache_hits) > hits)
