"""Stock Flax, for `python -m fmbench.benchmark`: the same nets as its users write them.

Nothing of fmbench: Flax's own layers and pooling, JAX's own random numbers, one jitted functional step. What is
left between this and fmbench_itself.py is what fmbench's own layers are worth.
"""

import protocol

if __name__ == "__main__":
    ANSWERS = protocol.claim_stdout()

import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike


class MLP(nnx.Module):
    def __init__(self, *, dtype: DTypeLike, rngs: nnx.Rngs):
        dense = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.dense1 = dense(784, 256)
        self.dropout1 = nnx.Dropout(0.4)
        self.dense2 = dense(256, 512)
        self.dropout2 = nnx.Dropout(0.4)
        self.dense3 = dense(512, 100)
        self.dropout3 = nnx.Dropout(0.5)
        self.head = dense(100, 10)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        x = self.dropout1(nnx.leaky_relu(self.dense1(x), 0.3), rngs=rngs)
        x = self.dropout2(nnx.leaky_relu(self.dense2(x), 0.3), rngs=rngs)
        x = self.dropout3(nnx.leaky_relu(self.dense3(x), 0.3), rngs=rngs)
        return self.head(x)


class FullyConnected(nnx.Module):
    def __init__(self, *, widths: Sequence[int], num_dropouts: int, dtype: DTypeLike, rngs: nnx.Rngs):
        dense = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.hidden = nnx.List(dense(*sizes) for sizes in itertools.pairwise([784, *widths]))
        self.num_dropouts = num_dropouts
        self.dropout = nnx.Dropout(0.25)
        self.head = dense(widths[-1], 10)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for number, layer in enumerate(self.hidden):
            x = nnx.relu(layer(x))
            if number < self.num_dropouts:
                x = self.dropout(x, rngs=rngs)
        return self.head(x)


class Baseline(nnx.Module):
    def __init__(self, *, filters: int = 32, padding: str = "VALID", dtype: DTypeLike, rngs: nnx.Rngs):
        side = 14 if padding == "SAME" else 13
        self.conv1 = nnx.Conv(1, filters, (3, 3), padding=padding, dtype=dtype, rngs=rngs)
        self.dense1 = nnx.Linear(side * side * filters, 100, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(100, 10, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        del rngs  # nothing here is random
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.dense1(x))
        return self.head(x)


class CNN1(nnx.Module):
    def __init__(self, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), padding="VALID", dtype=dtype, rngs=rngs)
        self.dropout1 = nnx.Dropout(0.2)
        self.dense1 = nnx.Linear(13 * 13 * 32, 128, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(128, 10, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = self.dropout1(x, rngs=rngs)
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.dense1(x))
        return self.head(x)


class CNN2(nnx.Module):
    def __init__(self, *, dtype: DTypeLike, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), padding="VALID", dtype=dtype, rngs=rngs)
        self.conv1 = conv(1, 64)
        self.dropout1 = nnx.Dropout(0.25)
        self.conv2 = conv(64, 32)
        self.dense1 = nnx.Linear(5 * 5 * 32, 32, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(32, 10, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = self.dropout1(x, rngs=rngs)
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.dense1(x))
        return nnx.log_sigmoid(self.head(x))


class CNN3(nnx.Module):
    def __init__(self, *, dtype: DTypeLike, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), padding="VALID", dtype=dtype, rngs=rngs)
        self.conv1 = conv(1, 32)
        self.dropout1 = nnx.Dropout(0.25)
        self.conv2 = conv(32, 64)
        self.dropout2 = nnx.Dropout(0.25)
        self.conv3 = conv(64, 128)
        self.dropout3 = nnx.Dropout(0.4)
        self.dense1 = nnx.Linear(3 * 3 * 128, 128, dtype=dtype, rngs=rngs)
        self.dropout4 = nnx.Dropout(0.3)
        self.head = nnx.Linear(128, 10, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = self.dropout1(x, rngs=rngs)
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        x = self.dropout2(x, rngs=rngs)
        x = nnx.relu(self.conv3(x))
        x = self.dropout3(x, rngs=rngs)
        x = x.reshape(x.shape[0], -1)
        x = self.dropout4(nnx.relu(self.dense1(x)), rngs=rngs)
        return self.head(x)


class CNN4(nnx.Module):
    def __init__(self, *, dtype: DTypeLike, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), padding="VALID", dtype=dtype, rngs=rngs)
        norm = functools.partial(nnx.BatchNorm, momentum=0.99, epsilon=1e-3, dtype=dtype, rngs=rngs)
        self.conv1 = conv(1, 32)
        self.norm1 = norm(32)
        self.conv2 = conv(32, 32)
        self.norm2 = norm(32)
        self.dropout2 = nnx.Dropout(0.25)
        self.conv3 = conv(32, 64)
        self.norm3 = norm(64)
        self.dropout3 = nnx.Dropout(0.25)
        self.conv4 = conv(64, 128)
        self.norm4 = norm(128)
        self.dropout4 = nnx.Dropout(0.25)
        self.dense1 = nnx.Linear(4 * 4 * 128, 512, dtype=dtype, rngs=rngs)
        self.norm5 = norm(512)
        self.dropout5 = nnx.Dropout(0.5)
        self.dense2 = nnx.Linear(512, 128, dtype=dtype, rngs=rngs)
        self.norm6 = norm(128)
        self.dropout6 = nnx.Dropout(0.5)
        self.head = nnx.Linear(128, 10, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = self.norm1(nnx.relu(self.conv1(x)))
        x = self.norm2(nnx.relu(self.conv2(x)))
        x = self.dropout2(nnx.max_pool(x, (2, 2), (2, 2)), rngs=rngs)
        x = self.norm3(nnx.relu(self.conv3(x)))
        x = self.dropout3(x, rngs=rngs)
        x = self.norm4(nnx.relu(self.conv4(x)))
        x = self.dropout4(nnx.max_pool(x, (2, 2), (2, 2)), rngs=rngs)
        x = x.reshape(x.shape[0], -1)
        x = self.dropout5(self.norm5(nnx.relu(self.dense1(x))), rngs=rngs)
        x = self.dropout6(self.norm6(nnx.relu(self.dense2(x))), rngs=rngs)
        return self.head(x)


class VGGLike(nnx.Module):
    def __init__(self, *, dtype: DTypeLike, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), dtype=dtype, rngs=rngs)
        dense = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.conv1 = conv(1, 32, padding="SAME")
        self.conv2 = conv(32, 64, padding="SAME")
        self.dropout2 = nnx.Dropout(0.5)
        self.conv3 = conv(64, 128, padding="SAME")
        self.conv4 = conv(128, 256, padding="VALID")
        self.dropout4 = nnx.Dropout(0.5)
        self.dense1 = dense(4 * 4 * 256, 256)
        self.dropout5 = nnx.Dropout(0.5)
        self.dense2 = dense(256, 256)
        self.head = dense(256, 10)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = nnx.relu(self.conv1(x))
        x = nnx.relu(self.conv2(x))
        x = self.dropout2(nnx.max_pool(x, (2, 2), (2, 2)), rngs=rngs)
        x = nnx.relu(self.conv3(x))
        x = nnx.relu(self.conv4(x))
        x = self.dropout4(nnx.max_pool(x, (3, 3), (3, 3)), rngs=rngs)
        x = x.reshape(x.shape[0], -1)
        x = self.dropout5(nnx.leaky_relu(self.dense1(x), 0.3), rngs=rngs)
        x = nnx.leaky_relu(self.dense2(x), 0.3)
        return self.head(x)


class BasicBlock(nnx.Module):
    def __init__(self, inputs: int, outputs: int, strides: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        norm = functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.strides = strides
        self.extra_channels = outputs - inputs
        self.conv1 = conv(inputs, outputs, strides=strides)
        self.norm1 = norm(outputs)
        self.conv2 = conv(outputs, outputs)
        self.norm2 = norm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = x[:, :: self.strides, :: self.strides]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, self.extra_channels)))
        return nnx.relu(y + shortcut)


class ResNet(nnx.Module):
    def __init__(self, *, depth: int = 20, dtype: DTypeLike, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, 16, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        self.stem_norm = nnx.BatchNorm(16, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)
        blocks = []
        inputs = 16
        for outputs in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                strides = 1 if inputs == outputs else 2
                blocks.append(BasicBlock(inputs, outputs, strides, dtype=dtype, rngs=rngs))
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(64, 10, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        del rngs  # nothing here is random
        x = nnx.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


MODELS: dict[str, Any] = {
    "mlp": MLP,
    "fully_connected": FullyConnected,
    "baseline": Baseline,
    "cnn1": CNN1,
    "cnn2": CNN2,
    "cnn3": CNN3,
    "cnn4": CNN4,
    "vgg_like": VGGLike,
    "resnet": ResNet,
}


class StockFlax:
    """A net with its optimizer and its data on the device."""

    def __init__(self, job: protocol.Job):
        job.check_variant("float32", "bfloat16")
        job.check_step()
        self.job = job
        images, labels = job.load_rows()
        self.images, self.labels = jnp.asarray(images), jnp.asarray(labels)
        self.train_batches = protocol.shuffled_batches(len(images), job.batch_size)
        self.infer_batches = functools.cache(functools.partial(protocol.consecutive_batches, len(images)))

        def make_model() -> nnx.Module:
            return MODELS[job.model](dtype=jnp.dtype(job.dtype), rngs=nnx.Rngs(protocol.SEED), **job.arguments)

        weights = job.load_weights()
        if weights is None:
            model = make_model()
        else:  # its own initial values would be thrown away
            model = nnx.eval_shape(make_model)
            set_weights(model, weights)
        self.graphdef, *states = nnx.split(model, nnx.Param, ...)
        self.params: Any
        self.batch_stats: Any
        self.params, self.batch_stats = states
        self.tx = make_optimizer(job.optimizer)
        self.opt_state = self.tx.init(self.params)
        self.step = jnp.int32(0)

        self.name = f"stock Flax {flax.__version__}, JAX {jax.__version__}"
        self.versions = {module.__name__: module.__version__ for module in (jax, jaxlib, flax, optax)}
        self.num_trainable_params = count(self.params)
        self.num_params = self.num_trainable_params + count(self.batch_stats)
        self.bytes_per_image: float | None = None

    def forward(self, params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        model = nnx.merge(self.graphdef, params, batch_stats)
        model.eval()
        return model(self.normalize(images)).astype(jnp.float32)

    def normalize(self, images: jax.Array) -> jax.Array:
        scale, shift = protocol.normalization_constants(self.job.normalization)
        return images.reshape(-1, 28, 28, 1).astype(jnp.float32) * scale + shift

    def train(self, params, batch_stats, opt_state, step, images, labels, indices):
        """One update."""
        images, labels = self.normalize(images[indices]), labels[indices]
        key = jax.random.fold_in(jax.random.key(protocol.SEED), step)

        def loss_fn(params):
            model = nnx.merge(self.graphdef, params, batch_stats, copy=True)
            model.train()
            logits = model(images, nnx.Rngs(dropout=key)).astype(jnp.float32)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, nnx.state(model, nnx.BatchStat)

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = self.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state, step + 1, loss

    def infer(self, params, batch_stats, images, indices):
        return self.forward(params, batch_stats, images[indices]).argmax(axis=-1)

    def logits(self, count: int) -> np.ndarray:
        # To be compared: on accelerators float32 is multiplied in fewer bits otherwise.
        with jax.default_matmul_precision("highest"):
            return np.asarray(jax.jit(self.forward)(self.params, self.batch_stats, self.images[:count]))

    def compile(self) -> float:
        lowered = jax.jit(self.train, donate_argnums=(0, 1, 2, 3)).lower(
            self.params,
            self.batch_stats,
            self.opt_state,
            self.step,
            self.images,
            self.labels,
            np.zeros(self.job.batch_size, np.int32),
        )
        self.train_program = lowered.compile()
        self.infer_program = jax.jit(self.infer)
        self.wait(self.infer_step(self.job.infer_batch_size)[1])
        return (lowered.cost_analysis() or {}).get("flops", 0.0) / self.job.batch_size

    def train_step(self) -> tuple[int, Any]:
        self.params, self.batch_stats, self.opt_state, self.step, loss = self.train_program(
            self.params,
            self.batch_stats,
            self.opt_state,
            self.step,
            self.images,
            self.labels,
            next(self.train_batches),
        )
        return self.job.batch_size, loss

    def infer_step(self, batch_size: int) -> tuple[int, Any]:
        indices = next(self.infer_batches(batch_size))
        return batch_size, self.infer_program(self.params, self.batch_stats, self.images, indices)

    def peak_memory_bytes(self) -> int:
        statistics = jax.local_devices()[0].memory_stats()  # none on CPUs
        return statistics["peak_bytes_in_use"] if statistics else protocol.process_peak_memory_bytes()

    def wait(self, started: Any) -> None:
        jax.block_until_ready(started)


def make_optimizer(settings: dict[str, Any]) -> optax.GradientTransformation:
    """SGD with weight decay on kernels, or Adam."""
    match settings["name"]:
        case "adam":
            return optax.adam(settings["learning_rate"], settings["b1"], settings["b2"], settings["eps"])
        case "sgd":
            return optax.chain(
                optax.add_decayed_weights(
                    settings["weight_decay"], lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
                ),
                optax.sgd(settings["learning_rate"], settings["momentum"], settings["nesterov"]),
            )
    raise protocol.RefusalError(f"does not do {settings['name']}: it has adam and sgd")


def set_weights(model: nnx.Module, weights: dict[str, np.ndarray]) -> None:
    """Gives the model the canonical weights, whose names are its own."""
    state = nnx.state(model)
    leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    protocol.check_weights(weights, {name: leaf.shape for name, leaf in leaves.items()})
    for name, leaf in leaves.items():
        leaf.set_value(jnp.asarray(weights[name]))
    nnx.update(model, state)


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    sys.exit(protocol.serve(StockFlax, sys.stdin, ANSWERS))
