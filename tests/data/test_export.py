"""Exported data: every format holds what was given, twice the same, and alone."""

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from fmbench import datasets
from fmbench.data import export, fashion_mnist, sources

SAMPLE = fashion_mnist.load("sample")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `python -m fmbench.datasets` on the sample: exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["datasets", *map(str, arguments)])
        code = 0
        try:
            datasets.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    monkeypatch.setattr(fashion_mnist, "load", lambda data_dir: SAMPLE)
    return run


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("format", ["csv", "idx"])
def test_what_is_written_comes_back_with_the_same_hashes(tmp_path, format):
    export.export(SAMPLE, format, tmp_path / "new" / "directory")
    back = fashion_mnist.load(format, str(tmp_path / "new" / "directory"))
    assert (back.version, back.sha256) == ("sample", SAMPLE.sha256)


def test_csv_is_kaggles_format(tmp_path):
    export.export(SAMPLE, "csv", tmp_path)
    assert files(tmp_path).keys() == {"fashion-mnist_train.csv", "fashion-mnist_test.csv"}
    lines = (tmp_path / "fashion-mnist_test.csv").read_bytes().split(b"\n")
    assert len(lines) == 1 + 200 + 1
    assert lines[0].startswith(b"label,pixel1,pixel2,") and lines[0].endswith(b",pixel783,pixel784")
    assert lines[1].split(b",") == [b"%d" % n for n in (SAMPLE.test_labels[0], *SAMPLE.test_images[0].ravel())]
    assert lines[-1] == b""


def test_idx_files_are_reproducible_and_decompress_to_the_proven_files(tmp_path):
    for name in ("one", "two"):
        export.export(SAMPLE, "idx", tmp_path / name)
    one = files(tmp_path / "one")
    assert one == files(tmp_path / "two")
    assert one.keys() == {f"{name}.gz" for name in sources.FILE_NAMES.values()}
    for part, name in sources.FILE_NAMES.items():
        content = one[f"{name}.gz"]
        assert hashlib.sha256(gzip.decompress(content)).hexdigest() == SAMPLE.sha256[part]
        assert content[3:8] == bytes(5)  # no flags, so no name, and no time


def test_every_png_comes_back_in_order(tmp_path):
    export.export(SAMPLE, "png", tmp_path)
    assert sorted(path.name for path in (tmp_path / "test").iterdir()) == [
        "0-T-shirt-top", "1-Trouser", "2-Pullover", "3-Dress", "4-Coat",
        "5-Sandal", "6-Shirt", "7-Sneaker", "8-Bag", "9-Ankle-boot",
    ]  # fmt: skip
    for split, images, labels in (
        ("train", SAMPLE.train_images, SAMPLE.train_labels),
        ("test", SAMPLE.test_images, SAMPLE.test_labels),
    ):
        paths = sorted((tmp_path / split).glob("*/*.png"), key=lambda path: path.name)
        assert [path.name for path in paths] == [f"{row:05}.png" for row in range(len(labels))]
        assert [int(path.parent.name.partition("-")[0]) for path in paths] == labels.tolist()
        for path, image in zip(paths, images, strict=True):
            with PIL.Image.open(path) as png:
                assert png.mode == "L"
                np.testing.assert_array_equal(np.asarray(png), image)
    assert len(files(tmp_path)) == 680


@pytest.mark.parametrize("format", ["csv", "idx", "png"])
def test_the_command_writes_each_format(run, tmp_path, format):
    code, out, err = run("export", f"--format={format}", "--output", tmp_path / "out")
    assert (code, out, err) == (0, f"Fashion-MNIST sample is in {tmp_path / 'out'}\n", "")
    export.export(SAMPLE, format, tmp_path / "direct")
    assert files(tmp_path / "out") == files(tmp_path / "direct")


def test_data_dir_may_stand_before_or_behind_the_command(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fashion_mnist, "load", lambda data_dir: asked.append(data_dir))
    monkeypatch.setattr(export, "export", lambda *arguments: None)
    arguments = ("export", "--format=idx", f"--output={tmp_path}")
    run(*arguments)
    run("--data_dir=before", *arguments)
    run(*arguments, "--data_dir=behind")
    assert asked == [None, "before", "behind"]


@pytest.mark.parametrize("kind", ["holds a file", "is a file"])
def test_only_a_new_or_empty_directory_will_do(run, tmp_path, kind):
    output = tmp_path / "output"
    if kind == "is a file":
        output.write_text("precious")
    else:
        output.mkdir()
        (output / ".hidden").write_text("precious")
    before = files(tmp_path)
    code, out, err = run("export", "--format=png", f"--output={output}")
    assert (code, out) == (2, "")
    assert (
        err == f"fmbench.datasets: --output={output} is not an empty directory; name one that is, or a new one.\n"
    )
    assert files(tmp_path) == before


def test_a_failure_leaves_no_half_of_the_files(run, tmp_path, monkeypatch):
    def fail(self, path):
        if path.name == "00003.png":
            raise OSError(28, "No space left on device")
        path.touch()

    monkeypatch.setattr(PIL.Image.Image, "save", fail)
    code, _, err = run("export", "--format=png", f"--output={tmp_path}")
    assert (code, err) == (
        2,
        f"fmbench.datasets: --output={tmp_path} cannot be written to: No space left on device.\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_mistakes_and_help(run):
    code, _, err = run("export", "--format=gif", "--output=x")
    assert code == 2
    assert "'gif'" in err
    assert not Path("x").exists()
    code, out, _ = run("export", "--help")
    assert code == 0
    assert all(f"--format={format}" in out for format in ("csv", "idx", "png"))


def test_what_a_killed_export_left_is_no_obstacle(run, tmp_path):
    (tmp_path / ".unfinished-k3j2x_1a" / "train").mkdir(parents=True)
    code, _, err = run("export", "--format=idx", f"--output={tmp_path}")
    assert (code, err) == (0, "")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_second_export_to_the_same_place_waits_for_nobody(run, tmp_path):
    with export._alone(tmp_path):
        code, _, err = run("export", "--format=idx", f"--output={tmp_path}")
    assert (code, err) == (
        2,
        f"fmbench.datasets: --output={tmp_path} is being written to by another export; wait for it.\n",
    )
