"""What a program for a device is made of, read from what JAX lowers it to and from what XLA makes of that."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.mlir import ir
from jax.stages import Lowered

# Custom calls in which XLA for GPUs has a convolution or a product of matrices.
CUDNN_CONVOLUTION, CUBLAS = "__cudnn$conv", "__cublas$"
# Custom calls that move data between the device and the host, or call Python; by a part of their name.
TO_HOST = ("callback", "annotate_device_placement", "MoveToHost", "MoveToDevice")
HOST_MEMORY = "S(5)"  # in the layout of an array in XLA's text


class Contents(NamedTuple):
    """The operations of a program that tell whether it is the one that was meant.

    The body of a loop counts once. Types are written as in XLA's text, 'f32[512,28,28,64]'.
    """

    convolutions: Counter[str]  # by the dtypes of their operands: 'bf16', or 'bf16*f32' where they differ
    dots: Counter[str]  # products of matrices, likewise
    custom_calls: Counter[str]  # by target; on GPUs with cuDNN's convolutions and cuBLAS's products among them
    transposes: list[str]  # types of the arrays that are written anew in another order
    dtypes: set[str]  # of all arrays
    host_transfers: list[str]  # operations by which the device and the host exchange data
    donated: set[int]  # arguments whose memory the program may take for its results


def _empty() -> Contents:
    return Contents(Counter(), Counter(), Counter(), [], set(), [], set())


def _operands(dtypes: list[str]) -> str:
    return "*".join(dict.fromkeys(dtypes))


def _add_custom_call(contents: Contents, target: str) -> None:
    contents.custom_calls[target] += 1
    if any(word in target for word in TO_HOST):
        contents.host_transfers.append(target)


# ---------------------------------------------------------------------------- as lowered


def read_lowered(lowered: Lowered) -> Contents:
    """The contents of a program before XLA compiles it, as StableHLO; a function counts each time it is called."""
    module: Any = lowered.compiler_ir("stablehlo")
    functions: dict[str, Any] = {
        view.operation.attributes["sym_name"].value: view.operation
        for view in module.body
        if view.operation.name == "func.func"
    }
    contents = _empty()
    main = functions["main"]
    for index, attributes in enumerate(main.attributes.get("arg_attrs", ())):
        if "tf.aliasing_output" in attributes or "jax.buffer_donor" in attributes:
            contents.donated.add(index)
    for operation in _executed(main, functions):
        name, attributes = operation.name.removeprefix("stablehlo."), operation.attributes
        contents.dtypes.update(
            _dtype(value) for value in operation.results if isinstance(value.type, ir.RankedTensorType)
        )
        match name:
            case "convolution":
                contents.convolutions[_operands([_dtype(value) for value in operation.operands])] += 1
            case "dot_general" | "dot":
                contents.dots[_operands([_dtype(value) for value in operation.operands])] += 1
            case "transpose":
                shape = operation.operands[0].type.shape
                longer = [axis for axis in attributes["permutation"] if shape[axis] > 1]
                if longer != sorted(longer):
                    (result,) = operation.results
                    contents.transposes.append(f"{_dtype(result)}[{','.join(map(str, result.type.shape))}]")
            case "custom_call":
                _add_custom_call(contents, attributes["call_target_name"].value)
            case "infeed" | "outfeed":
                contents.host_transfers.append(name)
            case "send" | "recv" if attributes["is_host_transfer"].value:
                contents.host_transfers.append(name)
    return contents


def _executed(operation: Any, functions: dict[str, Any]) -> Iterator[Any]:
    """All operations within, and those of the functions called there."""
    for region in operation.regions:
        for block in region:
            for view in block:
                inner = view.operation
                yield inner
                yield from _executed(inner, functions)
                if inner.name == "func.call":
                    yield from _executed(functions[inner.attributes["callee"].value], functions)


def _dtype(value: Any) -> str:
    return str(value.type.element_type)


# ---------------------------------------------------------------------------- as compiled

# `ROOT %name = f32[2,3]{1,0} opcode(%operand, ...), attribute=...`; the type may be a tuple of types.
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[\w-]+)\((?P<rest>.*)")
ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<shape>[\d,]*)\](?:\{(?P<minor_to_major>[\d,]*))?")


def read_compiled(text: str) -> Contents:
    """The contents of a program as XLA has optimised it: `compiled.as_text()`.

    On GPUs a convolution or a product is an instruction within a fusion or a custom call, and both are counted. On
    TPUs products are convolutions, too, and on CPUs some are calls of libraries. A transpose, or a copy to another
    layout, is listed if it changes the order of the elements in memory.
    """
    contents = _empty()
    header, _, body = text.partition("\n")
    for attribute in ("input_output_alias", "buffer_donor"):
        entries = re.search(rf"{attribute}={{(.*?)}}, \w+=", header)
        contents.donated.update(int(number) for number in re.findall(r"\((\d+), ", entries[1] if entries else ""))
    types: dict[str, str] = {}
    for line in body.splitlines():
        instruction = INSTRUCTION.match(line)
        if not instruction:
            continue
        name, kind, opcode, rest = instruction.group("name", "type", "opcode", "rest")
        types[name] = kind
        contents.dtypes.update(array["dtype"] for array in ARRAY.finditer(kind))
        operands = [types.get(operand, "") for operand in re.findall(r"%([^\s,)]+)", rest.partition("), ")[0])]
        dtypes = _operands([array["dtype"] for array in map(ARRAY.match, operands[:2]) if array])
        target = re.search(r'custom_call_target="([^"]*)"', rest)
        if opcode == "custom-call" and target:
            _add_custom_call(contents, target[1])
        called = target[1] if target else ""
        if opcode == "convolution" or called.startswith(CUDNN_CONVOLUTION):
            contents.convolutions[dtypes] += 1
        elif opcode == "dot" or called.startswith(CUBLAS):
            contents.dots[dtypes] += 1
        elif opcode in ("transpose", "copy", "copy-start"):
            permutation = re.search(r"dimensions={([\d,]*)}", rest)
            if _moves(operands[0], kind, permutation[1] if permutation else None):
                contents.transposes.append(ARRAY.search(kind)[0].partition("{")[0])  # type: ignore[index]
            if any((HOST_MEMORY in kind) != (HOST_MEMORY in operand) for operand in operands[:1]):
                contents.host_transfers.append(opcode)
        elif opcode in ("infeed", "outfeed") or (opcode in ("send", "recv") and "is_host_transfer=true" in rest):
            contents.host_transfers.append(opcode)
    return contents


def _moves(operand: str, result: str, permutation: str | None) -> bool:
    """Whether the elements lie in another order in memory afterwards."""
    before, after = ARRAY.search(operand), ARRAY.search(result)
    if not before or not after:
        return False
    axes = _numbers(permutation) if permutation is not None else list(range(len(_numbers(before["shape"]))))
    shape = _numbers(before["shape"])
    old_order, new_order = _minor_to_major(before), [axes[axis] for axis in _minor_to_major(after)]
    return [axis for axis in old_order if shape[axis] > 1] != [axis for axis in new_order if shape[axis] > 1]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _minor_to_major(array: re.Match[str]) -> list[int]:
    """The axes in the order of their strides, the shortest first."""
    if array["minor_to_major"]:
        return _numbers(array["minor_to_major"])
    return list(range(len(_numbers(array["shape"]))))[::-1]
