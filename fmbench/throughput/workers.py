"""Systems under test, each a worker process of benchmarks/ that is spoken to in lines of JSON."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from fmbench import config
from fmbench.system import files
from fmbench.system.peers import BENCHMARKS, interpreter, last_line
from fmbench.throughput.measurements import Dtype, WaitPolicy

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
# How OpenMP's threads wait for one another: as by default, which is to spin for a while, or asleep, which fmbench
# chooses for itself. XLA has threads of its own, which sleep.
WAIT_POLICIES: tuple[WaitPolicy, ...] = ("", "PASSIVE")
# XLA convolves and multiplies in a library of its own, YNN, unless it is told otherwise.
XLA_ONEDNN = "--xla_cpu_experimental_onednn_custom_call=true --xla_cpu_experimental_ynn_fusion_type="

XLA_FLAG_ERRORS = ("Unknown flag", "Illegal value for --xla")
TIMEOUT = 600.0  # seconds that a worker may take for an answer


class System(NamedTuple):
    """One way of running a model: a worker of benchmarks/ and what to tell it."""

    name: str
    script: str
    peer: str  # whose environment it runs in; empty: this one
    variant: str
    dtype: Dtype
    keeps_compiled: bool  # for the next process
    wait_policy: WaitPolicy = ""
    xla_flags: str = ""  # beside those that are set already; an XLA that lacks one ends the process, and says so

    @property
    def title(self) -> str:
        policy = f" ({self.wait_policy.lower()} waiting)" if self.wait_policy else ""
        return f"{self.name} {self.dtype}{policy}"

    def environ(self, environ: dict[str, str]) -> dict[str, str]:
        """The environment of its process."""
        if self.peer:  # fmbench chooses for itself, see layers/onednn.py
            environ = {name: value for name, value in environ.items() if name != "OMP_WAIT_POLICY"}
        if self.wait_policy:
            environ = environ | {"OMP_WAIT_POLICY": self.wait_policy}
        return with_xla_flags(environ, self.xla_flags)

    def command(self) -> list[str]:
        return [str(interpreter(self.peer)), str(BENCHMARKS / self.script)]


def choose_systems(peers: Sequence[str], dtypes: Sequence[Dtype], platform: str = "cpu") -> list[System]:
    """The systems in the order of the table's rows; the first is the yardstick, fmbench in float32.

    On CPUs each peer with an environment of its own comes twice, once for each of WAIT_POLICIES; and stock Flax
    comes with XLA's own oneDNN, too.
    """
    on_cpu = platform == "cpu"
    torch_modes = ("eager", "compile", "graph") if platform == "gpu" else ("eager", "compile")
    systems = []
    for dtype in DTYPES:
        systems.append(System("fmbench", "fmbench_itself.py", "", dtype, dtype, True))
        stock = System("stock Flax", "peer_flax.py", "", dtype, dtype, True)
        systems += [stock, stock._replace(name="stock Flax, oneDNN", xla_flags=XLA_ONEDNN)] if on_cpu else [stock]
        others = [
            System(f"PyTorch {m}", "peer_torch.py", "torch", f"{m}-{dtype}", dtype, False) for m in torch_modes
        ]
        others.append(System("Keras", "peer_keras.py", "keras", dtype, dtype, False))
        for system in others:
            systems += [system._replace(wait_policy=policy) for policy in (WAIT_POLICIES if on_cpu else ("",))]
    yardstick = systems[0]
    return [yardstick] + [
        system for system in systems[1:] if system.dtype in dtypes and system.peer in ("", *peers)
    ]


def fresh_caches(directory: Path) -> dict[str, str]:
    """An environment whose data cache is ours, and whose caches of compiled programs are empty.

    In it Python finds this fmbench and no other that is installed; and glibc keeps freed memory, as an expert
    would have it for PyTorch and the others too (fmbench does so by itself, see runtime.py).
    """
    directory.mkdir()
    for path in files.cache_directory().absolute().iterdir():
        if path.name != "xla":
            (directory / path.name).symlink_to(path)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(config.REPOSITORY), os.environ.get("PYTHONPATH")))),
        "FMBENCH_CACHE": str(directory),
        "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"),
        "TRITON_CACHE_DIR": str(directory / "triton"),
        # On accelerators each takes the memory that it needs: JAX would take three quarters of it at once.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "MALLOC_TOP_PAD_": str(512 << 20),
    }


def with_xla_flags(environ: dict[str, str], flags: str) -> dict[str, str]:
    """The environment with further flags of XLA."""
    return environ | ({"XLA_FLAGS": f"{environ.get('XLA_FLAGS', '')} {flags}".strip()} if flags else {})


def left_out(peers: Sequence[str], platform: str) -> dict[str, str]:
    """The peers that cannot be measured on this kind of device, and why."""
    reasons = {"keras": f"benchmarks/setup_peers.sh makes it a TensorFlow for CPUs, and this is a {platform}"}
    if platform != "gpu":
        reasons["torch"] = f"its worker runs on CPUs and NVIDIA GPUs, and this is a {platform}"
    return {} if platform == "cpu" else {peer: reason for peer, reason in reasons.items() if peer in peers}


class WorkerError(Exception):
    """A worker that cannot go on; the message says why."""


class Ready(BaseModel):
    system: str
    versions: dict[str, str]
    num_params: int
    bytes_per_image: float | None = None


class Logits(BaseModel):
    logits: list[list[float]]


class Compiled(BaseModel):
    compile_seconds: float
    flops_per_image: float | None


class Work(BaseModel):
    images: int
    seconds: float
    core_seconds: float


class Memory(BaseModel):
    peak_memory_bytes: int


Answer = TypeVar("Answer", bound=BaseModel)


class Worker:
    """A process that answers each line of JSON with one line of JSON."""

    def __init__(self, command: list[str], environ: dict[str, str]):
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `kill`)
        # A session of its own: Ctrl-C is ours to handle, and its children can be killed with it.
        self.process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            start_new_session=True,
        )
        self.lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(b"")

    def ask(self, message: dict[str, Any], answer: type[Answer]) -> Answer:
        """Sends a message and waits for the answer.

        Raises:
            WorkerError: If the worker reports an error, dies, answers something else or not within `TIMEOUT`.
        """
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it is dead, and its last words say more
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        try:
            line = self.lines.get(timeout=TIMEOUT)
        except queue.Empty:
            raise WorkerError(f"no answer to '{message.get('do', 'job')}' within {TIMEOUT:g} s") from None
        if not line:
            raise WorkerError(self._last_words())
        try:
            content = json.loads(line)
            if isinstance(content, dict) and "error" in content:
                raise WorkerError(str(content["error"]))
            return answer.model_validate(content)
        except ValueError as error:  # no JSON, or not what was asked for
            raise WorkerError(f"answered {line[:80].decode(errors='replace').strip()!r}") from error

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        if self.process.returncode == -signal.SIGKILL:
            return "was killed, perhaps for want of memory: all systems' processes are there at once"
        self.stderr.seek(0)
        words = self.stderr.read().decode(errors="replace")
        flags = [line for line in words.splitlines() if any(error in line for error in XLA_FLAG_ERRORS)]
        last = flags[0] if flags else last_line(words)  # XLA goes on with what all its flags are
        return f"ended with exit code {self.process.returncode}: {last[:200]}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.stderr.close()
