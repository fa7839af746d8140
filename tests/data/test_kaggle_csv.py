"""Kaggle's CSV files: what is read, what is refused and by which line, and a run on them."""

import gzip
import re
import tempfile
import time
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fmbench.data import export, fashion_mnist, kaggle_csv, proof
from fmbench.errors import UserError
from fmbench.records import store

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
IMAGES[0, 0, :2] = 0, 255
LABELS = np.array([9, 0, 3], np.uint8)
HEADER = "label," + ",".join(f"pixel{number}" for number in range(1, 785))
ROWS = [
    f"{label}," + ",".join(map(str, image.ravel().tolist())) for label, image in zip(LABELS, IMAGES, strict=True)
]
GOOD = "\n".join([HEADER, *ROWS]) + "\n"


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "fashion-mnist_test.csv"


def test_rows_become_images_and_labels(path):
    path.write_text(GOOD)
    images, labels = kaggle_csv.read_file(path)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    for array in (images, labels):
        assert array.dtype == np.uint8
        assert array.flags.c_contiguous
        assert not array.flags.writeable


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode(),
        GOOD.rstrip("\n").encode(),
        GOOD.replace("\n", "\r\n").rstrip("\r\n").encode(),
        (GOOD + "\n\n").encode(),
        GOOD.replace("\n", "\r").encode(),
        b"\xef\xbb\xbf" + GOOD.replace(",", ";").replace("\n", "\r\n").encode(),
        GOOD.replace(",", "\t").encode(),
        GOOD.replace(HEADER, '"' + HEADER.replace(",", '","') + '"').encode(),
    ],
    ids=[
        "BOM",
        "CRLF",
        "BOM and CRLF",
        "no last newline",
        "CRLF, no last newline",
        "empty lines at the end",
        "CR",
        "semicolons",
        "tabs",
        "quoted names",
    ],
)
def test_what_other_systems_do_to_a_text_file_does_no_harm(path, content):
    path.write_bytes(content)
    images, labels = kaggle_csv.read_file(path)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)


def with_cell(row: int, column: int, cell: str) -> str:
    cells = ROWS[row].split(",")
    cells[column] = cell
    return "\n".join([HEADER, *ROWS[:row], ",".join(cells), *ROWS[row + 1 :]]) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: expected the header label,pixel1,...,pixel784, found ''"),
        (HEADER, "line 2: expected a row of numbers below the header, found the end of the file"),
        (HEADER + "\n\n", "line 2: expected a row of numbers below the header, found the end of the file"),
        ("\n".join(ROWS), "line 1: expected the header label,pixel1,...,pixel784, found '9,0,255,"),
        (GOOD.replace("label", "Label"), "line 1: expected the header label,pixel1,...,pixel784, found 'Label,"),
        (GOOD.replace(",pixel784", ""), "line 1: expected the header"),
        (GOOD.replace("pixel7,", "pixel8,"), "line 1: expected the header"),
        (GOOD.replace(ROWS[1], ROWS[1][2:]), "line 3: expected 785 cells, a label and 784 pixels, found 784"),
        (GOOD.replace(ROWS[2], ROWS[2] + ",7"), "line 4: expected 785 cells, a label and 784 pixels, found 786"),
        (
            "\n".join([HEADER, *(row + ",7" for row in ROWS)]),  # consistently too many
            "line 2: expected 785 cells, a label and 784 pixels, found 786",
        ),
        (GOOD[:-1].rpartition(",")[0], "line 4: expected 785 cells, a label and 784 pixels, found 784"),
        (with_cell(1, 784, "256"), "line 3: pixel784 is '256', expected a whole number from 0 to 255"),
        (with_cell(1, 5, "1000"), "line 3: pixel5 is '1000', expected a whole number from 0 to 255"),
        (with_cell(2, 1, "-1"), "line 4: pixel1 is '-1', expected a whole number from 0 to 255"),
        (with_cell(0, 3, "1.5"), "line 2: pixel3 is '1.5', expected"),
        (with_cell(0, 3, "1.0"), "line 2: pixel3 is '1.0', expected"),
        (with_cell(0, 3, "1e1"), "line 2: pixel3 is '1e1', expected"),
        (with_cell(0, 3, "x"), "line 2: pixel3 is 'x', expected"),
        (with_cell(0, 3, "\u0663"), "line 2: pixel3 is '\u0663', expected"),  # int() takes this for a 3
        (with_cell(0, 3, "nan"), "line 2: pixel3 is 'nan', expected"),
        (with_cell(0, 3, ""), "line 2: pixel3 is '', expected"),
        (with_cell(0, 3, "# 1"), "line 2: pixel3 is '# 1', expected"),
        (with_cell(0, 0, ""), "line 2: label is '', expected a whole number from 0 to 9"),
        (with_cell(1, 0, "10"), "line 3: label is '10', expected a whole number from 0 to 9"),
        (with_cell(1, 0, "-1"), "line 3: label is '-1', expected a whole number from 0 to 9"),
        (with_cell(2, 784, "9" * 5000), "line 4: pixel784 is '9999"),
        (
            with_cell(2, 784, "9" * 20_000),
            "line 4: expected a label and 784 pixels, found 16,384 characters and no",
        ),
        (
            "label," * 5000,
            "line 1: expected a label and 784 pixels, found 16,384 characters and no end of the line",
        ),
        (
            GOOD.replace(ROWS[1], ROWS[1].replace(",", ";")),
            "line 3: expected 785 cells, a label and 784 pixels, found 1",
        ),
        (with_cell(0, 3, "\0"), "line 2: pixel3 is '\\x00', expected"),
        # The first mistake is named, whatever padding NumPy would have taken.
        (with_cell(1, 1, " 7 ").replace(ROWS[2], "1"), "line 4: expected 785 cells"),
        (with_cell(1, 1, "007").replace(ROWS[2], "1"), "line 4: expected 785 cells"),
        # An empty line is passed over, and counted.
        (GOOD.replace(ROWS[1], "\n" + ROWS[1] + ",1"), "line 4: expected 785 cells"),
    ],
)
def test_a_mistake_is_named_by_file_and_line(path, recwarn, content, message):
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"{path}, {message}")) as error:
        kaggle_csv.read_file(path)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < len(str(path)) + 150
    assert recwarn.list == []


def test_a_file_of_too_many_lines_is_named(path, monkeypatch):
    monkeypatch.setattr(kaggle_csv, "MOST_LINES", 3)
    path.write_text(GOOD)
    with pytest.raises(UserError, match=re.escape(f"{path} has more than 3 lines")):
        kaggle_csv.read_file(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "cp037"])
def test_other_encodings_are_named(path, encoding):
    path.write_bytes(GOOD.encode(encoding))
    with pytest.raises(UserError, match="line 1: expected ") as error:
        kaggle_csv.read_file(path)
    assert str(error.value).isprintable()


CELLS = st.one_of(
    st.integers(-10, 300).map(str),
    st.sampled_from(["", " ", "1.5", "x", "\n", "\r\n", '"', "\0", "٣", "1;2", "1e2", "nan"]),
)


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 784), CELLS), max_size=3))
def test_any_cells_are_the_numbers_that_stand_there_or_a_line(changes):
    rows = [row.split(",") for row in ROWS]
    for row, column, cell in changes:
        rows[row][column] = cell
    text = "\n".join([HEADER, *map(",".join, rows)])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "fashion-mnist_test.csv"
        path.write_text(text, encoding="utf-8")
        try:
            images, labels = kaggle_csv.read_file(path)
        except UserError as error:
            assert str(error).startswith(f"{path}, line ")
            assert str(error).isprintable()
        else:
            expected = [[int(cell) for cell in row] for row in rows]
            np.testing.assert_array_equal(np.column_stack([labels, images.reshape(3, 784)]), expected)


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused_in_a_line(content, after_the_header):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "fashion-mnist_test.csv"
        path.write_bytes((HEADER + "\n").encode() + content if after_the_header else content)
        with pytest.raises(UserError) as error:
            kaggle_csv.read_file(path)
    assert str(error.value).isprintable()


def test_bytes_that_are_no_text_are_named_by_line(path):
    path.write_bytes(with_cell(2, 4, "?").encode().replace(b"?", b"\xff"))
    with pytest.raises(UserError, match="line 4: pixel4 is"):
        kaggle_csv.read_file(path)


# As a source.


@pytest.fixture(scope="module")
def sample_csv(tmp_path_factory) -> Path:
    """The sample as CSV files."""
    directory = tmp_path_factory.mktemp("csv")
    export.export(fashion_mnist.load("sample"), "csv", directory)
    return directory


def copy(sample_csv: Path, directory: Path) -> list[Path]:
    """A copy of both files to spoil: train, test."""
    for name in kaggle_csv.FILE_NAMES.values():
        (directory / name).write_bytes((sample_csv / name).read_bytes())
    return [directory / name for name in kaggle_csv.FILE_NAMES.values()]


@pytest.mark.parametrize("gzipped", [False, True])
def test_the_version_is_told_by_the_hashes(sample_csv, tmp_path, gzipped):
    for path in copy(sample_csv, tmp_path):
        if gzipped:
            path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
            path.unlink()
    dataset, sample = fashion_mnist.load("csv", str(tmp_path)), fashion_mnist.load("sample")
    assert (dataset.version, dataset.sha256) == ("sample", sample.sha256)
    for field in fashion_mnist.PARTS:
        np.testing.assert_array_equal(getattr(dataset, field), getattr(sample, field))


def test_one_changed_pixel_is_noticed_and_its_file_named(sample_csv, tmp_path):
    _, test = copy(sample_csv, tmp_path)
    text = test.read_text().rstrip("\n")
    test.write_text(text[:-1] + ("1" if text[-1] == "0" else "0"))
    message = (
        f"{test} is not t10k-images of Fashion-MNIST, version sample: it seems to be a damaged or altered file"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        fashion_mnist.load("csv", str(tmp_path))


def test_swapped_files_are_named(sample_csv, tmp_path):
    train, test = copy(sample_csv, tmp_path)
    train.rename(tmp_path / "other")
    test.rename(train)
    (tmp_path / "other").rename(test)
    with pytest.raises(UserError, match=re.escape(f"{train} is not train-images")):
        fashion_mnist.load("csv", str(tmp_path))


def test_mnist_as_csv_is_named(sample_csv, tmp_path):
    train, _ = copy(sample_csv, tmp_path)
    digits = np.array([5, 0, 4, 1, 9, 2, 1, 3, 1, 4])
    dark = ",".join(["33"] * 784)
    train.write_text("\n".join([HEADER, *(f"{digit},{dark}" for digit in digits)]))
    with pytest.raises(UserError, match=f"{train} is not train-images.* seems to be MNIST's handwritten digits"):
        fashion_mnist.load("csv", str(tmp_path))


@pytest.mark.parametrize("data_dir", [None, ""])
@pytest.mark.parametrize("source", ["csv", "idx"])
def test_the_directory_must_be_named(source, data_dir, monkeypatch):
    monkeypatch.setenv("FMBENCH_DATA_DIR", str(fashion_mnist.SAMPLE_DIRECTORY))
    with pytest.raises(UserError, match=rf"'{source}'.*--config\.data\.dir=DIR"):
        fashion_mnist.load(source, data_dir)


def test_a_missing_file_is_named(sample_csv, tmp_path):
    copy(sample_csv, tmp_path)[1].unlink()
    with pytest.raises(UserError, match=r"has no fashion-mnist_test\.csv and no fashion-mnist_test\.csv\.gz"):
        fashion_mnist.load("csv", str(tmp_path))


def test_a_good_file_beside_a_damaged_one_is_used_and_the_other_named(sample_csv, tmp_path, caplog):
    train, test = copy(sample_csv, tmp_path)
    for path in (train, test):
        path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    test.write_bytes(test.read_bytes()[:10_000])
    assert fashion_mnist.load("csv", str(tmp_path)).version == "sample"
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(f"Another file is used instead. {test}, line ")


@pytest.mark.parametrize(
    "content",
    [gzip.compress(GOOD.encode())[:-100], b"no gzip", gzip.compress(b"") + b"x"],
    ids=["truncated", "no gzip", "rubbish after the end"],
)
def test_a_damaged_gzip_is_named(tmp_path, content):
    path = tmp_path / "fashion-mnist_train.csv.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path} cannot be read")):
        kaggle_csv.read_file(path)


def test_a_run_on_csv_files(run_main, sample_csv, tmp_path):
    done = run_main(
        "--config=configs/mlp.py",
        "--config.data.source=csv",
        f"--config.data.dir={sample_csv}",
        "--config.num_epochs=1",
        "--config.batch_size=32",
        f"--workdir={tmp_path / 'work'}",
        f"--results_dir={tmp_path / 'results'}",
    )
    assert done.returncode == 0, done.stderr
    (record,) = store.read_all(tmp_path / "results").values()
    assert (record.data_version, record.data_sha256) == ("sample", proof.SHA256["sample"])
    assert (record.config["data"]["source"], record.num_test) == ("csv", 200)


@pytest.mark.full
def test_the_real_data_comes_back_soon(tmp_path):
    dataset = fashion_mnist.load()
    export.export(dataset, "csv", tmp_path / "csv")
    start = time.perf_counter()
    back = fashion_mnist.load("csv", str(tmp_path / "csv"))
    assert time.perf_counter() - start < 5
    assert (back.version, back.sha256) == (proof.STANDARD, dataset.sha256)
