"""C functions as custom calls: the handler by itself, what XLA makes of it, and signals while it runs."""

import ctypes
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmbench.layers import onednn, xla_ffi

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the machine code is for Linux on x86-64"
)


# XLA's ffi/api/c_api.h of version 0.3.


class Version(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("major", c_int), ("minor", c_int))


class Metadata(Structure):
    _fields_ = (("struct_size", c_size_t), ("version", Version), ("traits", c_uint32))


class Extension(Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("type", c_int), ("next", c_void_p)),
        ("metadata", POINTER(Metadata)),
    )


class ErrorArguments(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("message", c_char_p), ("code", c_int))


CreateError = CFUNCTYPE(c_void_p, POINTER(ErrorArguments))


class Api(Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extension", c_void_p), ("version", Version), ("internal", c_void_p)),
        ("create_error", CreateError),
    )


class Buffer(Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extension", c_void_p), ("dtype", c_int), ("data", c_void_p)),
        *(("rank", c_int64), ("dims", POINTER(c_int64))),
    )


class Buffers(Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extension", c_void_p), ("size", c_int64), ("types", c_void_p)),
        ("buffers", POINTER(POINTER(Buffer))),
    )


class CallFrame(Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extension", POINTER(Extension)), ("api", POINTER(Api))),
        *(("context", c_void_p), ("stage", c_int), ("arguments", Buffers), ("results", Buffers)),
    )


METADATA, EXECUTE = 1, 3
INSTANTIATE, INITIALIZE = 0, 2


@CFUNCTYPE(c_int, c_int, c_void_p)
def note(tag, address):
    noted.append((tag, address))
    return 0


@CFUNCTYPE(c_int)
def fail():
    noted.append("failed")
    return 7


@CreateError
def create_error(arguments):
    errors.append((arguments.contents.struct_size, arguments.contents.message, arguments.contents.code))
    return 0xE44


noted: list = []
errors: list = []


def buffers(*addresses):
    listed = (POINTER(Buffer) * len(addresses))(
        *(ctypes.pointer(Buffer(48, None, 11, address, 0, None)) for address in addresses)
    )
    return Buffers(40, None, len(addresses), None, listed)


def call(handler, extension=None, stage=EXECUTE, arguments=(100, 200), results=(300,)):
    """What the handler returns for such a frame; `noted` and `errors` hold what it called."""
    noted.clear()
    errors.clear()
    api = Api(64, None, Version(24, None, 0, 99), None, create_error)
    frame = CallFrame(168, extension, ctypes.pointer(api), None, stage, buffers(*arguments), buffers(*results))
    return CFUNCTYPE(c_void_p, POINTER(CallFrame))(handler)(ctypes.byref(frame))


CALLS = [(note, 1, xla_ffi.Buffer(2)), (note, 2, xla_ffi.Buffer(0)), (note, 3, xla_ffi.Buffer(1)), (note, 4, 5)]


@pytest.fixture
def handler():
    return xla_ffi._handler("test.handler", 2, 1, CALLS)


def test_the_bytes_are_what_stands_beside_them(tmp_path):
    """The comments, assembled."""
    if not shutil.which("as"):
        pytest.skip("there is no assembler here (as, of GNU's binutils)")
    text = Path(xla_ffi.__file__).read_text()
    lines = re.findall(r'^    f?"[^"]+"  # ([^;\n]+)', text, re.MULTILINE)
    assert len(lines) > 40
    source = re.sub(r"\bcall\b(?=:|$)", "do_call", "\n".join(lines), flags=re.MULTILINE)  # else an instruction
    data = ".balign 8\nerror: .zero 32\narguments: .quad 0\nresults: .quad 0\ncalls: .quad 0\n"
    constants = f"MAJOR = {xla_ffi.MAJOR}\nMINOR = {xla_ffi.MINOR}\n"
    (tmp_path / "handler.s").write_text(f".intel_syntax noprefix\n{constants}{source}\n{data}")
    subprocess.run(["as", "handler.s", "-o", "handler.o"], cwd=tmp_path, check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "handler.o", "handler"], cwd=tmp_path, check=True)
    assembled = (tmp_path / "handler").read_bytes()
    assert assembled[: len(xla_ffi.CODE)] == xla_ffi.CODE
    assert len(assembled) == (len(xla_ffi.CODE) + 7) // 8 * 8 + 7 * 8


def test_calls_come_in_order_with_the_addresses_of_buffers(handler):
    assert call(handler) is None
    assert noted == [(1, 300), (2, 100), (3, 200), (4, 5)]
    assert not errors


def test_a_query_gets_the_version_this_was_written_for(handler):
    metadata = Metadata(48, Version(24, None, 77, 88), 66)
    assert call(handler, ctypes.pointer(Extension(32, METADATA, None, ctypes.pointer(metadata))), stage=0) is None
    assert (metadata.version.major, metadata.version.minor, metadata.traits) == (0, 3, 0)
    assert not noted


def test_an_extension_of_another_type_is_no_query(handler):
    metadata = Metadata(48, Version(24, None, 77, 88), 66)
    assert call(handler, ctypes.pointer(Extension(32, 2, None, ctypes.pointer(metadata)))) is None
    assert (metadata.version.major, metadata.version.minor, metadata.traits) == (77, 88, 66)
    assert len(noted) == len(CALLS)


@pytest.mark.parametrize(
    "frame",
    [
        *({"stage": stage} for stage in (INSTANTIATE, INITIALIZE, 4)),
        *({"arguments": addresses} for addresses in ((), (1,), (1, 2, 3))),
        *({"results": addresses} for addresses in ((), (1, 2))),
    ],
    ids=str,
)
def test_what_is_not_the_execution_asked_for_is_an_error(handler, frame):
    assert call(handler, **frame) == 0xE44
    assert errors == [(28, b"test.handler: a call failed", 13)]
    assert not noted


def test_all_are_called_even_if_one_fails():
    """As one that takes a lock is followed by one that gives it back."""
    assert call(xla_ffi._handler("test.failing", 2, 1, [(note, 1), (fail,), (note, 2)])) == 0xE44
    assert [entry if entry == "failed" else entry[0] for entry in noted] == [1, "failed", 2]
    assert errors == [(28, b"test.failing: a call failed", 13)]


def test_a_failing_call_fails_the_computation():
    name = xla_ffi.register("test.fail", 1, 1, [(fail,)])
    fails = jax.jit(lambda x: jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(x.shape, x.dtype))(x))
    for _ in range(3):
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=r"INTERNAL: test\.fail: a call failed"):
            fails(jnp.zeros(3)).block_until_ready()


def test_a_call_in_a_computation():
    memcmp = ctypes.CDLL(None).memcmp  # whose int is 0 if they are equal
    constant = np.array([1.5, 2.5], np.float32)
    name = xla_ffi.register(
        "test.equal", 1, 1, [(memcmp, c_void_p(constant.ctypes.data), xla_ffi.Buffer(0), constant.nbytes)]
    )
    equals = jax.jit(lambda x: jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((), jnp.float32))(x))
    equals(jnp.asarray(constant)).block_until_ready()
    # JAX raises the first where the computation ran before its call returned, the second where it was waited for.
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=r"test\.equal: a call failed"):
        equals(jnp.asarray(constant[::-1])).block_until_ready()


REFUSED = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from fmbench.layers import Conv, convolves_in_onednn, xla_ffi
{change}
ours, flax = (c(3, 4, (3, 3), rngs=nnx.Rngs(0)) for c in (Conv, nnx.Conv))
x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)
for _ in range(2):
    assert "stablehlo.convolution" in jax.jit(ours).lower(x).as_text()
    np.testing.assert_array_equal(ours(x), flax(x))
assert not convolves_in_onednn()
"""


@pytest.mark.skipif(onednn.library() is None, reason=f"{onednn.PACKAGE} cannot be used here")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            "code = xla_ffi.CODE; i = code.index(b'\\xc7\\x40\\x1c'); "
            "xla_ffi.CODE = code[:i + 3] + b'\\x63' + code[i + 4:]",
            r"handler's API version \(0\.99\) is incompatible",
        ),
        ("xla_ffi.PROT_EXEC = 1 << 20", "memory cannot be made executable"),
    ],
)
def test_where_xla_or_the_system_refuse_convolutions_stay_in_xla(change, why):
    command = [sys.executable, "-c", REFUSED.format(change=change)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(rf"fmbench: convolutions stay in XLA, which cannot call oneDNN: .*{why}.*\n", done.stderr)


# Signals. A child convolves all the time, in a program that XLA runs on the thread that calls it, having no matrix
# product, and in another; each signal must raise KeyboardInterrupt in it, and do nothing else.

INTERRUPTED = """
import jax, jax.numpy as jnp
from flax import nnx
from fmbench.layers import Conv, convolves_in_onednn
assert convolves_in_onednn()
first, second = Conv(1, 8, (3, 3), rngs=nnx.Rngs(0)), Conv(8, 8, (3, 3), rngs=nnx.Rngs(1))
called_inline = jax.jit(lambda x: second(first(x)))
products = lambda y: (y.reshape(-1, 8).T @ y.reshape(-1, 8)).sum()
dispatched = jax.jit(jax.grad(lambda x: products(second(first(x)))))
x = jnp.ones((4, 28, 28, 1))
expected = called_inline(x), dispatched(x)
caught = 0
print("ready", flush=True)
while caught < 50:
    try:
        while True:
            results = called_inline(x), dispatched(x)
    except KeyboardInterrupt:
        caught += 1
        print(caught, flush=True)
assert all(jnp.array_equal(result, e) for result, e in zip((called_inline(x), dispatched(x)), expected))
print("equal", flush=True)
x = jnp.ones((64, 28, 28, 1))
for _ in range(8):
    dispatched(x)
"""


@pytest.mark.skipif(onednn.library() is None, reason=f"{onednn.PACKAGE} cannot be used here")
@pytest.mark.parametrize("async_dispatch", [True, False])
def test_signals_inside_convolutions_raise_in_python(async_dispatch):
    """And the process ends though convolutions run: they need no lock of Python's, which nobody gives back."""
    environment = os.environ | {"JAX_CPU_ENABLE_ASYNC_DISPATCH": str(int(async_dispatch)), "XLA_FLAGS": ""}
    rng = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], env=environment, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        for number in range(1, 51):
            time.sleep(rng.uniform(0.002, 0.03))
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == f"{number}\n", f"signal {number} ended it: {child.wait(60)}"
        assert child.stdout.readline() == "equal\n"
        assert child.wait(60) == 0


@pytest.mark.slow
@pytest.mark.skipif(onednn.library() is None, reason=f"{onednn.PACKAGE} cannot be used here")
def test_a_command_that_is_interrupted_while_it_convolves_ends_as_python_does(run_main, tmp_path):
    run_main(
        *("--config=configs/cnn1.py", "--config.data.source=sample", "--config.num_epochs=1"),
        *(f"--workdir={tmp_path / 'work'}", f"--results_dir={tmp_path}"),
    )
    command = [sys.executable, "-m", "fmbench.evaluate", f"--model={tmp_path / 'work'}"]
    rng, codes = random.Random(0), []
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            while child.poll() is None and "libdnnl" not in Path(f"/proc/{child.pid}/maps").read_text():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            child.send_signal(signal.SIGINT)
            codes.append(child.wait(60))
    assert set(codes) <= {0, 130, -signal.SIGINT}  # 0: it was done
    assert set(codes) != {0}
