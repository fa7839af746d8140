"""Optimizers and schedules against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmbench import entries
from fmbench.errors import UserError
from fmbench.training.optimizer import make_optimizer, make_schedule, orthogonal

PARAMS = {
    "conv": {"kernel": jnp.full((3, 3, 2, 4), 0.5), "bias": jnp.full(4, 0.5)},
    "dense": {"kernel": jnp.full((8, 4), 0.5)},
    "head": {"kernel": jnp.full((4, 10), 0.5)},
}
GRADS = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(0).standard_normal(x.shape), jnp.float32), PARAMS)


def one_update(config, grads=GRADS):
    tx, _ = make_optimizer(config, steps_per_epoch=10)
    return tx.update(grads, tx.init(PARAMS), PARAMS)[0]


def test_sgd_decays_kernels_only(make_config):
    config = make_config(
        "configs/resnet.py:20",
        optimizer__weight_decay=0.1,
        optimizer__learning_rate=0.5,
        optimizer__nesterov=False,
        schedule__name="constant",
    )
    updates = one_update(config)
    np.testing.assert_allclose(
        updates["conv"]["kernel"], -0.5 * (GRADS["conv"]["kernel"] + 0.1 * 0.5), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(updates["conv"]["bias"], -0.5 * GRADS["conv"]["bias"], rtol=1e-6)


def test_nesterov(make_config):
    config = make_config("configs/resnet.py:20", optimizer__weight_decay=0.0, schedule__name="constant")
    updates = one_update(config)
    np.testing.assert_allclose(updates["conv"]["bias"], -0.1 * 1.9 * GRADS["conv"]["bias"], rtol=1e-5)


def test_adam_first_step_is_the_sign(make_config):
    updates = one_update(make_config("configs/mlp.py"))
    np.testing.assert_allclose(updates["dense"]["kernel"], -1e-3 * jnp.sign(GRADS["dense"]["kernel"]), rtol=1e-3)


def test_adamw_decay_is_decoupled(make_config):
    plain = one_update(make_config("configs/mlp.py"))
    decayed = one_update(make_config("configs/mlp.py", optimizer__name="adamw", optimizer__weight_decay=0.1))
    difference = jax.tree.map(lambda a, b: a - b, decayed, plain)
    np.testing.assert_allclose(difference["conv"]["kernel"], -1e-3 * 0.1 * 0.5, rtol=1e-2)
    np.testing.assert_array_equal(difference["conv"]["bias"], 0)


def test_muon_orthogonalises_convolutions_too(make_config):
    config = make_config("configs/mlp.py", optimizer__name="muon", optimizer__learning_rate=1.0)
    updates = one_update(config)
    for matrix in (updates["conv"]["kernel"].reshape(18, 4), updates["dense"]["kernel"]):
        singular_values = np.linalg.svd(matrix, compute_uv=False)
        assert singular_values.max() / singular_values.min() < 2  # the gradient's own ratio is above
    raw = np.linalg.svd(GRADS["dense"]["kernel"], compute_uv=False)
    assert raw.max() / raw.min() > 2


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_that_of_optax(make_config, nesterov):
    """Three updates, with weight decay and a rate that falls."""
    muon = {"name": "muon", "learning_rate": 0.1, "momentum": 0.6, "nesterov": nesterov, "weight_decay": 0.3}
    muon["adam_factor"] = 0.2
    settings = {f"optimizer__{name}": value for name, value in muon.items()}
    tx, schedule = make_optimizer(make_config("configs/mlp.py", schedule__name="linear", **settings), 10)
    dimensions = {
        "conv": {"kernel": optax.contrib.MuonDimensionNumbers((0, 1, 2), 3), "bias": None},
        "dense": {"kernel": optax.contrib.MuonDimensionNumbers(0, 1)},
        "head": {"kernel": None},
    }
    stock = optax.contrib.muon(
        schedule,
        beta=0.6,
        nesterov=nesterov,
        weight_decay=0.3,
        muon_weight_dimension_numbers=dimensions,
        adam_learning_rate=lambda step: 0.2 * schedule(step),
    )
    params, state, stock_state = PARAMS, tx.init(PARAMS), stock.init(PARAMS)
    for factor in (1.0, -2.0, 3.0):
        grads = jax.tree.map(lambda x, factor=factor: factor * x**2 + x, GRADS)
        updates, state = tx.update(grads, state, params)
        expected, stock_state = stock.update(grads, stock_state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), updates, expected)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("shape", [(36, 4), (4, 36), (1152, 128), (64, 64)], ids=str)
@pytest.mark.parametrize("condition", [1e1, 1e6])
def test_orthogonal_takes_the_five_steps_of_newton_and_schulz(shape, condition):
    """As the singular values tell, in double precision."""
    left, _, right = np.linalg.svd(np.random.default_rng(0).standard_normal(shape), full_matrices=False)
    singular_values = np.geomspace(1, 1 / condition, min(shape))
    matrix = jnp.asarray(left * singular_values @ right, jnp.float32)
    expected = singular_values / np.linalg.norm(singular_values)
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    actual = orthogonal(matrix) / np.linalg.norm(singular_values)
    np.testing.assert_allclose(actual, left * expected @ right, rtol=0, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_array_equal(orthogonal(jnp.zeros(shape)), 0)


def test_muon_leaves_the_head_and_the_biases_to_adam(make_config):
    muon = {"optimizer__name": "muon", "optimizer__learning_rate": 1.0, "optimizer__adam_factor": 0.1}
    updates = one_update(make_config("configs/mlp.py", **muon))
    for grads, update in [
        (GRADS["head"]["kernel"], updates["head"]["kernel"]),
        (GRADS["conv"]["bias"], updates["conv"]["bias"]),
    ]:
        np.testing.assert_allclose(update, -0.1 * jnp.sign(grads), rtol=1e-3)  # Adam's first step


def test_kept_norms_are_those_of_the_kernels_before_and_directions_those_of_the_update(make_config):
    plain = make_config("configs/mlp.py", optimizer__name="muon", optimizer__learning_rate=1.0)
    kept = make_config(
        "configs/mlp.py", optimizer__name="muon", optimizer__learning_rate=1.0, optimizer__keep_norm=True
    )
    moved, turned = (optax.apply_updates(PARAMS, one_update(config)) for config in (plain, kept))
    before, long, short = (tree["conv"]["kernel"] for tree in (PARAMS, moved, turned))
    assert jnp.linalg.norm(long) > 1.05 * jnp.linalg.norm(before)
    np.testing.assert_allclose(jnp.linalg.norm(short), jnp.linalg.norm(before), rtol=1e-6)
    np.testing.assert_allclose(short / jnp.linalg.norm(short), long / jnp.linalg.norm(long), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(turned["dense"]["kernel"], moved["dense"]["kernel"])


def test_gradient_clipping(make_config):
    config = make_config(
        "configs/resnet.py:20",
        grad_clip_norm=0.01,
        optimizer__weight_decay=0.0,
        optimizer__nesterov=False,
        schedule__name="constant",
    )
    np.testing.assert_allclose(optax.tree.norm(one_update(config)), 0.1 * 0.01, rtol=1e-5)


def test_schedules_at_their_corners(make_config):
    def schedule(name, **fields):
        fields = {f"schedule__{key}": value for key, value in fields.items()}
        config = make_config("configs/mlp.py", num_epochs=10, schedule__name=name, **fields)
        return make_schedule(config, steps_per_epoch=100)

    step = schedule("step")
    np.testing.assert_allclose([step(499), step(501), step(751)], [1e-3, 1e-4, 1e-5], rtol=1e-6)
    cosine = schedule("cosine", warmup_epochs=2.0)
    np.testing.assert_allclose(
        [cosine(step) for step in (0, 99, 199, 200, 600, 1000)], [5e-6, 5e-4, 1e-3, 1e-3, 5e-4, 0], atol=1e-9
    )
    linear = schedule("linear", warmup_epochs=2.0)
    np.testing.assert_allclose(
        [linear(step) for step in (0, 99, 199, 200, 600, 800, 999)],
        [5e-6, 5e-4, 1e-3, 1e-3, 5e-4, 2.5e-4, 1.25e-6],
        atol=1e-9,
    )
    np.testing.assert_allclose([schedule("linear")(0), schedule("linear")(500)], [1e-3, 5e-4], rtol=1e-6)
    onecycle = schedule("onecycle", warmup_epochs=2.0)
    np.testing.assert_allclose([onecycle(0), onecycle(200)], [1e-3 / 25, 1e-3], rtol=1e-5)
    np.testing.assert_allclose(onecycle(1000), 1e-3 / 25 / 1e4, rtol=1e-2)
    assert schedule("constant")(10**6) == 1e-3


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "linear", "onecycle"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 7])
def test_every_step_that_is_paid_for_updates(make_config, name, warmup_steps):
    config = make_config(
        "configs/mlp.py", num_epochs=2, schedule__name=name, schedule__warmup_epochs=warmup_steps / 5
    )
    schedule = make_schedule(config, steps_per_epoch=5)
    rates = np.array([schedule(step) for step in range(10)])
    assert rates.min() > 0
    assert rates.max() <= 1e-3 * (1 + 1e-6)
    if name in ("cosine", "linear") and warmup_steps:
        expected = 1e-3 * np.arange(1, warmup_steps + 1) / warmup_steps
        np.testing.assert_allclose(rates[:warmup_steps], expected, rtol=1e-6)


def test_the_schedule_begins_anew_with_each_stage(make_config):
    config = make_config("configs/cnn1.py", schedule__name="cosine", optimizer__learning_rate=0.5)
    with config.unlocked():
        config.stages.stage2.learning_rate = 0.1
    schedule = make_schedule(config, steps_per_epoch=10)  # 100 steps, then 500
    np.testing.assert_allclose([schedule(0), schedule(50)], [0.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose([schedule(100), schedule(350)], [0.1, 0.05], rtol=1e-6)
    np.testing.assert_allclose([schedule(99.999), schedule(600)], 0, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer__name": "adma"}, "one of sgd, adam, adamw, muon"),
        ({"schedule__name": "square"}, "one of constant, step, cosine, linear, onecycle"),
        ({"schedule__name": "cosine", "schedule__warmup_epochs": 100.0}, "below the number of epochs, 100"),
        ({"optimizer__weight_decay": 0.1}, "use adamw"),
    ],
)
def test_what_makes_no_optimizer_is_named(make_config, overrides, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(make_config("configs/mlp.py", **overrides), steps_per_epoch=10)


# Somebody else's.


def test_an_optimizer_by_its_import_path_has_the_configs_fields(make_config):
    config = make_config(
        "configs/mlp.py", optimizer__name="optax:lion", optimizer__b1=0.7, optimizer__weight_decay=0.1
    )
    expected = optax.lion(1e-3, b1=0.7, b2=0.999, weight_decay=0.1)  # b2 as config.py has it
    tx, _ = make_optimizer(config, steps_per_epoch=10)
    state, expected_state = tx.init(PARAMS), expected.init(PARAMS)
    for grads in (GRADS, jax.tree.map(lambda x: x[::-1], GRADS)):  # b2 shows in the second step
        updates, state = tx.update(grads, state, PARAMS)
        expected_updates, expected_state = expected.update(grads, expected_state, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, updates, expected_updates)


def test_a_schedule_by_its_import_path_begins_anew_with_each_stage(make_config):
    config = make_config(
        "configs/cnn1.py",
        schedule__name="outside:triangle",
        schedule__warmup_epochs=2.0,
        stages__stage1__learning_rate=1.0,
        stages__stage2__learning_rate=10.0,
    )
    schedule = make_schedule(config, steps_per_epoch=3)
    rates = [float(schedule(step)) for step in (0, 3, 6, 29, 30, 33, 36)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 1, 0, 5, 10], rtol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"optimizer__name": "adamm"}, "it must be one of sgd, adam, adamw, muon, or an import path"),
        ({"optimizer__name": "adamm"}, "the nearest are adam, adamw."),
        ({"optimizer__name": "outside:adam"}, "module 'outside' has no 'adam'"),
        ({"optimizer__name": "outside:takes_no_rate"}, "does not take learning_rate and also needs rate"),
        ({"optimizer__name": "outside:momentum", "optimizer__weight_decay": 0.5}, "does not take weight_decay"),
        ({"optimizer__name": "outside:returns_no_optimizer"}, "must return an optax.GradientTransformation"),
        ({"optimizer__name": "outside:fails"}, "which fails: RuntimeError: boom ("),
        ({"optimizer__name": "outside:A_NUMBER"}, "is no function but a int"),
        ({"schedule__name": "cosin"}, "the nearest is cosine."),
        ({"schedule__name": "outside:takes_the_rate_alone"}, "does not take num_steps, steps_per_epoch"),
        ({"schedule__name": "outside:returns_no_schedule"}, "whose schedule fails: TypeError"),
        ({"schedule__name": "outside:returns_two_rates"}, "it must return an optax.Schedule"),
        ({"schedule__name": "outside:fails"}, "which fails: RuntimeError: boom ("),
    ],
)  # fmt: skip
def test_what_is_missing_from_somebody_elses_is_said_in_one_line(make_config, overrides, said):
    with pytest.raises(UserError) as error:
        make_optimizer(make_config("configs/mlp.py", **overrides), steps_per_epoch=10)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_fields_that_a_config_file_adds_are_arguments(tmp_path):
    path = tmp_path / "tests_mine.py"
    lines = ("optimizer.name = 'outside:momentum'", "optimizer.{} = 0.25", "schedule.name = 'outside:triangle'")
    text = "from fmbench.config import base_config\n\ndef get_config(field):\n    config = base_config()\n"
    body = "".join(f"    config.{line}\n" for line in (*lines, "schedule.floor = 0.5"))
    path.write_text(f"{text}{body.replace('.{} =', '[field] =')}    return config\n")
    tx, schedule = make_optimizer(entries.load(f"{path}:beta"), steps_per_epoch=10)
    assert float(schedule(0)) == 0.5
    updates = tx.update(GRADS, tx.init(PARAMS), PARAMS)[0]
    np.testing.assert_allclose(updates["head"]["kernel"], -0.5 * 0.25 * GRADS["head"]["kernel"], rtol=1e-6)
    with pytest.raises(UserError, match="does not take gamma"):
        make_optimizer(entries.load(f"{path}:gamma"), steps_per_epoch=10)


def test_muon_needs_a_head(make_config):
    tx, _ = make_optimizer(make_config("configs/mlp.py", optimizer__name="muon"), steps_per_epoch=10)
    with pytest.raises(UserError, match="the model has conv, dense: call its last layer head"):
        tx.init({name: PARAMS[name] for name in ("conv", "dense")})
