"""How commands end that are stopped, that nobody listens to, or that the machine lets down: real processes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fmbench import __main__ as command
from fmbench.data import fashion_mnist

REPOSITORY = Path(__file__).parents[2]
COMMANDS = ["main" if name == "train" else name for name in command.commands()]
SLOW = [pytest.mark.slow]

# Python imports this before all else: it raises a signal at a moment that is named.
SITE = """
import os, signal, sys
kind, _, name = os.environ["RAISE_AT"].partition(" ")
signum = int(os.environ["RAISE"])
raised = []
def look(event, arguments):
    subject = str(arguments[0]) if event in ("import", "open") and arguments else ""
    if not raised and event == kind and (subject == name if kind == "import" else name in subject):
        raised.append(subject)
        signal.raise_signal(signum)
sys.addaudithook(look)
"""


def environ(**given: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return kept | {"PYTHONPATH": str(REPOSITORY)} | given


def run(*words: str, stdout=subprocess.PIPE, cwd=REPOSITORY, **given: str) -> subprocess.CompletedProcess:
    """`python -m fmbench.<words>`, or `python <words>` where they begin with a flag."""
    called = words if words[0].startswith("-") else ("-m", f"fmbench.{words[0]}", *words[1:])
    return subprocess.run(
        [sys.executable, *called],
        cwd=cwd,
        env=environ(**given),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
    )


@pytest.fixture
def run_with_signal(tmp_path):
    """Runs a command that a signal comes to as it imports a module, or opens a file."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)

    def run_it(moment: str, signum: int, *words: str) -> subprocess.CompletedProcess:
        path = f"{tmp_path / 'site'}{os.pathsep}{REPOSITORY}"
        return run(*words, PYTHONPATH=path, RAISE_AT=moment, RAISE=str(int(signum)))

    return run_it


@pytest.fixture
def model(tmp_path) -> Path:
    """What a command takes for a model before it reads it."""
    (tmp_path / "work" / "model").mkdir(parents=True)
    for name in ("model.json", "fmbench.json"):
        (tmp_path / "work" / "model" / name).write_text("{}")
    return tmp_path / "work"


# Ctrl-C and SIGTERM.

STARTING = {  # import little before they know what to do
    "main": ["--config=mlp"],
    "accelerator": ["check"],
    "suite": ["--launcher=local", "--jobs=1", "mlp 0"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_during_imports_is_one_line(run_with_signal, name):
    """Where an exception may be lost, in callbacks of the import machinery, and the command would go on."""
    done = run_with_signal("import numpy", signal.SIGINT, name, *STARTING.get(name, []))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "fmbench: interrupted.\n")


def test_so_it_is_in_the_first_import_and_of_the_script_and_for_sigterm(run_with_signal, tmp_path):
    done = run_with_signal("import argparse", signal.SIGTERM, "-m", "fmbench.predict")
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "fmbench: terminated.\n")
    script = tmp_path / "fmbench"  # as pip writes it
    script.write_text("import sys\nfrom fmbench.__main__ import main\nsys.exit(main())\n")
    for words in ([str(script), "compare"], ["-m", "fmbench", "compare"]):
        done = run_with_signal("import scipy", signal.SIGINT, "-W", "ignore", *words)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "fmbench: interrupted.\n")


@pytest.mark.parametrize(
    ("words", "file"),
    [
        ("compare speedrun-94 speedrun-95 --dtype=float32", "-seed0.json"),
        ("main --config=mlp --config.data.source=sample --workdir={0}/new --results_dir={0}/results", ".gz"),
        ("predict --model={0}/work docs/pullover.png", "/work/model/"),
        *(
            pytest.param(words, file, marks=SLOW)
            for words, file in [
                ("leaderboard --check", "-seed0.json"),
                ("reproduction --check", "-seed0.json"),
                ("speedrun --check", "-seed0.json"),
                ("pareto", "-seed0.json"),
                ("benchmark --check", "throughput.json"),
                ("verify results/runs/mlp-cpu-intel-xeon-2c-float32-seed0.json", ".npy"),
                ("evaluate --model={0}/work", "/work/model/"),
                ("embed --num_images=10", ".npy"),
                ("figures data", ".npy"),
                ("datasets", ".npy"),
                (
                    "cross_validate --config=mlp --config.data.source=sample --workdir={0}/new --results_dir={0}",
                    ".gz",
                ),
            ]
        ),
    ],
    ids=lambda value: value.split()[0],
)
@pytest.mark.parametrize(("signum", "code", "said"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_at_work_is_one_line(run_with_signal, model, words, file, signum, code, said):
    name, *flags = words.format(model.parent).split()
    done = run_with_signal(f"open {file}", signum, name, *flags)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(f"fmbench.{name}: {said}")
    assert done.stderr.count("\n") == 1
    assert not (model.parent / "new").exists()  # a run that had not begun


LOST = """
import signal, sys
sys.argv[0] = "-m"
import fmbench
from fmbench.system import command_line

class Finalized:
    def __del__(self):
        signal.raise_signal({signum})

with command_line.plain_errors("x"):
    {lose}
    print("went on")
"""


@pytest.mark.parametrize(
    ("lose", "said"),
    [
        ("Finalized()", "fmbench: {}.\n"),
        ("import ctypes; ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal({signum}))()", "fmbench: {}.\n"),
        (
            "try: signal.raise_signal({signum})\n    except KeyboardInterrupt: raise RuntimeError from None",
            "fmbench.x: {}.\n",
        ),
    ],
    ids=["in a finalizer", "in a callback of C", "turned into another exception"],
)
@pytest.mark.parametrize(("signum", "code", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_an_exception_that_gets_lost_ends_the_command_all_the_same(lose, said, signum, code, word):
    done = run("-c", LOST.format(signum=signum, lose=lose.format(signum=signum)))
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said.format(word))


def test_signals_that_are_ignored_stay_ignored_and_a_library_takes_none():
    ask = "print(*(signal.getsignal(s) in (signal.SIG_IGN, signal.default_int_handler, 0) for s in (2, 15)))"
    for begin, answer in (
        ("import fmbench", "True True"),
        ("sys.argv[0] = '-m'; import fmbench", "False False"),
        ("sys.argv[0] = '-m'; signal.signal(2, signal.SIG_IGN); import fmbench", "True False"),
    ):
        assert run("-c", f"import signal, sys; {begin}; {ask}").stdout == f"{answer}\n"


def test_after_its_last_line_a_command_is_not_disturbed():
    code = (
        "import atexit, signal, sys; sys.argv[0] = '-m'; import fmbench.__main__ as m; sys.argv[1:] = ['--help']\n"
    )
    late = "atexit.register(lambda: [signal.raise_signal(s) for s in (2, 15)]); m.main()"
    done = run("-c", code + late)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["main", "sweep", "cross_validate", "benchmark", "accelerator", "verify", "evaluate"]
)
def test_a_terminals_ctrl_c_at_any_moment(tmp_path, name):
    """The whole group of processes gets it; of those that a command starts none says a word."""
    sample = ["--config.data.source=sample", "--config.num_epochs=1000"]
    small = [*sample, "--config.batch_size=80"]
    words = {
        "main": ["--config=mlp", *small, f"--workdir={tmp_path}/w", f"--results_dir={tmp_path}/r"],
        "sweep": [
            "--config=mlp",
            *sample,
            "--config.data.split=default",
            "--grid=batch_size=8",
            f"--out={tmp_path}/s",
        ],
        "cross_validate": ["--config=mlp", *small, f"--workdir={tmp_path}/w", f"--results_dir={tmp_path}/r"],
        "benchmark": [f"--results_dir={tmp_path}/r"],
        "accelerator": ["check", "mlp", *small, f"--results_dir={tmp_path}/r"],
        "verify": ["results/runs/mlp-cpu-intel-xeon-2c-float32-seed0.json"],
        "evaluate": ["--model=nothing"],
    }[name]
    chance = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", f"fmbench.{name}", *words],
            cwd=REPOSITORY,
            env=environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        time.sleep(chance.uniform(0.5, 6))
        ended = process.poll() is not None
        if not ended:
            os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert ended or process.returncode == 130 or (name, process.returncode) == ("evaluate", 2), err
        assert "Traceback" not in err
        assert "Exception ignored" not in err


# Nobody listens; nothing can be written.


@pytest.fixture
def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


PRINTING = [
    "main --help",
    "compare speedrun-94 speedrun-95 --dtype=float32",
    "-m fmbench",
    *(pytest.param(f"{name} --help", marks=SLOW) for name in COMMANDS if name != "main"),
    pytest.param("main --config=mlp --summary", marks=SLOW),
    pytest.param("datasets", marks=SLOW),
    pytest.param("speedrun --seeds=speedrun:94", marks=SLOW),
    pytest.param("leaderboard --check", marks=SLOW),
]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", PRINTING)
def test_where_nobody_reads_it_ends_quietly(closed_pipe, words, unbuffered):
    fashion_mnist.load()  # which says what it does, the first time
    done = run(*words.split(), stdout=closed_pipe, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", PRINTING)
def test_a_full_device_is_one_line(words):
    fashion_mnist.load()  # which says what it does, the first time
    with Path("/dev/full").open("w") as full:
        done = run(*words.split(), stdout=full)
    assert done.returncode == 2
    name = words.split()[0]
    prefix = "fmbench" if name == "-m" else f"fmbench.{name}"
    assert done.stderr == f"{prefix}: writing: No space left on device; make room there, or name another place.\n"


def test_standard_error_may_be_full_or_closed(tmp_path):
    for where in ("2>/dev/full", "2>&-", "2>&- >&- <&-"):
        command_line = f"{sys.executable} -m fmbench.main --config=mpl {where}"
        done = subprocess.run(["bash", "-c", command_line], cwd=REPOSITORY, env=environ(), capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


# What the machine refuses.

FAILING = """
from pathlib import Path
from fmbench.system import command_line, files
with command_line.plain_errors("x"):
    {}
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("Path('/proc/nowhere').write_text('')", "/proc/nowhere: No such file or directory; name another place."),
        ("Path('/proc/version').mkdir()", "/proc/version: File exists; name another place."),
        (
            "raise OSError(28, 'No space left on device')",
            "writing: No space left on device; make room there, or name another place.",
        ),
        (
            "raise OSError(122, 'Disk quota exceeded', 'x')",
            "x: Disk quota exceeded; make room in the quota, or name another place.",
        ),
        (
            "raise PermissionError(13, 'Permission denied', 'a\\nb')",
            "a\\nb: Permission denied; name another place.",
        ),
        (
            "raise OSError(24, 'Too many open files')",
            "writing: Too many open files; allow more open files (ulimit -n).",
        ),
        (
            "raise ImportError('libjax.so: failed to map segment from shared object')",
            "out of memory, which others may hold, too (libjax.so: failed to map segment from shared object)",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_line(code, said):
    done = run("-c", FAILING.format(code))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"fmbench.x: {said}\n")


@pytest.mark.parametrize("error", ["OSError(9, 'Bad file descriptor')", "OSError('odd')", "ValueError('a bug')"])
def test_bugs_keep_their_traceback(error):
    done = run("-c", FAILING.format(f"raise {error}"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_what_fails_while_a_command_is_imported_is_one_line_too(tmp_path):
    (tmp_path / "numpy.py").write_text("raise OSError(24, 'Too many open files', 'numpy.so')")
    done = run("predict", PYTHONPATH=f"{tmp_path}{os.pathsep}{REPOSITORY}")
    assert done.returncode == 2
    assert done.stderr == "fmbench: numpy.so: Too many open files; allow more open files (ulimit -n).\n"


@pytest.mark.parametrize(
    "words",
    [
        "leaderboard --results_dir={0}/results",
        pytest.param("speedrun --results_dir={0}/results", marks=SLOW),
        pytest.param("reproduction --results_dir={0}/results", marks=SLOW),
        pytest.param("benchmark --render --results_dir={0}/results", marks=SLOW),
        pytest.param("pareto --results_dir={0}/results", marks=SLOW),
        pytest.param("figures data --output={0}/new", marks=SLOW),
        pytest.param("embed --num_images=10 --output={0}/new --projector", marks=SLOW),
        pytest.param("datasets export --format=csv --output={0}/new", marks=SLOW),
    ],
)
def test_a_file_that_may_not_be_so_large_is_one_line_with_its_name(tmp_path, words):
    """As a full disk: `ulimit -f`, of 1 kB."""
    shutil.copytree(REPOSITORY / "results", tmp_path / "results")
    for page in ("leaderboard.md", "speedrun.md", "reproduction.md", "throughput.md"):
        (tmp_path / "results" / page).write_text("outdated\n")
    name, *flags = words.format(tmp_path).split()
    limited = f"ulimit -f 1; {sys.executable} -m fmbench.{name} {' '.join(flags)}"
    done = subprocess.run(["bash", "-c", limited], cwd=REPOSITORY, env=environ(), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"fmbench.{name}: ")
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr
    assert not list(tmp_path.rglob(".*"))  # no temporary file stays
