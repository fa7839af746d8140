"""run_all.sh, test.sh and setup_env.sh, with stand-ins for Python.

The scripts are copied to a folder with a space in its name. The active environment there is a stub
that writes down how it was called and ends as the test wants; no test installs or trains anything.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import packaging
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SETUP = ROOT / "setup_env.sh"

# `-P` is the question whether this environment can run fmbench. Everything else is written down,
# and the first line of `replies` whose words are in the command decides how the call ends.
STUB = """#!/bin/bash
if [[ $1 == -P ]]; then exit "${STUB_UNFIT:-0}"; fi
echo "$PWD|$*" >>"$STUB_DIR/calls"
while read -r reply words; do
  if [[ " $* " != *" $words "* ]]; then continue; fi
  if [[ $reply != sleep:* ]]; then exit "$reply"; fi
  # Twentieths of a second to go; two after a signal, for something like a checkpoint.
  left=${reply#sleep:} status=0
  trap 'echo INT >>"$STUB_DIR/signals"; left=2 status=130' INT
  trap 'echo TERM >>"$STUB_DIR/signals"; left=2 status=143' TERM
  echo $$ >"$STUB_DIR/asleep"
  while ((left-- > 0)); do sleep 0.05; done
  echo "$PWD|over" >>"$STUB_DIR/calls"
  exit "$status"
done <"$STUB_DIR/replies"
exit 0
"""

PAGES = ["fmbench.leaderboard", "fmbench.speedrun", "fmbench.pareto"]
SUITE = """
configs/one.py     0,1
configs/two.py:20  7  --config.width=8 --config.depth=2
"""


def write_executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Folder:
    """A copy of the scripts beside an active environment that is a stub."""

    # run_all.sh with another quick suite; to be followed by the script's path and its arguments.
    RUN_ALL = ("bash", "-c", 'source "$1"; shift; QUICK=$SUITE; main "$@"', "bash")

    def __init__(self, tmp_path: Path):
        self.started: list[subprocess.Popen] = []
        self.path = tmp_path / "a folder"
        self.path.mkdir()
        for name in ("run_all.sh", "test.sh", "setup_env.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.path)
        self.stub_dir = tmp_path / "stub"
        write_executable(tmp_path / "active env" / "bin" / "python", STUB)
        self.stub_dir.mkdir()
        self.reply()
        self.environment = {
            "HOME": str(tmp_path),
            "PATH": "/usr/bin:/bin",
            "TERM": "xterm",
            "VIRTUAL_ENV": str(tmp_path / "active env"),
            "STUB_DIR": str(self.stub_dir),
        }

    def reply(self, *lines: str) -> None:
        (self.stub_dir / "replies").write_text("".join(f"{line}\n" for line in lines))

    def run_all(self, *arguments: str, suite: str = SUITE, cwd: Path | None = None):
        """The script with `suite` for its quick suite."""
        return subprocess.run(
            [*self.RUN_ALL, str(self.path / "run_all.sh"), *arguments],
            cwd=cwd or self.path,
            env=self.environment | {"SUITE": suite},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start_and_wait_for_a_run(self) -> subprocess.Popen:
        """The script in a session of its own, once a run has begun to sleep."""
        process = subprocess.Popen(
            [*self.RUN_ALL, str(self.path / "run_all.sh"), "quick"],
            env=self.environment | {"SUITE": SUITE},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A test runner started in the background ignores SIGINT, and its children would too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        deadline = time.monotonic() + 20
        while not (self.stub_dir / "asleep").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.started.append(process)
        return process

    def leave_nothing_running(self) -> None:
        """After a test that failed, the script or its run may still be there, or be paused."""
        for process in self.started:
            process.kill()
        if (self.stub_dir / "asleep").exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int((self.stub_dir / "asleep").read_text()), signal.SIGKILL)

    def calls(self) -> list[str]:
        file = self.stub_dir / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        assert all(line.startswith(f"{self.path}|") for line in lines)
        return [line.split("|", 1)[1] for line in lines]

    def trained(self) -> list[str]:
        """Config and seed of each call of fmbench.main."""
        pattern = r"-m fmbench.main --config=configs/(\S+) --config.seed=(\d+)"
        found = [re.match(pattern, call) for call in self.calls()]
        return [f"{match[1]} {match[2]}" for match in found if match]


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path)
    yield folder
    folder.leave_nothing_running()


# ---------------------------------------------------------------------------- run_all.sh


def test_data_first_then_each_run_then_leaderboard(folder):
    done = folder.run_all("quick")
    assert done.returncode == 0, done.stderr
    main = "-m fmbench.main --config=configs/"
    assert folder.calls() == [
        "-m fmbench.datasets",
        f"{main}one.py --config.seed=0 --results_dir=results",
        f"{main}one.py --config.seed=1 --results_dir=results",
        f"{main}two.py:20 --config.seed=7 --config.width=8 --config.depth=2 --results_dir=results",
        "-m fmbench.leaderboard --results_dir=results",
        "-m fmbench.speedrun --results_dir=results",
        "-m fmbench.pareto --results_dir=results",
    ]
    assert re.findall(r"^\[.*$", done.stdout, re.M) == [
        "[1/3] one seed 0",
        "[2/3] one seed 1",
        "[3/3] two-20 seed 7",
    ]
    for file in ("leaderboard.md", "speedrun.md", "pareto.svg"):
        assert f"results/{file} is up to date" in done.stdout
    assert "\033" not in done.stdout + done.stderr


def test_goes_on_after_a_failure_and_reports_it(folder):
    folder.reply("3 --config.seed=0", "2 configs/two.py:20", "2 --config=configs/two.py:20")
    done = folder.run_all("quick")
    assert done.returncode == 1
    assert folder.trained() == ["one.py 0", "one.py 1", "two.py:20 7"]
    assert [call.split()[1] for call in folder.calls()[-3:]] == PAGES
    summary = done.stderr[done.stderr.index("2 failed:") :]
    assert "one seed 0 (exit status 3: diverged)" in summary
    assert "two-20 seed 7 (exit status 2" in summary
    assert "one seed 1" not in summary


@pytest.mark.parametrize(
    ("module", "file"),
    [("leaderboard", "leaderboard.md"), ("speedrun", "speedrun.md"), ("pareto", "pareto.svg")],
)
def test_a_page_that_fails_is_a_failure_and_the_others_are_written(folder, module, file):
    folder.reply(f"1 fmbench.{module}")
    done = folder.run_all("quick")
    assert done.returncode == 1
    assert "1 failed:" in done.stderr
    assert f"{file} (exit status 1" in done.stderr
    assert f"{file} is up to date" not in done.stdout
    assert [call.split()[1] for call in folder.calls()[-3:]] == PAGES


def test_without_data_nothing_is_trained(folder):
    folder.reply("4 fmbench.datasets")
    done = folder.run_all("quick")
    assert done.returncode == 4
    assert folder.calls() == ["-m fmbench.datasets"]


@pytest.mark.parametrize("status", [130, 143])
def test_interrupted_run_stops_the_suite(folder, status):
    folder.reply(f"{status} --config.seed=1")
    done = folder.run_all("quick")
    assert done.returncode == status
    assert folder.trained() == ["one.py 0", "one.py 1"]
    assert folder.calls()[-1].startswith("-m fmbench.main")  # no leaderboard
    assert "Interrupted during one seed 1" in done.stderr
    assert "the same command" in done.stderr


@pytest.mark.parametrize("receiver", ["the script alone", "its process group"])
@pytest.mark.parametrize("name, status", [("INT", 130), ("TERM", 143)])
def test_signal_reaches_the_run_once_and_stops_the_suite(folder, name, status, receiver):
    folder.reply("sleep:200 --config.seed=0")
    process = folder.start_and_wait_for_a_run()
    # `kill` and `timeout` signal the script, Ctrl-C in a terminal the group.
    send = os.kill if receiver == "the script alone" else os.killpg
    send(process.pid, getattr(signal, f"SIG{name}"))
    assert process.wait(timeout=8) == status  # without the signal, the run would sleep longer
    assert folder.calls()[-1] == "over"  # the script waited for its checkpoint
    _, errors = process.communicate()
    assert (folder.stub_dir / "signals").read_text() == f"{name}\n"
    assert folder.trained() == ["one.py 0"]
    assert "Interrupted during one seed 0" in errors


def test_a_paused_suite_goes_on(folder):
    folder.reply("sleep:6 --config.seed=0")
    process = folder.start_and_wait_for_a_run()
    process.send_signal(signal.SIGTSTP)  # Ctrl-Z
    _, state = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(state)
    time.sleep(0.6)  # twice what the run needs
    assert "over" not in folder.calls()  # it is paused as well
    process.send_signal(signal.SIGCONT)  # fg
    _, errors = process.communicate(timeout=8)
    assert process.returncode == 0, errors
    assert folder.calls()[2] == "over"  # before the next run began
    assert folder.trained() == ["one.py 0", "one.py 1", "two.py:20 7"]


def test_entries_select_runs(folder):
    done = folder.run_all("quick", "two-20")
    assert done.returncode == 0, done.stderr
    assert folder.trained() == ["two.py:20 7"]
    assert "[1/1] two-20 seed 7" in done.stdout


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "No suite named: expected quick, paper, full or accelerator"),
        (["quik"], "Unknown suite 'quik': expected quick, paper, full or accelerator"),
        (["quick", "one", "two"], "Unknown entry 'two': the suite quick has one two-20"),
        (["quick", "--forse"], "Unknown option --forse"),
        (["quick", "--results_dir"], "--results_dir has no value"),
        (["quick", "--minutes=3"], "--minutes=3 is for the suite accelerator only"),
        (["quick", "--launcher=slrum"], "Unknown launcher 'slrum': expected local or slurm"),
        (["quick", "--launcher="], "--launcher has no value: expected local or slurm"),
        (["quick", "--jobs=2"], "--jobs=2 goes with --launcher=local"),
        (["accelerator", "--launcher=local"], "--launcher is not for the suite accelerator"),
        (["accelerator", "--plan"], "--plan goes with a suite other than accelerator"),
        (["quick", "--plan", "--launcher=local"], "--plan goes with a suite other than accelerator"),
        (["accelerator", "--force"], "--force is not for the suite accelerator"),
    ],
)
def test_mistakes_are_named_before_anything_runs(folder, arguments, expected):
    done = folder.run_all(*arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "--help" in done.stderr
    assert folder.calls() == []


def test_force_and_results_dir_are_passed_on(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = folder.run_all("quick", "--force", "one", "--results_dir=my results", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    # A relative folder is meant relative to where the command was given.
    assert folder.calls()[1:] == [
        f"-m fmbench.main --config=configs/one.py --config.seed={seed}"
        f" --results_dir={elsewhere}/my results --force"
        for seed in (0, 1)
    ] + [f"-m {page} --results_dir={elsewhere}/my results" for page in PAGES]


def test_the_suite_accelerator_is_one_process_and_its_pages_follow(folder):
    folder.reply("1 fmbench.accelerator")
    done = folder.run_all("accelerator", "check", "mlp", "--minutes=3", "--config.num_epochs=1")
    assert (done.returncode, done.stderr.count("the suite accelerator (exit status 1")) == (1, 1)
    assert folder.calls() == [
        "-m fmbench.datasets",
        "-m fmbench.accelerator check mlp --minutes=3 --config.num_epochs=1 --results_dir=results",
        "-m fmbench.leaderboard --results_dir=results",
        "-m fmbench.speedrun --results_dir=results",
    ]


@pytest.mark.parametrize("status", [2, 130])
def test_a_mistake_or_an_interruption_ends_the_suite_accelerator_with_its_status(folder, status):
    folder.reply(f"{status} fmbench.accelerator")
    assert folder.run_all("accelerator").returncode == status
    assert len(folder.calls()) == 2


@pytest.mark.parametrize("launcher", ["--launcher=slurm --max_jobs=3", "--launcher=local --jobs=2"])
def test_a_launcher_gets_the_entries_that_are_asked_for_and_the_pages_follow(folder, launcher):
    assert folder.run_all("quick", "two-20", "one", "--force", *launcher.split()).returncode == 0
    assert folder.calls() == [
        "-m fmbench.datasets",
        f"-m fmbench.suite {launcher} --results_dir=results --force configs/one.py 0,1 "
        "configs/two.py:20 7 --config.width=8 --config.depth=2",
        *(f"-m {page} --results_dir=results" for page in PAGES),
    ]


@pytest.mark.parametrize(("status", "ends_with", "num_calls"), [(1, 1, 5), (2, 2, 2), (130, 130, 2)])
def test_a_launcher_whose_runs_fail_has_its_pages_and_one_that_is_interrupted_has_none(
    folder, status, ends_with, num_calls
):
    folder.reply(f"{status} fmbench.suite")
    assert folder.run_all("quick", "--launcher=slurm").returncode == ends_with
    assert len(folder.calls()) == num_calls


@pytest.mark.parametrize("script", ["run_all.sh", "test.sh"])
def test_help(folder, script):
    done = subprocess.run([folder.path / script, "--help"], env=folder.environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
    assert folder.calls() == []


def test_every_suite_names_configs_that_exist(folder):
    for suite in ("quick", "paper", "full"):
        done = subprocess.run([folder.path / "run_all.sh", suite], env=folder.environment, capture_output=True)
        assert done.returncode == 0
    configs = {run.split()[0].split(":")[0] for run in folder.trained()}
    assert configs
    assert [name for name in sorted(configs) if not (ROOT / "configs" / name).is_file()] == []


# ---------------------------------------------------------------------------- test.sh


def run_tests(folder: Folder, *arguments: str) -> tuple[int, list[str]]:
    done = subprocess.run([folder.path / "test.sh", *arguments], env=folder.environment, capture_output=True)
    return done.returncode, folder.calls()


@pytest.mark.parametrize(
    "arguments, passed_on",
    [
        ([], "-m not slow and not full"),
        (["-x", "tests/a.py"], "-m not slow and not full -x tests/a.py"),
        (["-m", "slow"], "-m slow"),
        (["-mslow", "--maxfail=1"], "-mslow --maxfail=1"),
        (["--maxfail=1"], "-m not slow and not full --maxfail=1"),
    ],
)
def test_lint_types_tests_in_this_order(folder, arguments, passed_on):
    assert run_tests(folder, *arguments) == (
        0,
        [
            "-m ruff check .",
            "-m ruff format --check .",
            "-m mypy",
            f"-m pytest -n auto --dist loadfile {passed_on}",
        ],
    )


@pytest.mark.parametrize("status, tool", [(1, "ruff format"), (1, "mypy"), (5, "pytest")])
def test_any_finding_fails(folder, status, tool):
    folder.reply(f"{status} -m {tool}")
    returncode, calls = run_tests(folder)
    assert returncode == status
    assert calls[-1].startswith(f"-m {tool}")


# ---------------------------------------------------------------------------- setup_env.sh


def fake_python(path: Path, version: str) -> Path:
    """Answers setup_env.sh's question like a Python of that version, without being one."""
    check = f'[[ "$*" == *"!= \'{version}\'"* ]] && echo "{path}"'
    return write_executable(path, f"#!/bin/bash\n{check}\n")


def failing_shim(path: Path) -> None:
    write_executable(path, f"#!/bin/bash\necho 'pyenv: {path.name}: command not found' >&2; exit 127\n")


def newest_python(path: list[Path], home: Path) -> str | None:
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run(
        [bash, "-c", 'source "$1"; newest_python', "bash", SETUP],
        env={"PATH": os.pathsep.join(map(str, path)), "HOME": str(home)},
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() if done.returncode == 0 else None


def test_newest_working_python_wins(tmp_path):
    shims, binaries = tmp_path / "shims", tmp_path / "bin"
    for version in ("3.13", "3.12", "3.11"):
        failing_shim(shims / f"python{version}")
    fake_python(binaries / "python3.11", "3.11")
    fake_python(binaries / "python3", "3.11")
    path = [shims, binaries]
    assert newest_python(path, tmp_path) == str(binaries / "python3.11")

    behind_a_shim = fake_python(binaries / "python3.12", "3.12")
    assert newest_python(path, tmp_path) == str(behind_a_shim)

    pyenvs = fake_python(tmp_path / ".pyenv/versions/3.13.0/bin/python", "3.13")
    assert newest_python(path, tmp_path) == str(pyenvs)

    only_called_python3 = fake_python(shims / "python3", "3.13")
    assert newest_python(path, tmp_path) == str(only_called_python3)


def test_no_suitable_python(tmp_path):
    failing_shim(tmp_path / "bin" / "python3.13")
    fake_python(tmp_path / "bin" / "python3", "3.10")
    fake_python(tmp_path / ".pyenv/versions/3.14.0/bin/python", "3.14")
    assert newest_python([tmp_path / "bin"], tmp_path) is None


class Setup(Folder):
    """setup_env.sh with stand-ins for what makes and fills an environment."""

    # The environment's interpreter says whether it can run fmbench: it can once it is filled.
    SCRIPT = """
    source ./setup_env.sh
    newest_python() { echo /bin/true; }
    have_uv() { return 1; }
    new_venv() {
      rm -rf "$2"; mkdir -p "$2/bin"; echo unfinished >"$2/.fmbench-setup"; echo new >>log
      printf '#!/bin/bash\\n[[ $1 != -P || -e "%s/filled" ]]\\n' "$2" >"$2/bin/python"
      chmod +x "$2/bin/python"
    }
    install_packages() {
      echo install >>log; if [[ -e broken ]]; then return 1; fi; touch "$1/filled"
    }
    set -euo pipefail
    set_up_environment dev
    echo "$PYTHON"
    """

    def call(self, **environment: str) -> subprocess.CompletedProcess:
        (self.path / "log").write_text("")
        return subprocess.run(
            ["bash", "-c", self.SCRIPT],
            cwd=self.path,
            env={"HOME": str(self.path), "PATH": "/usr/bin:/bin"} | environment,
            capture_output=True,
            text=True,
        )

    def log(self) -> list[str]:
        return (self.path / "log").read_text().split()

    def made(self, **environment: str) -> list[str]:
        """What a successful call had to do."""
        done = self.call(**environment)
        assert done.returncode == 0, done.stderr
        name = environment.get("FMBENCH_VENV", f"{self.path}/.venv")
        assert done.stdout.splitlines()[-1] == f"{name}/bin/python"
        return self.log()


@pytest.fixture
def setup(tmp_path):
    return Setup(tmp_path)


def test_environment_is_made_once_and_updated_when_its_requirements_change(setup):
    assert setup.made() == ["new", "install"]
    assert setup.made() == []
    with (setup.path / "constraints.txt").open("a") as file:
        file.write("one-more==1\n")
    assert setup.made() == ["install"]
    assert setup.made() == []


def test_half_made_environment_is_made_anew(setup):
    (setup.path / ".venv" / "bin").mkdir(parents=True)  # interrupted at once
    assert setup.made() == ["new", "install"]

    (setup.path / ".venv" / "filled").unlink()  # finished, damaged since
    assert setup.made() == ["new", "install"]

    (setup.path / ".venv" / ".fmbench-setup").write_text("unfinished\n")  # looks complete
    assert setup.made() == ["new", "install"]
    assert setup.made() == []


def test_failed_set_up_is_not_believed_in(setup):
    (setup.path / "broken").touch()
    done = setup.call()
    assert done.returncode == 1
    assert "Setting up .venv failed" in done.stderr
    (setup.path / "broken").unlink()
    assert setup.made() == ["new", "install"]


def test_failed_update_is_not_believed_in(setup):
    setup.made()
    (setup.path / "constraints.txt").write_text("changed==1\n")
    (setup.path / "broken").touch()
    assert setup.call().returncode == 1
    (setup.path / "broken").unlink()
    assert setup.made() == ["new", "install"]


def test_active_environment_is_used_if_it_can_run_fmbench(setup):
    active = setup.environment["VIRTUAL_ENV"]
    fit = {"VIRTUAL_ENV": active, "STUB_DIR": str(setup.stub_dir)}
    done = setup.call(**fit)
    assert done.stdout == f"{active}/bin/python\n"
    assert setup.log() == []

    assert setup.made(**fit, STUB_UNFIT="1") == ["new", "install"]
    done = setup.call(**fit, STUB_UNFIT="1")
    assert f"Not using the active environment {active}" in done.stderr


def test_fmbench_venv_names_another_folder(setup, tmp_path):
    own = str(tmp_path / "own env")
    fit = {"VIRTUAL_ENV": setup.environment["VIRTUAL_ENV"], "STUB_DIR": str(setup.stub_dir)}
    assert setup.made(**fit, FMBENCH_VENV=own) == ["new", "install"]
    assert not (setup.path / ".venv").exists()

    (tmp_path / "home").mkdir()
    precious = tmp_path / "home" / "thesis.tex"
    precious.touch()
    done = setup.call(FMBENCH_VENV=str(precious.parent))
    assert done.returncode == 2
    assert precious.exists()


@pytest.mark.parametrize(
    "requirement, expected",
    [
        ("pytest>=2", ""),
        ("no-such-package>=1", "no-such-package>=1 is not installed"),
        ("pytest>=1000", "pytest>=1000 is needed, pytest "),
        ("no-such-package; python_version < '3'", ""),
    ],
)
def test_what_an_environment_lacks_is_named(tmp_path, requirement, expected):
    (tmp_path / "pyproject.toml").write_text(
        f'[project]\ndependencies = ["numpy"]\noptional-dependencies.dev = ["{requirement}"]\n'
    )
    done = subprocess.run(
        ["bash", "-c", 'source "$1"; can_run_fmbench "$2" dev', "bash", SETUP, sys.executable],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (not expected)
    assert done.stdout.startswith(expected) and bool(done.stdout) == bool(expected)


def test_a_package_that_is_not_needed_may_be_absent(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["no-such-package", "nor-this"]\n')
    done = subprocess.run(
        [
            "bash",
            "-c",
            'source "$1"; can_run_fmbench "$2" --without=no-such-package',
            "bash",
            SETUP,
            sys.executable,
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "nor-this is not installed\n")


def test_an_extra_that_another_extra_names_is_asked_for_too(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "fmbench"\ndependencies = []\n'
        'optional-dependencies.dev = ["fmbench[figures]"]\noptional-dependencies.figures = ["no-such-package"]\n'
    )
    done = subprocess.run(
        ["bash", "-c", 'source "$1"; can_run_fmbench "$2" dev', "bash", SETUP, sys.executable],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "no-such-package is not installed\n")


@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_what_is_installed_includes_pip_which_installs_further_extras(tmp_path, installer):
    write_executable(tmp_path / "bin" / "uv", '#!/bin/bash\n[[ $1 == --version ]] || echo "uv $*" >>"$CALLS"\n')
    write_executable(tmp_path / "venv" / "bin" / "python", '#!/bin/bash\necho "python $*" >>"$CALLS"\n')
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin" if installer == "uv" else "/usr/bin:/bin"
    subprocess.run(
        ["bash", "-c", 'source "$1"; install_packages "$2"', "bash", SETUP, tmp_path / "venv"],
        env={"PATH": path, "CALLS": str(tmp_path / "calls")},
        check=True,
    )
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith("uv pip install" if installer == "uv" else "python -I -m pip install")
    assert call.endswith("--constraint constraints.txt --editable .[dev] pip")


def test_the_two_commands_ask_for_the_extras_that_they_use():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["dev"][0] == "fmbench[export,figures,grain,optuna,slurm,transfer]"
    assert "set_up_environment --without=onednn-cpu-gomp" in (ROOT / "run_all.sh").read_text()
    assert "extras=(figures)" in (ROOT / "run_all.sh").read_text()
    assert "extras+=(slurm)" in (ROOT / "run_all.sh").read_text()
    assert "set_up_environment dev" in (ROOT / "test.sh").read_text()


def test_fmbench_lying_in_the_current_directory_does_not_count(tmp_path):
    (tmp_path / "fmbench").mkdir()
    (tmp_path / "fmbench" / "__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    # -S: no site-packages, so fmbench can only come from the current directory; `packaging`, which
    # reads the requirements, is lent to it.
    (tmp_path / "lent").mkdir()
    (tmp_path / "lent" / "packaging").symlink_to(Path(packaging.__file__).parent)
    python = write_executable(tmp_path / "python", f'#!/bin/bash\nexec "{sys.executable}" -S "$@"\n')
    done = subprocess.run(
        ["bash", "-c", 'source "$1"; can_run_fmbench "$2"', "bash", SETUP, python],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "lent")},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "fmbench is not installed\n"
    assert done.returncode != 0


def test_the_oldest_python_gets_the_oldest_jax_which_ci_tests():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = re.search(r"^SUPPORTED_PYTHONS='.* (\S+)'$", SETUP.read_text(), re.M)
    assert supported and project["requires-python"] == f">={supported[1]}"
    (pinned,) = re.findall(
        r"^jax==(\S+) ; python_full_version < '3\.12'$", (ROOT / "constraints.txt").read_text(), re.M
    )
    (jax,) = (
        requirement for requirement in map(Requirement, project["dependencies"]) if requirement.name == "jax"
    )
    (oldest,) = (part.version for part in jax.specifier if part.operator == ">=")
    assert pinned.split(".")[:2] == oldest.split(".")[:2]


def test_ci_fails_without_the_oldest_python(folder, tmp_path):
    shutil.copytree(ROOT / ".ci", folder.path / ".ci")
    fake_python(tmp_path / "bin" / "python3.13", "3.13")
    for command in ("bash", "dirname", "mktemp", "rm"):
        (tmp_path / "bin" / command).symlink_to(str(shutil.which(command)))
    done = subprocess.run(
        [tmp_path / "bin" / "bash", folder.path / ".ci" / "run"],
        env=folder.environment | {"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "CI needs Python 3.11, the oldest that fmbench supports, and finds none that starts.\n"
    assert folder.calls() == []


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = itertools.chain.from_iterable(lists)
    pinned: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([^ ;]+)", line):
            pinned.setdefault(canonicalize_name(match[1]), []).append(match[2])
    for requirement in map(Requirement, wanted):
        if requirement.name == project["name"]:
            continue  # one extra in another: its own list is among these
        versions = pinned.get(canonicalize_name(requirement.name), [])
        assert versions, f"{requirement} is not in constraints.txt"
        assert all(requirement.specifier.contains(version) for version in versions), requirement
