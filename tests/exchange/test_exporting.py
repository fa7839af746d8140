"""Exported models compute what the record of their run says, without fmbench; or nothing is there."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import yaml
from fake_models import arbitrary_model
from fake_records import make_record
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from fmbench import config, export
from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.exchange import folder, onnx_graph, program, stablehlo
from fmbench.models import exported, split_model
from fmbench.records import schema, store
from fmbench.system import runtime, sealed
from fmbench.training import inference

# Convolutions, batch norms with statistics, max-pooling.
DESCRIPTION: dict[str, Any] = {
    "model": {"name": "cnn4"},
    "dtype": "float32",
    "normalization": "standard",
    "class_names": list(fashion_mnist.CLASS_NAMES),
}
WITHOUT_FMBENCH = """
import sys
sys.modules.update(dict.fromkeys(["fmbench", "flax", "orbax"]))  # importing one fails
import jax, numpy
call = jax.export.deserialize(bytearray(open("model.bin", "rb").read())).call
images = numpy.load(sys.argv[1])
logits = numpy.concatenate([call(images[:7]), call(images[7:])])
assert (logits.argmax(axis=1) == numpy.load("record.npy")).all()
print(logits.dtype, logits.shape)
"""


@pytest.fixture(scope="module")
def dataset() -> fashion_mnist.Dataset:
    return fashion_mnist.load("sample")


@pytest.fixture(scope="module")
def workdir(dataset, tmp_path_factory) -> Path:
    """Of a run that might have been; tests work on copies, or only read."""
    return write_run(tmp_path_factory.mktemp("work"), dataset, arbitrary_model("cnn4"), DESCRIPTION)


def write_run(directory: Path, dataset, model: nnx.Module, description: dict[str, Any], **changes: Any) -> Path:
    exported.export_model(directory / "model", *split_model(model)[1:], description)
    predictions = inference.logits(model, description, dataset.test_images).argmax(axis=1)
    record = make_record(
        config={
            "data": config.to_json(config.base_config())["data"] | {"source": "sample"},
            "eval_batch_size": 150,
        },
        data_version=dataset.version,
        data_sha256=dataset.sha256,
        test_accuracy=float((predictions == dataset.test_labels).mean()),
        **{"predictions_sha256": schema.predictions_sha256(predictions)} | changes,
    )
    store.write(record, predictions, directory / "record")
    return directory


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `fmbench.export`: exit code, standard output and standard error."""
    monkeypatch.setattr(runtime, "set_up", lambda: None)  # is for a process of its own

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            export.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def test_safetensors_have_every_bit_and_what_rebuilds_the_net(workdir, tmp_path):
    assert folder.export(workdir, "safetensors", tmp_path / "out") is None
    expected = program.of(*exported.load_model(workdir)).arrays
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys() >= {"conv1.kernel", "norm1.var", "head.bias"}
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert {name: json.loads(metadata[name]) for name in DESCRIPTION} == DESCRIPTION
    for name in ("record.json", "record.npy"):
        assert (tmp_path / "out" / name).read_bytes() == (workdir / name).read_bytes()
    sealed.check(tmp_path / "out")


def test_stablehlo_runs_in_a_process_without_fmbench(workdir, dataset, tmp_path):
    comparison = folder.export(workdir, "stablehlo", tmp_path / "out")
    assert comparison and comparison.num_test == 200 and comparison.differing == 0
    np.save(tmp_path / "images.npy", dataset.test_images)
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_FMBENCH, tmp_path / "images.npy"],
        cwd=tmp_path / "out",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("float32 (200, 10)\n", 0), done.stderr
    read = jax.export.deserialize(bytearray((tmp_path / "out" / "model.bin").read_bytes()))
    assert read.platforms == ("cpu", "cuda", "tpu")
    text = (tmp_path / "out" / "model.mlir").read_text()
    assert "stablehlo.convolution" in text
    assert ".py" not in text  # nor where our files lie
    assert set(re.findall(r"custom_call @(\w+)", text)) == {
        "shape_assertion"
    }  # on the size of the batch; not ours


def test_onnx_gives_the_logits_in_onnxruntime(workdir, dataset, tmp_path):
    comparison = folder.export(workdir, "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 28, 28])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 10])
    expected = inference.logits(*exported.load_model(workdir), dataset.test_images)
    found = session.run(None, {"images": dataset.test_images})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert comparison and (comparison.num_test, comparison.differing) == (200, 0)
    assert comparison.largest == pytest.approx(np.abs(found - expected).max(), abs=1e-5)


def translated(call, *inputs: np.ndarray) -> None:
    """Whether a function of images alone is translated to what JAX makes of it."""
    graph = onnx_graph.graph_of(program.Program({}, call, {}, nnx.Module()))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    for images in inputs:
        (found,) = session.run(None, {"images": images})
        np.testing.assert_allclose(found, call([], jnp.asarray(images)), rtol=1e-5, atol=1e-6)


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
TRANSLATED = {
    "softplus, leaky ReLU, clip": lambda x: jnp.clip(jax.nn.softplus(jax.nn.leaky_relu(x - 0.5)), 0.6, 0.9),
    "sigmoid, tanh, powers": lambda x: (
        jax.nn.sigmoid(x) ** 3 + jnp.tanh(x) ** 2 + (x + 1) ** 0.5 + jax.lax.rsqrt(x + 1)
    ),
    "where, comparisons": lambda x: jnp.where((x > 0.5) & (x != 0.75), x, -x),
    "strided slice": lambda x: jnp.pad(x[:, 1::2, ::3], ((0, 0), (0, 14), (2, 16))),
    "shift": lambda x: jnp.pad(x, ((0, 0), (0, 1), (2, 1)))[:, 1:, 3:],
    "broadcast, concatenate": lambda x: jnp.concatenate([x[:, :14], jnp.ones_like(x[:, :14]) * 3], axis=1),
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "mean, transpose": lambda x: x - x.mean(axis=1, keepdims=True) + x.transpose(0, 2, 1),
}


@pytest.mark.parametrize("function", TRANSLATED.values(), ids=TRANSLATED)
def test_operations_of_onnx_are_those_of_jax(function):
    def call(arrays, images):
        return function(images.astype(jnp.float32) / 255).reshape(-1, 784)[:, 300:310]

    translated(call, IMAGES, IMAGES[:1])


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 0), (0, 1))])
def test_convolutions_and_pooling_of_onnx_are_those_of_jax(padding):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 1, 10)), jnp.float32)

    def call(arrays, images):
        x = images[..., None].astype(jnp.float32) / 255
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 1), padding, rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return nnx.max_pool(x, (2, 3), (2, 1), padding).max(axis=(1, 2))

    translated(call, IMAGES)


def test_what_onnx_does_not_have_is_named_in_one_line():
    def call(arrays, images):
        return jnp.sort(images.reshape(-1, 784).astype(jnp.float32))[:, :10]

    with pytest.raises(
        UserError, match=r"^--format=onnx: .* not translated to ONNX \(sort\); .*stablehlo takes it\.$"
    ):
        onnx_graph.graph_of(program.Program({}, call, {}, nnx.Module()))


def test_a_net_that_asks_for_the_batch_is_refused_in_one_line(tmp_path):
    def call(arrays, images):
        return images.reshape(-1, 784)[: min(len(images), 5), :10].astype(jnp.float32)

    net = program.Program({}, call, {"dtype": "float32"}, nnx.Module())
    for write, format in ((stablehlo.write, "stablehlo"), (onnx_graph.write, "onnx")):
        with pytest.raises(UserError, match=rf"\A--format={format} does not take this model: .+\Z"):
            write(net, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"dtype": "bfloat16"},
            "--format=onnx takes models that compute in float32, and this one does in bfloat16",
        ),
        (
            {"features": {"backbone": "vgg19", "weights": "", "image_size": 112, "preprocessing": "imagenet"}},
            "--format=onnx takes models of images, and this one is a head on the features of vgg19",
        ),
    ],
)
def test_models_that_onnx_cannot_have_are_refused(workdir, dataset, tmp_path, run, changes, said):
    shutil.copytree(workdir, tmp_path / "work")
    params, model_state = split_model(arbitrary_model("cnn4"))[1:]
    exported.export_model(tmp_path / "work" / "model", params, model_state, DESCRIPTION | changes)
    code, out, err = run(f"--model={tmp_path / 'work'}", "--format=onnx", f"--output={tmp_path / 'out'}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_damage_and_another_net_leave_nothing(workdir, tmp_path, run):
    flags = ("--format=onnx", f"--output={tmp_path / 'out'}")
    shutil.copytree(workdir, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "model" / "arrays")
    code, _, err = run(f"--model={tmp_path / 'work'}", *flags)
    assert code == 2 and "work/model holds no model of this version of fmbench, or a damaged one" in err
    code, _, err = run(f"--model={tmp_path / 'none'}", *flags)
    assert code == 2 and "none holds no record" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("logit", [0, np.nan])
def test_an_export_that_computes_otherwise_is_not_written(workdir, tmp_path, run, monkeypatch, logit):
    monkeypatch.setattr(
        folder, "_writer", lambda format: lambda *_: lambda images: np.full((len(images), 10), logit, np.float32)
    )
    code, out, err = run(f"--model={workdir}", "--format=stablehlo", f"--output={tmp_path / 'out'}")
    assert (code, out) == (2, "")
    assert "nothing is written, for it is not the same net. Compared on 200 test images: " in err
    assert not list(tmp_path.iterdir())


def test_predictions_unlike_the_record_are_counted(dataset, tmp_path, run):
    model = arbitrary_model("mlp")
    work = write_run(tmp_path / "work", dataset, model, DESCRIPTION | {"model": {"name": "mlp"}})
    other = np.load(work / "record.npy")
    other[:3] = (other[:3] + 1) % 10
    record = store.read(work / "record.json").model_copy(
        update={"predictions_sha256": schema.predictions_sha256(other)}
    )
    store.write(record, other, work / "record")
    code, out, _ = run(f"--model={work}", "--format=stablehlo", f"--output={tmp_path / 'out'}")
    assert code == 1
    assert "3 predictions not as in the record." in out
    assert "3 predictions not as in the record." in (tmp_path / "out" / "README.md").read_text()


def test_only_an_export_is_replaced_and_only_with_force(workdir, tmp_path, run):
    flags = (f"--model={workdir}", "--format=safetensors", f"--output={tmp_path / 'out'}")
    assert run(*flags)[0] == 0
    code, _, err = run(*flags)
    assert code == 2 and "is there already; name a new folder, or replace it with --force." in err
    (tmp_path / "out" / "left.txt").write_text("")
    assert run(*flags, "--force")[0] == 0
    assert not (tmp_path / "out" / "left.txt").exists()
    for precious in (workdir, workdir / "model", tmp_path):
        before = sorted(precious.rglob("*"))
        code, _, err = run(*flags[:2], f"--output={precious}", "--force")
        assert code == 2 and "is no export, so --force leaves it" in err
        assert sorted(precious.rglob("*")) == before


def test_the_card_says_what_the_record_says(workdir, tmp_path):
    folder.export(workdir, "safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["pipeline_tag"] == "image-classification"
    (result,) = metadata["model-index"][0]["results"]
    record = store.read(workdir / "record.json")
    assert result["metrics"][0] == {"type": "accuracy", "value": record.test_accuracy, "name": "Test accuracy"}
    assert result["dataset"] == {"type": "other", "name": "data of sample", "split": "test"}
    assert "datasets" not in metadata  # the hub's are not these
    assert "Every bit of the weights" in body
    named = {line.split(" | ")[0][2:] for line in body.splitlines() if line.startswith("| ")} - {"file"}
    assert named | {"README.md"} == {path.name for path in (tmp_path / "out").iterdir()}
