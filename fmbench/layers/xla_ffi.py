"""Python functions as XLA custom calls on CPUs: what `jax.ffi` asks a C++ compiler for, through ctypes.

XLA calls a handler with a frame of pointers to its arguments and results (XLA's `ffi/api/c_api.h`, here as ctypes
structures). The handler hands the addresses of the buffers to a Python function. That takes 6 microseconds a call
and copies nothing, where `jax.pure_callback` copies every result.
"""

import ctypes
import threading
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any

import jax

# A computation that calls Python needs Python's lock. One that runs on while the interpreter ends waits for that
# lock forever, and the interpreter for it; so a CPU's computations are done when their call returns.
jax.config.update("jax_cpu_enable_async_dispatch", False)

EXECUTE = 3  # XLA_FFI_ExecutionStage
INTERNAL = 13  # XLA_FFI_Error_Code


class _Version(ctypes.Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("major", c_int), ("minor", c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", c_size_t), ("version", _Version), ("traits", c_uint32))


class _MetadataExtension(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("type", c_int),
        ("next", c_void_p),
        ("metadata", POINTER(_Metadata)),
    )


class _ErrorArguments(ctypes.Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("message", c_char_p), ("code", c_int))


class _Api(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("version", _Version),
        ("internal", c_void_p),
        ("create_error", ctypes.CFUNCTYPE(c_void_p, POINTER(_ErrorArguments))),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    )


class _Buffers(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("size", c_int64),
        ("types", c_void_p),
        ("buffers", POINTER(POINTER(_Buffer))),
    )

    def addresses(self) -> list[int]:
        return [self.buffers[i].contents.data for i in range(self.size)]


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", POINTER(_MetadataExtension)),
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
    )


_Handler = ctypes.CFUNCTYPE(c_void_p, POINTER(_CallFrame))
_handlers: dict[str, Any] = {}  # XLA keeps their addresses, so they must not be collected
_registering = threading.Lock()


def register(name: str, function: Callable[..., None]) -> str:
    """Makes `function` what `jax.ffi.ffi_call(name, ...)` runs on CPUs; returns the name.

    Args:
        name: Unique in this process.
        function: Called with the address of every argument's buffer, then of every result's, as integers. It runs
            on a thread of XLA's and may be called from several at once. An exception fails the computation.
    """

    @_Handler
    def handler(frame_pointer: Any) -> int | None:
        frame = frame_pointer.contents
        if frame.extension:  # asked at registration which version of the interface this is
            version = frame.extension.contents.metadata.contents.version
            version.major, version.minor = frame.api.contents.version.major, frame.api.contents.version.minor
            return None
        if frame.stage != EXECUTE:
            return None
        try:
            function(*frame.arguments.addresses(), *frame.results.addresses())
        except Exception as error:
            arguments = _ErrorArguments(message=f"{name}: {error}".encode(), code=INTERNAL)
            arguments.struct_size = ctypes.sizeof(arguments)
            return frame.api.contents.create_error(ctypes.byref(arguments))
        return None

    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [c_void_p, c_char_p, c_void_p]
    address = ctypes.cast(handler, c_void_p)
    with _registering:
        jax.ffi.register_ffi_target(name, new_capsule(address, None, None), platform="cpu")
        _handlers[name] = handler
    return name
