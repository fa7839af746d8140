"""Whatever a user's shell, paths, locale, notebook or container are: real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.system import files, places

REPOSITORY = Path(__file__).parents[2]
SMALL = ["--config=mlp", "--config.data.source=sample", "--config.batch_size=80", "--config.num_epochs=1"]


def run(*words: str, shell: str = "", lacking: tuple[str, ...] = (), **given: str) -> subprocess.CompletedProcess:
    """`python -m fmbench.<words>`, or `python <words>` where they begin with a flag, after commands of a shell."""
    called = words if words[0].startswith("-") else ("-m", f"fmbench.{words[0]}", *words[1:])
    environ = {name: value for name, value in os.environ.items() if name not in lacking}
    return subprocess.run(
        ["bash", "-c", f'{shell}\nexec "$@"', "bash", sys.executable, *called],
        cwd=REPOSITORY,
        env=environ | {"PYTHONPATH": str(REPOSITORY)} | given,
        capture_output=True,
        text=True,
        timeout=240,
    )


def train(path: Path, *words: str, **settings) -> subprocess.CompletedProcess:
    return run(
        "main", *SMALL, f"--workdir={path / 'work'}", f"--results_dir={path / 'results'}", *words, **settings
    )


# How places are spelled.


def test_a_tilde_is_somebodys_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert places.local_path("~/x") == Path("/home/me/x")
    assert places.local_path("~root/x") == Path(os.path.expanduser("~root/x"))  # noqa: PTH111
    assert [places.local_path(text) for text in ("x~", "./~/x", "-")] == [Path("x~"), Path("~/x"), Path("-")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' names no place; a folder in the current one is called like x or ./x."),
        ("gs://bucket/x", "'gs://bucket/x' is no path on this machine; "),
        ("s3://bucket/x", "'s3://bucket/x' is no path on this machine; "),
        ("file:///x", "'file:///x' is no path on this machine; "),
        ("file:/x", "'file:/x' is no path on this machine; "),
        ("~nobody-at-all/x", "'~nobody-at-all/x': there is no home folder '~nobody-at-all'; "),
        ("a\0b", r"'a\\x00b' has a NUL in it"),
    ],
)
def test_what_is_no_place_here_is_refused(text, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        places.local_path(text)


@pytest.mark.parametrize(
    "words",
    [
        *([f"main {flag}={{}} {' '.join(SMALL)}" for flag in ("--workdir", "--results_dir")]),
        "predict --model={} x.png",
        "evaluate --model={}",
        "figures --model=w --output={}",
        "embed --output={}",
        "compare a b --results_dir={}",
        "cross_validate --config=mlp --workdir={}",
        "sweep --config=mlp --grid=seed=1 --out={}",
        "verify --cheap --results_dir={}",
        "leaderboard --results_dir={}",
        "benchmark --render --results_dir={}",
        "accelerator mlp --results_dir={}",
        "datasets export --format=csv --output={}",
    ],
)
def test_every_command_refuses_it_before_it_does_anything(words, monkeypatch, capsys):
    import importlib

    name, *flags = words.format("gs://bucket/x").split()
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"fmbench.{name}").main()
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert "'gs://bucket/x' is no path on this machine" in err
    assert err.count("\n") == 1
    assert not (REPOSITORY / "gs:").exists()


def test_in_python_places_are_spelled_alike(tmp_path, monkeypatch):
    import fmbench

    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("gs://bucket/x", "", "a\0b"):
        with pytest.raises(fmbench.UserError):
            fmbench.train("mlp", workdir=place)
        with pytest.raises(fmbench.UserError):
            fmbench.train("mlp", results_dir=place)
        with pytest.raises(fmbench.UserError):
            fmbench.load_model(place)
        with pytest.raises(fmbench.UserError):
            fmbench.read_records(place)
    (tmp_path / "results" / "runs").mkdir(parents=True)
    assert fmbench.read_records("~/results") == []


def test_a_run_is_refused_a_name_that_checkpoints_can_not_have(tmp_path):
    """And one with a newline does, in one line; a workdir of a run that was refused is not there."""
    done = train(tmp_path, f"--workdir={tmp_path}/a\nb/\udcff")
    assert done.returncode == 2
    assert done.stderr.endswith(
        "its full name is not UTF-8, which checkpoints need; name another, or set PYTHONUTF8=1 if it is.\n"
    )
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "refused",
    [
        "--config.data.source=idx --config.data.dir=/nowhere",
        pytest.param("--config.batch_size=481", marks=pytest.mark.slow),
        pytest.param("--config.data.source=tfds --config.data.dir=/nowhere", marks=pytest.mark.slow),
        pytest.param("--seeds=1,2 --config.early_stopping_patience=1", marks=pytest.mark.slow),
    ],
)
def test_a_rejected_run_leaves_nothing(tmp_path, refused):
    done = train(tmp_path, *refused.split())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_mistyped_folder_of_data_is_forgotten(tmp_path):
    idx = ["--config.data.source=idx", "--config.data.unproven=true"]
    good = [*idx, f"--config.data.dir={REPOSITORY / 'fmbench' / 'data' / 'sample'}"]
    mistyped = [*idx, "--config.data.dir=/nowhere"]
    for words, code in ((mistyped, 2), (good, 0), (mistyped, 2), (good, 0)):
        done = train(tmp_path, *words)
        assert done.returncode == code, done.stderr
        if code:
            assert "/nowhere" in done.stderr
            assert "another config" not in done.stderr


# Variables.


NO_PASSWD = """
import pwd, sys
def nobody(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
from fmbench.main import main
main()
"""


def test_without_a_home_the_cache_needs_a_place(tmp_path):
    lacking = ("HOME", "XDG_CACHE_HOME", "FMBENCH_CACHE")
    words = ["-c", NO_PASSWD, *SMALL, f"--workdir={tmp_path}/w", f"--results_dir={tmp_path}/r"]
    done = run(*words, lacking=lacking)
    assert done.returncode == 2
    assert done.stderr == (
        "fmbench.main: there is no place for the cache: '~/.cache/fmbench': there is no home folder '~'; if a "
        "file is called so, write './~/.cache/fmbench'. FMBENCH_CACHE may name another.\n"
    )
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_without_a_home_it_runs_where_the_cache_has_a_place(tmp_path):
    words = ["-c", NO_PASSWD, *SMALL, f"--workdir={tmp_path}/w", f"--results_dir={tmp_path}/r"]
    done = run(*words, lacking=("HOME", "XDG_CACHE_HOME"), FMBENCH_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert not Path("~").exists()


def test_the_cache_may_be_spelled_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("FMBENCH_CACHE", "~/cache")
    assert files.cache_directory() == Path("/home/me/cache")
    monkeypatch.delenv("FMBENCH_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert files.cache_directory() == Path("/home/me/.cache/fmbench")


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", ""])
def test_a_notebooks_backend_disturbs_nothing_and_stays(backend):
    code = """
import os
from fmbench.system import command_line
with command_line.needs_extra("figures"):
    from fmbench.pages import drawing, embedding, pareto
print(os.environ["MPLBACKEND"])
"""
    done = run("-c", code, MPLBACKEND=backend)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{backend}\n", "")


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize("given", [{"PYTHONIOENCODING": "ascii"}, ASCII])
def test_output_that_has_no_such_letters_is_not_in_the_way(given):
    code = (
        "from fmbench.system import command_line\nwith command_line.plain_errors('x'): print('\\xb1', '\\udcff')"
    )
    done = run("-c", code, **given)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xb1 \\udcff\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ASCII,
        {"PYTHONWARNINGS": "error"},
        {"PYTHONOPTIMIZE": "2"},
        {"TMPDIR": "/nowhere", "HOME": "/nowhere"},
        {"shell": "exec 0<&-"},
        {"shell": "ulimit -n 64"},
        {"shell": "ulimit -v 4000000"},
    ],
    ids=str,
)
def test_odd_settings_change_nothing(tmp_path, settings):
    fashion_mnist.load()  # which says what it does, the first time
    done = train(tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 10  # the run's own
    for words in (
        ["predict", f"--model={tmp_path / 'work'}", "docs/pullover.png", f"--figure={tmp_path / 'new' / 'ä.png'}"],
        ["figures", f"--model={tmp_path / 'work'}", f"--output={tmp_path / 'figures'}"],
        ["compare", "speedrun-94", "speedrun-95", "--dtype=float32", "--format=markdown"],
        ["leaderboard", "--check"],
    ):
        done = run(*words, FMBENCH_CACHE=str(files.cache_directory()), **settings)
        assert (done.returncode, done.stderr) == (0, ""), words


def test_a_current_folder_that_is_gone(tmp_path):
    gone = f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone"
    done = run("main", *SMALL, shell=gone)
    assert done.returncode == 2
    assert done.stderr == "fmbench.main: the current folder was removed; go to one that is there.\n"


@pytest.mark.slow
def test_a_notebook_may_run_a_command_again_and_again(tmp_path):
    """As `%run -m` does: in one process, which nothing ends, and whose signals and variables stay as they were."""
    code = """
import os, runpy, signal, sys
handlers, variables = [signal.getsignal(s) for s in (2, 15)], dict(os.environ)
small, path = sys.argv[2:], sys.argv[1]
for words in (
    ["main", *small, f"--workdir={path}/a", f"--results_dir={path}/r"],
    ["main", *small, f"--workdir={path}/b", f"--results_dir={path}/r"],
    ["main", "--config=cnn1", "--summary"],
    ["predict", f"--model={path}/a", "docs/pullover.png"],
    ["predict", f"--model={path}/a", "docs/pullover.png"],
    ["main", "--config=mlp", "--no-such-flag"],
    ["evaluate", f"--model={path}/a"],
):
    sys.argv = [f"fmbench/{words[0]}.py", *words[1:]]
    try:
        runpy.run_module(f"fmbench.{words[0]}", run_name="__main__")
    except SystemExit as end:
        print("code", end.code or 0)
    else:
        print("code", 0)
assert handlers == [signal.getsignal(s) for s in (2, 15)]
print({name for name in os.environ if os.environ[name] != variables.get(name)})
"""
    done = run("-c", code, str(tmp_path), *SMALL)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == [
        f"code {code}" for code in (0, 0, 2, 0, 0, 2, 0)
    ], done.stderr


def test_files_are_read_and_written_as_utf_8_whatever_the_locale():
    """Ruff's rule for text that is opened without its encoding, which stable ruff does not have on."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--isolated",
            "--preview",
            "--select=PLW1514",
            "fmbench",
            "configs",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
