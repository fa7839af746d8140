"""One step on many devices, or for many seeds: a mesh of one axis, jit or pmap, compiled ahead of time."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fmbench.errors import UserError

AXIS = "data"


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices in a row."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every leaf on every device; of several processes all have the same tree."""
    return place(tree, NamedSharding(mesh, PartitionSpec()))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """The leaves, whole in each process, as arrays over the devices of all."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place_leaf(leaf: Any) -> jax.Array:
        array = np.asarray(leaf)
        array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place_leaf, tree)


def spread(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """The leaves, of which each process has the part of its own devices, as arrays over the devices of all."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def own_part(batch: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Of a batch, which all devices share equally, what this process's devices take, as `my_part` says."""
    parts = zip(np.split(batch, mesh.size), mesh.devices.flat, strict=True)
    return np.concatenate([part for part, device in parts if device.process_index == jax.process_index()])


def local(tree: Any) -> Any:
    """Replicated arrays as this process can use them alone: where others have devices too, its own first copy."""
    return jax.tree.map(lambda x: x if x.is_fully_addressable else x.addressable_data(0), tree)


def check_batch_size(field: str, batch_size: int, mesh: Mesh) -> None:
    """Refuses a batch that cannot be cut into equal parts.

    Raises:
        UserError: If the number of devices doesn't divide it.
    """
    if batch_size % mesh.size:
        on_gpus = mesh.devices.flat[0].platform == "gpu"
        raise UserError(
            f"config.{field} is {batch_size}, which {mesh.size} devices cannot share equally; "
            f"take a multiple of {mesh.size}{', or one GPU: CUDA_VISIBLE_DEVICES=0' if on_gpus else ''}."
        )


def my_part(batch_size: int) -> jax.Array:
    """Within a step: the places in the global batch of this device's examples, int32 (batch_size / devices,)."""
    size = batch_size // jax.lax.axis_size(AXIS)
    return jax.lax.axis_index(AXIS) * size + jnp.arange(size)


def mean(tree: Any) -> Any:
    """Within a step: the mean over the devices of each leaf, all of one dtype, in a collective of one array.

    Of several arrays XLA for CPUs makes an exchange for each, in which processes wait for each other.
    """
    if (size := jax.lax.axis_size(AXIS)) == 1:
        return tree
    flat, unravel = ravel_pytree(tree)
    return jax.tree.map(lambda total: total / size, unravel(jax.lax.psum(flat, AXIS)))


def loops_on_devices(steps_per_call: int) -> bool:
    """Whether several steps, or batches of an evaluation, are to be one call; 0 leaves it to the kind of device.

    A `lax.scan` spares accelerators the host's time between steps. On CPUs it would cost far more than it saves:
    XLA runs convolutions inside loops 10 to 20 times slower there (jax#12868).
    """
    return steps_per_call > 1 or (steps_per_call == 0 and jax.default_backend() != "cpu")


def over_seeds(
    function: Callable[..., Any], seed: jax.Array, in_axes: int | tuple[int | None, ...] = 0
) -> Callable[..., Any]:
    """`function` as it is for one seed, uint32 (); for several, (n,), mapped over them as `jax.vmap` does."""
    return jax.vmap(function, in_axes) if seed.ndim else function


_cache_hits: list[str] = []


@jax.monitoring.register_event_listener
def _note_cache_hit(event: str, **kwargs: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _cache_hits.append(event)


WHOLE = PartitionSpec()  # on every device


def map_over(mesh: Mesh, step: Callable[..., Any], in_specs: Any = WHOLE) -> Callable[..., Any]:
    """The step on every device of the mesh, with its axis bound; results are whole on each, and so are arguments.

    But for those of which `in_specs` says, as `jax.shard_map` takes it, how the devices share them.
    """
    return jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=WHOLE, check_vma=False)


class Program(NamedTuple):
    """A compiled step."""

    run: Callable[..., Any]
    cached: bool  # came from the persistent compile cache
    count_flops: Callable[[], float]  # of the program on the whole batch, counted by XLA before optimisation


def compile_step(
    step: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    mesh: Mesh,
    parallel: str,
    donate_first: bool = False,
    compiler_options: dict[str, Any] | None = None,
    in_specs: Any = WHOLE,
) -> Program:
    """Compiles `step(*arguments)`, which every device runs on its own part of the batch.

    Within the step the axis `AXIS` is bound: `my_part` tells a device its part, and what the parts give is brought
    together by `jax.lax.pmean` and its like. Arguments and results are whole on every device. 'jit' maps the step
    with `jax.shard_map`, 'pmap' with `jax.pmap`; both give the same numbers. `compiler_options` are flags of XLA;
    with 'jit' devices may share arguments instead, by `in_specs` as in `map_over`.
    """
    # The arrays themselves may have been donated when the FLOPs are counted.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    if parallel == "jit":
        transformed = jax.jit(map_over(mesh, step, in_specs), donate_argnums=(0,) if donate_first else ())
    else:
        # pmap wants something to map over: the devices' numbers, which nobody reads.
        numbers = place(np.arange(mesh.size), NamedSharding(mesh, PartitionSpec(AXIS)))
        arguments = (numbers, *arguments)
        transformed = jax.pmap(
            lambda _, *arguments: step(*arguments),
            axis_name=AXIS,
            in_axes=(0, *(None for _ in arguments[1:])),
            out_axes=None,
            devices=list(mesh.devices.flat),
            donate_argnums=(1,) if donate_first else (),
        )
    hits = len(_cache_hits)
    compiled = transformed.lower(*arguments).compile(compiler_options)
    run = compiled if parallel == "jit" else functools.partial(compiled, numbers)

    def count_flops() -> float:
        # On one device, since others repeat what is not per example; for TPUs, whose programs have no custom
        # calls, in which XLA cannot count.
        on_one = map_over(make_mesh(jax.devices()[:1]), step, in_specs)
        costs = jax.jit(on_one).trace(*shapes).lower(lowering_platforms=("tpu",)).cost_analysis() or {}
        return costs.get("flops", 0.0)

    return Program(run, len(_cache_hits) > hits, count_flops)
