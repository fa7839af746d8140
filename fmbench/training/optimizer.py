"""From the config to an optax transformation and its learning-rate schedule.

Of somebody else's, named by its import path, an optimizer is called as `optimizer(learning_rate, ...)`, with the
schedule, and returns an `optax.GradientTransformation`: 'optax:lion' is one. A schedule is called as
`schedule(learning_rate, num_steps, steps_per_epoch, ...)` for each stage, with the stage's peak and updates, and
returns an `optax.Schedule`. Both are called by keywords, and get those fields of config.optimizer or
config.schedule that they have parameters for: where config.py has a default, that one and not the function's own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

from fmbench.config import Stage, base_config, stages
from fmbench.errors import UserError
from fmbench.system import import_path


def make_optimizer(
    config: config_dict.ConfigDict, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds (tx, schedule) for all the run's epochs.

    Weight decay falls on kernels only, never on biases or batch-norm scales.

    Args:
        config: The run's config; its fields optimizer, schedule, num_epochs, stages and grad_clip_norm are read.
        steps_per_epoch: Updates in an epoch.

    Raises:
        UserError: If the optimizer or the schedule is unknown or does not work, or its numbers make no schedule.
    """
    schedule = make_schedule(config, steps_per_epoch)
    settings = config.optimizer
    adam = {"b1": settings.b1, "b2": settings.b2, "eps": settings.eps}
    decay = {"weight_decay": settings.weight_decay, "mask": _kernels}
    match settings.name:
        case "sgd":
            tx = optax.chain(
                optax.add_decayed_weights(**decay),
                optax.sgd(schedule, settings.momentum, nesterov=settings.nesterov),
            )
        case "adam":
            tx = optax.adam(schedule, **adam)
        case "adamw":
            tx = optax.adamw(schedule, **adam, **decay)
        case "muon":
            momentum = optax.contrib.muon(
                schedule,
                ns_steps=0,  # `_orthogonalize` does these
                beta=settings.momentum,
                nesterov=settings.nesterov,
                muon_weight_dimension_numbers=_muon_dimensions,
                adam_learning_rate=lambda step: settings.adam_factor * schedule(step),
                adam_b1=settings.b1,
                adam_b2=settings.b2,
            )
            tx = optax.chain(
                momentum,
                _orthogonalize(),
                optax.add_decayed_weights(
                    lambda step: -settings.weight_decay * schedule(step), mask=_kernels_of_hidden_layers
                ),
            )
        case path if import_path.is_import_path(path):
            tx = _call("optimizer", settings, {"learning_rate": schedule}, ours=("keep_norm",))
            if not isinstance(tx, optax.GradientTransformation):
                raise UserError(
                    f"config.optimizer.name is '{path}', which returns a {type(tx).__name__}; it must return an "
                    "optax.GradientTransformation."
                )
        case name:
            raise ValueError(f"config.check lets '{name}' through, which is no optimizer")
    if settings.name == "adam" and settings.weight_decay:
        raise UserError("config.optimizer.weight_decay has no effect with adam; use adamw.")
    if settings.keep_norm:
        tx = optax.chain(tx, _keep_norm())
    if config.grad_clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.grad_clip_norm), tx)
    return tx, schedule


def make_schedule(config: config_dict.ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate as a function of the step; it begins anew with each stage.

    constant; step: multiplied by `factor` at each of the `boundaries`; cosine: linear warm-up, then half a
    cosine down; linear: linear warm-up, then in a line down; onecycle: up from 1/25 of the peak and down to
    1/10,000 of that, both by half a cosine (Smith & Topin, 2018, "Super-convergence"), the rise taking
    `warmup_epochs` or, where that is 0, 30 %. No step has a rate of zero, which would be the next one's after the
    last: the first of n steps of a warm-up has 1/n of the peak.

    Raises:
        UserError: As `make_optimizer`.
    """
    parts = stages(config)
    schedules = [_stage_schedule(config, stage, steps_per_epoch) for stage in parts]
    return optax.join_schedules(schedules, [stage.last_epoch * steps_per_epoch for stage in parts[:-1]])


def _stage_schedule(config: config_dict.ConfigDict, stage: Stage, steps_per_epoch: int) -> optax.Schedule:
    peak = stage.learning_rate
    num_steps = stage.num_epochs * steps_per_epoch
    warmup_steps = round(config.schedule.warmup_epochs * steps_per_epoch)
    if warmup_steps >= num_steps:
        raise UserError(
            f"config.schedule.warmup_epochs is {config.schedule.warmup_epochs}; it must be below the number of "
            f"epochs, {stage.num_epochs}."
        )
    match config.schedule.name:
        case "constant":
            return optax.constant_schedule(peak)
        case "step":
            boundaries = {round(b * num_steps): config.schedule.factor for b in config.schedule.boundaries}
            return optax.piecewise_constant_schedule(peak, boundaries)
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, num_steps - warmup_steps)
            return _after_warmup(decay, peak, warmup_steps)
        case "linear":
            return _after_warmup(optax.linear_schedule(peak, 0.0, num_steps - warmup_steps), peak, warmup_steps)
        case "onecycle":
            return optax.cosine_onecycle_schedule(num_steps, peak, pct_start=warmup_steps / num_steps or 0.3)
        case path if import_path.is_import_path(path):
            given = {"learning_rate": peak, "num_steps": num_steps, "steps_per_epoch": steps_per_epoch}
            schedule = _call("schedule", config.schedule, given)
            try:
                rate: Any = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
            except Exception as error:
                said = import_path.describe(error, import_path.load(path, "config.schedule.name"))
                raise UserError(f"config.schedule.name is '{path}', whose schedule fails: {said}.") from error
            if getattr(rate, "shape", None) != ():
                raise UserError(
                    f"config.schedule.name is '{path}'; it must return an optax.Schedule, which makes of a step "
                    "one number, the learning rate."
                )
            return schedule
        case name:
            raise ValueError(f"config.check lets '{name}' through, which is no schedule")


def _after_warmup(decay: optax.Schedule, peak: float, warmup_steps: int) -> optax.Schedule:
    """Steps of peak / warmup_steps up to the peak, the first of them for the first update, then `decay`."""
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps - 1)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def _call(
    part: str, settings: config_dict.ConfigDict, given: Mapping[str, Any], ours: tuple[str, ...] = ()
) -> Any:
    """Calls what config.<part>.name imports with what is `given` and the fields that it has parameters for.

    Raises:
        UserError: If it cannot be called like that, fails, or leaves a field without effect.
    """
    name = f"config.{part}.name is '{settings.name}'"
    function: Callable[..., Any] = import_path.load(settings.name, f"config.{part}.name")
    if not callable(function):
        raise UserError(f"{name}, which is no function but a {type(function).__name__}.")
    defaults = base_config()[part].to_dict()
    fields = {field: value for field, value in settings.to_dict().items() if field not in ("name", *given, *ours)}
    taken = import_path.named_arguments(function, fields)
    # Of the fields that every config has, many are for others; but it matters to all whether weights decay.
    fields = {
        field: value
        for field, value in fields.items()
        if field in taken or field not in defaults or (field == "weight_decay" and value)
    }
    if misfit := import_path.misfit(function, given=[*given, *fields]):
        raise UserError(
            f"{name}, which {misfit}; it must take {', '.join(given)}, and what a file adds to config.{part}."
        )
    try:
        return function(**given, **fields)
    except Exception as error:  # whatever their function may raise, its author wants to read it
        raise UserError(f"{name}, which fails: {import_path.describe(error, function)}.") from error


def _kernels(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _keep_norm() -> optax.GradientTransformation:
    """Shortens each convolution kernel, after its update, to the norm that it had before.

    Batch norm makes the length of a kernel meaningless but for the rate at which it turns, which would fall as the
    kernel grows.
    """

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params) -> Any:
        def one(kernel: jax.Array, update: jax.Array) -> jax.Array:
            if kernel.ndim != 4:
                return update
            moved = kernel + update
            return moved * (jnp.linalg.norm(kernel) / jnp.linalg.norm(moved)) - kernel

        return jax.tree.map(one, params, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _kernels_of_hidden_layers(params: optax.Params) -> optax.Params:
    """What Muon is for; Adam has the head and the rest.

    Raises:
        UserError: If there is no head.
    """
    if "head" not in params:
        raise UserError(
            "config.optimizer.name is 'muon', which leaves the last dense layer, `head`, to Adam; the model has "
            f"{', '.join(params)}: call its last layer head."
        )
    return jax.tree.map_with_path(lambda path, x: path[0].key != "head" and x.ndim > 1, params)


def _muon_dimensions(params: optax.Params) -> optax.Params:
    """Kernels of hidden layers as matrices of inputs x outputs, None for all else."""

    def dimensions(is_hidden: bool, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if not is_hidden:
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=tuple(range(x.ndim - 1)), output_axis=x.ndim - 1)

    return jax.tree.map(dimensions, _kernels_of_hidden_layers(params), params)


def _orthogonalize() -> optax.GradientTransformation:
    """Makes updates of hidden layers' kernels, as matrices of inputs x outputs, orthogonal; keeps their scale."""

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None) -> Any:
        def one(is_hidden: bool, update: jax.Array) -> jax.Array:
            if not is_hidden:
                return update
            return orthogonal(update.reshape(-1, update.shape[-1])).reshape(update.shape)

        return jax.tree.map(one, _kernels_of_hidden_layers(updates), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def orthogonal(matrix: jax.Array) -> jax.Array:
    """The matrix, float32, with the same singular vectors and all singular values near its Frobenius norm.

    Each of Newton and Schulz's five steps, X <- (a + b G + c GG) X with G = XX', multiplies by a polynomial of the
    first G, and these commute. So the steps are done on G, the smaller side squared, and X is multiplied once. The
    result is that of `optax.contrib.muon` but for rounding errors, for a 3x3 convolution that keeps its channels
    with 38 % of the multiply-adds: on a core 2304 x 256 takes 7 instead of 30 ms.

    References:
        Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks": the coefficients.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    a, b, c = 3.4445, -4.7750, 2.0315
    norm = jnp.linalg.norm(matrix)
    x = matrix / (norm + 1e-8)
    with jax.default_matmul_precision("float32"):  # G has the squares of the singular values
        gram = x @ x.T
        product = identity = jnp.eye(len(x))
        for _ in range(5):
            factor = a * identity + b * gram + c * gram @ gram
            product = factor @ product
            gram = factor @ gram @ factor
        return norm * (product @ x)
