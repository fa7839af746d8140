"""From the config to an optax transformation and its learning-rate schedule."""

import jax
import optax
from ml_collections import config_dict

from fmbench.config import Stage, stages
from fmbench.errors import UserError


def make_optimizer(
    config: config_dict.ConfigDict, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds (tx, schedule) for all the run's epochs.

    Weight decay falls on kernels only, never on biases or batch-norm scales.

    Args:
        config: The run's config; its fields optimizer, schedule, num_epochs, stages and grad_clip_norm are read.
        steps_per_epoch: Updates in an epoch.

    Raises:
        UserError: If the optimizer or the schedule is unknown, or its numbers make no schedule.
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
            tx = optax.contrib.muon(
                schedule,
                beta=settings.momentum,
                nesterov=settings.nesterov,
                weight_decay=settings.weight_decay,
                weight_decay_mask=_kernels,
                muon_weight_dimension_numbers=_muon_dimensions,
                adam_b1=settings.b1,
                adam_b2=settings.b2,
            )
        case unknown:
            raise UserError(f"config.optimizer.name is '{unknown}'; it must be one of sgd, adam, adamw, muon.")
    if settings.name == "adam" and settings.weight_decay:
        raise UserError("config.optimizer.weight_decay has no effect with adam; use adamw.")
    if config.grad_clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.grad_clip_norm), tx)
    return tx, schedule


def make_schedule(config: config_dict.ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate as a function of the step; it begins anew with each stage.

    constant; step: multiplied by `factor` at each of the `boundaries`; cosine: linear warm-up, then half a
    cosine down to zero; onecycle: up from 1/25 of the peak and down to 1/10,000 of that, both by half a cosine
    (Smith & Topin, 2018, "Super-convergence"), the rise taking `warmup_epochs` or, where that is 0, 30 %.

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
            return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, num_steps)
        case "onecycle":
            return optax.cosine_onecycle_schedule(num_steps, peak, pct_start=warmup_steps / num_steps or 0.3)
        case unknown:
            raise UserError(
                f"config.schedule.name is '{unknown}'; it must be one of constant, step, cosine, onecycle."
            )


def _kernels(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _muon_dimensions(params: optax.Params) -> optax.Params:
    """Muon for matrices and convolution kernels (as matrices of inputs x outputs), Adam for the rest."""

    def dimensions(x: jax.Array):
        if x.ndim == 4:
            return optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
        return optax.contrib.MuonDimensionNumbers() if x.ndim == 2 else None

    return jax.tree.map(dimensions, params)
