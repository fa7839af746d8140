"""On what JAX computes: what is said where it finds nothing, or less than there is."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from fmbench.errors import UserError
from fmbench.system import runtime

EVERY_WAY_IN = """
import importlib, pathlib, sys
import fmbench
model = pathlib.Path("work")
train = ["--config=mlp", "--config.data.source=sample"]
commands = {
    "main": [*train, "--workdir=work"],
    "main --summary": [*train, "--summary"],
    "predict": ["--model=work", "image.png"],
    "evaluate": ["--model=work"],
    "embed": ["--model=work"],
    "figures": ["--model=work"],
    "cross_validate": [*train, "--workdir=work"],
}
for command, flags in commands.items():
    name = command.split()[0]
    sys.argv = [name, *flags]
    try:
        importlib.import_module(f"fmbench.{name}").main()
    except SystemExit as end:
        print(end.code)
for call in (lambda: fmbench.train("mlp"), lambda: fmbench.load_model("work")):
    try:
        call()
    except fmbench.UserError as error:
        print("fmbench.UserError:", error, file=sys.stderr)
"""
REMEDY = "JAX_PLATFORMS may be cuda (with an NVIDIA GPU and pip install 'fmbench[gpu]'), tpu (with a TPU and"


def without_devices(code: str, where: Path, platforms: str) -> subprocess.CompletedProcess:
    environ = os.environ | {"JAX_PLATFORMS": platforms, "FMBENCH_CACHE": str(where / "cache")}
    return subprocess.run([sys.executable, "-c", code], cwd=where, env=environ, capture_output=True, text=True)


def test_every_command_and_function_says_in_one_line_that_there_is_no_device(tmp_path):
    done = without_devices(EVERY_WAY_IN, tmp_path, "wrong")
    lines = done.stderr.splitlines()
    names = ["main", "main", "predict", "evaluate", "embed", "figures", "cross_validate", *["UserError"] * 2]
    assert [line.partition(":")[0] for line in lines] == [f"fmbench.{name}" for name in names], done.stderr
    assert len({line.partition(":")[2] for line in lines}) == 1
    assert "JAX_PLATFORMS is 'wrong', and JAX has no device: no platform 'wrong' is installed; " in lines[0]
    assert REMEDY in lines[0]
    assert done.stdout.split() == ["2"] * 7
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("platforms", ["cuda", "tpu", "gpu", "cuda,", " "])
def test_jax_itself_fails_in_one_line(tmp_path, platforms):
    """Not as the other tests have it, but as the installed JAX does."""
    code = (
        "from fmbench.system import command_line, runtime\nwith command_line.plain_errors('x'): runtime.set_up()"
    )
    done = without_devices(code, tmp_path, platforms)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fmbench.x: JAX_PLATFORMS is '{platforms}', and JAX has no device: ")
    assert REMEDY in line


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "JAX_LOGGING_LEVEL",
            "x",
            "JAX refuses the environment, which has JAX_LOGGING_LEVEL='x', JAX_PLATFORMS='cpu'",
        ),
        (
            "JAX_SERIALIZATION_VERSION",
            "x",
            "JAX refuses the environment, which has JAX_PLATFORMS='cpu', JAX_SERIAL",
        ),
        ("XLA_FLAGS", "--xla_x=1", "XLA_FLAGS is '--xla_x=1', which XLA refuses: Unknown flag"),
        ("XLA_FLAGS", "/nowhere.txt x", "XLA_FLAGS is '/nowhere.txt x', which XLA refuses: Could not open file"),
        ("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=x", "refuses: Couldn't interpret value x for flag"),
    ],
)
def test_variables_that_jax_or_xla_refuses_are_one_line(tmp_path, monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    code = (
        "from fmbench.system import command_line\n"
        "with command_line.plain_errors('x'):\n"
        "    from fmbench.system import runtime; runtime.set_up()"
    )
    done = without_devices(code, tmp_path, "cpu")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("fmbench.x: ")
    assert said in line


def test_flags_that_xla_knows_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    done = without_devices("from fmbench.system import runtime; runtime.set_up()", tmp_path, "cpu")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_measurement_says_so_too(tmp_path):
    code = "from fmbench.throughput import measure; measure.describe_machine()"
    done = without_devices(code, tmp_path, "wrong")
    assert "fmbench.errors.UserError: JAX_PLATFORMS is 'wrong'" in done.stderr.splitlines()[-1]


@pytest.fixture
def find(monkeypatch, capsys):
    """Calls `find_devices` where JAX logs and raises what it is told to: the error, and standard error."""
    runtime._warn.cache_clear()

    def find(result, *, platforms="", logs=lambda logger: None) -> tuple[str, str]:
        def devices():
            logs(logging.getLogger("jax._src.xla_bridge"))
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(jax, "devices", devices)
        before = jax.config.jax_platforms
        jax.config.update("jax_platforms", platforms)
        raised = ""
        try:
            runtime.find_devices()
        except UserError as error:
            raised = str(error)
        finally:
            jax.config.update("jax_platforms", before)
        return raised, capsys.readouterr().err

    return find


def logs_a_failure(logger):
    """As JAX does of a plugin that can't be initialised."""
    try:
        raise RuntimeError("Unable to load cuDNN. Is it installed?\nand more")
    except RuntimeError:
        logger.exception("Jax plugin configuration error: Exception when calling %s.initialize()", "xla_cuda13")


INIT = "Unable to initialize backend 'cuda': "
HINT = " (set JAX_PLATFORMS='' to automatically choose an available backend)"


@pytest.mark.parametrize(
    ("error", "platforms", "said"),
    [
        (
            AssertionError(),
            "cuda",
            "JAX_PLATFORMS is 'cuda', and JAX has no device: this machine shows no NVIDIA GPU; ",
        ),
        (
            RuntimeError(f"{INIT}Backend 'cuda' is not in the list of known backends: ['cpu', 'tpu'].{HINT}"),
            "cuda,cpu",
            "JAX_PLATFORMS is 'cuda,cpu', and JAX has no device: no platform 'cuda' is installed; ",
        ),
        (
            RuntimeError(f"{INIT}Backend 'cdua' is not in the list of known backends: ['cpu', 'tpu'].{HINT}"),
            "cdua",
            "no platform 'cdua' is installed; the nearest are cuda, cpu; ",
        ),
        (
            RuntimeError(f"{INIT}INTERNAL: no CUDA-capable device{HINT}"),
            "cuda",
            f": {INIT}INTERNAL: no CUDA-capable device; ",
        ),
        (RuntimeError(f"{INIT}driver\ntoo\nold"), "", f"JAX has no device: {INIT}driver; JAX_PLATFORMS may be"),
        (
            ValueError("invalid literal for int(): 'MIG-1'"),
            "",
            "JAX has no device: invalid literal for int(): 'MIG-1'; ",
        ),
    ],
)
def test_why_there_is_no_device(find, error, platforms, said):
    raised, stderr = find(error, platforms=platforms)
    assert said in raised
    assert "automatically" not in raised
    assert REMEDY in raised
    assert "\n" not in raised
    assert stderr == ""


def test_a_plugin_that_fails_is_the_reason_and_its_traceback_is_not_shown(find):
    error = RuntimeError(f"{INIT}Backend 'cuda' is not in the list of known backends: ['cpu'].")
    raised, stderr = find(error, platforms="cuda", logs=logs_a_failure)
    assert "JAX has no device: Unable to load cuDNN. Is it installed?; " in raised
    assert stderr == ""


def test_hidden_devices_are_named(find, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    raised, _ = find(RuntimeError(f"{INIT}no supported devices found"), platforms="cuda")
    assert raised.startswith("JAX_PLATFORMS is 'cuda' and CUDA_VISIBLE_DEVICES is '', and JAX has no device")


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Path:
    """A file that stands for an NVIDIA GPU;"""
    path = tmp_path / "nvidia0"
    path.touch()
    monkeypatch.setattr(runtime, "NVIDIA_GPU", (tmp_path / "absent", path))
    return path


def test_an_idle_gpu_is_told_of_once(find, gpu):
    def logs(logger):
        logger.warning("An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not installed.")

    _, stderr = find(jax.devices(), logs=logs)
    assert stderr == (
        f"fmbench: this machine shows an NVIDIA GPU ({gpu}), but JAX computes on the CPU: JAX's CUDA plugin is "
        "missing; pip install 'fmbench[gpu]', or set JAX_PLATFORMS=cpu if that is meant.\n"
    )
    assert find(jax.devices()) == ("", "")


def test_why_a_gpu_is_idle(find, gpu):
    _, stderr = find(jax.devices(), logs=logs_a_failure)
    assert "computes on the CPU: Unable to load cuDNN. Is it installed?; " in stderr
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize("platforms", ["cpu", "cuda,cpu"])
def test_who_asked_for_the_cpu_is_not_told_of_a_gpu(find, gpu, platforms):
    assert find(jax.devices(), platforms=platforms) == ("", "")


def test_what_else_jax_logs_is_not_lost(find, monkeypatch, caplog):
    monkeypatch.setattr(runtime, "NVIDIA_GPU", ())
    find(jax.devices(), logs=lambda logger: logger.warning("A Google TPU may be present on this machine"))
    assert caplog.messages == ["A Google TPU may be present on this machine"]
