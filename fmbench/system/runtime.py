"""How a process runs XLA: on what, and what it keeps between programs and between processes."""

import contextlib
import ctypes
import functools
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from fmbench.errors import UserError, nearest
from fmbench.system import cgroup, files

EXPECTED = (
    "JAX_PLATFORMS may be cuda (with an NVIDIA GPU and pip install 'fmbench[gpu]'), tpu (with a TPU and "
    "pip install 'fmbench[tpu]') or, everywhere, cpu."
)
# Where Linux shows an NVIDIA GPU; the last two in containers and in WSL.
NVIDIA_GPU = tuple(map(Path, ("/dev/nvidia0", "/proc/driver/nvidia/gpus", "/dev/nvidiactl", "/dev/dxg")))

# glibc's <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def set_up() -> None:
    """To be called before JAX is used: keeps freed memory, and compiled programs for the next process.

    Raises:
        UserError: As `find_devices`.
    """
    keep_freed_memory()
    jax.config.update("jax_compilation_cache_dir", str(files.cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    find_devices()


def find_devices() -> list[jax.Device]:
    """The devices that JAX computes on. Where it leaves an NVIDIA GPU idle unasked, standard error says so, once.

    Raises:
        UserError: If JAX has none: JAX_PLATFORMS names what is not there, or what is there cannot be used; or
            XLA cannot read XLA_FLAGS.
    """
    _check_xla_flags(os.environ.get("XLA_FLAGS", ""))
    with _hold_back_what_jax_logs() as records:
        try:
            with cgroup.threads_within_quota("PJRT_NPROC", "NPROC"):
                devices = jax.devices()
        except Exception as error:  # AssertionError, RuntimeError, ValueError, as it happens
            why = _why_there_is_none(error, records)
            records.clear()
            raise UserError(f"{_asked_for()}JAX has no device: {why}; {EXPECTED}") from error
        gpu = next((path for path in NVIDIA_GPU if path.exists()), None)
        if gpu and devices[0].platform == "cpu" and not jax.config.jax_platforms:
            why = next(filter(None, map(_failure, records)), "JAX's CUDA plugin is missing")
            records.clear()
            _warn(
                f"fmbench: this machine shows an NVIDIA GPU ({gpu}), but JAX computes on the CPU: {why}; "
                "pip install 'fmbench[gpu]', or set JAX_PLATFORMS=cpu if that is meant."
            )
    return devices


@functools.cache
def _check_xla_flags(flags: str) -> None:
    """Lets another process read them first: XLA ends the one in which it finds a flag that it does not know."""
    if not flags:
        return
    read = [sys.executable, "-c", "from jaxlib import _jax; _jax.CompileOptions()"]
    done = subprocess.run(read, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode and (why := re.search(r"^[EF]\d{4} [^]]*\] (.*)", done.stderr, re.MULTILINE)):
        raise UserError(f"XLA_FLAGS is '{flags}', which XLA refuses: {why[1]}")


@contextlib.contextmanager
def _hold_back_what_jax_logs() -> Iterator[list[logging.LogRecord]]:
    """Lists what JAX logs of its search for devices, tracebacks and all; what is left in it is logged at last."""
    logger = logging.getLogger("jax._src.xla_bridge")
    records: list[logging.LogRecord] = []

    def hold_back(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    logger.addFilter(hold_back)
    try:
        yield records
    finally:
        logger.removeFilter(hold_back)
        for record in records:
            logger.handle(record)


def _asked_for() -> str:
    """What is set of the variables that choose devices."""
    values = {"JAX_PLATFORMS": jax.config.jax_platforms or None}
    values |= {name: os.environ.get(name) for name in ("JAX_PLATFORM_NAME", "CUDA_VISIBLE_DEVICES")}
    asked = [f"{name} is '{value}'" for name, value in values.items() if value is not None]
    return f"{' and '.join(asked)}, and " if asked else ""


def _why_there_is_none(error: Exception, records: list[logging.LogRecord]) -> str:
    """The reason in one line."""
    asked = (jax.config.jax_platforms or "").split(",")
    if "gpu" in asked:
        return "'gpu' asks for those of all makers at once; write cuda for NVIDIA's"
    if isinstance(error, AssertionError):  # that its choice is empty: it skips cuda where there is no NVIDIA GPU
        return "this machine shows no NVIDIA GPU"
    if failure := next(filter(None, map(_failure, records)), None):
        return failure
    if unknown := re.search(r"Backend '(.*)' is not in the list of known backends", str(error)):
        near = "" if unknown[1] == "cuda" else nearest(unknown[1], ["cpu", "cuda", "tpu"])
        return f"no platform '{unknown[1]}' is installed{near}"
    return _first_line(error)


def _failure(record: logging.LogRecord) -> str | None:
    """The exception that a log record tells of, in one line."""
    error = record.exc_info and record.exc_info[1]
    return _first_line(error) if error else None


def _first_line(error: BaseException) -> str:
    """What an exception says, without JAX's own advice, which stands in parentheses at the end."""
    first, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"\s*\((set|you may) .*\)$", "", first).rstrip(".")


@functools.cache
def _warn(line: str) -> None:
    """Says it once."""
    print(line, file=sys.stderr)


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed for the next allocation; elsewhere does nothing.

    To be called before there are threads: the arena that one has stays, and XLA's threads would allocate there.

    On CPUs XLA allocates a program's buffers anew at each call. glibc takes large ones from the system and gives
    them back, and the system clears every page of them again: at cnn1 on two cores that is 31 instead of 17 ms a
    step, at cnn4 172 instead of 128.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # no glibc
        return
    mallopt(M_ARENA_MAX, 1)  # threads' own arenas cannot hold large blocks
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    mallopt(M_TOP_PAD, 512 << 20)
