"""fmbench's own training step, for `python -m fmbench.benchmark`.

The worker of protocol.py; and, for the weights that all systems start from,

    python benchmarks/fmbench_itself.py weights configs/vgg_like.py OUT.npz

which writes the initial values of seed 0 by dotted path, with batch-norm statistics.
"""

import protocol

if __name__ == "__main__":
    ANSWERS = protocol.claim_stdout()

import contextlib
import dataclasses
import functools
import sys
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from flax import nnx
from ml_collections import config_dict

import fmbench
from fmbench import config as config_lib
from fmbench import entries
from fmbench.data import fashion_mnist
from fmbench.records import machine
from fmbench.system import runtime
from fmbench.training import inference, input_pipeline, parallel, selection, steps
from fmbench.training.optimizer import make_optimizer

MOST_INFERRED = 10_000  # images

# What has to read its operands from memory and to write its results there; all else can be fused into it.
MATRIX_PRIMITIVES = (
    *("dot_general", "conv_general_dilated"),
    *("convolution", "convolution_input_grad", "convolution_kernel_grad"),  # fmbench.layers.convolution_primitives
)


class FmbenchItself:
    """What `fmbench.main` runs, on the job's data."""

    def __init__(self, job: protocol.Job):
        job.check_variant("float32", "bfloat16")
        self.config = make_config(job)
        self.seeds = job.seeds
        self.train_images = job.train_images
        self.mesh = parallel.make_mesh()
        parallel.check_batch_size("batch_size", self.config.batch_size, self.mesh)
        parallel.check_batch_size("eval_batch_size", self.config.eval_batch_size, self.mesh)
        self.data = make_data(job, self.config, self.mesh)
        self.tx, _ = make_optimizer(self.config, self.data.steps_per_epoch)
        self.graphdef, state = steps.init_state(
            self.config, self.tx, self.mesh, self.data.seed, self.data.num_train
        )
        weights = job.load_weights()
        if weights is not None:
            params, model_state = from_canonical((state.params, state.model_state), weights)
            state = dataclasses.replace(
                state,
                params=parallel.replicate(params, self.mesh),
                model_state=parallel.replicate(model_state, self.mesh),
            )
        self.state = state
        self.steps_done = 0
        normalization = self.config.data.normalization
        # As `inference.make_classifier` has it, but that the images are on the device, as the peers' are.
        self.classes = jax.jit(
            lambda params, model_state, images, indices: inference.forward(
                params, model_state, images[indices], graphdef=self.graphdef, normalization=normalization
            ).argmax(axis=-1)
        )
        self.inferred = parallel.replicate(np.load(job.train_images, mmap_mode="r")[:MOST_INFERRED], self.mesh)
        self.infer_batches = functools.cache(functools.partial(protocol.consecutive_batches, len(self.inferred)))
        self.prepared: tuple[Any, Any] | None = None  # parameters and statistics, since the last step of training
        self.name = f"fmbench {fmbench.__version__}, JAX {jax.__version__}"
        self.versions = {module.__name__: module.__version__ for module in (jax, jaxlib, flax, optax)}
        one = steps.of_seed(state, 0)
        self.num_trainable_params = steps.count(one.params)
        self.num_params = self.num_trainable_params + steps.count(one.model_state)
        self.bytes_per_image = self.least_traffic(one) / self.config.batch_size

    def logits(self, count: int) -> np.ndarray:
        @jax.jit
        def forward(params: Any, model_state: Any, images: jax.Array) -> jax.Array:
            model = nnx.merge(self.graphdef, params, model_state)
            return model(input_pipeline.normalize(images, self.config.data.normalization)).astype(jnp.float32)

        images = np.load(self.train_images, mmap_mode="r")[:count]
        # To be compared: on accelerators float32 is multiplied in fewer bits otherwise.
        on_cpu = jax.default_backend() == "cpu"
        with contextlib.nullcontext() if on_cpu else jax.default_matmul_precision("highest"):
            return np.asarray(forward(self.state.params, self.state.model_state, images))

    def least_traffic(self, state: steps.TrainState) -> float:
        """Bytes that an update on a batch moves to and from memory at the least, if nothing stays in a cache.

        Each convolution and matrix product of the net and its gradient reads its operands and writes its results
        once, and so does the optimizer with its state; all between them is fused into them.
        """

        def loss(params: Any, model_state: Any, images: jax.Array) -> jax.Array:
            model = nnx.merge(self.graphdef, params, model_state, copy=True)
            return model(images, train=True, rngs=nnx.Rngs(dropout=0)).astype(jnp.float32).sum()

        images = jax.ShapeDtypeStruct((self.config.batch_size, 28, 28, 1), jnp.float32)
        one_device = parallel.make_mesh(jax.devices()[:1])
        gradient = jax.make_jaxpr(parallel.map_over(one_device, jax.grad(loss)))
        updated = state.params, state.model_state, state.opt_state, state.average
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(updated))
        return 2 * state_bytes + matrix_traffic(gradient(state.params, state.model_state, images).jaxpr)

    def compile(self) -> float:
        steps_per_call = steps.choose_steps_per_call(self.config, self.data.whole_batches)
        if self.config.steps_per_call > self.data.steps_per_epoch:  # what no run does, yet
            steps_per_call = self.config.steps_per_call
        (self.train_programs, *_), _ = steps.compile_programs(
            self.config, self.mesh, self.data, self.graphdef, self.tx, self.state, steps_per_call
        )
        self.data.compile_orders(self.losses())
        self.wait(self.infer_step(self.config.eval_batch_size)[1])
        return self.train_programs[steps_per_call].count_flops() / self.config.batch_size / self.seeds

    def losses(self) -> jax.Array | None:
        """By which an epoch that begins now chooses its examples, if it does."""
        return selection.losses_of_epoch(self.state.losses, is_new=True)

    def train_step(self) -> tuple[int, Any]:
        done = self.steps_done % self.data.steps_per_epoch
        if done == 0:
            self.arguments = self.data.feed(self.steps_done, self.losses())
        longest = max(self.train_programs)
        in_epoch = done + longest <= self.data.steps_per_epoch or longest > self.data.steps_per_epoch
        length = longest if in_epoch else 1
        self.prepared = None
        self.state, metrics = self.train_programs[length].run(self.state, *self.arguments(length))
        self.steps_done += length
        return length * self.config.batch_size * self.seeds, metrics

    def infer_step(self, batch_size: int) -> tuple[int, Any]:
        if self.prepared is None:
            one = steps.of_seed(self.state, 0)
            self.prepared = inference.in_dtype_of_computation(self.graphdef, one.params, one.model_state)
        indices = next(self.infer_batches(batch_size))
        return batch_size, self.classes(*self.prepared, self.inferred, indices)

    def wait(self, started: Any) -> None:
        jax.block_until_ready(started)

    def peak_memory_bytes(self) -> int:
        return machine.peak_memory_bytes()


def matrix_traffic(jaxpr: Any) -> int:
    """Bytes of the operands and results of all convolutions and matrix products, also of inner functions."""
    traffic = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in MATRIX_PRIMITIVES:
            arrays: list[Any] = [variable.aval for variable in (*equation.invars, *equation.outvars)]
            traffic += sum(array.size * array.dtype.itemsize for array in arrays)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            traffic += matrix_traffic(inner) if hasattr(inner, "eqns") else 0
    return traffic


def make_config(job: protocol.Job) -> config_dict.ConfigDict:
    """The config of the job's entry, with what the job says otherwise."""
    config = entries.load(job.config)
    with config.unlocked():
        config.model.update({"name": job.model, **job.arguments})
        config.optimizer.update(job.optimizer)
        config.dtype = job.dtype
        config.batch_size = job.batch_size
        config.steps_per_call = job.steps_per_call or config.steps_per_call
        config.eval_batch_size = job.infer_batch_size
        config.data.normalization = job.normalization
        config.data.split = "all"
        config.data.pipeline = job.pipeline
        config.label_smoothing = job.label_smoothing
        config.ema_decay = job.ema_decay
        config.grad_clip_norm = job.grad_clip_norm
        config.selection.update(config_lib.no_selection().to_dict() | job.selection)
        first_stage = config.stages[min(config.stages)] if config.stages else config
        first_stage.augment.update(config_lib.no_augmentation().to_dict() | job.augment)
    return entries.finalize(config, job.config)


def make_data(job: protocol.Job, config: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> input_pipeline.Data:
    """`input_pipeline.load`, but of the job's rows, and with none to evaluate."""
    images, labels = job.load_rows()
    if config.batch_size > len(images):
        raise protocol.RefusalError(
            f"batch_size is {config.batch_size}, but the train set has only {len(images)} images"
        )
    describe = functools.partial(
        input_pipeline.Data,
        num_train=len(images),
        num_validation=0,
        num_test=0,
        batch_size=config.batch_size,
        watched=None,
        version="",
        sha256={},
        test_labels=labels[:0],
        selection=config.selection.to_dict(),
    )
    train = np.arange(len(images), dtype=np.int32)
    if job.pipeline == "grain":
        on_disk = np.load(job.train_images, mmap_mode="r")
        # One image to evaluate, since a split of none has no batches.
        dataset = fashion_mnist.Dataset(on_disk, labels, images[:1], labels[:1], "", {})
        endless = config.copy_and_resolve_references()
        endless.num_epochs = 10**6
        return input_pipeline.streamed(endless, dataset, train, train[:0], mesh, describe)
    train_rows, train_indices, seed = parallel.replicate(
        (
            input_pipeline.device_rows(images, labels),
            train,
            np.arange(job.seeds, dtype=np.uint32) if job.seeds > 1 else np.uint32(config.seed),
        ),
        mesh,
    )
    return describe(train_rows, train_indices, {}, seed)


def canonical_name(path: tuple[Any, ...]) -> str:
    """A leaf's path in its state as 'blocks.0.conv1.kernel'."""
    return ".".join(str(part.key) for part in path)


def to_canonical(*states: Any) -> dict[str, Any]:
    """Parameters and batch-norm statistics by dotted path."""
    return {canonical_name(path[1:]): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(states)}


def to_shapes(states: tuple[Any, ...]) -> dict[str, tuple[int, ...]]:
    """Their shapes, in the same form."""
    return {canonical_name(path[1:]): leaf.shape for path, leaf in jax.tree.leaves_with_path(states)}


def from_canonical(states: tuple[Any, ...], weights: dict[str, np.ndarray]) -> tuple[Any, ...]:
    """Trees like `states` with the values of `weights`."""
    protocol.check_weights(weights, to_shapes(states))
    return jax.tree.map_with_path(lambda path, _: weights[canonical_name(path[1:])], states)


def write_weights(spec: str, out: str) -> None:
    """Writes the initial values of seed 0."""
    config = entries.resolve(spec, {})
    _, state = steps.init_state(config, optax.identity(), parallel.make_mesh(), np.uint32(config.seed))
    np.savez(out, **to_canonical(state.params, state.model_state))


if __name__ == "__main__":
    runtime.set_up()
    if sys.argv[1:2] == ["weights"]:
        if len(sys.argv) != 4:
            sys.exit(__doc__)
        write_weights(*sys.argv[2:])
    else:
        sys.exit(protocol.serve(FmbenchItself, sys.stdin, ANSWERS))
