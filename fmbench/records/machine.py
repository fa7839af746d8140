"""What a record says of the machine, the libraries and the commit that made it."""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import psutil

from fmbench import layers
from fmbench.config import REPOSITORY
from fmbench.errors import UserError
from fmbench.layers import cpp, onednn
from fmbench.records import nvidia
from fmbench.records.schema import Accelerator, Environment
from fmbench.system import cgroup, runtime

CPUINFO = Path("/proc/cpuinfo")
INSTRUCTION_SETS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"),
    *("asimd", "sve", "bf16"),  # Arm's
)
THREAD_SETTINGS = (
    *("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES"),
    *("GOMP_CPU_AFFINITY", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    *("NPROC", "PJRT_NPROC"),  # XLA's
)
ARITHMETIC_SETTINGS = (  # which change bits and speed, as the number of threads does
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    *("JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64", "NVIDIA_TF32_OVERRIDE", "LIBTPU_INIT_ARGS"),
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")
MACHINE = "FMBENCH_MACHINE"
SHARED_BY = "FMBENCH_SHARED_BY"  # set by fmbench.studies.shared_cores
PACKAGE = REPOSITORY / "fmbench"
GIT_REDIRECTIONS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")
GIT_TIMEOUT = 60  # seconds


def environment(*, ask_driver: bool = True) -> Environment:
    """Describes this process's machine, libraries and commit.

    Args:
        ask_driver: What clocks and memory accelerators have, and of which version the driver is. To be asked at
            the end of a run, when the clocks are those under load; it takes tenths of a second.
    """
    device, *_ = runtime.find_devices()
    packages = list(PACKAGES)
    if layers.convolves_in_onednn():
        packages.append(onednn.PACKAGE)
    versions = {package: importlib.metadata.version(package) for package in packages}
    if layers.convolves_in_onednn() and cpp.library() is not None:
        versions[cpp.NAME] = cpp.compiler()
    accelerators = None
    if device.platform != "cpu":
        versions |= _accelerator_versions(device)
        if ask_driver:
            readings = nvidia.Readings() if device.platform == "gpu" else None
            accelerators = _accelerators(readings)
            versions |= {"NVIDIA driver": readings.driver} if readings and readings.driver else {}
    git = _git()
    cpuinfo = _cpuinfo()
    flags = cpuinfo.get("flags", cpuinfo.get("Features", "")).split()
    return Environment(
        device_platform=device.platform,
        device_kind=_cpu_model() if device.platform == "cpu" else " and ".join(_kinds(jax.devices())),
        num_devices=jax.device_count(),
        num_processes=jax.process_count(),
        cpu=_cpu_model(),
        cpu_cores=_cpu_cores(),
        machine=machine_name(),
        cpu_stepping=".".join(cpuinfo[field] for field in ("cpu family", "model", "stepping") if field in cpuinfo)
        or None,
        instruction_sets=[name for name in INSTRUCTION_SETS if name in flags] if flags else None,
        shared_by=_shared_by(),
        cpu_quota=cgroup.cpu_quota(),
        memory_bytes=psutil.virtual_memory().total,
        virtualised="hypervisor" in flags if "flags" in cpuinfo else None,  # only x86 tells
        thread_settings=_thread_settings(),
        operating_system=platform.platform(),
        python=platform.python_version(),
        versions=versions,
        accelerators=accelerators,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        git_commit=git.commit,
        git_dirty=git.dirty,
        git_unknown=git.unknown,
        code_sha256=code_sha256(),
    )


def software() -> dict[str, str]:
    """What is known of the code before JAX has devices: versions of libraries, and the hash of fmbench."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions[onednn.PACKAGE] = importlib.metadata.version(onednn.PACKAGE)
    return versions | {"python": platform.python_version(), "fmbench's code": code_sha256()}


def machine_name() -> str | None:
    """What --machine or FMBENCH_MACHINE calls this machine, if they do.

    Raises:
        UserError: If that is nothing for a file's name.
    """
    name = os.environ.get(MACHINE, "")
    if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}", name):
        raise UserError(
            f"the machine's name, by --machine or {MACHINE}, is '{name}'; it is part of a file's name: up to 40 "
            "letters, digits, '.', '_' and '-', the first a letter or digit."
        )
    return name or None


def _shared_by() -> int | None:
    """How many runs at a time share this machine's cores; None, where this one has them all."""
    text = os.environ.get(SHARED_BY, "")
    if text and not re.fullmatch(r"[2-9]|[1-9]\d{1,3}", text):
        raise UserError(f"{SHARED_BY} is '{text}'; it is the number of runs that share this machine, two or more.")
    return int(text) if text else None


def describe_devices() -> str:
    """Number and kind of the devices, for people: '2 x NVIDIA A100-SXM4-40GB'."""
    return " and ".join(f"{number} x {kind}" for kind, number in _kinds(jax.devices()).items())


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
        (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE)
        return int(kilobytes) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _kinds(devices: Sequence[jax.Device]) -> Counter[str]:
    """How many there are of each kind; the kind of a slice of a GPU has its profile."""
    return Counter(gpu.kind if gpu else device.device_kind for device, gpu in _with_gpus(devices))


def _with_gpus(devices: Sequence[jax.Device]) -> Iterator[tuple[jax.Device, nvidia.Gpu | None]]:
    """Each device and, where nvidia-smi knows it, the GPU it is."""
    gpus: list[nvidia.Gpu | None] = [None] * len(devices)
    if devices[0].platform == "gpu":
        gpus = nvidia.find_gpus([device.device_kind for device in devices])
    return zip(devices, gpus, strict=True)


def _accelerators(readings: nvidia.Readings | None) -> list[Accelerator]:
    """This process's accelerators as they are now."""

    def whole_number(gpu: nvidia.Gpu | None, field: str, unit: int = 1) -> int | None:
        value = readings.number(gpu, field) if readings else None
        return None if value is None else int(value) * unit

    return [
        Accelerator(
            kind=gpu.kind if gpu else device.device_kind,
            usable_memory_bytes=(device.memory_stats() or {}).get("bytes_limit"),
            memory_bytes=whole_number(gpu, "memory.total", 1 << 20),
            mig_profile=gpu.mig_profile if gpu else None,
            sm_clock_mhz=whole_number(gpu, "clocks.sm"),
            max_sm_clock_mhz=whole_number(gpu, "clocks.max.sm"),
            memory_clock_mhz=whole_number(gpu, "clocks.mem"),
            max_memory_clock_mhz=whole_number(gpu, "clocks.max.mem"),
            power_limit_watts=readings.number(gpu, "power.limit") if readings else None,
        )
        for device, gpu in _with_gpus(jax.local_devices())
    ]


def _accelerator_versions(device: jax.Device) -> dict[str, str]:
    """Of JAX's plugin, and of the CUDA and cuDNN that it has loaded, or that are installed for it."""
    versions = {}
    for package in ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if cuda := re.search(r"\bcuda (\d+)(\d\d)\d\b", device.client.platform_version, re.IGNORECASE):
        versions["CUDA"] = f"{cuda[1]}.{int(cuda[2])}"
        for package in ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions["cuDNN"] = importlib.metadata.version(package)
        with contextlib.suppress(Exception):  # no public API tells what is loaded
            from jax._src.lib import cuda_versions

            assert cuda_versions
            number = cuda_versions.cudnn_get_version()
            versions["cuDNN"] = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return versions


def _cpu_model() -> str:
    """The processor as its maker calls it, where the system tells."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; elsewhere nothing."""
    try:
        first, *_ = CPUINFO.read_text(encoding="utf-8").split("\n\n")
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def _thread_settings() -> dict[str, str]:
    """What is set of these settings, but for the waiting that fmbench.layers.onednn chooses by itself."""
    settings = THREAD_SETTINGS + ARITHMETIC_SETTINGS
    given = {name: os.environ[name] for name in settings if name in os.environ}
    if given.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        del given["OMP_WAIT_POLICY"]
    return given


def _cpu_cores() -> int:
    """Cores this process may use; macOS only tells how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def code_sha256() -> str:
    """The hash of fmbench's source files, at the first call: of what this process has loaded."""
    files = (file for file in PACKAGE.rglob("*") if file.suffix in (".py", ".cpp", ".h"))
    return _sha256(sorted(files), PACKAGE)


def sha256_of_modules(names: Iterable[str]) -> str:
    """The hash of `code_sha256` and of the files of these modules, which lie outside of fmbench."""
    modules = sorted({name for name in names if getattr(sys.modules.get(name), "__file__", None)})
    hashes = [f"{name} {_sha256([Path(str(sys.modules[name].__file__))])}" for name in modules]
    return hashlib.sha256("\n".join([code_sha256(), *hashes]).encode()).hexdigest() if hashes else code_sha256()


def _sha256(files: Sequence[Path], folder: Path | None = None) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix() if folder else ''}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


class _Git(NamedTuple):
    """What git says of the checkout; None is not known."""

    commit: str | None
    dirty: bool | None  # whether anything but results/ and the README differs from it
    unknown: str | None  # why one of them is None


def _git() -> _Git:
    """Commit of this checkout and whether anything but results/ differs from it."""
    try:
        top = _ask_git("rev-parse", "--show-toplevel")
        if top != str(REPOSITORY):
            return _Git(None, None, "fmbench is not in a checkout of its own")  # below somebody else's, perhaps
        commit = _ask_git("rev-parse", "HEAD")
    except _GitError as error:
        return _Git(None, None, str(error))
    try:
        changes = _ask_git(
            "status", "--porcelain", "--untracked-files=normal", "--", ".", ":!results", ":!README.md"
        )
    except _GitError as error:
        return _Git(commit, None, str(error))
    return _Git(commit, bool(changes), None)


class _GitError(Exception):
    """Git's reason for not answering, in one line."""


def _ask_git(*arguments: str) -> str:
    """What git answers about this checkout, whatever repository the environment, as that of a hook, points to."""
    environment = {name: value for name, value in os.environ.items() if name not in GIT_REDIRECTIONS}
    try:
        answer = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(REPOSITORY), *arguments],
            env=environment | {"LC_ALL": "C"},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=GIT_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise _GitError(f"git gave no answer in {GIT_TIMEOUT} s") from None
    except OSError as error:
        raise _GitError(f"git cannot be run ({error.strerror})") from None
    if answer.returncode:
        first, *_ = answer.stderr.strip().splitlines() or [f"git ended with {answer.returncode}"]
        raise _GitError(f"git: {first.removeprefix('fatal: ')}")
    return answer.stdout.strip()
