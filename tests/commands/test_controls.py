"""Controls: what a framework's script is asked for, what its answers become, and that a stopped call goes on."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from fmbench import reproduction
from fmbench.data import fashion_mnist, proof
from fmbench.errors import UserError
from fmbench.records import controls
from fmbench.studies import controls as study
from fmbench.system import peers

# Knows the true labels but for the first test image; what it was asked for is a line of asked.jsonl beside it.
FAKE_FRAMEWORK = """#!{python}
import json, sys
from pathlib import Path
import numpy as np

job = json.loads(Path(sys.argv[2]).read_text())
arrays = dict(np.load(job["arrays"]))
with Path({asked!r}).open("a") as file:
    sizes = {{name: len(array) for name, array in arrays.items()}}
    asked = {{"script": Path(sys.argv[1]).name, **job, "sizes": sizes}}
    print(json.dumps(asked), file=file)
if job["seed"] == {fails_with}:
    sys.exit("Traceback\\nno such layer")
print(json.dumps({{"system": "Fake 1.0", "versions": {{"fake": "1.0"}}, "num_params": 3}}), flush=True)
for stage in job["stages"]:
    for _ in range(stage["num_epochs"]):
        print(json.dumps({{"train_loss": 0.5, "train_accuracy": 0.75, "val_accuracy": 0.5}}), flush=True)
classes = {{}}
for number, _ in enumerate(job["stages"], start=1):
    test = arrays["test_labels"].copy()
    test[0] = (test[0] + 1) % 10
    classes |= {{f"{{number}}_test": test, f"{{number}}_validation": arrays["validation_labels"]}}
np.savez(job["predictions"], **classes)
"""


@pytest.fixture
def framework(tmp_path, monkeypatch):
    """Makes an interpreter of a framework that is none; returns the file of what it is asked."""
    sample = dataclasses.replace(fashion_mnist.load("sample"), version=proof.STANDARD)
    monkeypatch.setattr(fashion_mnist, "load", lambda *_: sample)
    asked = tmp_path / "asked.jsonl"

    def make(fails_with: int = -1) -> Path:
        script = tmp_path / "fake-python"
        script.write_text(FAKE_FRAMEWORK.format(python=sys.executable, asked=str(asked), fails_with=fails_with))
        script.chmod(0o755)
        for peer in peers.PEERS:
            monkeypatch.setenv(f"FMBENCH_{peer.upper()}_PYTHON", str(script))
        return asked

    return make


def train(results_dir: Path, names: str, *, num_seeds: int = 1) -> list[controls.ControlRecord]:
    study.train(peers.PEERS, names.split(","), num_seeds, results_dir)
    return controls.read_all(results_dir)


def jobs(asked: Path) -> list[dict]:
    return [json.loads(line) for line in asked.read_text().splitlines()]


def test_a_control_is_our_entry_in_its_own_framework(framework, tmp_path):
    asked = framework()
    (record,) = train(tmp_path, "fc-b")
    (job,) = jobs(asked)
    assert job["script"] == "control_torch.py"
    assert job["model"] == "fully_connected"
    assert job["arguments"] == {"widths": [392, 196, 98, 49], "num_dropouts": 3}
    assert (job["batch_size"], job["normalization"], job["optimizer"]["learning_rate"]) == (64, "symmetric", 7e-4)
    assert [stage["num_epochs"] for stage in job["stages"]] == [35]
    assert job["sizes"] == {
        **{"train_images": 384, "train_labels": 384, "validation_images": 96, "validation_labels": 96},
        **{"test_images": 200, "test_labels": 200},
    }
    assert (record.name, record.system, record.num_params) == ("fc-b-torch-seed0", "Fake 1.0", 3)
    assert (len(record.history), record.stages[0].test_accuracy) == (35, 0.995)
    assert record.val_predictions_sha256 is None  # kept of folds only


def test_both_stages_and_their_augmentation(framework, tmp_path):
    asked = framework()
    short, whole = train(tmp_path, "cnn1")
    assert (short.name, whole.name) == ("cnn1+num_epochs=10-keras-seed0", "cnn1-keras-seed0")
    assert [len(record.stages) for record in (short, whole)] == [1, 2]
    first, second = jobs(asked)[1]["stages"]
    assert not any(first["augment"].values())
    assert (second["augment"]["rotation"], second["augment"]["shear"]) == (8.0, 0.3)


def test_folds_are_ours_and_scored_on_what_was_held_out(framework, tmp_path):
    framework()
    records = [record for record in train(tmp_path, "baseline") if record.is_fold]
    assert [record.entry for record in records] == [f"baseline+fold={fold}of5" for fold in range(1, 6)]
    for record in records:
        assert (record.num_train, record.num_validation) == (384, 96)
        assert record.config["data"]["random_state"] == 1
        assert record.stages[0].val_accuracy == 1


def test_what_was_done_is_not_done_again(framework, tmp_path, capsys):
    asked = framework(fails_with=1)
    with pytest.raises(UserError, match=r"fc-a-torch-seed1: ended with exit code 1: no such layer"):
        train(tmp_path, "fc-a", num_seeds=2)
    framework()
    train(tmp_path, "fc-a", num_seeds=2)
    assert [job["seed"] for job in jobs(asked)] == [0, 1, 1]
    assert "fc-a-torch-seed0: done before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("frameworks", "names", "said"),
    [
        (["kears"], [], r"--controls: there is no 'kears'; the nearest is keras; there are torch, keras\."),
        (["keras"], ["cn1"], r"--entries: there is no 'cn1'; the nearest (is|are) cnn1.*there are baseline, "),
        (["torch"], ["cnn1", "mlp"], r"none of cnn1, mlp was published in torch\."),
    ],
)
def test_what_there_is_not(frameworks, names, said, tmp_path):
    with pytest.raises(UserError, match=said):
        study.train(frameworks, names, 1, tmp_path)


def test_a_missing_environment_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FMBENCH_KERAS_PYTHON", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "argv", ["reproduction", "--controls=keras", f"--results_dir={tmp_path}"])
    with pytest.raises(SystemExit, match="2"):
        reproduction.main()
    assert capsys.readouterr().err.startswith("fmbench.reproduction: keras has no environment at ")


@pytest.mark.parametrize("which", ["test", "held out", "name", "field", "epochs", "config"])
def test_a_forged_control_is_refused(framework, tmp_path, which):
    framework()
    train(tmp_path, "baseline")
    path = tmp_path / "controls" / "baseline+fold=2of5-keras-seed0.json"
    record = json.loads(path.read_text())
    said = "is not what the predictions give"
    if which == "test":
        record["stages"][0]["test_accuracy"] = 1.0
    elif which == "held out":
        record["stages"][0]["val_accuracy"] = 0.9
    elif which == "name":
        record["seed"], said = 7, "its content says baseline.*seed7"
    elif which == "field":
        record["num_params"], said = "3", "field 'num_params'"
    elif which == "config":
        record["config"]["data"]["split"], said = 3, "config.data.split is 3"
    else:
        record["history"], said = record["history"][1:], "history has 9 epochs, the stages "
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=said):
        controls.read_all(tmp_path)


def test_what_is_no_plain_file_is_refused(framework, tmp_path):
    framework()
    train(tmp_path, "fc-a")
    path = tmp_path / "controls" / "fc-a-torch-seed0.json"
    path.unlink()
    os.mkfifo(path)  # whose reader would wait for ever
    with pytest.raises(UserError, match=r"cannot read the control .*no plain file"):
        controls.read_all(tmp_path)


def test_changed_predictions_are_refused(framework, tmp_path):
    framework()
    train(tmp_path, "fc-a")
    path = tmp_path / "controls" / "fc-a-torch-seed0.npy"
    classes = np.load(path)
    classes[0, 0] = (classes[0, 0] + 9) % 10  # right, this time
    np.save(path, classes)
    with pytest.raises(UserError, match=r"not the predictions of fc-a-torch-seed0\.json"):
        controls.read_all(tmp_path)
