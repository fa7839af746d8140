"""Data of Fashion-MNIST's shape that are other data: taken where they are meant, called after their hashes."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from fmbench.data import export, fashion_mnist, proof, sources, splits
from fmbench.errors import UserError

SAMPLE = fashion_mnist.SAMPLE_DIRECTORY


def arrays(seed: int = 0, num_train: int = 130, num_test: int = 30) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {}
    for prefix, number in (("train", num_train), ("t10k", num_test)):
        made[f"{prefix}-images"] = rng.integers(0, 256, (number, 28, 28), np.uint8)
        made[f"{prefix}-labels"] = rng.permutation(np.arange(number) % 10).astype(np.uint8)
    return made


def write(directory: Path, parts: dict[str, np.ndarray], *, compressed: bool = False) -> str:
    directory.mkdir()
    for part, array in parts.items():
        content = sources.idx_header(array) + array.tobytes()
        path = directory / (sources.FILE_NAMES[part] + (".gz" if compressed else ""))
        path.write_bytes(gzip.compress(content) if compressed else content)
    return str(directory)


def test_they_are_what_the_files_hold_gzipped_or_not(tmp_path):
    parts = arrays()
    plain = fashion_mnist.load("idx", write(tmp_path / "plain", parts), unproven=True)
    gzipped = fashion_mnist.load("idx", write(tmp_path / "gzipped", parts, compressed=True), unproven=True)
    for field, part in fashion_mnist.PARTS.items():
        np.testing.assert_array_equal(getattr(plain, field), parts[part])
    assert plain.version.startswith("unproven-") and len(plain.version) == len("unproven-") + 8
    assert proof.is_unproven(plain.version)
    assert (gzipped.version, gzipped.sha256) == (plain.version, plain.sha256)
    assert plain.class_names == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


@pytest.mark.parametrize("part", sources.FILE_NAMES)
def test_another_byte_anywhere_is_another_version(tmp_path, part):
    one, other = arrays(), arrays()
    other[part] = np.roll(other[part], 1, axis=0)
    versions = [
        fashion_mnist.load("idx", write(tmp_path / name, parts), unproven=True).version
        for name, parts in (("one", one), ("other", other))
    ]
    assert len(set(versions)) == 2


@pytest.mark.parametrize("source", ["idx", "tfds"])
def test_by_mistake_they_are_an_error_that_says_how_to_mean_them(tmp_path, source):
    with pytest.raises(UserError) as error:
        fashion_mnist.load(source, write(tmp_path / "data", arrays()))
    assert "is not train-images of Fashion-MNIST, version 2017-08-31" in str(error.value)
    assert "--config.data.source=idx --config.data.unproven=true." in str(error.value)


def test_known_data_stay_what_they_are():
    dataset = fashion_mnist.load("idx", str(SAMPLE), unproven=True)
    assert (dataset.version, dataset.sha256) == ("sample", proof.SHA256["sample"])
    assert dataset.class_names == fashion_mnist.CLASS_NAMES


@pytest.mark.parametrize("source", ["tfds", "sample"])
def test_only_named_files_can_be_unproven(source):
    with pytest.raises(UserError, match=f"give --config.data.source=idx, not {source}"):
        fashion_mnist.load(source, unproven=True)


def relabelled(array: np.ndarray, old: int, new: int) -> np.ndarray:
    return np.where(array == old, new, array).astype(np.uint8)


@pytest.mark.parametrize(
    ("part", "spoil", "said"),
    [
        ("train-images", lambda a: a.reshape(-1, 14, 56), r"train-images\S* has shape \(130, 14, 56\); images"),
        ("t10k-images", lambda a: a.reshape(-1, 784), r"t10k-images\S* has shape \(30, 784\)"),
        ("t10k-images", lambda a: a[:0], r"t10k-labels\S* has shape \(30,\), but \S*t10k-images\S* has 0 images"),
        ("train-labels", lambda a: a[:-1], r"train-labels\S* has shape \(129,\), but \S*train-images\S* has 130 "),
        ("t10k-labels", lambda a: a.reshape(-1, 1), r"t10k-labels\S* has shape \(30, 1\)"),
        ("train-labels", lambda a: relabelled(a, 3, 10), r"train-labels\S*: label \d+ is 10; labels must be"),
        ("t10k-labels", lambda a: relabelled(a, 3, 4), r"t10k-labels\S* has no image of class 3;"),
    ],
)  # fmt: skip
def test_what_no_run_can_use_is_named(tmp_path, part, spoil, said):
    parts = arrays()
    with pytest.raises(UserError, match=said):
        fashion_mnist.load("idx", write(tmp_path / "data", parts | {part: spoil(parts[part])}), unproven=True)


def test_classes_may_have_names(tmp_path):
    directory = write(tmp_path / "data", arrays())
    names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    (tmp_path / "data" / "class_names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    assert fashion_mnist.load("idx", directory, unproven=True).class_names == names


@pytest.mark.parametrize(
    "content",
    ["", "a b", "a a a a a a a a a a", "a b c d  f g h i j", "a b c d e f g h i j k"],
)
def test_other_than_ten_names_are_refused(tmp_path, content):
    directory = write(tmp_path / "data", arrays())
    (tmp_path / "data" / "class_names.txt").write_text(content.replace(" ", "\n"))
    with pytest.raises(UserError, match=r"class_names\.txt must have ten lines"):
        fashion_mnist.load("idx", directory, unproven=True)


def test_names_that_are_no_text_are_refused(tmp_path):
    directory = write(tmp_path / "data", arrays())
    (tmp_path / "data" / "class_names.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"class_names\.txt cannot be read"):
        fashion_mnist.load("idx", directory, unproven=True)


def test_csv_files_will_do_too(tmp_path):
    dataset = fashion_mnist.load("idx", write(tmp_path / "idx", arrays()), unproven=True)
    export.export(dataset, "csv", tmp_path / "csv")
    assert fashion_mnist.load("csv", str(tmp_path / "csv"), unproven=True).sha256 == dataset.sha256


def test_pictures_lie_in_folders_of_their_own_classes(tmp_path):
    dataset = fashion_mnist.load("idx", write(tmp_path / "idx", arrays()), unproven=True)
    export.export(dataset, "png", tmp_path / "png")
    assert sorted(path.name for path in (tmp_path / "png" / "train").iterdir()) == [f"{k}-{k}" for k in range(10)]


def test_the_default_split_keeps_a_twelfth_of_classes_of_any_size():
    labels = np.repeat(np.arange(10), [120, 60, 60, 60, 60, 60, 60, 60, 48, 12])
    train, validation = splits.split(labels, "default")
    assert len(validation) == 600 // 12
    np.testing.assert_array_equal(np.bincount(labels[validation]), [10, 5, 5, 5, 5, 5, 5, 5, 4, 1])
    assert sorted([*train, *validation]) == list(range(600))


@pytest.mark.parametrize(
    "labels", [np.arange(10), np.repeat(np.arange(10), 3), np.r_[np.repeat(np.arange(9), 30), 9]]
)
def test_where_it_cannot_another_split_is_recommended(labels):
    with pytest.raises(UserError, match=r"default cannot split \d+ train images: .*--config\.data\.split=all"):
        splits.split(labels, "default")
