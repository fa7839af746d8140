"""ONNX: the model's jaxpr, primitive by primitive, as a graph of ONNX operators.

Arrays are NHWC in JAX and NCHW in ONNX, so that convolutions and pooling stand between transpositions, most of
which runtimes remove. What is known when the graph is made (indices of a strided slice, say) is computed by JAX.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
from jax.extend import core
from onnx import TensorProto, helper, numpy_helper

from fmbench.errors import UserError
from fmbench.exchange.program import Program, refuse_features, refused, specification

FILE = "model.onnx"
OPSET, IR_VERSION = 18, 8  # of December 2022, which runtimes of all kinds know

Value = np.ndarray | str  # what is known, or the name of what the graph computes

CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint")
ONE_TO_ONE = {
    **{"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow"},
    **{"neg": "Neg", "abs": "Abs", "sign": "Sign", "floor": "Floor", "exp": "Exp", "log": "Log", "sqrt": "Sqrt"},
    **{"tanh": "Tanh", "logistic": "Sigmoid", "erf": "Erf", "stop_gradient": "Identity", "copy": "Identity"},
    **{"eq": "Equal", "gt": "Greater", "lt": "Less", "ge": "GreaterOrEqual", "le": "LessOrEqual"},
    **{"and": "And", "or": "Or", "not": "Not"},
}


class UnknownOperationError(Exception):
    """ONNX, or this translation to it, has no such operation."""


def write(program: Program, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Writes the graph, its weights within.

    Returns:
        What onnxruntime makes of the file, on the CPU: uint8 (n, 28, 28) -> float32 (n, 10).

    Raises:
        UserError: If the model has an operation that is not translated, computes in bfloat16, or is no function
            of images alone.
    """
    refuse_features(program, "onnx")
    if program.description["dtype"] != "float32":
        raise UserError(
            f"--format=onnx takes models that compute in float32, and this one does in "
            f"{program.description['dtype']}, in which onnxruntime has no convolution on CPUs; "
            "--format=stablehlo takes it."
        )
    onnx.save(graph_of(program), folder / FILE)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it prints of an error it raises, too
    with refused("onnx"):
        session = onnxruntime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])

    def logits(batch: np.ndarray) -> np.ndarray:
        with refused("onnx"):
            return session.run(["logits"], {"images": batch})[0]

    return logits


def graph_of(program: Program) -> onnx.ModelProto:
    """The model as ONNX has it: images, uint8 (batch, 28, 28) -> logits, float32 (batch, 10).

    Raises:
        UserError: If it has an operation that is not translated; names it.
    """
    values = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in program.arrays.values()]
    # With a precision of its own a convolution is JAX's, not our primitive.
    with refused("onnx"), jax.default_matmul_precision("highest"):
        closed = jax.make_jaxpr(program.call)(values, specification())
    graph = _Graph()
    for name, array in program.arrays.items():
        graph.initializers.append(numpy_helper.from_array(array, name))
    try:
        (logits,) = graph.translate(closed.jaxpr, closed.consts, [*program.arrays, "images"])
    except UnknownOperationError as error:
        raise UserError(
            f"--format=onnx: this model has an operation that is not translated to ONNX ({error}); "
            "--format=stablehlo takes it."
        ) from error
    graph.nodes.append(helper.make_node("Identity", [graph.name(logits)], ["logits"]))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 28, 28])
    result = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])
    made = helper.make_graph(graph.nodes, "fmbench", [images], [result], graph.initializers)
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(made, opset_imports=opset, ir_version=IR_VERSION, producer_name="fmbench")
    with refused("onnx"):
        onnx.checker.check_model(model, full_check=True)
    return model


class _Graph:
    """Nodes and constants, as they come."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._counter = 0

    def translate(self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
        """Adds what a jaxpr computes; returns its results."""
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
        known |= zip(jaxpr.invars, inputs, strict=True)

        def read(atom: Any) -> Value:
            return np.asarray(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            known |= zip(equation.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Value]) -> Sequence[Value]:
        name, params = equation.primitive.name, equation.params
        shapes = [atom.aval.shape for atom in equation.invars]
        if name in CALLS:
            inner = params.get("jaxpr") or params["call_jaxpr"]
            return self.translate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
        if name == "optimization_barrier":
            return inputs
        if not any(isinstance(value, str) for value in inputs) and _is_fixed(equation.outvars):
            results = equation.primitive.bind(*map(jnp.asarray, inputs), **params)
            return [np.asarray(one) for one in (results if equation.primitive.multiple_results else [results])]
        if name in ONE_TO_ONE:
            return [self.node(ONE_TO_ONE[name], *inputs)]
        if name not in TRANSLATIONS:
            raise UnknownOperationError(name)
        (result,) = equation.outvars
        return [TRANSLATIONS[name](self, params, inputs, shapes, result.aval)]

    def node(self, kind: str, *inputs: Value, **attributes: Any) -> str:
        """Adds an operator of one result; returns the result's name."""
        self._counter += 1
        result = f"{kind}_{self._counter}"
        self.nodes.append(helper.make_node(kind, [self.name(value) for value in inputs], [result], **attributes))
        return result

    def name(self, value: Value) -> str:
        """Of a value, which becomes a constant of the graph if it is known."""
        if isinstance(value, str):
            return value
        self._counter += 1
        self.initializers.append(numpy_helper.from_array(np.asarray(value), f"constant_{self._counter}"))
        return f"constant_{self._counter}"

    def reshape(self, value: Value, shape: Sequence[Any]) -> str:
        """With -1 for the one axis whose size depends on the batch."""
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        if sizes.count(-1) > 1:
            raise UnknownOperationError(f"reshape to {tuple(shape)}")
        return self.node("Reshape", value, np.array(sizes, np.int64))

    def transpose(self, value: Value, order: Sequence[int]) -> str:
        return self.node("Transpose", value, perm=list(order))

    def size(self, shape: Sequence[Any]) -> Value:
        """A shape, int64 (rank,), in which the batch may stand."""
        if all(isinstance(size, int) for size in shape):
            return np.array(shape, np.int64)
        batch = self.node("Shape", "images", start=0, end=1)
        if any(str(size) != "batch" for size in shape if not isinstance(size, int)):
            raise UnknownOperationError(f"broadcast to {tuple(shape)}")
        return self.node("Concat", *(np.array([n]) if isinstance(n, int) else batch for n in shape), axis=0)


def _is_fixed(outvars: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for var in outvars for size in var.aval.shape)


# Each takes the graph, the primitive's parameters, its inputs, their shapes, and what is known of its result.


def _convolution(graph: _Graph, params: Any, inputs: list[Value], shapes: Any, result: Any) -> Value:
    if params["batch_group_count"] != 1 or set(params["lhs_dilation"]) > {1}:
        raise UnknownOperationError("transposed convolution")
    layout = params["dimension_numbers"]
    kernel_shape = [shapes[1][axis] for axis in layout.rhs_spec[2:]]
    y = graph.node(
        "Conv",
        graph.transpose(inputs[0], layout.lhs_spec),
        graph.transpose(inputs[1], layout.rhs_spec),
        kernel_shape=kernel_shape,
        strides=params["window_strides"],
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
        pads=_before_and_after(params["padding"]),
    )
    return graph.transpose(y, np.argsort(layout.out_spec).tolist())


def _max_pool(graph: _Graph, params: Any, inputs: list[Value], shapes: Any, result: Any) -> Value:
    window, rank = params["window_dimensions"], len(shapes[0])
    space = range(1, rank - 1)
    others = {(window[axis], params["window_strides"][axis], params["padding"][axis]) for axis in (0, rank - 1)}
    if others != {(1, 1, (0, 0))} or set(params["base_dilation"]) != {1}:
        raise UnknownOperationError("pooling over the batch or the channels")
    y = graph.node(
        "MaxPool",
        graph.transpose(inputs[0], [0, rank - 1, *space]),
        kernel_shape=[window[axis] for axis in space],
        strides=[params["window_strides"][axis] for axis in space],
        dilations=[params["window_dilation"][axis] for axis in space],
        pads=_before_and_after([params["padding"][axis] for axis in space]),
    )
    return graph.transpose(y, [0, *range(2, rank), 1])


def _before_and_after(padding: Sequence[tuple[int, int]]) -> list[int]:
    return [before for before, _ in padding] + [after for _, after in padding]


def _product(graph: _Graph, params: Any, inputs: list[Value], shapes: Any, result: Any) -> Value:
    (contracted, batched) = params["dimension_numbers"]
    if len(shapes[1]) != 2 or any(batched) or tuple(map(tuple, contracted)) != ((len(shapes[0]) - 1,), (0,)):
        raise UnknownOperationError(f"dot_general of {shapes[0]} and {shapes[1]}")
    return graph.node("MatMul", *inputs)


def _gather(graph: _Graph, params: Any, inputs: list[Value], shapes: Any, result: Any) -> Value:
    """A slice, as it is traced where the batch is free: from x[:, 1:] one window, from x[:, ::2, ::2] elements."""
    numbers, sizes, indices = params["dimension_numbers"], params["slice_sizes"], inputs[1]
    indexed, rank = numbers.start_index_map, len(shapes[0])
    rest = [axis for axis in range(rank) if axis not in indexed]
    if isinstance(indices, str) or numbers.operand_batching_dims or any(sizes[i] != shapes[0][i] for i in rest):
        raise UnknownOperationError("gather")
    starts = indices.astype(np.int64)
    if not numbers.collapsed_slice_dims and starts.ndim == 1:
        ends = starts + np.array([sizes[axis] for axis in indexed])
        return graph.node("Slice", inputs[0], starts, ends, np.array(indexed, np.int64))
    if numbers.collapsed_slice_dims != tuple(sorted(indexed)):
        raise UnknownOperationError("gather")
    y = graph.node("GatherND", graph.transpose(inputs[0], [*indexed, *rest]), starts)
    places = [axis for axis in range(len(result.shape)) if axis not in numbers.offset_dims]
    return graph.transpose(y, np.argsort([*places, *numbers.offset_dims]).tolist())


def _slice(graph: _Graph, params: Any, inputs: list[Value], shapes: Any, result: Any) -> Value:
    axes = [axis for axis, size in enumerate(shapes[0]) if result.shape[axis] != size]
    strides = params["strides"] or [1] * len(shapes[0])
    parts = (params["start_indices"], params["limit_indices"], range(len(strides)), strides)
    return graph.node("Slice", inputs[0], *(np.array([part[axis] for axis in axes], np.int64) for part in parts))


def _pad(graph: _Graph, params: Any, inputs: list[Value], shapes: Any, result: Any) -> Value:
    if any(interior for *_, interior in params["padding_config"]):
        raise UnknownOperationError("pad between elements")
    pads = _before_and_after([(before, after) for before, after, _ in params["padding_config"]])
    return graph.node("Pad", inputs[0], np.array(pads, np.int64), inputs[1])


def _broadcast(graph: _Graph, params: Any, inputs: list[Value], shapes: Any, result: Any) -> Value:
    axes = dict(zip(params["broadcast_dimensions"], shapes[0], strict=True))
    aligned = graph.reshape(inputs[0], [axes.get(axis, 1) for axis in range(len(result.shape))])
    return graph.node("Expand", aligned, graph.size(result.shape))


def _reduce(kind: str) -> Callable[..., Value]:
    def reduce(graph: _Graph, params: Any, inputs: list[Value], shapes: Any, result: Any) -> Value:
        return graph.node(kind, inputs[0], np.array(params["axes"], np.int64), keepdims=0)

    return reduce


def _one(like: Any) -> np.ndarray:
    return np.ones((), like.dtype)


TRANSLATIONS: dict[str, Callable[[_Graph, Any, list[Value], Any, Any], Value]] = {
    "conv_general_dilated": _convolution,
    "reduce_window_max": _max_pool,
    "dot_general": _product,
    "gather": _gather,
    "slice": _slice,
    "pad": _pad,
    "broadcast_in_dim": _broadcast,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reshape": lambda graph, params, x, shapes, result: graph.reshape(x[0], result.shape),
    "squeeze": lambda graph, params, x, shapes, result: graph.reshape(x[0], result.shape),
    "transpose": lambda graph, params, x, shapes, result: graph.transpose(x[0], params["permutation"]),
    "concatenate": lambda graph, params, x, shapes, result: graph.node("Concat", *x, axis=params["dimension"]),
    "convert_element_type": lambda graph, params, x, shapes, result: graph.node(
        "Cast", x[0], to=helper.np_dtype_to_tensor_dtype(np.dtype(result.dtype))
    ),
    "select_n": lambda graph, params, x, shapes, result: graph.node("Where", x[0], x[2], x[1]),
    "clamp": lambda graph, params, x, shapes, result: graph.node("Min", graph.node("Max", x[1], x[0]), x[2]),
    "ne": lambda graph, params, x, shapes, result: graph.node("Not", graph.node("Equal", *x)),
    "rsqrt": lambda graph, params, x, shapes, result: graph.node("Reciprocal", graph.node("Sqrt", *x)),
    "log1p": lambda graph, params, x, shapes, result: graph.node("Log", graph.node("Add", x[0], _one(result))),
    "square": lambda graph, params, x, shapes, result: graph.node("Mul", x[0], x[0]),
    "integer_pow": lambda graph, params, x, shapes, result: graph.node(
        "Pow", x[0], np.array(params["y"], result.dtype)
    ),
}
