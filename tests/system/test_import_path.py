"""What an import path leads to, and what is said where it leads nowhere."""

import sys

import pytest

from fmbench.errors import UserError
from fmbench.system import import_path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in the current folder, which is not on Python's path, as where a console script is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    folder = tmp_path / "package_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "good.py").write_text("def answer():\n    return 42\n")
    (folder / "needy.py").write_text("import os\nimport nothing_of_that_name\n")
    (folder / "broken.py").write_text("x = 1\ny = (\n")
    (folder / "failing.py").write_text("import json\n\njson.loads('no')\n")
    yield folder
    for name in [name for name in sys.modules if name.startswith("package_of_a_test")]:
        del sys.modules[name]


def test_modules_in_the_current_folder_are_found(package):
    assert import_path.load("package_of_a_test.good:answer", "config.x")() == 42


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("package_of_a_test.good:anwser", "'package_of_a_test.good' has no 'anwser'; the nearest is answer"),
        ("package_of_a_test.god:answer", "but there is no module 'package_of_a_test.god'; install its package"),
        ("package_of_another:answer", "but there is no module 'package_of_another'; install its package"),
        ("package_of_a_test.needy:x", "Error: No module named 'nothing_of_that_name' ({}needy.py:2)"),
        ("package_of_a_test.broken:x", "fails: SyntaxError: '(' was never closed ({}broken.py:2)"),
        ("package_of_a_test.failing:x", "Expecting value: line 1 column 1 (char 0) ({}failing.py:3)"),
        ("package_of_a_test.good:", "an import path is package.module:Name"),
        (":answer", "an import path is package.module:Name"),
        ("package_of_a_test/good.py:answer", "an import path is package.module:Name"),
        ("package_of_a_test.good:answer.x", "an import path is package.module:Name"),
        ("a:b:c", "an import path is package.module:Name"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_place(package, path, said):
    with pytest.raises(UserError) as error:
        import_path.load(path, "config.x")
    assert str(error.value).startswith(f"config.x is '{path}'")
    assert said.format(f"{package}/") in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_told_with_the_nearest():
    error = import_path.unknown("config.x", "adamm", ("sgd", "adam", "adamw"))
    assert "must be one of sgd, adam, adamw, or an import path" in str(error)
    assert str(error).endswith("the nearest are adam, adamw.")
    assert "nearest" not in str(import_path.unknown("config.x", "qqq", ("sgd",)))


def by_place(a, b, /, *, c):
    pass


def anything(*args, **kwargs):
    pass


def defaults(a, b=1, *, c=2):
    pass


class Built:
    def __init__(self, a, *, b):
        pass


@pytest.mark.parametrize(
    ("function", "given", "places", "said"),
    [
        (by_place, ("c",), 2, ""),
        (by_place, (), 2, "also needs c"),
        (by_place, ("c",), 3, "takes 2 arguments by their place, and is given 3"),
        (by_place, ("c", "d", "e"), 2, "does not take d, e"),
        (anything, ("c", "d"), 5, ""),
        (defaults, ("a",), 0, ""),
        (defaults, ("b",), 0, "also needs a"),
        (defaults, ("b", "d"), 0, "does not take d and also needs a"),
        (Built, ("a", "b"), 0, ""),
        (Built, ("self", "a"), 0, "does not take self and also needs b"),
    ],
)
def test_misfits(function, given, places, said):
    assert import_path.misfit(function, given=given, places=places) == said
