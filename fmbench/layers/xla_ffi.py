"""C functions as XLA custom calls on CPUs, without a compiler: a handler in machine code.

XLA calls a handler with a frame of pointers to its arguments and results (XLA's `ffi/api/c_api.h`). A Python
function would not do as one. On the main thread a signal's handler may raise (Ctrl-C: KeyboardInterrupt) before
its first line, and what ctypes then returns to XLA is undefined; on other threads it waits for Python's lock,
which nobody gives back while the interpreter ends. Which thread that is XLA decides: even with asynchronous
dispatch the caller's own runs what XLA takes for small, as it does any number of custom calls. So the handler is
fifty instructions that call C functions, and Python runs before and after a computation, never within.

They are instructions of x86-64, by the calling convention of Linux; there are wheels of oneDNN for nothing else.
"""

import contextlib
import ctypes
import os
import struct
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_long, c_size_t, c_void_p
from typing import Any, NamedTuple

import jax

# XLA refuses a handler of an interface that it does not know. jaxlib 0.10 has 0.3; 0.11 and 0.12, of 0.4 and 0.5,
# know it and have all that is used here in the same places.
MAJOR, MINOR = 0, 3

INTERNAL = 13  # XLA_FFI_Error_Code
ARGUMENTS, RESULTS = 72, 112  # where a frame has the lists of its buffers

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_PRIVATE, MAP_ANONYMOUS = 2, 32

# XLA_FFI_Error *handler(XLA_FFI_CallFrame *frame): answers a query for the version, or makes the calls. `_handler`
# says what follows it in memory. tests/layers/test_xla_ffi.py assembles what stands beside the bytes.
CODE = bytes.fromhex(
    "48 8b 47 08"  # mov rax, [rdi + 8] ; the extension, or null
    "48 85 c0"  # test rax, rax
    "74 22"  # jz run
    "83 78 08 01"  # cmp dword ptr [rax + 8], 1 ; XLA_FFI_Extension_Metadata
    "75 1c"  # jne run
    "48 8b 40 18"  # mov rax, [rax + 24] ; the metadata
    f"c7 40 18 {MAJOR:02x} 00 00 00"  # mov dword ptr [rax + 24], MAJOR
    f"c7 40 1c {MINOR:02x} 00 00 00"  # mov dword ptr [rax + 28], MINOR
    "c7 40 20 00 00 00 00"  # mov dword ptr [rax + 32], 0 ; no traits
    "31 c0"  # xor eax, eax
    "c3"  # ret
    "53"  # run: push rbx
    "55"  # push rbp
    "41 54"  # push r12
    "48 89 fd"  # mov rbp, rdi ; the frame
    "48 8d 1d af 00 00 00"  # lea rbx, calls[rip]
    "41 bc 01 00 00 00"  # mov r12d, 1 ; failed, if not all is as it should be:
    "83 7d 20 03"  # cmp dword ptr [rbp + 32], 3 ; XLA_FFI_ExecutionStage_EXECUTE
    "75 56"  # jne end
    "48 8b 45 38"  # mov rax, [rbp + 56] ; number of arguments
    "48 3b 05 88 00 00 00"  # cmp rax, arguments[rip]
    "75 49"  # jne end
    "48 8b 45 60"  # mov rax, [rbp + 96] ; number of results
    "48 3b 05 83 00 00 00"  # cmp rax, results[rip]
    "75 3c"  # jne end
    "45 31 e4"  # xor r12d, r12d ; else the statuses of all calls, or'ed
    "48 8b 03"  # next: mov rax, [rbx] ; a function, or null after the last
    "48 85 c0"  # test rax, rax
    "74 31"  # jz end
    "48 8b 7b 08"  # mov rdi, [rbx + 8]
    "48 8b 73 10"  # mov rsi, [rbx + 16]
    "48 8b 53 18"  # mov rdx, [rbx + 24]
    "48 8b 4b 20"  # mov rcx, [rbx + 32]
    "4c 8b 43 28"  # mov r8, [rbx + 40] ; where the frame has the list of which rsi is an index, or 0
    "4d 85 c0"  # test r8, r8
    "74 0d"  # jz call
    "4e 8b 44 05 00"  # mov r8, [rbp + r8]
    "4d 8b 04 f0"  # mov r8, [r8 + rsi * 8] ; the XLA_FFI_Buffer
    "49 8b 70 18"  # mov rsi, [r8 + 24] ; its address
    "ff d0"  # call: call rax
    "41 09 c4"  # or r12d, eax
    "48 83 c3 30"  # add rbx, 48
    "eb c7"  # jmp next
    "31 c0"  # end: xor eax, eax ; no error
    "45 85 e4"  # test r12d, r12d
    "74 0e"  # jz out
    "48 8b 45 10"  # mov rax, [rbp + 16] ; XLA_FFI_Api, of which create_error
    "48 8d 3d 0b 00 00 00"  # lea rdi, error[rip]
    "ff 50 30"  # call [rax + 48]
    "41 5c"  # out: pop r12
    "5d"  # pop rbp
    "5b"  # pop rbx
    "c3"  # ret
)


class Buffer(NamedTuple):
    """In a call, the address of an array: of the arguments, or of the results that follow them."""

    position: int


class RefusedError(Exception):
    """This process can have no custom calls of this kind."""


def register(name: str, num_arguments: int, num_results: int, calls: Sequence[tuple[Any, ...]]) -> str:
    """Makes C functions what `jax.ffi.ffi_call(name, ...)` runs on CPUs; returns the name.

    Args:
        name: Unique in this process.
        num_arguments: How many arrays `ffi_call` is given.
        num_results: How many it returns.
        calls: What to call, in this order: each a function of ctypes and up to four arguments, integers and
            pointers as ctypes has them, of which the second may be a `Buffer`. They run on a thread of XLA's or on
            the caller's, maybe on several at once. All are called, and if one returns another int than 0, the
            computation fails.

    Raises:
        RefusedError: If XLA does not know the interface, or the system lets nothing be executed that is written.
    """
    handler = _handler(name, num_arguments, num_results, calls)
    with contextlib.suppress(RuntimeError):  # that there are none
        jax.local_devices(backend="cpu")  # before which nobody asks XLA
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [c_void_p, c_char_p, c_void_p]
    try:
        jax.ffi.register_ffi_target(name, new_capsule(handler, None, None), platform="cpu")
    except jax.errors.JaxRuntimeError as error:
        raise RefusedError(str(error).splitlines()[0]) from error
    return name


def _handler(name: str, num_arguments: int, num_results: int, calls: Sequence[tuple[Any, ...]]) -> int:
    """The address of the machine code, with the calls behind it."""
    message = ctypes.create_string_buffer(f"{name}: a call failed".encode())
    code = CODE + bytes(-len(CODE) % 8)
    code += struct.pack("6q", 28, 0, ctypes.addressof(message), INTERNAL, num_arguments, num_results)
    for function, *arguments in calls:
        values, frame_offset = [_value(argument) for argument in arguments], 0
        if len(arguments) > 1 and isinstance(arguments[1], Buffer):
            is_result = values[1] >= num_arguments
            values[1] -= num_arguments * is_result
            frame_offset = RESULTS if is_result else ARGUMENTS
        code += struct.pack("6q", _value(function), *values, *[0] * (4 - len(values)), frame_offset)
    # A computation may still run while the interpreter ends, which frees what is Python's.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object((message, calls)))
    return _executable(code + bytes(8))


def _value(argument: Any) -> int:
    """What C gets: a number or an address."""
    if isinstance(argument, int):
        return argument
    if isinstance(argument, Buffer):
        return argument.position
    if isinstance(argument, ctypes.Array):
        return ctypes.addressof(argument)
    return ctypes.cast(argument, c_void_p).value or 0


def _executable(code: bytes) -> int:
    """The address of a copy in memory that can be executed, and is never freed."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = c_void_p
    libc.mmap.argtypes = [c_void_p, c_size_t, c_int, c_int, c_int, c_long]
    libc.mprotect.argtypes = [c_void_p, c_size_t, c_int]
    address = libc.mmap(None, len(code), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if address == c_void_p(-1).value:
        raise RefusedError(f"no memory: {os.strerror(ctypes.get_errno())}")
    ctypes.memmove(address, code, len(code))
    if libc.mprotect(address, len(code), PROT_READ | PROT_EXEC):
        raise RefusedError(f"memory cannot be made executable: {os.strerror(ctypes.get_errno())}")
    return address
