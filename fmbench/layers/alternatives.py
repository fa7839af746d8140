"""Functions that XLA computes or, on CPUs, C++ of ours: which is decided when a program is lowered."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fmbench.layers import cpp
from fmbench.layers.sharding import is_on_one_device, vary_alike


def with_cpp(
    in_xla: Callable[..., Sequence[jax.Array]],
    in_cpp: Callable[..., Sequence[jax.Array]],
    suits: Callable[..., bool],
) -> Callable[..., Sequence[jax.Array]]:
    """Gives a function of arrays an alternative in C++, which programs take that run on one CPU device at a time.

    Those of other platforms hold XLA's, as do exported ones, which may run where no C++ of ours is. So do
    derivatives and `jax.vmap`.

    Args:
        in_xla: `in_xla(*arrays, **params)`, hashable params -> arrays.
        in_cpp: The same by `fmbench.layers.cpp`.
        suits: `suits(*avals, **params)` -> whether there is C++ for arrays of such shapes and dtypes.

    Returns:
        What is called as `in_xla`.
    """
    primitive = Primitive(in_xla.__name__)
    primitive.multiple_results = True

    def plain(*arrays: Any, alone: bool, **params: Any) -> Sequence[jax.Array]:
        del alone
        return in_xla(*arrays, **params)

    @functools.cache
    def compiled(**params: Any) -> Callable:
        return jax.jit(functools.partial(primitive.bind, **params))

    def jvp(arrays, tangents, **params):
        return jax.jvp(functools.partial(plain, **params), arrays, tuple(map(ad.instantiate_zeros, tangents)))

    def batch(arrays, axes, **params):
        results = jax.vmap(functools.partial(plain, **params), in_axes=tuple(axes))(*arrays)
        return results, [0] * len(results)

    lower_to_xla = mlir.lower_fun(plain, multiple_results=True)

    def lower_on_cpu(context: mlir.LoweringRuleContext, *arrays: Any, alone: bool, **params: Any) -> Any:
        exported = context.module_context.lowering_parameters.for_export
        if alone and not exported and cpp.library() is not None and suits(*context.avals_in, **params):
            return mlir.lower_fun(in_cpp, multiple_results=True)(context, *arrays, **params)
        return lower_to_xla(context, *arrays, alone=alone, **params)

    primitive.def_impl(lambda *arrays, **params: compiled(**params)(*arrays))
    primitive.def_abstract_eval(
        lambda *avals, **params: jax.make_jaxpr(functools.partial(plain, **params))(*avals).out_avals
    )
    mlir.register_lowering(primitive, lower_to_xla)
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    return lambda *arrays, **params: primitive.bind(*vary_alike(*arrays), alone=is_on_one_device(), **params)
