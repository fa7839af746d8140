"""What a record says of the machine, the libraries and the commit that made it."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
from pathlib import Path

import jax

from fmbench import layers
from fmbench.config import REPOSITORY
from fmbench.layers import onednn
from fmbench.records.schema import Environment
from fmbench.system import runtime


def environment() -> Environment:
    """Describes this process's machine, libraries and commit."""
    device, *_ = runtime.find_devices()
    packages = ["jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets"]
    if layers.convolves_in_onednn():
        packages.append(onednn.PACKAGE)
    commit, dirty = _git()
    return Environment(
        device_platform=device.platform,
        device_kind=_cpu_model() if device.platform == "cpu" else device.device_kind,
        num_devices=jax.device_count(),
        num_processes=jax.process_count(),
        cpu=_cpu_model(),
        cpu_cores=_cpu_cores(),
        operating_system=platform.platform(),
        python=platform.python_version(),
        versions={package: importlib.metadata.version(package) for package in packages},
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        git_commit=commit,
        git_dirty=dirty,
    )


def now() -> str:
    """The time for `created`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def peak_memory_bytes() -> int:
    """The most memory held at any time: the accelerator's, or on CPUs the process's."""
    statistics = [device.memory_stats() for device in jax.local_devices()]
    if statistics[0] and "peak_bytes_in_use" in statistics[0]:
        return max(device["peak_bytes_in_use"] for device in statistics)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss is inherited from the parent, which may have been larger
        (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        return int(kilobytes) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _cpu_model() -> str:
    """The processor as its maker calls it, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_cores() -> int:
    """Cores this process may use; macOS only tells how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git() -> tuple[str | None, bool | None]:
    """Commit of this checkout and whether anything but results/ differs from it; None outside git."""

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(REPOSITORY), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    if git("rev-parse", "--show-toplevel") != str(REPOSITORY):
        return None, None  # installed elsewhere, perhaps below someone else's repository
    changes = git("status", "--porcelain", "--", ".", ":!results", ":!README.md")
    return git("rev-parse", "HEAD"), None if changes is None else bool(changes)
