"""How a process runs XLA: what it keeps between programs, and between processes."""

import ctypes

import jax

from fmbench.system import files

# glibc's <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def set_up() -> None:
    """To be called before JAX is used: keeps freed memory, and compiled programs for the next process."""
    keep_freed_memory()
    jax.config.update("jax_compilation_cache_dir", str(files.cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed for the next allocation; elsewhere does nothing.

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
