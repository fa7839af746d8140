"""A training step by layers: the work of each, the time of each in a profile, and the page."""

import json
import os
import sys

import jax
import jax.numpy as jnp
import pytest
from fake_records import ENVIRONMENT
from flax import nnx

from fmbench import benchmark
from fmbench.errors import UserError
from fmbench.layers import BatchNorm, Conv, Dropout, max_pool
from fmbench.pages import throughput
from fmbench.records.schema import Environment
from fmbench.throughput import layers, measure
from fmbench.throughput.layers import FORWARD, GRADIENT, INPUT_GRADIENT, KERNEL_GRADIENT, Program, Row
from fmbench.throughput.measurements import Conditions, Layer, Measurements, Profile, Profiles, read_measurements
from fmbench.throughput.trace import EXECUTOR, RECORD, START, STOP, Event, operation_seconds
from fmbench.training import parallel

CONDITIONS = Conditions(
    created="2026-01-01T00:00:00+00:00",
    environment=Environment(**ENVIRONMENT),
    matmul_flops_per_sec={"float32": 1e9, "bfloat16": 2e9},
    memory_bytes_per_sec=1e8,
    rounds=3,
    seconds=2.0,
)


def make_profile(dtype="float32") -> Profile:
    """A step of 10 ms, of which a convolution has 6, where 2 would do, and pooling 3, where 1 would."""
    fields = {"dtype": dtype, "flops": 0.0}
    return Profile(
        batch_size=8,
        dtype=dtype,
        steps=4,
        step_seconds=0.01,
        unprofiled_step_seconds=0.009,
        layers=[
            Layer(layers=["pooling"], direction="gradient", bytes=1e5, seconds=3e-3, **fields),
            Layer(
                layers=["conv1", "conv2"],
                direction="forward",
                bytes=1e3,
                seconds=6e-3,
                **fields | {"flops": 2e6 if dtype == "float32" else 4e6},
            ),
        ],
    )


# The profile.


def on_cpu(name: str, start: float, end: float, module: str = "jit_step") -> Event:
    return Event(name, start, end, {"hlo_op": name, "hlo_module": module})


def test_threads_share_the_time_in_which_several_work():
    first = [
        Event(f"{EXECUTOR[0]}Execute", 0, 100),
        on_cpu("a", 0, 10),
        Event(RECORD, 1, 1, {"_p": 7}),  # a hands over a part of itself
        Event(f"{EXECUTOR[1]}a", 10, 12),  # which is no work, nor is what it hands over
        Event(RECORD, 11, 11, {"_p": 8}),
        on_cpu("of another program", 12, 90, "jit_eval"),
    ]
    second = [
        Event(START, 4, 4, {"_c": 7}),
        Event(STOP, 8, 8),
        on_cpu("b", 8, 12),
        Event(START, 20, 20, {"_c": 8}),
        Event(f"{EXECUTOR[0]}Execute (wait for completion)", 21, 60),
        on_cpu("c", 60, 65),
        Event(STOP, 70, 70),
    ]
    seconds = operation_seconds([first, second], "jit_step")
    assert {name: round(1e9 * time, 6) for name, time in seconds.items()} == {"a": 9, "b": 3, "c": 5}


def test_an_operation_within_another_has_its_own_time_alone():
    seconds = operation_seconds(
        [[on_cpu("while.1", 0, 10), on_cpu("body", 2, 5), on_cpu("body", 6, 7)]], "jit_step"
    )
    assert {name: round(1e9 * time, 6) for name, time in seconds.items()} == {"while.1": 6, "body": 4}


def test_operations_of_accelerators_are_found_by_stat_or_by_name():
    gpu = [Event("sm90_xmma_gemm", 0, 4, {"hlo_op": "cublas-gemm.1", "hlo_module": "jit_step"})]
    tpu = [Event("%fusion.3 = f32[8]{0} fusion(%p)", 0, 4)]
    assert operation_seconds([gpu, tpu], "jit_step") == {"cublas-gemm.1": 2e-9, "fusion.3": 2e-9}


# The work, and both together.


class Net(nnx.Module):
    """Convolution, batch norm, pooling, dropout, dense: on 6x6 images of 3 channels."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = Conv(3, 4, (3, 3), padding="SAME", rngs=rngs)
        self.norm = BatchNorm(4, rngs=rngs)
        self.dropout = Dropout(0.5)
        self.head = nnx.Linear(3 * 3 * 4, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(max_pool(self.norm(self.conv(x), use_running_average=False), 2))
        x = self.dropout(x, rngs=nnx.Rngs(dropout=0), train=True)
        return self.head(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def step():
    """Its gradient on 2 images, for the images too: the traced program, and the one of XLA."""
    graphdef, *states = nnx.split(layers.scoped(Net(nnx.Rngs(0))), nnx.Param, ...)
    params, rest = states

    def loss(params, x):
        return (nnx.merge(graphdef, params, rest, copy=True)(x) ** 2).sum()

    gradient = parallel.map_over(parallel.make_mesh(jax.devices()[:1]), jax.grad(loss, argnums=(0, 1)))
    arguments = params, jnp.ones((2, 6, 6, 3))
    text = jax.jit(gradient).lower(*arguments).compile().as_text() or ""
    return jax.make_jaxpr(gradient)(*arguments).jaxpr, Program(text)


KINDS = {"conv": "Conv", "norm": "BatchNorm", "dropout": "Dropout", "head": "Linear"}
X, Y, KERNEL = 2 * 6 * 6 * 3, 2 * 6 * 6 * 4, 3 * 3 * 3 * 4


def test_flops_and_bytes_of_a_layer_are_those_of_its_definition(step):
    work = {(one.place.path, one.direction): one for one in layers.count_work(step[0])}
    assert len(work) == 6 == len(list(layers.count_work(step[0])))
    # Of 6 positions by 3 taps on an axis two lie outside: 16 x 16 products of each image and pair of channels.
    convolution = {work["conv", direction].flops for direction in (FORWARD, KERNEL_GRADIENT, INPUT_GRADIENT)}
    assert convolution == {2 * 2 * 16 * 16 * 3 * 4}
    assert work["conv", FORWARD].bytes == 4 * (X + KERNEL + 4 + Y)
    assert work["conv", KERNEL_GRADIENT].bytes == 4 * (X + Y + KERNEL + 4)
    assert work["conv", INPUT_GRADIENT].bytes == 4 * (Y + KERNEL + X)
    dense = {work["head", direction].flops for direction in (FORWARD, KERNEL_GRADIENT, INPUT_GRADIENT)}
    assert dense == {2 * 2 * 36 * 5}
    assert work["head", FORWARD].bytes == 4 * (2 * 36 + 36 * 5 + 2 * 5)


def test_all_time_finds_a_layer_and_adds_up(step):
    work, program = list(layers.count_work(step[0])), step[1]
    seconds = {name: 1.0 for name, line in program.lines.items() if line.computation == program.entry}
    rows = layers.match(work, program, seconds, KINDS)
    assert sum(row.seconds for row in rows.values()) == len(seconds)
    for path in ("conv", "head"):
        assert all(rows[Row(path, at)].seconds >= 1 for at in (FORWARD, KERNEL_GRADIENT, INPUT_GRADIENT))
    for row in (Row("norm", FORWARD), Row("norm", GRADIENT), Row("pooling", FORWARD)):
        assert rows[row].seconds >= 1
        assert rows[row].bytes > 0
    assert {row.layer for row in rows} <= {*KINDS, "pooling", layers.REST, layers.BETWEEN, layers.ELSE}


GPU = """\
HloModule jit_step, is_scheduled=true

%fused (p: f32[2,6,6,4]) -> f32[2,6,6,4] {
  %p = f32[2,6,6,4]{3,2,1,0} parameter(0)
  ROOT %m = f32[2,6,6,4]{3,2,1,0} maximum(%p, %p), metadata={op_name="jit(step)/jvp(layer:norm)/max"}
}

%bare (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%q)
}

ENTRY %main (x: f32[2,6,6,3], k: f32[3,3,3,4], b: f32[4]) -> (f32[3,3,3,4], f32[4]) {
  %x = f32[2,6,6,3]{3,2,1,0} parameter(0)
  %k = f32[3,3,3,4]{3,2,1,0} parameter(1)
  %b = f32[4]{0} parameter(2)
  %conv.1 = (f32[2,6,6,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), custom_call_target="__cudnn$convForward", \
metadata={op_name="jit(step)/jvp(layer:conv)/conv_general_dilated"}
  %get-tuple-element = f32[2,6,6,4]{3,2,1,0} get-tuple-element(%conv.1), index=0
  %fusion = f32[2,6,6,4]{3,2,1,0} fusion(%get-tuple-element), kind=kLoop, calls=%fused
  %conv.2 = (f32[3,3,3,4]{3,2,1,0}, u8[64]{0}) custom-call(%x, %fusion), \
custom_call_target="__cudnn$convBackwardFilter", \
metadata={op_name="jit(step)/transpose(jvp(layer:conv))/conv_general_dilated"}
  %get-tuple-element.1 = f32[3,3,3,4]{3,2,1,0} get-tuple-element(%conv.2), index=0
  %fusion.1 = f32[4]{0} fusion(%b), kind=kLoop, calls=%bare
  ROOT %tuple = (f32[3,3,3,4]{3,2,1,0}, f32[4]{0}) tuple(%get-tuple-element.1, %fusion.1)
}
"""


def test_a_program_for_gpus_is_read_alike(step):
    seconds = {"conv.1": 1.0, "fusion": 2.0, "conv.2": 4.0, "fusion.1": 8.0}
    rows = layers.match(layers.count_work(step[0]), Program(GPU), seconds, KINDS)
    timed = {tuple(row): (cost.seconds, cost.bytes) for row, cost in rows.items() if cost.seconds}
    assert timed == {
        ("conv", FORWARD): (1, 4 * (X + KERNEL + 4 + Y)),
        ("norm", FORWARD): (2, 4 * 2 * Y),
        ("conv", KERNEL_GRADIENT): (4, 4 * (X + Y + KERNEL + 4)),
        (layers.ELSE, ""): (8, 4 * 2 * 4),
    }


def test_layers_that_do_as_much_are_one_row():
    rows = {
        Row("a", FORWARD): layers.Cost("float32", 8.0, 4.0, 1.0),
        Row("b", FORWARD): layers.Cost("float32", 8.0, 4.0, 2.0),
        Row("c", FORWARD): layers.Cost("float32", 9.0, 4.0, 4.0),
    }
    merged = layers.together(rows, dict.fromkeys("abc", "Conv"))
    assert [(layer.layers, layer.flops, layer.bytes, layer.seconds) for layer in merged] == [
        (["a", "b"], 16, 8, 3),
        (["c"], 9, 4, 4),
    ]


def test_a_real_step_is_profiled_in_a_process_of_its_own(tmp_path):
    (tmp_path / "small.py").write_text(
        "from fmbench.config import base_config\n"
        "def get_config(arg=''):\n"
        "    config = base_config()\n"
        "    config.model.name, config.batch_size, config.data.source = 'mlp', 17, 'sample'\n"
        "    return config\n"
    )
    profile = layers.profile(str(tmp_path / "small.py"), "float32", os.environ)
    shares = {tuple(layer.layers): layer.seconds / profile.step_seconds for layer in profile.layers}
    assert profile.batch_size == 17
    assert 0 < sum(shares.values()) <= 1
    assert shares["dense1",] > 0
    assert sum(layer.flops for layer in profile.layers) == 2 * 17 * (
        2 * 784 * 256 + 3 * (256 * 512 + 512 * 100 + 1000)
    )


# The command and the page.


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the section with steps that need no profile: exit code, standard error, results directory."""
    setting = measure.Setting(CONDITIONS, tmp_path, {})
    monkeypatch.setattr(measure, "prepare", lambda *_: setting)

    def profile(spec, dtype, environ):
        if "cnn1" in spec and dtype == "bfloat16":
            raise UserError(f"{spec}: no profile: out of luck")
        return make_profile(dtype)

    monkeypatch.setattr(layers, "profile", profile)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["benchmark", f"--results_dir={tmp_path / 'results'}", *flags])
        code = 0
        try:
            benchmark.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().err, tmp_path / "results"

    return run


def test_a_profile_that_fails_loses_no_other(run):
    code, said, results_dir = run("--sections=layers", "--configs=configs/cnn1.py,configs/mlp.py")
    assert code == 0
    assert "cnn1.py: no profile: out of luck" in said
    kept = {name: [one.dtype for one in it.profiles] for name, it in read_measurements(results_dir).layers.items()}
    assert kept == {"cnn1": ["float32"], "mlp": ["float32", "bfloat16"]}
    code, _, _ = run("--sections=layers", "--configs=configs/cnn1.py", "--dtype=bfloat16")
    assert code == 0
    assert kept["cnn1"] == [one.dtype for one in read_measurements(results_dir).layers["cnn1"].profiles]


def test_the_page_says_layers_by_gap_and_is_checked(run):
    _, _, results_dir = run("--sections=layers", "--configs=configs/mlp.py")
    page = (results_dir / "rooflines.md").read_text()
    table = [
        line.split(" | ")
        for line in page.partition("**float32**")[2].partition("**bf")[0].splitlines()
        if "|" in line
    ]
    assert [[cell.strip("| *") for cell in line] for line in table[2:]] == [
        ["conv1 and 1 more", "forward", "0.002", "0.001", "2.00", "6.00", "33.3", "4.00"],
        ["pooling", "gradient", "0", "0.1", "1.00", "3.00", "33.3", "2.00"],
        ["no operation seen", "", "0", "0", "0.00", "1.00", "-", "1.00"],
        ["step", "", "0.002", "0.101", "3.00", "10.0", "30.0", "7.00"],
    ]
    assert run("--check")[0] == 0
    (results_dir / "rooflines.md").write_text(page.replace("6.00", "5.00"))
    assert run("--check")[0] == 1
    assert run("--render")[0] == 0
    assert (results_dir / "rooflines.md").read_text() == page


def test_the_largest_gaps_stand_beside_the_table_and_old_files_render(tmp_path):
    old = json.loads((benchmark.Path(__file__).parents[2] / "results" / "throughput.json").read_text())
    old.pop("layers", None)
    measured = Measurements.model_validate_json(json.dumps(old))
    assert list(throughput.render_pages({"cpu": measured}, tmp_path)) == [tmp_path / "throughput.md"]
    profiles = Profiles(conditions=CONDITIONS, config_file="configs/mlp.py", profiles=[make_profile()])
    new = measured.model_copy(update={"layers": {"mlp": profiles}})
    pages = throughput.render_pages({"cpu": new}, tmp_path)
    assert list(pages) == [tmp_path / "throughput.md", tmp_path / "rooflines.md"]
    assert (
        "- float32: of 9.00 ms a step, conv1 and 1 more, forward 4.00 ms (6.00, at the least 2.00, 33.3 %); "
        "pooling, gradient 2.00 ms (3.00, at the least 1.00, 33.3 %)." in pages[tmp_path / "throughput.md"]
    )
