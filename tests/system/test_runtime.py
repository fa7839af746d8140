"""What a process keeps between programs."""

import ctypes
import resource
import subprocess
import sys

import pytest

from fmbench.system import runtime

TOUCH_TWICE = """
import ctypes, resource
from fmbench.system import runtime
{call}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(200 << 20)))
    libc.memset(block, 1, ctypes.c_size_t(200 << 20))
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
@pytest.mark.parametrize(("call", "keeps"), [("", False), ("runtime.keep_freed_memory()", True)])
def test_freed_memory_is_kept(call, keeps):
    code = TOUCH_TWICE.format(call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    pages = (200 << 20) // resource.getpagesize()
    assert first > 0.9 * pages
    assert second < 0.1 * pages if keeps else second > 0.9 * pages


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    runtime.keep_freed_memory()


def test_processes_that_train_together_say_so_before_they_have_threads():
    code = (
        "import os; from fmbench.distributed import meeting; from fmbench.system import runtime\n"
        "runtime.keep_freed_memory = lambda: print('threads:', len(os.listdir('/proc/self/task')), flush=True)\n"
        "with meeting.joined(meeting.Place('127.0.0.1:1', 2, 0, 1.0), dict): pass"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "threads: 1\n", done.stderr
