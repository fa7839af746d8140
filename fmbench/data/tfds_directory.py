"""Fashion-MNIST in a TensorFlow Datasets directory, written and read without TensorFlow.

TFDS's own builder of Fashion-MNIST needs TensorFlow (1.3 GB) and the network to prepare it, but the
result needs neither: `prepare` writes the same directory from arrays, and a plain
`tfds.data_source('fashion_mnist', data_dir=..., download=False)` reads it, as `read` does.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging

SPLITS = {"train": "train", "test": "t10k"}  # TFDS's name of a split: that of its idx files


def default_directory() -> Path:
    # Unlike pathlib's, this leaves ~ as it is where there is no home.
    return Path(os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))  # noqa: PTH111


def is_prepared(directory: Path) -> bool:
    """Tells whether TFDS has finished preparing Fashion-MNIST here, in whatever format."""
    return any(directory.glob("fashion_mnist/*/dataset_info.json"))


def prepare(arrays: dict[str, np.ndarray], directory: Path) -> None:
    """Writes the images and labels as TFDS's `fashion_mnist`.

    Only the two methods of TFDS's builder that read files are replaced. The format is array_record,
    since parquet silently loses rows (TFDS 4.9.10).

    Args:
      arrays: 'train-images' and 't10k-images', uint8 (n, 28, 28), and '...-labels', uint8 (n,).
      directory: where to write; nothing happens if Fashion-MNIST is already prepared there.

    Raises:
      OSError: if it cannot be written.
    """
    from PIL import Image
    from tqdm import tqdm

    with _quietly():
        from tensorflow_datasets.image_classification.mnist import FashionMNIST

        class FromArrays(FashionMNIST, skip_registration=True):  # type: ignore[call-arg]
            name = "fashion_mnist"

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in SPLITS}

            def _generate_examples(self, split):
                images = arrays[f"{SPLITS[split]}-images"]
                labels = arrays[f"{SPLITS[split]}-labels"]
                for row, image in enumerate(tqdm(images, f"Writing {split}", disable=None)):
                    yield row, {"image": Image.fromarray(image), "label": int(labels[row])}

        builder = FromArrays(data_dir=directory, file_format="array_record")
        try:
            builder.download_and_prepare()
        except RuntimeError as error:  # array_record's, where a disk is full
            raise OSError(str(error).partition("\n")[0]) from error


def read(directory: Path) -> dict[str, np.ndarray]:
    """Reads what `prepare`, or TFDS itself, has written; the reverse of `prepare`, in its order.

    Raises:
      Exception: of any kind TFDS likes, for a directory that is damaged or in a format that only
        TensorFlow reads.
    """
    with _quietly():
        import tensorflow_datasets as tfds

        # TFDS hands over the PNGs: it would take three times as long to decode them.
        source = tfds.data_source(
            "fashion_mnist",
            data_dir=directory,
            download=False,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        arrays: dict[str, np.ndarray] = {}
        for split, prefix in SPLITS.items():
            images, labels = _read_split(source[split], split)
            arrays |= {f"{prefix}-images": images, f"{prefix}-labels": labels}
    return arrays


def _read_split(records, split: str) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image
    from tqdm import tqdm

    count = len(records)
    images = np.empty((count, 28, 28), np.uint8)
    labels = np.empty(count, np.uint8)
    # All at once, since array_record takes ten times as long to fetch its records one by one.
    progress = tqdm(records.__getitems__(range(count)), f"Reading {split}", disable=None)
    for row, record in zip(_record_order(count, split), progress, strict=True):
        images[row] = np.asarray(Image.open(io.BytesIO(record["image"])))
        labels[row] = record["label"]
    return images, labels


def _record_order(count: int, split: str) -> list[int]:
    """Returns, record by record, the row of the idx file it was made from.

    TFDS sorts the records by the MD5 of the split's name and their key; the keys of Fashion-MNIST
    are the row numbers. So rows sorted likewise stand in the order of the records.
    Source: tensorflow_datasets/core/hashing.py and shuffle.py.
    """

    def md5(row: int) -> bytes:
        return hashlib.md5(f"{split}{row}".encode(), usedforsecurity=False).digest()

    return sorted(range(count), key=md5)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keeps TFDS's prints, log lines and progress bars from the screen; errors still pass."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import tensorflow_datasets as tfds

            tfds.disable_progress_bar()
            yield
    finally:
        logging.set_verbosity(verbosity)
