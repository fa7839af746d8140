"""Eight fake CPU devices for the whole suite; configs and processes that train on the sample."""

import datetime
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import pytest

from fmbench import entries
from fmbench.data import fashion_mnist
from fmbench.pages import leaderboard
from fmbench.records import calibration, plausibility

REPOSITORY = Path(__file__).parents[1]

jax.config.update("jax_num_cpu_devices", 8)
# The suite's programs take seconds to compile and run for milliseconds. Processes that tests start, as users do,
# compile with all optimisations.
jax.config.update("jax_disable_most_optimizations", True)
# Shells start jobs in the background with it ignored, which tests of Ctrl-C would wait for in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--daily", type=int, default=1, metavar="N", help="an N-th of the slow tests, another every day"
    )
    parser.addoption(
        "--day", type=datetime.date.fromisoformat, default=datetime.date.today(), help="default: today"
    )


def pytest_report_header(config):
    share, day = config.getoption("daily"), config.getoption("day")
    return f"slow tests: one of {share} parts, that of --day={day}" if share > 1 else None


def pytest_collection_modifyitems(config, items):
    """Leaves out the slow tests of other days; a test's name decides which its days are."""
    share, day = config.getoption("daily"), config.getoption("day").toordinal()
    others = [
        item
        for item in items
        if item.get_closest_marker("slow") and (zlib.crc32(item.nodeid.encode()) + day) % share
    ]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]


def pytest_configure(config):
    """Keeps compiled programs: the suite shares them, its next run finds them, and `--cache-clear` drops them."""
    if config.pluginmanager.has_plugin("cacheprovider"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(autouse=True)
def quick_calibration(monkeypatch):
    """What the machine reaches, without the seconds that measuring takes."""
    measured = calibration.Calibration({"float32": 2e11, "bfloat16": 3e11}, 2e10)
    monkeypatch.setattr(calibration, "measure_beside_a_run", lambda: measured)


@pytest.fixture(autouse=True)
def read_anew():
    """Lets each test read its own data: `load_once` would remember another test's fake."""
    fashion_mnist.load_once.cache_clear()


@pytest.fixture(autouse=True)
def fake_records_pass(request, monkeypatch):
    """Leaves unasked whether records can be true, but in the tests of that: fake_records' could not."""
    if request.path.stem != "test_plausibility":
        monkeypatch.setattr(plausibility, "contradiction", lambda record: "")
        monkeypatch.setattr(leaderboard, "implausible", lambda records: {})


@pytest.fixture
def strict_dtypes():
    """Makes an error of what JAX would convert by itself. (optax's updates need that, so training has it.)"""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def make_config():
    """A config by its file and overrides, as the command line would make it, on the sample."""

    def make(spec: str, **overrides):
        config = entries.load(str(REPOSITORY / spec))
        config.data.source = "sample"
        with config.unlocked():
            config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
        return entries.finalize(config, str(REPOSITORY / spec))

    return make


@pytest.fixture(scope="session")
def start_main(tmp_path_factory):
    """Starts `python -m fmbench.main` in a process of its own; all share one compile cache."""
    cache = tmp_path_factory.mktemp("cache")

    def start(*flags: str, devices: int = 1) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "fmbench.main", *flags],
            cwd=REPOSITORY,
            env=os.environ | {"FMBENCH_CACHE": str(cache), "JAX_NUM_CPU_DEVICES": str(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def run_main(start_main):
    """Runs `python -m fmbench.main` to its end."""

    def run(*flags: str, devices: int = 1) -> subprocess.CompletedProcess:
        process = start_main(*flags, devices=devices)
        stdout, stderr = process.communicate(timeout=240)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run
