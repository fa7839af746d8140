"""Tests of where the images come from, of the proof, the cache and the splits.

Everything but the slow tests runs on the sample, through the same functions as the real data. The
slow ones need the real data where `fashion_mnist.load` finds it, for example in $FMBENCH_DATA_DIR.
"""

import gzip
import hashlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from absl import logging
from hypothesis import strategies as st
from sklearn.model_selection import KFold, train_test_split

from fmbench import datasets
from fmbench.data import fashion_mnist, kaggle_csv, proof, sources, splits, tfds_directory
from fmbench.errors import UserError
from fmbench.pages import leaderboard
from fmbench.records import store
from fmbench.system import files

SAMPLE = fashion_mnist.SAMPLE_DIRECTORY
REPOSITORY = SAMPLE.parents[2]


@pytest.fixture(autouse=True)
def nothing_of_this_machine(request, tmp_path, monkeypatch):
    """Leaves the fast tests an empty cache and no other place the data could come from; and warnings are heard."""
    logging.set_verbosity(logging.WARNING)  # which commands before in this process have turned down
    if request.node.get_closest_marker("full") is None:
        monkeypatch.setenv("FMBENCH_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no_tfds"))
        monkeypatch.delenv("FMBENCH_DATA_DIR", raising=False)
        monkeypatch.setattr(sources, "sources", lambda scratch: {})


@pytest.fixture
def sample_copy(tmp_path) -> Path:
    return Path(shutil.copytree(SAMPLE, tmp_path / "idx"))


def load_sample_through_tfds(directory: Path | None = SAMPLE) -> fashion_mnist.Arrays:
    return fashion_mnist._load_cached("sample", directory)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=1))


def write_labels(path: Path, first_ten: Sequence[int], count: int) -> None:
    write_idx(path, np.resize(np.array(first_ten, np.uint8), count))


# The sample.


def test_sample_is_proven_balanced_and_read_only():
    sample = fashion_mnist.load("sample")
    assert sample.version == "sample"
    assert sample.sha256 == fashion_mnist.SHA256["sample"]
    assert sample.train_images.shape == (480, 28, 28)
    assert sample.test_images.shape == (200, 28, 28)
    np.testing.assert_array_equal(np.bincount(sample.train_labels), [48] * 10)
    np.testing.assert_array_equal(np.bincount(sample.test_labels), [20] * 10)
    # Known from the official set: it begins with an ankle boot.
    assert fashion_mnist.CLASS_NAMES[sample.train_labels[0]] == "Ankle boot"
    assert sample.test_labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    for array in (sample.train_images, sample.train_labels, sample.test_images, sample.test_labels):
        assert array.dtype == np.uint8
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_hash_of_an_array_is_the_hash_of_its_idx_file():
    for part, name in sources.FILE_NAMES.items():
        content = gzip.decompress((SAMPLE / f"{name}.gz").read_bytes())
        assert hashlib.sha256(content).hexdigest() == fashion_mnist.SHA256["sample"][part]


def test_unknown_source_names_the_sources():
    with pytest.raises(UserError, match=r"'parquet'.*'tfds', 'csv', 'idx' and 'sample'"):
        fashion_mnist.load("parquet")


def test_sample_refuses_a_data_dir():
    with pytest.raises(UserError, match="drop data_dir"):
        fashion_mnist.load("sample", data_dir="somewhere")


# Wrong data is named, with its file.


@pytest.mark.parametrize(
    ("part", "first_ten", "named"),
    [
        ("train-labels", (5, 0, 4, 1, 9, 2, 1, 3, 1, 4), "MNIST's handwritten digits"),
        ("t10k-labels", (7, 2, 1, 0, 4, 1, 4, 9, 5, 9), "MNIST's handwritten digits"),
        ("train-labels", (2, 9, 6, 0, 3, 4, 4, 5, 4, 8), "the old Fashion-MNIST"),
        ("t10k-labels", (0, 1, 2, 2, 3, 2, 8, 6, 5, 0), "the old Fashion-MNIST"),
    ],
)
def test_labels_of_another_set_are_named(sample_copy, part, first_ten, named):
    path = sample_copy / f"{sources.FILE_NAMES[part]}.gz"
    write_labels(path, first_ten, 480)
    with pytest.raises(UserError, match=f"{path} is not {part}.* seems to be {named}"):
        load_sample_through_tfds(sample_copy)


@pytest.mark.parametrize(("mean", "named"), [(0.1307, "MNIST's"), (0.2860, "a damaged or altered")])
def test_mnist_images_are_known_by_their_mean(sample_copy, mean, named):
    path = sample_copy / "train-images-idx3-ubyte.gz"
    write_idx(path, np.full((480, 28, 28), round(mean * 255), np.uint8))
    with pytest.raises(UserError, match=f"{path} is not train-images.* seems to be {named}"):
        load_sample_through_tfds(sample_copy)


def test_mnist_is_known_by_its_hash():
    for part, sha256 in proof.MNIST_SHA256.items():
        guess = proof._guess(part, np.zeros(10, np.uint8), sha256)
        assert guess == proof.MNIST


def test_truncated_gzip(sample_copy):
    path = sample_copy / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"{path} is truncated: its gzip"):
        load_sample_through_tfds(sample_copy)


def test_flipped_byte_in_gzip(sample_copy):
    path = sample_copy / "t10k-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # in the CRC, so that whatever the stream decodes to is refused
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} is damaged: its gzip check fails"):
        load_sample_through_tfds(sample_copy)


def unzip(path: Path) -> Path:
    """Replaces `path` by its decompressed contents under the name without .gz."""
    raw = path.with_suffix("")
    raw.write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    return raw


def test_raw_idx_is_as_good_as_gzipped(sample_copy):
    for path in sample_copy.glob("*.gz"):
        unzip(path)
    arrays = fashion_mnist._read_idx_directory(sample_copy, "sample")
    assert arrays["train-images"].shape == (480, 28, 28)


def test_flipped_bit_in_raw_idx(sample_copy):
    path = unzip(sample_copy / "t10k-images-idx3-ubyte.gz")
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} is not t10k-images.* a damaged or altered file"):
        load_sample_through_tfds(sample_copy)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (10_000, "is truncated: its header promises 156800 bytes, 9984 follow"),
        (6, "is truncated: it ends within the idx header"),
        (3, "is truncated: it ends within the idx header"),
        (0, "is not an idx file of bytes"),
    ],
)
def test_truncated_raw_idx(sample_copy, keep, message):
    path = unzip(sample_copy / "t10k-images-idx3-ubyte.gz")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{path} {message}"):
        load_sample_through_tfds(sample_copy)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\0\0\x08\xff" + b"\xff" * 1020, "is damaged: its header says 255 dimensions, images have 3, labels 1"),
        (b"\0\0\x08\0", "is damaged: its header says 0 dimensions"),
        (
            b"\0\0\x08\x03" + b"\xff" * 12,
            "too large: its header promises 79,228,162,458,924,105,385,300,197,375 bytes",
        ),
        (b"\0\0\x08\x01" + struct.pack(">I", 2**31), "too large: its header promises 2,147,483,648 bytes"),
        (b"\0\0\x0d\x03", "is not an idx file of bytes"),
    ],
)
@pytest.mark.parametrize("gzipped", [False, True])
def test_a_header_of_no_images_is_refused_before_they_are_read(sample_copy, header, message, gzipped):
    path = sample_copy / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(header + bytes(1000)) if gzipped else header + bytes(1000))
    for source in ("tfds", "idx"):
        with pytest.raises(UserError, match=f"{path} .*{message}"):
            fashion_mnist.load(source, str(sample_copy)) if source == "idx" else load_sample_through_tfds(
                sample_copy
            )


def test_more_than_the_header_promises_is_refused(sample_copy):
    path = unzip(sample_copy / "t10k-labels-idx1-ubyte.gz")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match=f"{path} is damaged: its header promises 200 bytes, more follow it"):
        load_sample_through_tfds(sample_copy)


# What a process that loads it printed, and the most KiB that it held.
LOAD_AND_TELL_MEMORY = """
import re, sys
from pathlib import Path
from fmbench.data import fashion_mnist
from fmbench.errors import UserError
try:
    fashion_mnist.load(sys.argv[1], sys.argv[2])
except UserError as error:
    print(error)
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
"""


def gzip_of(beginning: bytes, repeated: bytes, times: int) -> bytes:
    """A gzip file of far more than its size."""
    packer = zlib.compressobj(9, wbits=31)
    return packer.compress(beginning) + b"".join(packer.compress(repeated) for _ in range(times)) + packer.flush()


BOMBS: dict[str, tuple[str, bytes, bytes, int]] = {
    # name, beginning, what is repeated, how often: to 8.3 GB and 1.6 GB in 4 MB and less
    "idx": (
        "train-images-idx3-ubyte.gz",
        b"\0\0\x08\x03" + struct.pack(">III", 60_000, 28, 28),
        bytes(2**20),
        1000,
    ),
    "idx, honest": (
        "train-images-idx3-ubyte.gz",
        b"\0\0\x08\x03" + struct.pack(">III", 240_000, 28, 28),
        bytes(784_000),
        240,
    ),
    "no idx": ("train-images-idx3-ubyte.gz", b"", bytes(2**20), 1000),
    "CSV without an end of line": ("fashion-mnist_train.csv.gz", b"label", b"1," * 2**19, 1000),
    "CSV of many rows": (
        "fashion-mnist_train.csv.gz",
        ",".join(kaggle_csv.COLUMNS).encode() + b"\n",
        (b"0" + b",0" * 784 + b"\n") * 1000,
        1000,
    ),
    "CSV of empty lines": (
        "fashion-mnist_train.csv.gz",
        ",".join(kaggle_csv.COLUMNS).encode() + b"\n",
        b"\n" * 2**20,
        1000,
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory was held")
@pytest.mark.parametrize("kind", BOMBS)
def test_what_unpacks_to_gigabytes_is_refused_in_little_memory(sample_copy, kind):
    name, beginning, repeated, times = BOMBS[kind]
    source = "csv" if "CSV" in kind else "idx"
    if source == "csv":
        (sample_copy / "fashion-mnist_test.csv").touch()
    (sample_copy / name).write_bytes(gzip_of(beginning, repeated, times))
    command = [sys.executable, "-c", LOAD_AND_TELL_MEMORY, source, str(sample_copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    said, memory = done.stdout.splitlines()
    assert f"{sample_copy / name}" in said
    assert int(memory) < 2**20


# What is unambiguous is taken.


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1000], lambda content: b"<html>", lambda content: b""]
)
@pytest.mark.parametrize("source", ["tfds", "idx"])
def test_a_good_file_beside_a_damaged_one_is_used_and_the_other_named(sample_copy, source, damage, caplog):
    path = sample_copy / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    unzip(path)
    path.write_bytes(damage(content))
    if source == "idx":
        assert fashion_mnist.load("idx", str(sample_copy)).version == "sample"
    else:
        load_sample_through_tfds(sample_copy)
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(f"Another file is used instead. {path} is ")


def test_the_proven_one_of_two_good_files_is_used(sample_copy, caplog):
    path = sample_copy / "t10k-labels-idx1-ubyte.gz"
    raw = path.read_bytes()
    unzip(path)
    write_labels(path, (7, 2, 1, 0, 4, 1, 4, 9, 5, 9), 200)
    load_sample_through_tfds(sample_copy)
    assert f"{path} is not t10k-labels" in caplog.text
    path.write_bytes(raw)
    caplog.clear()
    load_sample_through_tfds(sample_copy)
    assert caplog.text == ""


def test_two_good_files_that_differ_are_refused_where_nothing_tells_which_is_meant(sample_copy):
    path = sample_copy / "t10k-labels-idx1-ubyte.gz"
    raw = sample_copy / "t10k-labels-idx1-ubyte"
    raw.write_bytes(gzip.decompress(path.read_bytes()))
    assert fashion_mnist.load("idx", str(sample_copy)).version == "sample"
    write_labels(path, range(10), 200)
    with pytest.raises(UserError, match=f"{path} and {raw} hold different data; remove one of them"):
        fashion_mnist.load("idx", str(sample_copy), unproven=True)


@pytest.mark.parametrize("folder", ["raw", "FashionMNIST/raw"])
def test_torchvisions_folders_will_do(sample_copy, tmp_path, folder):
    (tmp_path / "root" / folder).parent.mkdir(parents=True)
    sample_copy.rename(tmp_path / "root" / folder)
    assert fashion_mnist.load("idx", str(tmp_path / "root")).version == "sample"


def test_dots_for_dashes_will_do(sample_copy):
    for path in list(sample_copy.glob("*.gz")):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    unzip(sample_copy / "t10k-images.idx3-ubyte.gz")
    assert fashion_mnist.load("idx", str(sample_copy)).version == "sample"


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    st.binary(max_size=40), st.booleans(), st.sampled_from([b"", b"\0\0\x08", b"\0\0\x08\x01\0\0\0"])
)
def test_any_bytes_are_an_array_or_a_line(content, gzipped, beginning):
    content = beginning + content
    file = sources.IdxFile("somewhere", gzip.compress(content, 0) if gzipped else content)
    try:
        array = sources.decode_idx(file)
    except UserError as error:
        assert str(error).startswith("somewhere is ")
        assert "\n" not in str(error)
    else:
        assert sources.idx_header(array) + array.tobytes() == content


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.data())
def test_damaged_gzips_are_an_array_or_a_line(data):
    """Any that comes back is the one that was packed: gzip has a check sum."""
    packed = bytearray((SAMPLE / "t10k-labels-idx1-ubyte.gz").read_bytes())
    expected = sources.decode_idx(sources.IdxFile("somewhere", bytes(packed)))
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        array = sources.decode_idx(sources.IdxFile("somewhere", bytes(packed)))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        np.testing.assert_array_equal(array, expected)


def test_html_page_instead_of_idx(sample_copy):
    path = sample_copy / "train-labels-idx1-ubyte.gz"
    path.write_text("<!DOCTYPE html><html>Please log in</html>")
    with pytest.raises(UserError, match=f"{path} is not an idx file of bytes: it .*DOCTYPE"):
        load_sample_through_tfds(sample_copy)


def test_missing_file(sample_copy):
    (sample_copy / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"has no t10k-labels-idx1-ubyte.gz .*train-images-idx3"):
        load_sample_through_tfds(sample_copy)


def test_missing_directory(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a directory"):
        fashion_mnist.load(data_dir=str(tmp_path / "nowhere"))


def test_sample_is_not_taken_for_the_real_data(monkeypatch):
    monkeypatch.setenv("FMBENCH_DATA_DIR", str(SAMPLE))
    with pytest.raises(UserError, match="version 2017-08-31: it seems to be version 'sample'"):
        fashion_mnist.load()


# The old Fashion-MNIST, which is not at hand: a stand-in with all that is known of it.


def old_labels(first_ten: Sequence[int], per_class: int) -> np.ndarray:
    """Labels that begin with `first_ten`, equally many of each class."""
    rest = np.repeat(np.arange(10), per_class - np.bincount(first_ten, minlength=10))
    return np.concatenate([first_ten, rest]).astype(np.uint8)


@pytest.fixture(scope="module")
def old() -> fashion_mnist.Arrays:
    """Images of one grey each, of the mean that Fashion-MNIST has."""
    arrays = {}
    greys = np.linspace(50, 96, 10).astype(np.uint8)
    for prefix, first_ten, per_class in (
        ("train", (2, 9, 6, 0, 3, 4, 4, 5, 4, 8), 6000),
        ("t10k", (0, 1, 2, 2, 3, 2, 8, 6, 5, 0), 1000),
    ):
        labels = old_labels(first_ten, per_class)
        arrays[f"{prefix}-images"] = np.repeat(greys[labels], 784).reshape(-1, 28, 28)
        arrays[f"{prefix}-labels"] = labels
    return arrays


@pytest.fixture(scope="module")
def old_idx(old, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("old")
    for part, name in sources.FILE_NAMES.items():
        (directory / name).write_bytes(sources.idx_header(old[part]) + old[part].tobytes())
    return directory


def test_the_old_data_is_a_version_of_its_own_where_its_files_are_asked_for(old, old_idx):
    dataset = fashion_mnist.load("idx", str(old_idx))
    assert dataset.version == "old"
    for part, name in sources.FILE_NAMES.items():
        assert dataset.sha256[part] == hashlib.sha256((old_idx / name).read_bytes()).hexdigest()
    np.testing.assert_array_equal(dataset.test_labels, old["t10k-labels"])


def test_the_old_data_is_an_error_where_the_standard_data_is_asked_for(old_idx):
    with pytest.raises(UserError, match=r"is not train-images of Fashion-MNIST, version 2017-08-31"):
        fashion_mnist.load("tfds", str(old_idx))


def changed(array: np.ndarray, place: int, value: int) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("part", "spoil"),
    [
        ("train-images", lambda array: array[:-1]),
        ("t10k-images", lambda array: array.reshape(-1, 14, 56)),
        ("train-images", lambda array: np.full_like(array, 33)),  # as dark as MNIST
        ("t10k-images", lambda array: array * 2),
        ("train-labels", lambda array: array[:-1]),
        ("train-labels", lambda array: np.concatenate([array[10:], array[:10]])),  # the first ten are others
        ("t10k-labels", lambda array: np.concatenate([array[10:], array[:10]])),
        ("train-labels", lambda array: old_labels((5, 0, 4, 1, 9, 2, 1, 3, 1, 4), 6000)),  # they are MNIST's
        ("t10k-labels", lambda array: changed(array, -1, 1)),  # a class has one too few
    ],
)
def test_what_only_resembles_the_old_data_is_an_error(old, part, spoil):
    arrays = {**old, part: spoil(old[part])}
    with pytest.raises(UserError, match="somewhere is not train-images of Fashion-MNIST, version 2017-08-31"):
        proof.recognize(arrays, dict.fromkeys(arrays, "somewhere"))


def test_one_wrong_part_among_good_ones_is_the_one_named(old):
    arrays = fashion_mnist._read_idx_directory(SAMPLE, "sample") | {"t10k-labels": old["t10k-labels"]}
    with pytest.raises(UserError, match=r"t10k-labels of Fashion-MNIST, version sample: .* the old Fashion-MNIST"):
        proof.recognize(arrays, dict.fromkeys(arrays, "somewhere"))


def test_idx_files_of_any_version_may_be_named():
    dataset = fashion_mnist.load("idx", str(SAMPLE))
    assert (dataset.version, dataset.sha256) == ("sample", fashion_mnist.SHA256["sample"])


@pytest.mark.slow
def test_a_run_on_the_old_data_leaves_its_labels_and_has_a_table_of_its_own(run_main, old_idx, tmp_path):
    results_dir = tmp_path / "results"
    done = run_main(
        "--config=configs/mlp.py",
        "--config.data.source=idx",
        f"--config.data.dir={old_idx}",
        "--config.num_epochs=1",
        "--config.batch_size=1000",
        f"--workdir={tmp_path / 'work'}",
        f"--results_dir={results_dir}",
    )
    assert done.returncode == 0, done.stderr
    ((path, record),) = store.read_all(results_dir).items()
    assert record.data_version == "old"
    assert path.stem.endswith("-seed0-old")
    (labels,) = (results_dir / "labels").iterdir()
    assert labels.stem == record.data_sha256["t10k-labels"]
    leaderboard.verify_accuracies({path: record})
    text = leaderboard.render(results_dir, {path: record})[results_dir / "leaderboard.md"]
    assert "float32, old data (withdrawn 2017-08-31)\n" in text


# Through TFDS and the cache.


def test_records_come_back_in_idx_order_and_need_to_be_put_there(tmp_path):
    arrays = fashion_mnist._read_idx_directory(SAMPLE, "sample")
    tfds_directory.prepare(arrays, tmp_path)
    back = tfds_directory.read(tmp_path)
    assert back.keys() == arrays.keys()
    for part, array in arrays.items():
        np.testing.assert_array_equal(back[part], array)

    import tensorflow_datasets as tfds

    plain = tfds.data_source("fashion_mnist", data_dir=tmp_path, download=False)
    assert [len(plain["train"]), len(plain["test"])] == [480, 200]
    order = tfds_directory._record_order(480, "train")
    assert order != sorted(order)
    for record, row in ((0, order[0]), (479, order[479])):
        np.testing.assert_array_equal(plain["train"][record]["image"][:, :, 0], arrays["train-images"][row])


def test_cache_is_memory_mapped_and_spares_tfds(monkeypatch):
    first = load_sample_through_tfds()
    monkeypatch.setattr(tfds_directory, "read", None)
    monkeypatch.setattr(tfds_directory, "prepare", None)
    second = load_sample_through_tfds(None)
    sample = fashion_mnist._read_idx_directory(SAMPLE, "sample")
    for part, array in second.items():
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        np.testing.assert_array_equal(first[part], array)
        np.testing.assert_array_equal(sample[part], array)


def damage_bit(content: bytearray) -> bytearray:
    content[-100] ^= 1
    return content


@pytest.mark.parametrize(
    "damage",
    [damage_bit, lambda content: content[:-100], lambda content: content[:20], lambda content: b""],
    ids=["bit flip", "truncated", "truncated header", "empty"],
)
def test_damaged_cache_is_named_and_rebuilt(damage, caplog):
    load_sample_through_tfds()
    path = fashion_mnist._cache_path(files.cache_directory() / "sample", "train-images", "sample")
    intact = path.read_bytes()
    path.write_bytes(damage(bytearray(intact)))
    load_sample_through_tfds(None)
    assert path.read_bytes() == intact
    assert [str(path) in record.message for record in caplog.records] == [True]


def test_damaged_tfds_directory_in_the_cache_is_rebuilt(caplog):
    load_sample_through_tfds()
    cache = files.cache_directory() / "sample"
    (records,) = cache.glob("tfds/fashion_mnist/*/*train.array_record*")
    records.write_bytes(records.read_bytes()[:-5000])
    fashion_mnist._cache_path(cache, "train-labels", "sample").unlink()
    load_sample_through_tfds(SAMPLE)
    assert "Passing over a TFDS directory" in caplog.text
    assert tfds_directory.read(cache / "tfds").keys() == fashion_mnist.SHA256["sample"].keys()


def test_a_cache_whose_origin_is_not_noted_heals(monkeypatch):
    """As versions left it that noted the origin last, and were killed before."""
    load_sample_through_tfds()
    cache = files.cache_directory() / "sample"
    (cache / "origin.txt").unlink()
    assert fashion_mnist.origin(cache) == "what is not noted"
    for path in cache.glob("*.npy"):
        path.unlink()
    load_sample_through_tfds(None)
    assert fashion_mnist.origin(cache) == f"the TFDS directory {cache / 'tfds'}"


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_the_report_needs_no_origin(content, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["datasets"])
    monkeypatch.setitem(fashion_mnist.SHA256, "2017-08-31", fashion_mnist.SHA256["sample"])
    fashion_mnist.load(data_dir=str(SAMPLE))
    path = files.cache_directory() / "2017-08-31" / "origin.txt"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    datasets.main()
    assert f"cache         {path.parent}, made from what is not noted\n" in capsys.readouterr().out


# Kills itself after the so-manieth of the steps in which the cache is filled.
KILLED_IN_BETWEEN = """
import os, signal, sys
from pathlib import Path
from fmbench.data import fashion_mnist, tfds_directory
from fmbench.system import files
left = [int(sys.argv[1])]
def counted(function):
    def call(*arguments):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call
fashion_mnist._note_origin = counted(fashion_mnist._note_origin)
tfds_directory.prepare, tfds_directory.read = counted(tfds_directory.prepare), counted(tfds_directory.read)
os.fsync = counted(os.fsync)
fashion_mnist._load_cached("sample", Path(sys.argv[2]))
print(left[0])
"""


@pytest.mark.slow
def test_killed_between_any_two_steps_the_next_run_goes_on(tmp_path):
    for step in range(1, 100):
        cache = tmp_path / f"killed-{step}"
        environment = os.environ | {"FMBENCH_CACHE": str(cache)}
        command = [sys.executable, "-c", KILLED_IN_BETWEEN]
        killed = subprocess.run(
            [*command, str(step), str(SAMPLE)], env=environment, capture_output=True, text=True
        )
        if killed.returncode == 0:
            break
        assert killed.returncode == -9, killed.stderr
        again = subprocess.run([*command, "1000", str(SAMPLE)], env=environment, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert fashion_mnist.origin(cache / "sample") == str(SAMPLE)
        assert sorted(path.name for path in (cache / "sample").iterdir()) == sorted(
            ["lock", "origin.txt", "tfds"]
            + [f"{part}-{sha256}.npy" for part, sha256 in fashion_mnist.SHA256["sample"].items()]
        )
    assert step >= 8  # origin, TFDS directory, its reading, four arrays, at least


def test_prepared_tfds_directory_is_used(tmp_path, monkeypatch):
    tfds_directory.prepare(fashion_mnist._read_idx_directory(SAMPLE, "sample"), tmp_path / "tfds")
    monkeypatch.setattr(tfds_directory, "prepare", None)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    assert load_sample_through_tfds(None)["train-images"].shape == (480, 28, 28)


def test_data_dir_may_be_a_tfds_directory(tmp_path, monkeypatch):
    arrays = fashion_mnist._read_idx_directory(SAMPLE, "sample")
    tfds_directory.prepare(arrays, tmp_path / "good")
    tfds_directory.prepare(arrays | {"t10k-labels": arrays["t10k-labels"][::-1]}, tmp_path / "bad")
    monkeypatch.setattr(tfds_directory, "prepare", None)
    assert load_sample_through_tfds(tmp_path / "good")["train-images"].shape == (480, 28, 28)
    with pytest.raises(UserError, match="bad is not t10k-labels"):  # although the cache is good
        load_sample_through_tfds(tmp_path / "bad")


@pytest.mark.parametrize("named_by", ["argument", "environment"])
def test_named_bad_data_beats_a_good_cache(sample_copy, named_by, monkeypatch):
    monkeypatch.setitem(fashion_mnist.SHA256, "2017-08-31", fashion_mnist.SHA256["sample"])
    fashion_mnist.load(data_dir=str(sample_copy))
    fashion_mnist.load()
    path = sample_copy / "t10k-labels-idx1-ubyte.gz"
    write_labels(path, (7, 2, 1, 0, 4, 1, 4, 9, 5, 9), 200)
    if named_by == "environment":
        monkeypatch.setenv("FMBENCH_DATA_DIR", str(sample_copy))
    with pytest.raises(UserError, match=f"{path} .*MNIST's handwritten digits"):
        fashion_mnist.load(data_dir=str(sample_copy) if named_by == "argument" else None)


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("FMBENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot be written.*Set FMBENCH_CACHE"):
        load_sample_through_tfds()


def test_where_there_is_no_room_for_the_cache_one_line_says_so(tmp_path):
    """Files may not be large, as if a disk were full: array_record's complaint is a RuntimeError."""
    program = (
        "import resource, sys; from pathlib import Path; from fmbench.data import fashion_mnist\n"
        "from fmbench.system import command_line\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "with command_line.plain_errors('x'): fashion_mnist._load_cached('sample', Path(sys.argv[1]))\n"
    )
    environment = os.environ | {"FMBENCH_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", program, str(SAMPLE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"fmbench.x: The cache {tmp_path / 'sample'} cannot be written: ")
    assert "Set FMBENCH_CACHE to" in said
    assert "Traceback" not in done.stderr


FIRST_START = """
import sys, time
from pathlib import Path
from fmbench.data import fashion_mnist, tfds_directory
def announce(function):
    def announced(*args):
        print(function.__name__)
        return function(*args)
    return announced
tfds_directory.prepare, tfds_directory.read = announce(tfds_directory.prepare), announce(tfds_directory.read)
version, directory, start = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
time.sleep(max(0, start - time.time()))
arrays = fashion_mnist._load_cached(version, directory)
print(*(array.shape for array in arrays.values()))
"""


def start_together(version: str, directory: Path, cache: Path, processes: int) -> list[str]:
    """Lets real processes load `version` at once; returns the lines they printed, sorted."""
    environment = os.environ | {"FMBENCH_CACHE": str(cache), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", FIRST_START, version, str(directory), f"{time.time() + 1.5}"]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * processes, outputs
    return sorted("".join(output for output, _ in outputs).splitlines())


def test_concurrent_first_starts_prepare_once(tmp_path):
    printed = start_together("sample", SAMPLE, tmp_path / "cache", 4)
    assert printed == ["(480, 28, 28) (480,) (200, 28, 28) (200,)"] * 4 + ["prepare", "read"]


# Where the idx files come from.


def test_sources_are_asked_in_order_until_one_is_proven(sample_copy):
    def nothing() -> sources.Files:
        raise UserError("there is nothing.")

    (sample_copy / "train-images-idx3-ubyte.gz").write_text("<html>")
    asked = {
        "nothing": nothing,
        "a login page": lambda: sources.read_directory(sample_copy),
        "good": lambda: sources.read_directory(SAMPLE),
        "never asked": lambda: pytest.fail("asked"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "sources", lambda scratch: asked)
        load_sample_through_tfds(None)
    origin = files.cache_directory() / "sample" / "origin.txt"
    assert origin.read_text() == "good\n"


def test_debian_then_urls_then_apt(tmp_path):
    source_names = list(real_sources(tmp_path))
    assert [name.split()[0] for name in source_names] == ["Debian's", "the", "apt-get"]


real_sources = sources.sources  # the fixture above takes it away


@pytest.fixture
def silent_url():
    """A server that never answers a connection: its queue is full, so the system drops packets."""
    with socket.socket() as server, socket.socket() as first:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        first.connect(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"


@pytest.fixture
def closed_url():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, so that nobody else listens there
        yield f"http://localhost:{unused.getsockname()[1]}/"


def test_all_sources_fail_soon_and_are_listed(tmp_path, monkeypatch, silent_url, closed_url):
    monkeypatch.setattr(sources, "sources", real_sources)
    monkeypatch.setattr(sources, "DEBIAN_DIRECTORY", tmp_path / "debian")
    monkeypatch.setattr(sources, "OFFICIAL_URLS", (silent_url, closed_url))
    monkeypatch.setattr(sources, "NO_ANSWER_SECONDS", 1)
    monkeypatch.setenv("PATH", "")
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_sample_through_tfds(None)
    assert time.monotonic() - start < 3
    message = str(caught.value)
    for expected in (
        f"{tmp_path}/debian is not a directory",
        "127.0.0.1:",
        "no answer within 1 seconds",
        "localhost:",
        "Connection refused",
        "this machine has no apt-get",
        "FMBENCH_DATA_DIR",
        "train-images-idx3-ubyte",
    ):
        assert expected in message
    assert len(message.splitlines()) < 8


@pytest.fixture
def serve(tmp_path):
    """Serves a directory over HTTP from a process of its own."""
    running = []

    def start(directory: Path) -> str:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "http.server", "-b", "127.0.0.1", "0"],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None
        port = process.stdout.readline().split(" port ")[1].split()[0]
        return f"http://127.0.0.1:{port}/"

    yield start
    for process in running:
        process.terminate()
        process.communicate()


def test_download_from_the_server_that_has_the_files(serve, tmp_path, closed_url, silent_url):
    (tmp_path / "login").mkdir()
    (tmp_path / "login" / "t10k-labels-idx1-ubyte.gz").write_text("<html>Please log in</html>")
    (tmp_path / "empty").mkdir()
    good = serve(SAMPLE)
    bad = (silent_url, closed_url, serve(tmp_path / "login"), serve(tmp_path / "empty"))
    files = sources.download((*bad, good))
    assert {file.where.rpartition("/")[0] + "/" for (file,) in files.values()} == {good}
    assert fashion_mnist._decode_idx_files(files, "sample").keys() == fashion_mnist.SHA256["sample"].keys()
    with pytest.raises(UserError, match=r"something else than the file.*HTTP Error 404"):
        sources.download(bad[2:])


FAKE_APT_GET = """#!/bin/sh
for last; do :; done
case "$*" in
  *--print-uris*) [ -e "$FAKE/lists" ] ;;
  *update) touch "$FAKE/lists"; case "$*" in *Dir::State::lists=*) ;; *) exit 1;; esac ;;
  *) cp "$FAKE/package.deb" . ;;
esac
"""


@pytest.fixture
def fake_apt(tmp_path, monkeypatch):
    """An apt-get without package lists, whose package holds the sample; returns its directory."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "apt-get").write_text(FAKE_APT_GET)
    # dpkg-deb -x PACKAGE DIRECTORY
    (fake / "dpkg-deb").write_text(
        f'#!/bin/sh\nmkdir -p "$3/usr/share/datasets"\ncp -r "{SAMPLE}" "$3/usr/share/datasets/fashion-mnist"\n'
    )
    for program in ("apt-get", "dpkg-deb"):
        (fake / program).chmod(0o755)
    (fake / "package.deb").touch()
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(fake))
    return fake


def test_apt_get_updates_its_lists_first_and_leaves_nothing_behind(fake_apt, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    files = sources.apt_get_download(scratch)
    assert (fake_apt / "lists").exists()
    assert fashion_mnist._decode_idx_files(files, "sample")["t10k-images"].shape == (200, 28, 28)
    assert list(scratch.iterdir()) == []


def test_failing_apt_get_gives_its_reason(fake_apt, tmp_path):
    (fake_apt / "apt-get").write_text("#!/bin/sh\necho 'E: Mirror on fire' >&2; exit 100\n")
    with pytest.raises(UserError, match="update: Mirror on fire"):
        sources.apt_get_download(tmp_path)


def test_silent_apt_get_is_stopped_with_its_children(fake_apt, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "APT_IDLE_SECONDS", 0.5)
    (fake_apt / "apt-get").write_text(
        '#!/bin/sh\ncase "$*" in *--print-uris*) exit 0;; esac\n(sleep 1.5; touch "$FAKE/survived") & wait\n'
    )
    with pytest.raises(UserError, match=r"nothing arrived for 0\.5 seconds"):
        sources.apt_get_download(tmp_path)
    time.sleep(1.5)
    assert not (fake_apt / "survived").exists()


def test_slow_apt_get_may_take_its_time(fake_apt, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "APT_IDLE_SECONDS", 0.8)
    (fake_apt / "apt-get").write_text(
        '#!/bin/sh\ncase "$*" in *--print-uris*) exit 0;; esac\n'
        "for i in 1 2 3 4 5 6; do sleep 0.3; echo $i >> package.deb; done\n"
    )
    assert len(sources.apt_get_download(tmp_path)) == 4


# Splits.


def test_default_split_is_stratified_disjoint_complete_and_fixed():
    labels = fashion_mnist.load("sample").train_labels
    train, validation = splits.split(labels, "default")
    assert train.dtype == validation.dtype == np.int32
    assert len(validation) == 40
    np.testing.assert_array_equal(np.bincount(labels[validation]), [4] * 10)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(480))
    # Written down, so that a change of scikit-learn or of ours cannot move the benchmark unseen.
    digest = hashlib.sha256(validation.astype("<i4").tobytes()).hexdigest()
    assert digest[:16] == "1d42c700d20b8e31"
    for other in ({"test_size": 0.5}, {"random_state": 3}):
        np.testing.assert_array_equal(splits.split(labels, "default", **other)[1], validation)


@pytest.mark.parametrize(("test_size", "random_state"), [(0.2, 0), (0.2, 42), (0.1, 7)])
def test_train_test_split_is_that_of_scikit_learn(test_size, random_state):
    labels = fashion_mnist.load("sample").train_labels
    ours = splits.split(labels, "train_test_split", test_size=test_size, random_state=random_state)
    theirs = train_test_split(np.arange(480), test_size=test_size, random_state=random_state)
    for our_rows, their_rows in zip(ours, theirs, strict=True):
        assert our_rows.dtype == np.int32
        np.testing.assert_array_equal(our_rows, their_rows)


def test_kfold_is_that_of_scikit_learn():
    labels = np.arange(480, dtype=np.uint8) % 10
    expected = KFold(5, shuffle=True, random_state=1).split(labels)
    for fold, (train, validation) in enumerate(expected):
        got = splits.split(labels, "kfold", num_folds=5, fold=fold, random_state=1)
        assert [rows.dtype for rows in got] == [np.int32, np.int32]
        np.testing.assert_array_equal(got[0], train)
        np.testing.assert_array_equal(got[1], validation)
    with pytest.raises(UserError, match="no fold 5 of 5"):
        splits.split(labels, "kfold", num_folds=5, fold=5)
    with pytest.raises(UserError, match="num_folds=1"):
        splits.split(labels, "kfold", num_folds=1, fold=0)


def test_split_all_leaves_nothing_for_validation():
    train, validation = splits.split(np.zeros(480, np.uint8), "all")
    np.testing.assert_array_equal(train, np.arange(480))
    assert (len(validation), train.dtype, validation.dtype) == (0, np.int32, np.int32)


def test_bad_splits_are_refused():
    labels = np.zeros(480, np.uint8)
    with pytest.raises(UserError, match=r"'half'.*'default', 'train_test_split', 'kfold' and 'all'"):
        splits.split(labels, "half")
    with pytest.raises(UserError, match=r"test_size=1\.5"):
        splits.split(labels, "train_test_split", test_size=1.5)


# The command line.


def run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fmbench.datasets", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_command_line_tells_a_mistake_in_one_message(tmp_path):
    result = run_module("--data_dir", str(tmp_path))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"fmbench.datasets: {tmp_path} has no train-images-idx3-ubyte.gz")
    assert len(result.stderr.splitlines()) == 1


# The real data.


@pytest.mark.full
def test_real_data_is_proven_and_warm_loads_are_fast():
    fashion_mnist.load()
    report = run_module()
    assert report.returncode == 0, report.stderr
    for sha256 in fashion_mnist.SHA256["2017-08-31"].values():
        assert sha256 in report.stdout
    code = (
        "import sys, time; from fmbench.data import fashion_mnist; start = time.perf_counter(); "
        "data = fashion_mnist.load(); seconds = time.perf_counter() - start; "
        "assert data.train_images.shape == (60000, 28, 28) and data.test_labels.shape == (10000,); "
        "assert 'tensorflow_datasets' not in sys.modules; print(seconds)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "FMBENCH_DATA_DIR"}
    warm = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(warm.stdout) < 0.5


@pytest.mark.full
def test_real_first_starts_at_the_same_time(tmp_path, monkeypatch):
    data = fashion_mnist.load()
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", data.train_images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", data.train_labels)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", data.test_images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", data.test_labels)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no_tfds"))
    printed = start_together("2017-08-31", tmp_path, tmp_path / "cache", 2)
    assert printed == ["(60000, 28, 28) (60000,) (10000, 28, 28) (10000,)"] * 2 + [
        "prepare",
        "read",
    ]


@pytest.mark.full
def test_real_default_split_has_5000_images_500_of_each_class():
    labels = fashion_mnist.load().train_labels
    train, validation = splits.split(labels, "default")
    assert len(train) == 55_000
    np.testing.assert_array_equal(np.bincount(labels[validation]), [500] * 10)
