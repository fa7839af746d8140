"""What runs on the devices: a training step, an evaluation step, and their compilation."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from fmbench.config import stages
from fmbench.models import build_model, check_model, split_model
from fmbench.training import augment as augmentation
from fmbench.training import input_pipeline, parallel, selection
from fmbench.training.input_pipeline import Batch
from fmbench.training.parallel import AXIS, Program

CALLS_IN_FLIGHT = 2  # how far the host runs ahead of the devices, and how late a signal is answered


@struct.dataclass
class TrainState:
    """All that a training step changes."""

    step: jax.Array  # int32, updates done
    params: Any
    model_state: Any  # batch-norm statistics
    opt_state: optax.OptState
    average: tuple[Any, Any] | None = None  # moving average of params and model_state, where the run has one
    losses: dict[str, jax.Array] | None = None  # of the train rows, where the run selects by them

    @property
    def evaluated(self) -> tuple[Any, Any]:
        """The params and model_state that are evaluated and exported."""
        return self.average or (self.params, self.model_state)


def train_step(
    state: TrainState,
    rows: Batch,
    order: jax.Array | None,
    seed: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    batch_size: int,
    num_examples: int,
    normalization: str,
    label_smoothing: float,
    ema_decay: float,
    augment: augmentation.Settings,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update on the next batch of the epoch, of which each device sees its part.

    Args:
        state: Before the update.
        rows: The train set on the device; or, without an order, this device's part of the batch.
        order: Rows of the epoch in the order of their visit, int32 (images_per_epoch,).
        seed: uint32; with state.step it decides what dropout drops and how images are augmented.
        graphdef: The model's structure.
        tx: The optimizer.
        batch_size: Examples of a whole batch, over all devices.
        num_examples: Of this step: `batch_size`, or fewer, which end the epoch.
        normalization: As `input_pipeline.normalize` takes it.
        label_smoothing: Probability that the target gives away to all classes.
        ema_decay: Of the moving average of params and model_state, if the state has one.
        augment: As `config.no_augmentation` has it.

    Returns:
        The state after the update, and the batch's mean loss and accuracy before it; the accuracy is that on the
        augmented images, and where images are mixed, on the label of the one of `order`.
    """
    key = jax.random.key(seed)
    dropout_key = jax.random.fold_in(jax.random.fold_in(key, 2), state.step)
    first = jnp.int32(0) if order is None else state.step % -(-order.size // batch_size) * batch_size

    def rows_at(positions: jax.Array, is_mine: bool) -> Batch:
        if order is not None:
            return input_pipeline.gather(rows, order.at[first + positions].get(mode="promise_in_bounds"))
        return rows if is_mine else input_pipeline.gather(jax.lax.all_gather(rows, AXIS, tiled=True), positions)

    images, label, targets = _see(rows_at, key, state.step, parallel.my_part(num_examples), num_examples, augment)
    targets = optax.smooth_labels(targets, label_smoothing)
    images = input_pipeline.normalize(images, normalization)

    def loss_fn(params):
        model = nnx.merge(graphdef, params, state.model_state, copy=True)
        logits = model(images, train=True, rngs=nnx.Rngs(dropout=dropout_key)).astype(jnp.float32)
        losses = optax.softmax_cross_entropy(logits, targets)
        model_state = split_model(model)[2]
        return losses.mean(), (losses, logits, model_state)

    (loss, (losses, logits, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    accuracy = (logits.argmax(axis=-1) == label).mean()
    grads, metrics = parallel.mean((grads, {"loss": loss, "accuracy": accuracy}))
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average:
        # The first steps, of which the average would otherwise remember the initial values, count for more.
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update((params, model_state), average, 1 - decay)
    known_losses = state.losses
    if known_losses and order is not None:
        indices = jax.lax.dynamic_slice(order, (first,), (num_examples,))
        losses = jax.lax.all_gather(losses, AXIS, tiled=True)
        known_losses = selection.update(known_losses, indices, losses, starts_epoch=first == 0)
    return TrainState(state.step + 1, params, model_state, opt_state, average, known_losses), metrics


def _see(
    rows_at: Callable[[jax.Array, bool], Batch],
    key: jax.Array,
    step: jax.Array | int,
    positions: jax.Array,
    num_examples: int,
    augment: augmentation.Settings,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Images, augmented and mixed, labels and targets at these places of a step's global batch.

    `rows_at` has the rows at places of the batch, of which those of `positions` are this device's.
    """
    augment_key = jax.random.fold_in(jax.random.fold_in(key, 3), step)

    def examples(positions: jax.Array, is_mine: bool = True) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys, augmented images and labels at these places, be they this device's or not."""
        batch = rows_at(positions, is_mine)
        keys = augmentation.example_keys(augment_key, positions)
        images = augmentation.augment(keys, batch["image"], augment) if any(augment.values()) else batch["image"]
        return keys, images, batch["label"]

    keys, images, label = examples(positions)
    targets = jax.nn.one_hot(label, 10)
    if augmentation.mixes(augment):
        _, partners, partner_label = examples((positions + 1) % num_examples, is_mine=False)
        images, share = augmentation.mix(keys, images, partners, augment)
        targets = share[:, None] * targets + (1 - share[:, None]) * jax.nn.one_hot(partner_label, 10)
    return images, label, targets


def first_images(data: input_pipeline.Data, augment: augmentation.Settings, lane: int, most: int) -> np.ndarray:
    """Up to `most` images of a seed's first batch as its first step sees them, but not normalised.

    Returns:
        Grey levels, uint8 (n, 28, 28); none, (0, 28, 28), of features and of what is read from disk.
    """
    if data.stream or data.train_rows["image"].shape[1] != augmentation.SIDE**2:
        return np.zeros((0, augmentation.SIDE, augmentation.SIDE), np.uint8)
    # This process asks alone.
    rows, indices, seeds = parallel.local((data.train_rows, data.train_indices, data.seed))
    orders = dataclasses.replace(data, train_indices=indices, seed=seeds).epoch_order(0)
    order, seed = orders.reshape(seeds.size, -1)[lane], seeds.reshape(-1)[lane]
    size = min(data.batch_size, order.size)

    @jax.jit
    def see(rows: Batch, order: jax.Array, seed: jax.Array) -> jax.Array:
        def rows_at(positions: jax.Array, is_mine: bool) -> Batch:
            return input_pipeline.gather(rows, order[positions])

        return _see(rows_at, jax.random.key(seed), 0, jnp.arange(min(most, size)), size, augment)[0]

    images = np.asarray(see(rows, order, seed)).reshape(-1, augmentation.SIDE, augmentation.SIDE)
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def eval_step(
    params: Any,
    model_state: Any,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef,
    normalization: str,
) -> dict[str, jax.Array]:
    """Sums over the real examples of a padded batch: to be added up and divided once, at the end.

    Returns:
        loss, correct, correct_top5, class_correct (10,), class_count (10,), and the predictions (batch_size,).
    """
    batch = input_pipeline.gather(batch, parallel.my_part(len(batch["label"])))
    model = nnx.merge(graphdef, params, model_state, copy=True)
    images = input_pipeline.normalize(batch["image"], normalization)
    logits = model(images).astype(jnp.float32)
    label, mask = batch["label"], batch["mask"]
    predictions = logits.argmax(axis=-1)
    correct = jnp.where(predictions == label, mask, 0)
    top5 = jax.lax.top_k(logits, 5)[1]
    classes = jax.nn.one_hot(label, 10)
    sums = {
        "loss": jnp.sum(mask * optax.softmax_cross_entropy_with_integer_labels(logits, label)),
        "correct": jnp.sum(correct),
        "correct_top5": jnp.sum(jnp.where((top5 == label[:, None]).any(axis=-1), mask, 0)),
        "class_correct": correct @ classes,
        "class_count": mask @ classes,
    }
    return jax.lax.psum(sums, AXIS) | {"predictions": jax.lax.all_gather(predictions, AXIS, tiled=True)}


def eval_steps(params: Any, model_state: Any, batches: Batch, **settings: Any) -> dict[str, jax.Array]:
    """`eval_step` on each of `batches`, (n, batch_size, ...): its results, (n, ...)."""

    def of_batch(batch: Batch) -> dict[str, jax.Array]:
        return eval_step(params, model_state, batch, **settings)

    if len(batches["label"]) == 1:  # XLA would compile the loop's body otherwise than a step without a loop
        return jax.tree.map(lambda x: x[None], of_batch(jax.tree.map(lambda x: x[0], batches)))
    return jax.lax.map(of_batch, batches)


class Evaluation(NamedTuple):
    """What an evaluation of every example of a split found."""

    num_examples: int
    loss: float
    accuracy: float
    top5_accuracy: float
    per_class_accuracy: list[float]
    predictions: np.ndarray  # uint8 (num_examples,)


def evaluate(programs: Mapping[int, Program], state: TrainState, calls: Sequence[Batch]) -> list[Evaluation]:
    """Evaluates every real example of the padded batches of all `calls`.

    Returns:
        One evaluation, or where several seeds train together, one of each.
    """
    started: list[dict[str, jax.Array]] = []
    for call in calls:
        started.append(programs[len(call["label"])].run(*state.evaluated, call))
        if len(started) > CALLS_IN_FLIGHT:  # more would hold the images of all, where they come from the disk
            started[-1 - CALLS_IN_FLIGHT]["loss"].block_until_ready()
    outputs = jax.device_get(started)
    if state.step.ndim == 0:
        outputs = jax.tree.map(lambda x: x[None], outputs)
    of_all = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *outputs)  # (seeds, batches, ...)
    seeds = range(len(of_all["loss"]))
    return [_evaluation({name: output[seed] for name, output in of_all.items()}) for seed in seeds]


def _evaluation(outputs: dict[str, np.ndarray]) -> Evaluation:
    """Adds up what `eval_steps` gives for all batches of a split."""
    predictions = outputs.pop("predictions").reshape(-1)
    sums = {name: np.sum(x, axis=0, dtype=np.float64) for name, x in outputs.items()}
    num_examples = int(sums["class_count"].sum())
    return Evaluation(
        num_examples,
        loss=float(sums["loss"] / num_examples),
        accuracy=float(sums["correct"] / num_examples),
        top5_accuracy=float(sums["correct_top5"] / num_examples),
        per_class_accuracy=(sums["class_correct"] / sums["class_count"]).tolist(),
        predictions=predictions[:num_examples].astype(np.uint8),
    )


def of_seed(state: TrainState, index: int) -> TrainState:
    """The state of one seed, of those that train together."""
    return jax.tree.map(lambda x: x[index], state) if state.step.ndim else state


def make_model(config: config_dict.ConfigDict, axis_name: str | None, seed: int | jax.Array) -> nnx.Module:
    """The config's model.

    Raises:
        UserError: If there is no such model, or it is not built or called as `fmbench.models` says.
    """
    model = config.model.to_dict()
    if isinstance(seed, int):  # not where it is traced, for a second time
        shape = (config.model.num_features,) if config.features.backbone else (28, 28, 1)
        check_model(model, config.dtype, shape)
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return build_model(model, rngs=nnx.Rngs(key), dtype=config.dtype, axis_name=axis_name)


def init_state(
    config: config_dict.ConfigDict,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    seed: jax.Array | np.uint32,
    num_rows: int = 0,
) -> tuple[nnx.GraphDef, TrainState]:
    """The model's structure, and a fresh state on every device; `num_rows` of the train set, for their losses.

    Where `seed` is several, uint32 (n,), every array of the state has a first axis of that size.

    Raises:
        UserError: As `make_model`.
    """
    graphdef = split_model(nnx.eval_shape(lambda: make_model(config, AXIS, 0)))[0]

    # Run once, so not worth optimising: on CPUs LLVM takes 17 of ResNet-20's 19 seconds for the random numbers.
    on_cpus = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpus else None

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()), compiler_options=options)
    def init(seed: jax.Array) -> TrainState:
        return parallel.over_seeds(init_one, seed)(seed)

    def init_one(seed: jax.Array) -> TrainState:
        _, params, model_state = split_model(make_model(config, AXIS, seed))
        average = (params, model_state) if config.ema_decay else None
        losses = selection.unknown_losses(num_rows) if config.selection.easy else None
        return TrainState(jnp.int32(0), params, model_state, tx.init(params), average, losses)

    return graphdef, jax.block_until_ready(init(seed))  # where memory ends, here and not in what comes next


def choose_steps_per_call(config: config_dict.ConfigDict, whole_batches: int) -> int:
    """What the config asks for or, where it says 0, 1 on CPUs and elsewhere an epoch's whole batches.

    Of batches that are read from disk, which lie on the devices for a call, `input_pipeline.MOST_BATCHES` at most.
    """
    most = input_pipeline.MOST_BATCHES if config.data.pipeline == "grain" else whole_batches
    default = min(most, whole_batches) if parallel.loops_on_devices(config.steps_per_call) else 1
    return min(config.steps_per_call or default, whole_batches)


def compile_programs(
    config: config_dict.ConfigDict,
    mesh: Mesh,
    data: input_pipeline.Data,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    state: TrainState,
    steps_per_call: int,
    compiler_options: dict[str, Any] | None = None,
) -> tuple[list[dict[int, Program]], dict[int, Program]]:
    """Compiles the training step and the evaluation step, with what flags of XLA `compiler_options` may name.

    Returns:
        For each stage of the run, its training programs by the number of steps they do: `steps_per_call` and, if
        that divides no epoch or not the rest of the one that `state` is in, 1; and 0, the smaller step that ends
        an epoch, where there is one. And the evaluation programs by the number of batches.
    """
    begun = state.step.max() % data.steps_per_epoch
    fits = data.whole_batches % steps_per_call == 0 and begun % steps_per_call == 0
    lengths = {steps_per_call} if fits else {steps_per_call, 1}
    if data.remainder:
        lengths.add(0)

    def compile_training(augment: augmentation.Settings) -> dict[int, Program]:
        def step(num_examples: int) -> Callable[..., Any]:
            one_seed = functools.partial(
                train_step,
                graphdef=graphdef,
                tx=tx,
                batch_size=config.batch_size,
                num_examples=num_examples,
                normalization=config.data.normalization,
                label_smoothing=config.label_smoothing,
                ema_decay=config.ema_decay,
                augment=augment,
            )
            return parallel.over_seeds(one_seed, data.seed, in_axes=(0, None, 0, 0))

        def steps(length: int, state: TrainState, rows: Batch, order: jax.Array | None, seed: jax.Array):
            one = step(config.batch_size)
            if order is None:
                return jax.lax.scan(lambda state, batch: one(state, batch, None, seed), state, rows)
            return jax.lax.scan(lambda state, _: one(state, rows, order, seed), state, length=length)

        return {
            length: parallel.compile_step(
                functools.partial(steps, length)
                if length > 1
                else step(config.batch_size if length else data.remainder),
                (state, *data.example_arguments(length)),
                mesh=mesh,
                parallel=config.parallel,
                donate_first=True,
                compiler_options=compiler_options,
                in_specs=(parallel.WHOLE, data.rows_spec(length), parallel.WHOLE, parallel.WHOLE),
            )
            for length in lengths
        }

    train_programs: list[dict[int, Program]] = []
    parts = stages(config)
    for index, stage in enumerate(parts):
        same = [i for i, earlier in enumerate(parts[:index]) if earlier.augment == stage.augment]
        train_programs.append(train_programs[same[0]] if same else compile_training(stage.augment))
    # Of a split only the last call may be smaller.
    ends = [calls[index] for calls in data.eval_batches.values() for index in (0, -1)]
    evaluate_calls = functools.partial(eval_steps, graphdef=graphdef, normalization=config.data.normalization)
    eval_programs = {
        len(call["label"]): parallel.compile_step(
            parallel.over_seeds(evaluate_calls, data.seed, in_axes=(0, 0, None)),
            (state.params, state.model_state, call),
            mesh=mesh,
            parallel=config.parallel,
            compiler_options=compiler_options,
        )
        for call in {len(call["label"]): call for call in ends}.values()
    }
    return train_programs, eval_programs


def count(tree: Any) -> int:
    """Numbers in a pytree of arrays."""
    return sum(x.size for x in jax.tree.leaves(tree))
