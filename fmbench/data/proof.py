"""The proof that arrays are Fashion-MNIST, and a name for what they are otherwise.

The sources of all hashes and first labels are the official files of the three data sets themselves.

Of the old Fashion-MNIST no hash is published. It can be recognised, by its shapes and labels, but not proven: what
is called version 'old' may be altered. So its records carry the hashes that were found. So do those of other data,
which are taken only where they are asked for, and called after their hashes: version 'unproven-0a1b2c3d'.
"""

import hashlib
from collections.abc import Mapping

import numpy as np

from fmbench.data import sources
from fmbench.errors import UserError

HOME_PAGE = "https://github.com/zalandoresearch/fashion-mnist"
STANDARD, OLD = "2017-08-31", "old"  # versions: that of this day, which replaced the old one
UNPROVEN = "unproven-"  # other data's versions begin with it

# Of the decompressed idx files. The gzipped ones differ from mirror to mirror.
SHA256 = {
    STANDARD: {
        "train-images": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    # The first 48 train and 20 test images of each class, in idx order.
    "sample": {
        "train-images": "98f29fdfa7f0435e7371cfc3c2e6929d8213fe9558b089aa6ca0d376807c6784",
        "train-labels": "c5f84d58b4753e803aee7d1ba091ef4d627ed2987c3027e0309250b4a9ae2668",
        "t10k-images": "c5778dde4e96eeb34657888930a98f527ac6b0cb35e9e969ba53f01dfce868bd",
        "t10k-labels": "3bf96d4b7566f51d8726eb6088e70eb796c98349a6135181dddfcc5bc590cf72",
    },
}

MNIST = "MNIST's handwritten digits, another data set"
OLD_FASHION_MNIST = (
    "the old Fashion-MNIST, withdrawn on 2017-08-31 (Kaggle's CSV files still hold it), with other "
    "images in another order"
)
MNIST_SHA256 = {
    "train-images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
FIRST_TEN_LABELS = {
    (5, 0, 4, 1, 9, 2, 1, 3, 1, 4): MNIST,
    (7, 2, 1, 0, 4, 1, 4, 9, 5, 9): MNIST,
    (2, 9, 6, 0, 3, 4, 4, 5, 4, 8): OLD_FASHION_MNIST,
    (0, 1, 2, 2, 3, 2, 8, 6, 5, 0): OLD_FASHION_MNIST,
}
OTHER_DATA = (
    " If you mean other data of the same shape, give --config.data.source=idx --config.data.unproven=true."
)
MNIST_MEAN, FASHION_MNIST_MEAN = 0.1307, 0.2860  # of the train pixels in [0, 1]


def prove(part: str, array: np.ndarray, version: str, where: str, remedy: str = "") -> None:
    """Raises UserError unless `array` is that `part`, and says what it seems to be instead and the `remedy`."""
    expected, found = SHA256[version][part], sha256(array)
    if found != expected:
        raise UserError(
            f"{where} is not {part} of Fashion-MNIST, version {version}: it seems to be "
            f"{_guess(part, array, found)}. SHA-256 of the decompressed idx file: expected "
            f"{expected}, found {found}. The official files are at {HOME_PAGE}.{remedy}"
        )


def recognize(
    arrays: Mapping[str, np.ndarray], where: Mapping[str, str], *, unproven: bool = False
) -> tuple[str, dict[str, str]]:
    """Tells which version of Fashion-MNIST the user has named.

    Args:
      arrays: the four parts.
      where: where each part came from, for messages.
      unproven: whether other data of the same shape will do.

    Returns:
      The version, a key of `SHA256` and thereby proven, `OLD`, or one that begins with `UNPROVEN` and goes on with
      eight digits of the hash of all parts' hashes; and the hash of each part.

    Raises:
      UserError: the arrays are of no version or of several, or other data that no run can use.
    """
    found = {part: sha256(array) for part, array in arrays.items()}
    if _is_old(arrays):
        return OLD, found
    # If some parts are wrong, the others tell what the wrong ones should be.
    version = max(SHA256, key=lambda version: len(SHA256[version].items() & found.items()))
    if unproven and found != SHA256[version]:
        _check_shapes(arrays, where)
        digest = hashlib.sha256("".join(found[part] for part in sorted(found)).encode()).hexdigest()
        return f"{UNPROVEN}{digest[:8]}", found
    for part, array in arrays.items():
        prove(part, array, version, where[part], OTHER_DATA)
    return version, found


def is_unproven(version: str) -> bool:
    """Whether data of this version are not Fashion-MNIST, but others of its shape."""
    return version.startswith(UNPROVEN)


def _check_shapes(arrays: Mapping[str, np.ndarray], where: Mapping[str, str]) -> None:
    """Raises UserError unless both splits have 28 x 28 images of all ten classes."""
    for prefix in ("train", "t10k"):
        images, labels = arrays[f"{prefix}-images"], arrays[f"{prefix}-labels"]
        images_file, labels_file = where[f"{prefix}-images"], where[f"{prefix}-labels"]
        if images.ndim != 3 or images.shape[1:] != (28, 28):
            raise UserError(f"{images_file} has shape {images.shape}; images must be (n, 28, 28).")
        if labels.shape != images.shape[:1]:
            raise UserError(f"{labels_file} has shape {labels.shape}, but {images_file} has {len(images)} images.")
        if labels.size and labels.max() > 9:
            row = int(np.argmax(labels > 9))
            raise UserError(f"{labels_file}: label {row} is {labels[row]}; labels must be from 0 to 9.")
        if absent := sorted(set(range(10)) - set(labels.tolist())):
            raise UserError(
                f"{labels_file} has no image of class {', '.join(map(str, absent))}; train and test must have all "
                "ten, from 0 to 9."
            )


def _is_old(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether all we know of the old Fashion-MNIST is true: shapes, labels, the images' mean."""
    for prefix, per_class in (("train", 6000), ("t10k", 1000)):
        images, labels = arrays[f"{prefix}-images"], arrays[f"{prefix}-labels"]
        if (
            images.shape != (10 * per_class, 28, 28)
            or labels.shape != (10 * per_class,)
            or FIRST_TEN_LABELS.get(tuple(labels[:10].tolist())) != OLD_FASHION_MNIST
            or np.bincount(labels).tolist() != [per_class] * 10
            or abs(images.mean() / 255 - FASHION_MNIST_MEAN) > 0.01
        ):
            return False
    return True


def sha256(array: np.ndarray) -> str:
    """Hashes the array with the idx header it would have: the hash of the decompressed file."""
    if array.dtype != np.uint8:
        return f"none, for {array.dtype} instead of uint8"
    digest = hashlib.sha256(sources.idx_header(array))
    digest.update(np.ascontiguousarray(array).reshape(-1))
    return digest.hexdigest()


def _guess(part: str, array: np.ndarray, found: str) -> str:
    """Names what took the place of `part`: the mix-ups known in the field, or plain damage."""
    for version, hashes in SHA256.items():
        if found == hashes[part]:
            return f"version {version!r}"
    if found == MNIST_SHA256[part]:
        return MNIST
    if array.ndim == 1:
        known = FIRST_TEN_LABELS.get(tuple(array[:10].tolist()))
        if known is not None:
            return known
    elif array.size and abs(array.mean() / 255 - MNIST_MEAN) < 0.01:
        return MNIST
    return f"a damaged or altered file, or another data set: {array.dtype} of shape {array.shape}"
