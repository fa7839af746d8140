"""Feeds inputs that hypothesis makes to what reads people's files; see `fuzz_faults.py`.

    python tests/faults/fuzz.py TARGET SEED INPUTS REFERENCE

What is read must be right, what is not a `UserError` of one line; whatever else is raised ends the process.
"""

import copy
import csv
import gzip
import io
import json
import math
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import PIL.Image
from hypothesis import strategies as st

from fmbench import config, entries
from fmbench.data import kaggle_csv, photos, sources
from fmbench.data.fashion_mnist import SAMPLE_DIRECTORY
from fmbench.errors import UserError
from fmbench.models import exported
from fmbench.records import store

HEADER = ",".join(kaggle_csv.COLUMNS)
tried = 0


def main() -> None:
    target, seed, inputs, reference = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        strategy, check = TARGETS[target](Path(reference), Path(name))

        @hypothesis.seed(int(seed))
        @hypothesis.settings(
            max_examples=int(inputs),
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(strategy)
        def test(value: Any) -> None:
            global tried
            tried += 1
            try:
                check(value)
            except UserError as error:
                assert str(error).strip(), "an empty message"

        test()
    print(tried)


Target = tuple[st.SearchStrategy, Callable[[Any], None]]


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some of them replaced, left out or repeated, now and then any bytes at all."""
    position = st.integers(0, len(content))
    edit = st.tuples(position, st.integers(0, 20), st.binary(max_size=20))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        result = content
        for start, length, new in edits:
            result = result[:start] + new + result[start + length :]
        return result

    early = st.tuples(st.integers(0, 40), st.integers(0, 8), st.binary(max_size=8))
    return st.one_of(st.lists(st.one_of(edit, early), max_size=4).map(apply), st.binary(max_size=200))


def idx(reference: Path, folder: Path) -> Target:
    shutil.copytree(SAMPLE_DIRECTORY, folder, dirs_exist_ok=True)
    name = "train-labels-idx1-ubyte"
    plain = gzip.decompress((folder / f"{name}.gz").read_bytes())
    (folder / f"{name}.gz").unlink()
    header = st.builds(
        lambda zeros, kind, sizes, rest: (
            zeros + bytes([kind, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + rest
        ),
        st.sampled_from([b"\0\0", b"\0\1"]),
        st.sampled_from([8, 8, 8, 9, 13]),
        st.lists(st.integers(0, 40) | st.integers(0, 2**32 - 1), max_size=6),
        st.binary(max_size=100),
    )
    contents = st.one_of(mutations(plain), header)

    def check(value: tuple[bytes, bool]) -> None:
        content, gzipped = value
        path = folder / (f"{name}.gz" if gzipped else name)
        path.write_bytes(gzip.compress(content) if gzipped else content)
        try:
            arrays, _ = sources.decode_directory(folder)
        finally:
            path.unlink()
        if content[:2] == b"\x1f\x8b":
            return
        dims = struct.unpack(f">{content[3]}I", content[4 : 4 + 4 * content[3]])
        assert content[:3] == b"\0\0\x08", "no idx file of bytes"
        assert arrays["train-labels"].shape == dims, "another shape"
        assert arrays["train-labels"].tobytes() == content[4 + 4 * len(dims) :], "other numbers"
        assert math.prod(dims) == len(content) - 4 - 4 * len(dims), "another length"

    return st.tuples(contents, st.booleans()), check


def csv_files(reference: Path, folder: Path) -> Target:
    rng = np.random.default_rng(0)
    rows = [",".join(map(str, [row % 10, *rng.integers(0, 256, 784)])) for row in range(3)]
    whole = "\n".join([HEADER, *rows, ""]).encode()
    cell = st.one_of(st.integers(-1, 300).map(str), st.text("0123456789. +-eExnaif\"'_\u0661\u00b2", max_size=6))

    def with_cell(value: tuple[int, int, str]) -> bytes:
        row, column, text = value
        cells = [line.split(",") for line in rows]
        cells[row][column] = text
        return "\n".join([HEADER, *map(",".join, cells), ""]).encode()

    strategy = st.one_of(mutations(whole), st.tuples(st.integers(0, 2), st.integers(0, 784), cell).map(with_cell))
    path = folder / "fashion-mnist_train.csv"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        images, labels = kaggle_csv.read_file(path)
        _, *expected = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")) if row]
        assert np.array_equal(labels, [int(row[0]) for row in expected]), "other labels"
        assert np.array_equal(images.reshape(len(images), -1), [list(map(int, row[1:])) for row in expected]), (
            "others"
        )
        assert labels.max() <= 9, "a label above 9"

    return strategy, check


def pictures(reference: Path, folder: Path) -> Target:
    article = PIL.Image.open(reference.parent / "picture.png")
    contents = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "JPEG2000"):
        for mode in ("L", "RGB"):
            stream = io.BytesIO()
            article.convert(mode).save(stream, kind)
            contents.append(stream.getvalue())
    path = folder / "picture.png"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        image = photos.read_image(path)
        image = image[0] if isinstance(image, tuple) else image
        assert image.shape == (28, 28) and image.dtype == np.uint8, "not as the models see it"

    return st.sampled_from(contents).flatmap(mutations), check


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1", "nan", 2**70, -1, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def changes(tree: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The tree with some of its values, at any depth, replaced or left out."""
    places: list[tuple[Any, ...]] = []

    def find(node: Any, at: tuple[Any, ...]) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((*at, key))
            if isinstance(value, dict | list):
                find(value, (*at, key))

    find(tree, ())

    def apply(edits: list[tuple[tuple[Any, ...], bool, Any]]) -> dict[str, Any]:
        result = copy.deepcopy(tree)
        for (*parents, last), leave_out, value in edits:
            node: Any = result
            try:
                for key in parents:
                    node = node[key]
                if leave_out:
                    del node[last]
                else:
                    node[last] = value
            except (KeyError, IndexError, TypeError):
                continue  # an edit before took its place
        return result

    return st.lists(st.tuples(st.sampled_from(places), st.booleans(), JSON), min_size=1, max_size=3).map(apply)


def records(reference: Path, folder: Path) -> Target:
    whole = json.loads((reference / "work" / "record.json").read_text())
    path = folder / "record.json"

    def check(record: dict[str, Any]) -> None:
        path.write_text(json.dumps(record))
        read = store.read(path)
        store.write(read, None, folder / "again")
        assert store.read(folder / "again.json") == read, "not what was written"

    return changes(whole), check


def descriptions(reference: Path, folder: Path) -> Target:
    model = folder / "model"
    shutil.copytree(reference / "work" / "model", model)
    whole = json.loads((model / "model.json").read_text())

    def check(description: dict[str, Any]) -> None:
        (model / "model.json").write_text(json.dumps(description))
        _, read = exported.load_model(model)
        assert len(read["class_names"]) == 10, "not ten classes"
        assert read["normalization"] in ("unit", "symmetric", "standard", "none"), "no normalization"

    return changes(whole), check


def overrides(reference: Path, folder: Path) -> Target:
    keys = [field.key for field in config.fields() if field.default]
    value = st.one_of(
        st.integers().map(str),
        st.floats().map(str),
        st.text(max_size=10),
        st.sampled_from(
            ["", "true", "None", "()", "(1, 2)", "[", "1e400", "nan", "__import__('os')", "a:b", "-0", "0x10"]
        ),
    )

    def check(changed: dict[str, str]) -> None:
        resolved = entries.resolve("mlp", changed)
        config.check(resolved)
        assert json.loads(json.dumps(resolved.to_dict())) == config.to_json(resolved), "not as JSON gives it back"

    return st.dictionaries(st.sampled_from(keys) | st.text(max_size=10), value, min_size=1, max_size=3), check


TARGETS: dict[str, Callable[[Path, Path], Target]] = {
    "idx": idx,
    "csv": csv_files,
    "pictures": pictures,
    "records": records,
    "descriptions": descriptions,
    "overrides": overrides,
}


if __name__ == "__main__":
    main()
