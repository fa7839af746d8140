"""The programs that accelerators get, read where there is none: every entry's steps, lowered for CUDA and TPUs."""

import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.mlir import ir
from jax.interpreters import mlir

from fmbench import config as config_lib
from fmbench import entries
from fmbench.device import program
from fmbench.layers import convolution
from fmbench.models import split_model
from fmbench.training import parallel, selection, steps
from fmbench.training.optimizer import make_optimizer

EXAMPLES = 60_000
QUICK = ("baseline", "cnn4", "mlp", "resnet:20", "speedrun:93", "transfer:efficientnet_lite0")


def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def rows(config, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape, dtype = (784,), jnp.uint8
    if config.features.backbone:
        shape, dtype = (config.model.num_features,), jnp.float32
    return {"image": array((examples, *shape), dtype), "label": array((examples,), jnp.int32)}


def train_step(config, graphdef, tx, state) -> tuple[Callable, tuple]:
    step = functools.partial(
        steps.train_step,
        graphdef=graphdef,
        tx=tx,
        batch_size=config.batch_size,
        num_examples=config.batch_size,
        normalization=config.data.normalization,
        label_smoothing=config.label_smoothing,
        ema_decay=config.ema_decay,
        augment=config_lib.stages(config)[-1].augment,
    )
    order = array((EXAMPLES // config.batch_size * config.batch_size,), jnp.int32)
    return step, (state, rows(config, EXAMPLES), order, array((), jnp.uint32))


def eval_step(config, graphdef, tx, state) -> tuple[Callable, tuple]:
    step = functools.partial(steps.eval_step, graphdef=graphdef, normalization=config.data.normalization)
    size = config.eval_batch_size
    return step, (*state.evaluated, rows(config, size) | {"mask": array((size,), jnp.float32)})


def seeds_step(config, graphdef, tx, state) -> tuple[Callable, tuple]:
    """Three seeds in one program: a convolution of all is one, in groups."""
    step, (_, images, *others) = train_step(config, graphdef, tx, state)
    state, *others = jax.tree.map(lambda x: array((3, *x.shape), x.dtype), (state, *others))
    return parallel.over_seeds(step, others[-1], in_axes=(0, None, 0, 0)), (state, images, *others)


# What makes each step and the shapes that it takes; all but 'eval' give the state's memory to their results.
STEPS = {"train": train_step, "eval": eval_step, "seeds": seeds_step}


def shapes(config) -> tuple[nnx.Module, nnx.GraphDef, Any, steps.TrainState]:
    """The config's model, its structure, its optimizer and its state, of which nothing is computed."""
    tx, _ = make_optimizer(config, EXAMPLES // config.batch_size)
    model = nnx.eval_shape(lambda: steps.make_model(config, parallel.AXIS, 0))
    graphdef, params, model_state = split_model(model)
    opt_state = jax.eval_shape(tx.init, params)
    average = (params, model_state) if config.ema_decay else None
    losses = jax.eval_shape(lambda: selection.unknown_losses(EXAMPLES)) if config.selection.easy else None
    step: Any = array((), jnp.int32)
    return model, graphdef, tx, steps.TrainState(step, params, model_state, opt_state, average, losses)


def check(spec: str, dtype: str) -> None:
    """Reads the programs of an entry's steps for both kinds of accelerators."""
    config = entries.load(spec)
    config.dtype = dtype
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    model, graphdef, tx, state = shapes(config)
    kinds = Counter(
        kind for _, node in nnx.iter_graph(model) for kind in (nnx.Conv, nnx.Linear) if isinstance(node, kind)
    )
    num_convs, num_dense = kinds[nnx.Conv], kinds[nnx.Linear]
    mesh = parallel.make_mesh(jax.devices()[:1])
    for name, make in STEPS.items():
        step, arguments = make(config, graphdef, tx, state)
        trains = name != "eval"
        traced = jax.jit(parallel.map_over(mesh, step), donate_argnums=(0,) if trains else ()).trace(*arguments)
        for platform in ("cuda", "tpu"):
            contents = program.read_lowered(traced.lower(lowering_platforms=(platform,)))
            where = f"{spec} in {dtype}, {name} on {platform}"
            # Forward, gradient of the kernel, gradient of the input: but the images, which need none.
            convs, dense = (3 * num_convs, 3 * num_dense) if trains else (num_convs, num_dense)
            if trains and num_convs:
                convs -= 1
            elif trains:
                dense -= 1
            assert contents.convolutions == +Counter({short: convs}), where
            if trains:  # Muon and schedules have products of their own, in float32
                assert contents.dots[short] == dense if short == "bf16" else contents.dots["f32"] >= dense, where
                assert contents.dots.keys() <= {short, "f32"}, where
            else:  # two count the classes
                assert contents.dots == Counter({short: dense}) + Counter({"f32": 2}), where
            assert not contents.custom_calls, where
            assert not contents.host_transfers, where
            assert contents.dtypes.isdisjoint({"f64", "f16", *({"bf16"} - {short})}), where
            if name != "seeds":  # whose images a convolution in groups wants side by side
                assert [kind for kind in contents.transposes if kind.count(",") > 2] == [], where  # of images
            assert contents.donated == (set(range(len(jax.tree.leaves(state)))) if trains else set()), where


def cases() -> list:
    """The first entry of each file in both dtypes, the others in their own."""
    found, files = [], set()
    for spec in entries.specs():
        file = spec.partition(":")[0]
        for dtype in {entries.load(spec).dtype} if file in files else ("bfloat16", "float32"):
            marks = [] if spec in QUICK and dtype == "bfloat16" else [pytest.mark.slow]
            if re.match(r"\w*resnet:(4\d|5\d|110)", spec):  # deeper nets of the same blocks
                marks = [pytest.mark.full]
            found.append(pytest.param(spec, dtype, marks=marks))
        files.add(file)
    return found


@pytest.mark.parametrize(("spec", "dtype"), cases())
def test_the_steps_of_every_entry(monkeypatch, spec, dtype):
    # As a process on a device traces them, not with oneDNN's convolutions, which the next test sees lowered.
    monkeypatch.setattr(convolution, "convolves_in_onednn", lambda: False)
    check(spec, dtype)


@pytest.mark.parametrize(
    ("spec", "dtype"), [("cnn3", "float32"), pytest.param("resnet:20", "bfloat16", marks=pytest.mark.slow)]
)
def test_steps_that_cpus_trace(spec, dtype):
    check(spec, dtype)


# ---------------------------------------------------------------------------- what is found at all


def convolve(x, kernel, strides=(1, 1)):
    return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


IMAGES, KERNEL = array((2, 8, 8, 3), jnp.float32), array((3, 3, 3, 3), jnp.float32)
HALF_IMAGES, HALF_KERNEL = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (IMAGES, KERNEL))


def lowered(function, *arguments, platform="cpu", donate=()):
    return jax.jit(function, donate_argnums=donate).trace(*arguments).lower(lowering_platforms=(platform,))


def test_convolutions_and_products_by_dtype_and_as_often_as_they_are_called():
    @jax.jit
    def shared(x, kernel):
        return convolve(x, kernel)

    def function(x, kernel, half_x, half_kernel, matrix):
        y = shared(shared(x, kernel), kernel)
        z = convolve(half_x, half_kernel)
        dot = jax.lax.dot_general(matrix, matrix.astype(jnp.bfloat16), (((1,), (0,)), ((), ())))
        looped = jax.lax.fori_loop(0, 5, lambda _, x: convolve(x, kernel), x)
        return y, z, dot, looped

    matrix = array((4, 4), jnp.float32)
    contents = program.read_lowered(
        lowered(function, IMAGES, KERNEL, HALF_IMAGES, HALF_KERNEL, matrix, platform="tpu")
    )
    assert contents.convolutions == {"f32": 3, "bf16": 1}
    assert contents.dots == {"f32*bf16": 1}
    assert contents.dtypes >= {"f32", "bf16", "i32"}


def step(state, images, kernel):
    """Takes the state's memory, turns images over, convolves, and calls the host."""
    y = convolve(images, kernel)
    jax.debug.callback(lambda _: None, y[0, 0, 0, 0])
    return state + 1, jax.lax.sort(y.transpose(0, 3, 1, 2)), y.reshape(2, 8, 8, 3, 1).transpose(0, 4, 1, 2, 3)


@pytest.mark.parametrize("read", ["lowered", "compiled"])
def test_donation_transposes_and_host_transfers(read):
    low = lowered(step, array((4,), jnp.float32), IMAGES, KERNEL, donate=0)
    contents = program.read_lowered(low) if read == "lowered" else program.read_compiled(low.compile().as_text())
    assert contents.convolutions == {"f32": 1}
    assert contents.transposes == ["f32[2,3,8,8]"]  # moving axes of length 1 moves no element
    assert contents.host_transfers == ["xla_ffi_python_cpu_callback"]
    assert contents.custom_calls == {"xla_ffi_python_cpu_callback": 1}
    assert contents.donated == {0}


class ForATPU:
    """What calls the host there, which JAX lowers only where one is."""

    TEXT = """
    func.func public @main(%arg0: tensor<4xf32>) -> tensor<4xf32> {
      %token = stablehlo.create_token : !stablehlo.token
      %sent = "stablehlo.send"(%arg0, %token) {channel_handle = #stablehlo.channel_handle<handle = 1, type = 2>,
        is_host_transfer = true} : (tensor<4xf32>, !stablehlo.token) -> !stablehlo.token
      %received:2 = "stablehlo.recv"(%sent) {channel_handle = #stablehlo.channel_handle<handle = 2, type = 3>,
        is_host_transfer = true} : (!stablehlo.token) -> (tensor<4xf32>, !stablehlo.token)
      %between_devices = "stablehlo.send"(%arg0, %token) {channel_handle = #stablehlo.channel_handle<handle = 3,
        type = 1>, is_host_transfer = false} : (tensor<4xf32>, !stablehlo.token) -> !stablehlo.token
      return %received#0 : tensor<4xf32>
    }"""

    def compiler_ir(self, dialect):
        return ir.Module.parse(self.TEXT, mlir.make_ir_context())


def test_a_callback_from_a_tpu_is_an_exchange_with_the_host():
    contents = program.read_lowered(ForATPU())  # type: ignore[arg-type]
    assert contents.host_transfers == ["send", "recv"]
    assert contents.donated == set()


def test_onednn_and_64_bits_are_seen():
    if not convolution.convolves_in_onednn():
        pytest.skip("oneDNN is not installed or cannot be loaded here")
    window = convolution.Window((3, 3), (1, 1), ((1, 1), (1, 1)))
    on_cpu = program.read_lowered(
        lowered(lambda x, kernel: convolution.convolution(x, kernel, None, window, False), IMAGES, KERNEL)
    )
    assert not on_cpu.convolutions
    assert sum(on_cpu.custom_calls.values()) == 1
    with jax.enable_x64(True):
        wide = program.read_lowered(lowered(lambda x: x.astype(jnp.float64), IMAGES))
    assert "f64" in wide.dtypes


# In XLA's words for GPUs: a transpose, a convolution of cuDNN's, a copy to another layout and one to the same, a
# transpose that moves nothing, a product in a fusion and one of cuBLAS's, copies to the host and back.
ON_A_GPU = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, must-alias) }, \
buffer_donor={ (4, {}) }, entry_computation_layout={(f32[8]{0}, bf16[16,9,9,4]{3,2,1,0})->(f32[8]{0})}

%turned (p.1: bf16[16,9,9,4]) -> bf16[16,4,9,9] {
  %p.1 = bf16[16,9,9,4]{3,2,1,0} parameter(0)
  ROOT %transpose.1 = bf16[16,4,9,9]{3,2,1,0} transpose(%p.1), dimensions={0,3,1,2}
}

%product (p.2: f32[6,5], p.3: f32[5,7]) -> f32[6,7] {
  %p.2 = f32[6,5]{1,0} parameter(0)
  %p.3 = f32[5,7]{1,0} parameter(1)
  ROOT %dot.1 = f32[6,7]{1,0} dot(%p.2, %p.3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (s: f32[8], x: bf16[16,9,9,4], k: bf16[3,4,3,8], a: f32[6,5], b: f32[5,7]) -> f32[8] {
  %s = f32[8]{0} parameter(0)
  %x = bf16[16,9,9,4]{3,2,1,0} parameter(1)
  %k = bf16[8,3,3,4]{3,2,1,0} parameter(2)
  %a = f32[6,5]{1,0} parameter(3)
  %b = f32[5,7]{1,0} parameter(4)
  %fusion.1 = bf16[16,4,9,9]{3,2,1,0} fusion(%x), kind=kInput, calls=%turned
  %conv.1 = (bf16[16,9,9,8]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", backend_config={"algorithm":{"algo_id":"28"}}
  %y = bf16[16,9,9,8]{3,2,1,0} get-tuple-element(%conv.1), index=0
  %copy.1 = bf16[16,9,9,8]{2,1,3,0} copy(%y)
  %copy.2 = bf16[16,9,9,8]{2,1,3,0} copy(%copy.1)
  %transpose.2 = bf16[16,8,9,9]{3,2,1,0} transpose(%copy.2), dimensions={0,3,1,2}
  %fusion.2 = f32[6,7]{1,0} fusion(%a, %b), kind=kCustom, calls=%product
  %gemm.1 = (f32[6,7]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  %copy.3 = f32[8]{0:S(5)} copy(%s)
  ROOT %s.2 = f32[8]{0} copy(%copy.3)
}
"""


def test_a_program_compiled_for_a_gpu():
    contents = program.read_compiled(ON_A_GPU)
    assert contents.convolutions == {"bf16": 1}
    assert contents.dots == {"f32": 2}
    assert contents.custom_calls == {"__cudnn$convForward": 1, "__cublas$gemm": 1}
    assert contents.transposes == ["bf16[16,4,9,9]", "bf16[16,9,9,8]"]
    assert contents.host_transfers == ["copy", "copy"]
    assert contents.donated == {0, 2, 4}
    assert contents.dtypes == {"f32", "bf16", "u8", "s8"}
