"""The training and evaluation steps: equal on any layout, exact under a mask, ready for every platform."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fmbench import config as config_lib
from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.models import split_model
from fmbench.studies.compiled_step import COLLECTIVE
from fmbench.training import augment, input_pipeline, parallel, steps
from fmbench.training.optimizer import make_optimizer

COMPILES_SOONER = {"xla_backend_optimization_level": 0}


# Compiled once, where several tests ask for the same.
compiled: dict[tuple, tuple] = {}


def set_up(config, num_devices, steps_per_call=1):
    """Data, a fresh state and the programs that the config asks for."""
    key = (str(config), num_devices, steps_per_call)
    if key not in compiled:
        compiled[key] = compile_anew(config, num_devices, steps_per_call)
    data, state, programs, eval_programs = compiled[key]
    return data, jax.tree.map(jnp.copy, state), programs, eval_programs  # a step takes its state's memory


def compile_anew(config, num_devices, steps_per_call):
    mesh = parallel.make_mesh(jax.devices()[:num_devices])
    data = input_pipeline.load(config, mesh)
    tx, _ = make_optimizer(config, data.steps_per_epoch)
    graphdef, state = steps.init_state(config, tx, mesh, data.seed, len(data.train_rows["label"]))
    (programs, *_), eval_programs = steps.compile_programs(config, mesh, data, graphdef, tx, state, steps_per_call)
    return data, state, programs, eval_programs


def train(config, num_devices, num_calls, steps_per_call=1):
    """After each of a few calls of the step: the state, the losses, and the test evaluation."""
    data, state, programs, eval_programs = set_up(config, num_devices, steps_per_call)
    after = []
    for _ in range(num_calls):
        state, metrics = programs[steps_per_call].run(state, data.train_rows, data.epoch_order(0), data.seed)
        (evaluation,) = steps.evaluate(eval_programs, state, data.eval_batches["test"])
        after.append((jax.device_get(state), np.atleast_1d(metrics["loss"]), evaluation))
    return after


def fresh_model(config):
    """Structure, parameters and statistics, as the seed has them."""

    @functools.partial(jax.jit, compiler_options=COMPILES_SOONER)
    def init():
        return split_model(steps.make_model(config, None, config.seed))[1:]

    return split_model(nnx.eval_shape(lambda: steps.make_model(config, None, 0)))[0], *init()


AUGMENT = {
    f"augment__{name}": strength
    for name, strength in {
        "rotation": 8.0,
        "crop_padding": 2,
        "flip": True,
        "random_erasing": 0.5,
        "mixup": 0.4,
    }.items()
}


# cnn4 has all that could differ: dropout, batch norm, pooling. resnet has batch norm alone.
@pytest.mark.parametrize(
    ("spec", "strengths", "layouts"),
    [
        pytest.param(
            *("configs/cnn4.py", {"num_epochs": 10}, [(8, "jit"), (1, "pmap"), (8, "pmap")]),  # its first stage
            marks=pytest.mark.slow,
        ),
        pytest.param("configs/resnet.py:8", {}, [(8, "jit"), (8, "pmap")], marks=pytest.mark.slow),
        ("configs/baseline.py", AUGMENT, [(8, "jit"), (8, "pmap")]),
        pytest.param(
            "configs/speedrun.py:95",
            {"model__stem_width": 4, "model__widths": (4, 8, 12), "batch_size": 48},
            [(8, "jit"), (8, "pmap")],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_jit_and_pmap_on_one_and_eight_devices_give_the_same_numbers(make_config, spec, strengths, layouts):
    # One step of SGD, seen through its parameters, and the loss of a second. Adam's first step would divide noise
    # by noise, and after several steps the kinks of ReLUs and poolings make a difference of 1e-7 any size.
    sgd = {"batch_size": 40, "optimizer__name": "sgd", "optimizer__learning_rate": 0.1, **strengths}
    (state, loss, evaluation), (_, second_loss, _) = train(make_config(spec, **sgd), num_devices=1, num_calls=2)
    for num_devices, mode in layouts:
        config = make_config(spec, **sgd, parallel=mode)
        (other_state, other_loss, other_evaluation), (_, other_second, _) = train(config, num_devices, num_calls=2)
        where = f"{mode} on {num_devices}"
        np.testing.assert_allclose([other_loss, other_second], [loss, second_loss], rtol=2e-5, err_msg=where)
        for got, expected in zip(
            jax.tree.leaves((other_state.params, other_state.model_state)),
            jax.tree.leaves((state.params, state.model_state)),
            strict=True,
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5, err_msg=where)
        np.testing.assert_allclose(other_evaluation.loss, evaluation.loss, rtol=1e-4)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_devices_add_up_all_gradients_in_one_collective_of_one_array(make_config, mode):
    # In a collective of several arrays gloo's processes wait for each other once for each of them.
    *_, programs, _ = set_up(make_config("configs/mlp.py", batch_size=48, parallel=mode), 2)
    run = programs[1].run
    program = getattr(run, "func", run)
    (collective,) = filter(None, map(COLLECTIVE.match, program.as_text().splitlines()))
    assert collective["kind"] == "all-reduce"
    assert collective["type"] == f"f32[{384_854 + 2}]{{0}}"  # all parameters, loss and accuracy


def test_several_steps_per_call_do_what_single_steps_do(make_config):
    data, state, programs, _ = set_up(make_config("configs/mlp.py", batch_size=48), 1, steps_per_call=3)
    scanned_state, order = jax.tree.map(jnp.copy, state), data.epoch_order(0)
    single, scanned = [], []
    for _ in range(6):
        state, metrics = programs[1].run(state, data.train_rows, order, data.seed)
        single.append(metrics["loss"])
    for _ in range(2):
        scanned_state, metrics = programs[3].run(scanned_state, data.train_rows, order, data.seed)
        scanned += [*metrics["loss"]]
    assert scanned_state.step == state.step == 6
    np.testing.assert_allclose(scanned, single, rtol=1e-5)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_steps_and_evaluations_take_nothing_from_the_host(make_config, mode):
    config = make_config("configs/mlp.py", batch_size=40, parallel=mode)
    data, state, programs, eval_programs = set_up(config, num_devices=8)
    order = data.epoch_order(0)
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            state, _ = programs[1].run(state, data.train_rows, order, data.seed)
        eval_programs[1].run(*state.evaluated, data.eval_batches["test"][0])


def test_an_epoch_that_calls_do_not_divide_gets_a_single_step_too(make_config):
    config = make_config("configs/mlp.py", batch_size=48)  # 480 images: 10 steps
    assert set(set_up(config, 1, steps_per_call=3)[2]) == {3, 1}
    assert set(set_up(config, 1, steps_per_call=5)[2]) == {5}


def test_steps_per_call_is_one_on_cpus_and_never_more_than_an_epoch(make_config):
    config = make_config("configs/mlp.py")
    assert steps.choose_steps_per_call(config, whole_batches=7) == 1
    with config.unlocked():
        config.steps_per_call = 50
    assert steps.choose_steps_per_call(config, whole_batches=7) == 7


@pytest.mark.parametrize(("num_devices", "mode"), [(1, "jit"), (8, "jit"), (8, "pmap")])
@pytest.mark.parametrize("steps_per_call", [1, 100])
def test_evaluation_is_exact_on_a_size_that_does_not_divide(strict_dtypes, num_devices, mode, steps_per_call):
    """A fake model whose every answer is known: it says the label that is written into the first pixel."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 203).astype(np.uint8)
    answers = np.where(rng.random(203) < 0.7, labels, (labels + 1) % 10)
    images = np.zeros((203, 28, 28), np.uint8)
    images[:, 0, 0] = answers

    class Oracle(nnx.Module):
        def __call__(self, images, *, train=False, rngs=None):
            answer = jnp.round(images[:, 0, 0, 0] * 255).astype(int)
            # The answer first, then the classes in falling order: label 9 is second, 5 is in no top five.
            return jnp.arange(10.0) + 100 * jax.nn.one_hot(answer, 10)

    mesh = parallel.make_mesh(jax.devices()[:num_devices])
    batches = parallel.replicate(input_pipeline.eval_calls(images, labels, 64, steps_per_call), mesh)
    program = parallel.compile_step(
        functools.partial(steps.eval_steps, graphdef=nnx.split(Oracle())[0], normalization="unit"),
        ({}, {}, batches[0]),
        mesh=mesh,
        parallel=mode,
    )
    state = steps.TrainState(step=jnp.int32(0), params={}, model_state={}, opt_state=())
    (evaluation,) = steps.evaluate({len(batches[0]["label"]): program}, state, batches)

    logits = np.arange(10.0) + 100 * np.eye(10)[answers]
    top5 = np.argsort(-logits, axis=1)[:, :5]
    log_softmax = logits - np.log(np.exp(logits - 110).sum(1, keepdims=True)) - 110
    assert evaluation.num_examples == 203
    np.testing.assert_array_equal(evaluation.predictions, answers)
    assert evaluation.predictions.dtype == np.uint8
    assert evaluation.accuracy == (answers == labels).mean()
    assert evaluation.top5_accuracy == (top5 == labels[:, None]).any(1).mean()
    assert evaluation.per_class_accuracy == [(answers == labels)[labels == c].mean() for c in range(10)]
    np.testing.assert_allclose(evaluation.loss, -log_softmax[np.arange(203), labels].mean(), rtol=1e-6)


def test_the_training_step_is_adam_on_the_mean_loss(make_config):
    """One step against the same mathematics written down plainly."""
    plain = {"augment__crop_padding": 0, "augment__flip": False, "augment__random_erasing": 0.0}
    config = make_config("configs/speedrun.py:95", batch_size=48, label_smoothing=0.1, model__stem_width=4,
                         model__widths=(4, 8, 12), data__normalization="standard", optimizer__name="adam",
                         optimizer__weight_decay=0.0, optimizer__keep_norm=False, schedule__name="constant",
                         ema_decay=0.0, selection__easy=0.0, **plain)  # fmt: skip
    data, state, programs, _ = set_up(config, 1)
    before = jax.device_get(state)
    order = np.asarray(data.epoch_order(0))
    after, metrics = programs[1].run(state, data.train_rows, data.epoch_order(0), data.seed)

    dataset = fashion_mnist.load("sample")
    images = (dataset.train_images[order[:48]][..., None] / 255 - 0.28604) / 0.35302
    targets = 0.9 * np.eye(10)[dataset.train_labels[order[:48]]] + 0.01
    graphdef, params, rest = fresh_model(config)

    def loss_fn(params):
        logits = nnx.merge(graphdef, params, rest, copy=True)(jnp.float32(images), train=True)
        return -(targets * jax.nn.log_softmax(logits)).sum(1).mean()

    for got, expected in zip(jax.tree.leaves(before.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)  # the initialisation is the seed's
    loss, grads = jax.jit(jax.value_and_grad(loss_fn), compiler_options=COMPILES_SOONER)(params)
    tx = optax.adam(config.optimizer.learning_rate)
    updates, _ = tx.update(grads, tx.init(params))
    expected_params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for got, expected in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected_params), strict=True):
        # Adam's first step is the sign of the gradient times the rate: where that is noise, so is the step.
        assert np.mean(np.abs(got - expected) > 1e-5) < 0.01


def test_the_moving_average_of_weights_and_statistics_is_what_is_evaluated(make_config):
    config = make_config("configs/mlp.py:best", batch_size=40, ema_decay=0.15, model__widths=(32, 32))
    data, state, programs, eval_programs = set_up(config, 1)
    average = jax.device_get((state.params, state.model_state))
    for decay in (1 / 10, 0.15, 0.15):  # 2 / 11 and 3 / 12 are above 0.15
        state, _ = programs[1].run(state, data.train_rows, data.epoch_order(0), data.seed)
        average = jax.tree.map(
            lambda old, new, decay=decay: decay * old + (1 - decay) * new,
            average,
            jax.device_get((state.params, state.model_state)),
        )
        for got, expected in zip(jax.tree.leaves(state.average), jax.tree.leaves(average), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)

    batches = data.eval_batches["test"]
    params, model_state = state.average
    averages = state.replace(params=params, model_state=model_state, average=None)
    loss, same, other = (
        steps.evaluate(eval_programs, state, batches)[0].loss
        for state in (state, averages, state.replace(average=None))
    )
    assert loss == same != other


@pytest.mark.parametrize(("num_devices", "mode"), [(1, "jit"), (8, "jit"), (8, "pmap")])
def test_a_step_remembers_the_losses_of_its_rows(make_config, num_devices, mode):
    config = make_config("configs/cnn1.py", num_epochs=10, batch_size=40, selection__easy=0.5, parallel=mode)
    mesh = parallel.make_mesh(jax.devices()[:num_devices])
    data = input_pipeline.load(config, mesh)
    tx, _ = make_optimizer(config, data.steps_per_epoch)
    graphdef, state = steps.init_state(config, tx, mesh, data.seed, num_rows=480)
    (programs, *_), _ = steps.compile_programs(config, mesh, data, graphdef, tx, state, 1)
    order = data.epoch_order(0)
    for step in range(2):
        state, metrics = programs[1].run(state, data.train_rows, order, data.seed)
        assert state.losses is not None
        losses = np.asarray(state.losses["last"])
        seen = np.asarray(order)[: 40 * (step + 1)]
        assert np.isfinite(losses[seen]).all()
        assert np.isinf(np.delete(losses, seen)).all()
        np.testing.assert_allclose(losses[seen[-40:]].mean(), metrics["loss"], rtol=1e-5)
        assert np.isinf(state.losses["before_epoch"]).all()


def test_without_a_decay_there_is_no_average(make_config):
    state = set_up(make_config("configs/baseline.py", batch_size=40), 1)[1]
    assert state.average is None
    assert state.evaluated == (state.params, state.model_state)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_blends_labels_as_it_blends_images(make_config, kind):
    """The loss of a step against the same mathematics written down plainly."""
    config = make_config("configs/baseline.py", batch_size=48, augment__flip=True, **{f"augment__{kind}": 1.0})
    data, state, programs, _ = set_up(config, 1)
    graphdef, params, rest = fresh_model(config)
    order = np.asarray(data.epoch_order(0))[:48]
    _, metrics = programs[1].run(state, data.train_rows, data.epoch_order(0), data.seed)

    dataset, settings = fashion_mnist.load("sample"), config.augment.to_dict()

    @functools.partial(jax.jit, compiler_options=COMPILES_SOONER)
    def loss(images, labels):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 3), 0)
        keys = augment.example_keys(key, np.arange(48))
        images = augment.augment(keys, images, settings)
        images, share = augment.mix(keys, images, jnp.roll(images, -1, axis=0), settings)
        targets = share[:, None] * labels + (1 - share[:, None]) * jnp.roll(labels, -1, axis=0)
        logits = nnx.merge(graphdef, params, rest)(images[..., None] / 255)
        return -(targets * jax.nn.log_softmax(logits)).sum(axis=1).mean()

    expected = loss(dataset.train_images[order], np.eye(10)[dataset.train_labels[order]])
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_each_stage_has_a_program_of_its_augmentation(make_config):
    config = make_config("configs/baseline.py", batch_size=48, num_epochs=3)
    with config.unlocked():
        for number, flip in enumerate([False, True, False]):
            config.stages[f"stage{number}"] = config_lib.stage(num_epochs=1)
            config.stages[f"stage{number}"].augment.flip = flip
    mesh = parallel.make_mesh(jax.devices()[:1])
    data = input_pipeline.load(config, mesh)
    tx, _ = make_optimizer(config, data.steps_per_epoch)
    graphdef, state = steps.init_state(config, tx, mesh, data.seed)
    programs, _ = steps.compile_programs(config, mesh, data, graphdef, tx, state, 1)
    plain, flipped, plain_again = (stage[1] for stage in programs)
    assert plain is plain_again
    losses = [
        float(
            program.run(jax.tree.map(jnp.copy, state), data.train_rows, data.epoch_order(0), data.seed)[1]["loss"]
        )
        for program in (plain, flipped)
    ]
    assert losses[0] != losses[1]


def test_dropout_drops_other_units_in_every_step(make_config):
    # The same images and, at a learning rate of zero, the same parameters: the masks are all that can differ.
    config = make_config("configs/mlp.py", batch_size=480, optimizer__learning_rate=0.0)
    first, second = train(config, num_devices=1, num_calls=2)
    assert first[1] != second[1]
    assert first[2].loss == second[2].loss


def test_every_step_sees_its_own_batch_and_an_epoch_sees_each_image_once(make_config):
    config = make_config("configs/mlp.py", batch_size=50)
    data = input_pipeline.load(config, parallel.make_mesh(jax.devices()[:1]))
    first, second = np.asarray(data.epoch_order(0)), np.asarray(data.epoch_order(1))
    assert data.steps_per_epoch == 9
    assert len(first) == 450
    assert len(set(first.tolist())) == 450
    assert not np.array_equal(first, second)
    assert set(first.tolist()) != set(second.tolist())  # others are left out


def test_a_kept_remainder_is_a_smaller_step_on_the_rows_that_fill_no_batch(make_config):
    whole = {"optimizer__name": "sgd", "optimizer__learning_rate": 0.1}
    config = make_config("configs/baseline.py", batch_size=64, data__remainder="keep", **whole)
    data, state, programs, _ = set_up(config, 1)
    order = data.epoch_order(0)
    assert (data.steps_per_epoch, data.images_per_epoch, len(order)) == (8, 480, 480)
    assert sorted(order.tolist()) == list(range(480))
    # The same step by itself, as the first of an epoch of batches of 32 that begins with these rows.
    alone = make_config("configs/baseline.py", batch_size=32, **whole)
    last_rows = jnp.concatenate([order[448:], order[:448]])
    alone_state, alone_metrics = set_up(alone, 1)[2][1].run(
        jax.tree.map(jnp.copy, state), data.train_rows, last_rows, data.seed
    )
    state = dataclasses.replace(state, step=jnp.int32(7))
    state, metrics = programs[0].run(state, data.train_rows, order, data.seed)
    assert state.step == 8
    np.testing.assert_allclose(metrics["loss"], alone_metrics["loss"], rtol=1e-6)
    for got, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone_state.params), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_a_kept_remainder_that_devices_cannot_share_is_refused(make_config):
    config = make_config("configs/mlp.py", batch_size=56, data__remainder="keep")  # 480 = 8 * 56 + 32
    assert input_pipeline.load(config, parallel.make_mesh()).remainder == 32
    config = make_config("configs/mlp.py", batch_size=72, data__remainder="keep", data__split="default")
    with pytest.raises(UserError, match=r"config\.data\.remainder=keep .* on 8 images, which 3 devices"):
        input_pipeline.load(config, parallel.make_mesh(jax.devices()[:3]))


@pytest.mark.parametrize("spec", ["configs/cnn4.py", "configs/resnet.py:8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_steps_lower_for_every_platform(make_config, spec, dtype):
    config = make_config(spec, batch_size=40, dtype=dtype, optimizer__name="muon")
    mesh = parallel.make_mesh(jax.devices()[:1])
    data = input_pipeline.load(config, mesh)
    tx, _ = make_optimizer(config, data.steps_per_epoch)
    graphdef, state = steps.init_state(config, tx, mesh, data.seed)
    train_step = functools.partial(
        steps.train_step,
        graphdef=graphdef,
        tx=tx,
        batch_size=40,
        num_examples=40,
        normalization="unit",
        label_smoothing=0.1,
        ema_decay=0.0,
        augment=config.augment.to_dict(),
    )
    eval_steps = functools.partial(steps.eval_steps, graphdef=graphdef, normalization="unit")
    arguments = (state, data.train_rows, data.epoch_order(0), data.seed)
    batch = data.eval_batches["test"][0]
    for function, args in ((train_step, arguments), (eval_steps, (state.params, state.model_state, batch))):
        step = jax.jit(parallel.map_over(mesh, function))  # traced once for all
        for platform in ("cpu", "cuda", "tpu"):
            exported = jax.export.export(step, platforms=[platform])(*args)
            assert exported.platforms == (platform,)
            assert "stablehlo.convolution" in exported.mlir_module()


def test_a_batch_that_devices_cannot_share_is_refused_before_anything_is_compiled():
    mesh = parallel.make_mesh(jax.devices()[:8])
    parallel.check_batch_size("batch_size", 16, mesh)
    with pytest.raises(UserError, match=r"config\.batch_size is 100.*8 devices.*multiple of 8"):
        parallel.check_batch_size("batch_size", 100, mesh)


def test_flops_are_those_of_the_whole_batch_however_it_is_spread(make_config):
    config = make_config("configs/mlp.py", batch_size=480, optimizer__learning_rate=0.0)
    flops = [set_up(config, num_devices)[2][1].count_flops() for num_devices in (1, 8)]
    # Two per parameter forward; twice that backward but for the images' own gradient, 784 x 256. The rest is
    # dropout, Adam and the like.
    matmuls = 480 * (6 * 384_854 - 2 * 784 * 256)
    assert flops[0] == flops[1]
    np.testing.assert_allclose(flops[0], matmuls, rtol=0.05)


def test_unknown_models_and_arguments_are_named(make_config):
    with pytest.raises(UserError, match=r"one of .*mlp, .*cnn1"):
        steps.make_model(make_config("configs/mlp.py", model__name="lenet"), None, 0)
    with pytest.raises(UserError, match=r"'mlp'.*depth"):
        steps.make_model(make_config("configs/resnet.py:20", model__name="mlp"), None, 0)
    with pytest.raises(UserError, match="6n"):
        steps.make_model(make_config("configs/resnet.py:21"), None, 0)
