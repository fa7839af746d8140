"""How batches are formed. The data lives on the device as flat rows, uint8 or features; a batch is a gather.

Where `config.data.pipeline` says so, images stay on disk, and each process reads its part of every batch: of the
same rows, in the same order.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from ml_collections import config_dict

from fmbench.data import fashion_mnist, features, sources, splits
from fmbench.data.streaming import Stream
from fmbench.errors import UserError
from fmbench.training import parallel, selection

# Mean and standard deviation of the train images' pixels in [0, 1].
TRAIN_MEAN, TRAIN_STD = 0.28604, 0.35302
MOST_BATCHES = 100  # of a call, where they are read from disk and nothing else is asked for
AHEAD = 8  # batches that are read before their call

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Data:
    """A run's data, resident on every device; or, with a `stream`, on disk."""

    train_rows: Batch  # all of the train file, validation too; none with a stream
    train_indices: jax.Array | np.ndarray  # int32 (num_train,): the rows to train on
    # 'test' and perhaps 'validation', call by call: arrays (batches of the call, eval_batch_size, ...).
    eval_batches: Mapping[str, Sequence[Batch]]
    seed: jax.Array  # uint32 (), or (n,) where n seeds train together; then so have the orders and losses below
    num_train: int
    num_validation: int
    num_test: int
    batch_size: int
    watched: Literal["validation", "test"] | None  # the split of eval_batches that is evaluated after each epoch
    version: str
    sha256: dict[str, str]
    test_labels: np.ndarray  # (num_test,), here alone
    remainder: int = 0  # examples of an epoch's last, smaller step, where there is one
    selection: dict[str, Any] | None = None  # as `config.no_selection` has it
    class_names: tuple[str, ...] = fashion_mnist.CLASS_NAMES
    stream: Stream | None = None

    @property
    def num_rows(self) -> int:
        return len(self.train_rows["label"]) if self.train_rows else 0

    @property
    def resident(self) -> Any:
        """What lies on every device from the beginning to the end."""
        return self.train_rows, [] if self.stream else self.eval_batches

    @property
    def whole_batches(self) -> int:
        return self.num_train // self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        return self.whole_batches + (self.remainder > 0)

    @property
    def images_per_epoch(self) -> int:
        return self.whole_batches * self.batch_size + self.remainder

    def feed(self, step: int, losses: jax.Array | None = None) -> Callable[[int], tuple[Any, ...]]:
        """What the training programs take beside the state, from `step` to the end of its epoch.

        Args:
            step: Of the run, that comes next.
            losses: As for `epoch_order`.

        Returns:
            The arguments of the next call, by the number of its steps as `steps.compile_programs` counts them.
        """
        if self.stream is None:
            arguments = self.train_rows, self.epoch_order(step // self.steps_per_epoch, losses), self.seed
            return lambda length: arguments
        stream = self.stream
        stream.seek(step)
        return lambda length: (stream.take(length), None, self.seed)

    def example_arguments(self, length: int) -> tuple[Any, ...]:
        """Such arguments of a call of `length` steps, to compile with."""
        if self.stream is None:
            return self.train_rows, self.epoch_order(0), self.seed
        return self.stream.example(0 if length else self.whole_batches, length), None, self.seed

    def rows_spec(self, length: int) -> PartitionSpec:
        """How devices share the first of these arguments."""
        return _rows_spec(length) if self.stream else parallel.WHOLE

    @property
    def position(self) -> dict[str, int] | None:
        """For the checkpoint: grain's own state. It follows from the step, as `check_position` makes sure."""
        return self.stream.position if self.stream else None

    def check_position(self, step: int, position: dict[str, int] | None) -> None:
        """Compares the position that a checkpoint of `step` has with the one that the step says.

        Raises:
            UserError: If they differ.
        """
        if self.stream:
            self.stream.seek(step)
        if position != self.position:
            raise UserError(
                f"the checkpoint of step {step} has {position} as its position in the data, which should be "
                f"{self.position}; --force starts anew."
            )

    def compile_orders(self, losses: jax.Array | None) -> None:
        """Orders an epoch of each kind, so that none compiles while training is timed; `losses` as below."""
        if self.stream:  # which has ordered one
            return
        after = self.selection["after_epochs"] if self.selection else 0
        for epoch in {0, after} if losses is not None else {0}:
            self.epoch_order(epoch, losses).block_until_ready()

    def epoch_order(self, epoch: int, losses: jax.Array | None = None) -> jax.Array:
        """The rows of an epoch in the order of their visit: int32 (images_per_epoch,).

        Args:
            epoch: Counted from 0.
            losses: Of the train rows, (num_rows,), if there is a `selection`.
        """
        size = self.images_per_epoch
        if losses is None or self.selection is None or epoch < self.selection["after_epochs"]:
            return _epoch_order(self.seed, np.int32(epoch), self.train_indices, size)
        easy, keep = self.selection["easy"], self.selection["keep"]
        return _hard_epoch_order(self.seed, np.int32(epoch), self.train_indices, losses, size, easy, keep)


def split(
    config: config_dict.ConfigDict, dataset: fashion_mnist.Dataset, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on and those of the validation set, int32, after a look whether the config fits them.

    Raises:
        UserError: If it doesn't: its batch, what is left of an epoch, or its early stopping.
    """
    train, validation = splits.split(
        dataset.train_labels,
        config.data.split,
        test_size=config.data.test_size,
        random_state=config.data.random_state,
        num_folds=config.data.num_folds,
        fold=config.data.fold,
    )
    if config.batch_size > len(train):
        raise UserError(
            f"config.batch_size is {config.batch_size}, but the train set has only {len(train)} images."
        )
    remainder = _remainder(config, len(train))
    if remainder % mesh.size:
        raise UserError(
            f"config.data.remainder=keep ends an epoch with a step on {remainder} images, which {mesh.size} "
            "devices cannot share equally; take --config.data.remainder=drop."
        )
    if config.early_stopping_patience and not (config.watch == "validation" and len(validation)):
        raise UserError("config.early_stopping_patience needs config.watch='validation' and a split that has one.")
    return train, validation


def _remainder(config: config_dict.ConfigDict, num_train: int) -> int:
    return num_train % config.batch_size if config.data.remainder == "keep" else 0


def count_steps(config: config_dict.ConfigDict, num_train: int) -> int:
    """Of an epoch, before its data are placed."""
    return num_train // config.batch_size + (_remainder(config, num_train) > 0)


def load(config: config_dict.ConfigDict, mesh: Mesh, seeds: Sequence[int] = ()) -> Data:
    """Loads, splits and places the data that the config asks for; for its own seed, or for several.

    Raises:
        UserError: If the data can't be had or are the wrong ones, or the config doesn't fit them.
    """
    dataset = fashion_mnist.of_config(config.data)
    train, validation = split(config, dataset, mesh)
    eval_splits = {"test", "validation"} if len(validation) else {"test"}
    watched = config.watch if config.watch in eval_splits else None
    describe = functools.partial(
        Data,
        num_train=len(train),
        num_validation=len(validation),
        num_test=len(dataset.test_labels),
        batch_size=config.batch_size,
        watched=watched,
        version=dataset.version,
        sha256=dataset.sha256,
        remainder=_remainder(config, len(train)),
        selection=config.selection.to_dict(),
        class_names=dataset.class_names,
        test_labels=dataset.test_labels,
    )
    if config.data.pipeline == "grain":
        return streamed(config, dataset, train, validation, mesh, describe)
    train_images, test_images = dataset.train_images, dataset.test_images
    if config.features.backbone:
        train_images, test_images = _features(config, dataset)
    eval_sets = {"test": (test_images, dataset.test_labels)}
    if len(validation):
        eval_sets["validation"] = (
            train_images[validation],
            dataset.train_labels[validation],
        )
    train_rows, train_indices, eval_batches, seed = parallel.replicate(
        (
            device_rows(train_images, dataset.train_labels),
            train,
            {
                name: eval_calls(images, labels, config.eval_batch_size, config.steps_per_call)
                for name, (images, labels) in eval_sets.items()
            },
            np.array(seeds if len(seeds) > 1 else config.seed, np.uint32),
        ),
        mesh,
    )
    return describe(train_rows, train_indices, eval_batches, seed)


def streamed(
    config: config_dict.ConfigDict,
    dataset: fashion_mnist.Dataset,
    train: np.ndarray,
    validation: np.ndarray,
    mesh: Mesh,
    describe: Callable[..., Data],
) -> Data:
    """The data of a run that reads its images from disk: of each batch the rows of this process's devices."""
    for images in (dataset.train_images, dataset.test_images):
        sources.expect_any_order(images)
    train_images = np.asarray(dataset.train_images)  # np.memmap takes its time for every part of it
    calls = functools.partial(_StreamedCalls, config=config, mesh=mesh)
    test = np.arange(len(dataset.test_labels), dtype=np.int32)
    eval_batches = {"test": calls(dataset.test_images, dataset.test_labels, test)}
    if len(validation):
        eval_batches["validation"] = calls(train_images, dataset.train_labels, validation)
    data = describe({}, train, eval_batches, parallel.replicate(np.uint32(config.seed), mesh))
    lock = threading.Lock()

    @functools.lru_cache(maxsize=2)  # what is read ahead may be of the next epoch
    def order(epoch: int) -> np.ndarray:
        # On a device of this process alone: others do it at other times.
        return np.asarray(_epoch_order(np.uint32(config.seed), np.int32(epoch), train, data.images_per_epoch))

    def read(step: int) -> dict[str, np.ndarray]:
        epoch, done = divmod(step, data.steps_per_epoch)
        with lock:
            batch = order(epoch)[done * config.batch_size :][: config.batch_size]
        rows = parallel.own_part(batch, mesh)
        return device_rows(train_images[rows], dataset.train_labels[rows])

    def place(batches: list[dict[str, np.ndarray]], length: int) -> Batch:
        rows = jax.tree.map(lambda *x: np.stack(x), *batches) if length > 1 else batches[0]
        return parallel.spread(rows, mesh, _rows_spec(length))

    per_call = (config.steps_per_call or MOST_BATCHES) if parallel.loops_on_devices(config.steps_per_call) else 1
    ahead = max(AHEAD, 2 * min(per_call, data.whole_batches))
    stream = Stream(read, place, config.num_epochs * data.steps_per_epoch, ahead)
    return dataclasses.replace(data, stream=stream)


def _rows_spec(length: int) -> PartitionSpec:
    """How devices share the images of a call of `length` steps: (batch_size, ...) or (length, batch_size, ...)."""
    return PartitionSpec(None, parallel.AXIS) if length > 1 else PartitionSpec(parallel.AXIS)


class _StreamedCalls(Sequence[Batch]):
    """The calls of an evaluation, as `eval_calls` has them, each read when it is asked for, and placed."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        rows: np.ndarray,
        *,
        config: config_dict.ConfigDict,
        mesh: Mesh,
    ):
        self._images, self._labels, self._rows, self._mesh = images, labels, rows, mesh
        self._batch_size, self._steps_per_call = config.eval_batch_size, config.steps_per_call
        self._size = self._batch_size * (MOST_BATCHES if parallel.loops_on_devices(config.steps_per_call) else 1)

    def __len__(self) -> int:
        return -(-len(self._rows) // self._size)

    def __getitem__(self, index: Any) -> Any:
        start = range(0, len(self._rows), self._size)[index]
        rows = self._rows[start : start + self._size]
        (call,) = eval_calls(self._images[rows], self._labels[rows], self._batch_size, self._steps_per_call)
        return parallel.replicate(call, self._mesh)


def _features(config: config_dict.ConfigDict, dataset: fashion_mnist.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The features of the train and test images, (n, config.model.num_features)."""
    spec = features.Spec(**config.features)
    train = features.load(dataset.train_images, dataset.sha256["train-images"], spec)
    if train.shape[1] != config.model.num_features:
        raise UserError(
            f"config.model.num_features is {config.model.num_features}, but {spec.backbone} has {train.shape[1]} "
            f"features of an image of this size; give --config.model.num_features={train.shape[1]}."
        )
    return train, features.load(dataset.test_images, dataset.sha256["t10k-images"], spec)


def device_rows(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """What goes to the device: image (n, 784) uint8, or float features (n, num_features); label (n,) int32.

    Flat rows, because a gather from (n, 784) is several times faster than from (n, 28, 28, 1).
    """
    return {"image": images.reshape(len(images), -1), "label": labels.astype(np.int32)}


def eval_calls(images: np.ndarray, labels: np.ndarray, batch_size: int, steps_per_call: int) -> list[dict]:
    """All rows in batches of one size, the last filled up, and the batches of a call in one array.

    Returns:
        For each call what `device_rows` gives and mask, float32: 1 real, 0 filler; all (batches, batch_size, ...).
    """
    rows = device_rows(images, labels) | {"mask": np.ones(len(labels), np.float32)}
    num_batches = -(-len(labels) // batch_size)
    filler = num_batches * batch_size - len(labels)
    batches = {
        name: np.pad(array, [(0, filler)] + [(0, 0)] * (array.ndim - 1)).reshape(
            num_batches, batch_size, *array.shape[1:]
        )
        for name, array in rows.items()
    }
    size = num_batches if parallel.loops_on_devices(steps_per_call) else 1
    return [
        {name: array[start : start + size] for name, array in batches.items()}
        for start in range(0, num_batches, size)
    ]


@functools.partial(jax.jit, static_argnames="size")
def _epoch_order(seed: jax.Array, epoch: jax.Array, train_indices: jax.Array, size: int) -> jax.Array:
    # A fresh permutation every epoch, so that the examples of the partial batch that is cut off, if it is, differ.
    # It depends on nothing but seed and epoch.
    def order(seed: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)
        return jax.random.permutation(key, train_indices)[:size]

    return parallel.over_seeds(order, seed)(seed)


@functools.partial(jax.jit, static_argnames=("size", "easy", "keep"))
def _hard_epoch_order(
    seed: jax.Array,
    epoch: jax.Array,
    train_indices: jax.Array,
    losses: jax.Array,
    size: int,
    easy: float,
    keep: float,
) -> jax.Array:
    def order(seed: jax.Array, losses: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)
        return selection.order(key, train_indices, losses.at[train_indices].get(), size=size, easy=easy, keep=keep)

    return parallel.over_seeds(order, seed)(seed, losses)


def gather(rows: Mapping[str, jax.Array], indices: jax.Array) -> Batch:
    """The rows at `indices`, which are known to be in bounds."""
    return {name: array.at[indices].get(mode="promise_in_bounds") for name, array in rows.items()}


def normalize(images: jax.Array | np.ndarray, normalization: str) -> jax.Array:
    """Grey levels, (batch, 784) or (batch, 28, 28), -> float32 (batch, 28, 28, 1).

    unit: in [0, 1]; symmetric: in [-1, 1]; standard: with mean 0 and standard deviation 1 over the train images.
    none: features, (batch, num_features), as they are.
    """
    if normalization == "none":
        return jnp.asarray(images, jnp.float32)
    x = jnp.reshape(images, (-1, 28, 28, 1)).astype(jnp.float32) / 255
    match normalization:
        case "unit":
            return x
        case "symmetric":
            return (x - 0.5) * 2
        case "standard":
            return (x - TRAIN_MEAN) / TRAIN_STD
    raise ValueError(f"normalization must be unit, symmetric, standard or none, got {normalization!r}")
