"""The wheel: what is in it, and that it works in an empty folder; the command `fmbench`."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from fmbench import __main__ as command

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built from a copy of what it is made of."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("fmbench", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from hatchling.build import build_wheel; import sys; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, target], cwd=source, check=True)
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs modules in a folder of its own, with the wheel installed and this environment's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", symlinks=True)
    (packages,) = (folder / "venv").glob("lib/*/site-packages")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(packages)
    # At the end of the path, where the wheel's fmbench hides an editable one.
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [folder / "venv" / "bin" / "python", "-m", *arguments],
            cwd=folder,
            env=environment | {"FMBENCH_CACHE": str(folder / "cache")},
            capture_output=True,
            text=True,
        )

    (folder / "shirt.png").write_bytes((ROOT / "docs" / "pullover.png").read_bytes())
    return folder, run


def test_the_wheel_has_the_configs_the_sample_and_the_types(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (entry_points,) = (file.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert {f"fmbench/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")} <= names
    assert {f"fmbench/data/sample/{path.name}" for path in (ROOT / "fmbench/data/sample").iterdir()} <= names
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "fmbench").rglob("*.py")}
    assert {"fmbench/py.typed"} | code <= names
    assert all(name.startswith(("fmbench/", "fmbench-")) for name in names)
    assert "fmbench = fmbench.__main__:main" in entry_points


@pytest.mark.slow
def test_an_installed_wheel_trains_and_predicts_in_an_empty_folder(installed):
    folder, run = installed

    def succeed(*arguments: str) -> str:
        done = run("fmbench", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = ("--config.data.source=sample", "--config.num_epochs=1", "--config.batch_size=80", "--workdir=work")
    succeed("train", "--config=mlp", *small)
    assert "shirt.png: label " in succeed("predict", "--model=work", "shirt.png")
    assert "--data_dir" in succeed("datasets", "--help")
    assert "290,302" in succeed("train", "--config=speedrun:94", "--summary")
    where = run("fmbench.main", "--config=configs/vgg_like.py", "--config.num_epochs=0")
    assert where.stderr == "fmbench.main: config.num_epochs is 0; it must be at least 1.\n"
    benchmark = run("fmbench", "benchmark")
    assert (benchmark.returncode, benchmark.stderr.count("\n")) == (2, 1)
    assert "benchmarks/ of fmbench's repository" in benchmark.stderr
    (folder / "records.py").write_text(
        "import fmbench\n(record,) = fmbench.read_records('trials')\n"
        "print(record.config_file, record.environment.git_commit)\n"
    )
    assert run("records").stdout == "configs/mlp.py None\n"


# The command.


HEAVY = [
    "jax",
    "flax",
    "optax",
    "numpy",
    "pydantic",
    "sklearn",
    "scipy",
    "matplotlib",
    "orbax",
    "ml_collections",
    "absl",
]


def python(script: str, lacking: Sequence[str] = ()) -> subprocess.CompletedProcess:
    """Runs a script where the named modules cannot be imported."""
    setup = f"import sys; sys.modules.update(dict.fromkeys({lacking}))\n"
    return subprocess.run([sys.executable, "-c", setup + script], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def fmbench(monkeypatch, capsys):
    """Runs the command `fmbench` in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fmbench", *arguments])
        try:
            command.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def test_every_module_that_is_a_command_is_listed_with_the_first_line_of_its_docstring(fmbench):
    code, out, _ = fmbench("--help")
    assert (code, out) == fmbench()[:2]
    listed = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    modules = {path.stem for path in (ROOT / "fmbench").glob("[!_]*.py")}
    assert listed == modules - {"main", "api", "config", "entries", "errors"} | {"train"}
    assert "  predict         Classifies images with an exported model.\n" in out


def test_neither_the_import_nor_the_list_of_commands_waits_for_anything_large():
    script = "import fmbench; from fmbench.__main__ import main; sys.argv[1:] = ['--help']; main()"
    done = python(script, lacking=HEAVY)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_of_training_and_the_answer_to_a_mistake_do_not_wait_for_jax():
    script = "import runpy; sys.argv[1:] = [{!r}]; runpy.run_module('fmbench.main', run_name='__main__')"
    lacking = ["jax", "flax", "optax", "pydantic", "sklearn"]
    assert "--config.num_epochs=10" in python(script.format("--help"), lacking).stdout
    mistaken = python(script.format("--config=mpl"), lacking)
    assert (mistaken.returncode, mistaken.stderr) == (2, "fmbench.main: no config 'mpl'; the nearest is mlp.\n")


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("trian", "train"),
        ("pedict", "predict"),
        ("leader_board", "leaderboard"),
        ("cross-validate", "cross_validate"),
    ],
)
def test_a_mistyped_command_is_told_the_nearest(fmbench, given, nearest):
    code, out, err = fmbench(given)
    assert (code, out) == (2, "")
    assert re.match(rf"fmbench: there is no command '{given}'; the nearest (is|are) {nearest}[;,]", err)
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", command.commands())
def test_every_command_has_help_and_names_the_nearest_flag(fmbench, name):
    code, out, err = fmbench(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: fmbench {name} ")
    code, out, err = fmbench(name, "--hepl")
    assert (code, out) == (2, "")
    assert re.match(r"fmbench\.\w+: there is no flag --hepl; the nearest (is|are) --help[;,]", err)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        ("predict --modle=x", "--model"),  # told before what is missing
        ("datasets export --format=png --output=x --formt=csv", "--format"),
        ("train --config=mlp --wrokdir=x", "--workdir"),
        ("sweep --config=mlp --gird=seed=1", "--grid"),
        ("cross_validate --config=mlp --fold=3", "--folds"),
    ],
)
def test_a_mistyped_flag_is_told_the_nearest(fmbench, words, nearest):
    code, out, err = fmbench(*words.split())
    assert (code, out) == (2, "")
    assert re.search(rf"there is no flag --\w+; the nearest (is|are) {nearest}[;,]", err)
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", ["cross_validate --folds=x", "embed --num_images=1.5", "benchmark --rounds=a"])
def test_a_word_for_a_number_is_refused_in_plain_words(fmbench, words):
    code, out, err = fmbench(*words.split())
    assert (code, out) == (2, "")
    assert "is no whole number; --help lists the flags." in err


# Extras.


def test_what_draws_names_the_extra_that_it_needs_and_all_else_works_without_it():
    script = f"""
import importlib
for name, *arguments in {[[*words.split()] for words in DRAWING]}:
    sys.argv = [f"fmbench.{{name}}", *arguments]
    try:
        importlib.import_module(f"fmbench.{{name}}").main()
    except SystemExit as end:
        print(end.code)
for name in {sorted(command.commands().keys() - {"train"})}:
    importlib.import_module(f"fmbench.{{name}}")
"""
    done = python(script, lacking=["matplotlib", "openTSNE"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"] * len(DRAWING)
    said = "matplotlib is missing; it comes with pip install 'fmbench[figures]'."
    assert done.stderr.splitlines() == [f"fmbench.{words.split()[0]}: {said}" for words in DRAWING]


DRAWING = ("figures data", "embed", "pareto", "predict --model=nowhere --figure=x.png docs/pullover.png")
