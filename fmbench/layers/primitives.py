"""Primitives of our own: linear functions with a transpose, and functions with an alternative in C++."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fmbench.layers import cpp
from fmbench.layers.sharding import is_on_one_device, vary_alike


def with_transpose(function: Callable[..., jax.Array], transpose: Callable[..., Sequence[jax.Array]]) -> Callable:
    """Gives a function that is linear in its first arguments a transpose that is faster than the derived one.

    For the rule of a `jax.custom_jvp`: with `jax.custom_vjp` there would be no forward mode. All but the transpose
    (values, second derivatives, `jax.vmap`) comes of `function`.

    Args:
        function: `function(linear, others, **params)`, two tuples of arrays, hashable params -> an array.
        transpose: `transpose(cotangent, others, **params)` -> the gradient of every array in `linear`.

    Returns:
        What is to be called as `function`.
    """
    primitive = Primitive(function.__name__)

    def flat(*arrays: Any, num_linear: int, **params: Any) -> jax.Array:
        return function(arrays[:num_linear], arrays[num_linear:], **params)

    @functools.cache
    def compiled(**params: Any) -> Callable:
        return jax.jit(functools.partial(flat, **params))

    def jvp(arrays, tangents, **params):
        return jax.jvp(functools.partial(flat, **params), arrays, tuple(map(ad.instantiate_zeros, tangents)))

    def transposed(cotangent, *arrays, num_linear, **params):
        if isinstance(cotangent, ad.Zero):
            return [None] * len(arrays)
        grads = transpose(cotangent, arrays[num_linear:], **params)
        asked = map(ad.is_undefined_primal, arrays[:num_linear])
        return [grad if ask else None for grad, ask in zip(grads, asked, strict=True)] + [None] * (
            len(arrays) - num_linear
        )

    def batch(arrays, axes, **params):
        return jax.vmap(functools.partial(flat, **params), in_axes=tuple(axes))(*arrays), 0

    primitive.def_impl(lambda *arrays, **params: compiled(**params)(*arrays))
    primitive.def_abstract_eval(
        lambda *avals, **params: jax.make_jaxpr(functools.partial(flat, **params))(*avals).out_avals[0]
    )
    mlir.register_lowering(primitive, mlir.lower_fun(flat, multiple_results=False))
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transposed
    batching.primitive_batchers[primitive] = batch
    return lambda linear, others, **params: primitive.bind(*linear, *others, num_linear=len(linear), **params)


def with_cpp(
    in_xla: Callable[..., Sequence[jax.Array]],
    in_cpp: Callable[..., Sequence[jax.Array]],
    suits: Callable[..., bool],
) -> Callable[..., Sequence[jax.Array]]:
    """Gives a function of arrays an alternative in C++, which programs take that run on one CPU device at a time.

    It is decided when a program is lowered.

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
