"""Forged records are refused or marked; what fmbench trains is neither."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fmbench import leaderboard as command
from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.records import plausibility, schema, store
from fmbench.records.schema import RunRecord
from fmbench.training.run import train_and_evaluate, train_seeds

RESULTS = Path(__file__).parents[2] / "results"
FORGED = RESULTS / "runs" / "speedrun-94-cpu-amd-epyc-2c-float32-seed0.json"


def changed(record: RunRecord, **changes) -> RunRecord:
    return RunRecord.model_validate(record.model_dump() | changes)


@pytest.fixture(scope="module")
def committed() -> dict[Path, RunRecord]:
    return store.read_all(RESULTS)


@pytest.fixture(scope="module")
def forged(committed) -> RunRecord:
    return committed[FORGED]


# What contradicts itself.


@pytest.mark.parametrize("folder", ["", "cross_validation"])
def test_no_committed_record_contradicts_itself(folder):
    records = store.read_all(RESULTS / folder)
    assert len(records) >= 15
    plausibility.refuse_contradictions(records)


def first(record: RunRecord, **changes) -> dict:
    """The history with a changed first epoch."""
    history = record.model_dump()["history"]
    return {"history": [history[0] | changes, *history[1:]]}


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (lambda r: {"history": []}, "history has not the epochs 1 to 6"),
        (lambda r: {"history": r.model_dump()["history"][:5]}, "history has not the epochs 1 to 6"),
        (lambda r: {"history": r.model_dump()["history"][::-1]}, "history has not the epochs 1 to 6"),
        (
            lambda r: {"history": r.model_dump()["history"][:1], "num_epochs": 1},
            "num_epochs is 1, but the config's",
        ),
        (lambda r: {"history": [], "num_epochs": 0}, "history has not the epochs"),
        (lambda r: first(r, step=1), "history.0.step is 1, but num_train / batch_size 117.188"),
        (
            lambda r: {"history": [*r.model_dump()["history"][:5], r.model_dump()["history"][5] | {"step": 600}]},
            "history.step does not grow",
        ),
        (lambda r: {"num_steps": 7020}, "num_steps is 7020, but history ends with step 702"),
        (lambda r: {"train_seconds": 1.0}, "train_seconds is 1, but that of all epochs in history"),
        (lambda r: {"train_core_seconds": 2.0}, "train_core_seconds is 2, but that of all epochs in history"),
        (lambda r: first(r, train_images_per_sec=1e6), "history.0.train_images_per_sec is 1e+06, but"),
        (lambda r: {"train_images_per_sec": 1e6}, "train_images_per_sec is 1000000.0, but history's median"),
        (lambda r: {"wall_seconds": 60.0}, "wall_seconds is 60, but the parts of it"),
        (
            lambda r: {"time_to_target": {"90": 1.0, "92": None, "94": None}},
            "time_to_target.90 is 1.0, but history gives None",
        ),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(forged, forge, said):
    record = changed(forged, **forge(forged))
    with pytest.raises(UserError, match="the record contradicts itself") as error:
        plausibility.refuse_contradictions({FORGED: record})
    assert said in str(error.value)
    assert str(FORGED) in str(error.value)


def test_what_the_watched_split_gave_must_be_what_the_history_says(committed):
    record = committed[RESULTS / "runs" / "cnn1+data.remainder=drop-cpu-intel-xeon-2c-float32-seed0.json"]
    assert "val_accuracy is 0.92, but that of the last epoch" in plausibility.contradiction(
        changed(record, val_accuracy=0.92)
    )
    seconds = record.time_to_target | {"92": 1.0}
    assert "time_to_target.92 is 1.0" in plausibility.contradiction(changed(record, time_to_target=seconds))
    history = [epoch | {"val_accuracy": None} for epoch in record.model_dump()["history"]]
    assert "val_accuracy is" in plausibility.contradiction(changed(record, history=history))


def test_typed_in_scores_of_a_fold_are_refused():
    path = RESULTS / "cross_validation" / "runs" / "baseline+fold=1of5-cpu-intel-xeon-2c-float32-seed0.json"
    record = store.read(path)
    history = record.model_dump()["history"]
    history[-1]["val_accuracy"] = 0.999
    forged = changed(record, val_accuracy=0.999, history=history)
    said = plausibility.contradiction(forged)
    assert said == "val_accuracy is 0.999, but the predictions give a test_accuracy of 0.897"


def test_a_run_that_was_not_completed_may_stop_anywhere(forged):
    plausibility.refuse_contradictions({FORGED: changed(forged, status="interrupted", history=[], num_epochs=0)})


@pytest.mark.parametrize(
    "overrides",
    [
        {"watch": "test", "num_epochs": 2},
        {"watch": "none", "num_epochs": 1},
        {"num_epochs": 5, "early_stopping_patience": 1, "optimizer__learning_rate": 0.0},
    ],
    ids=str,
)
def test_what_fmbench_trains_does_not_contradict_itself(make_config, tmp_path, overrides):
    config = make_config("configs/fc.py:a", **overrides)
    record = train_and_evaluate(config, tmp_path / "work", results_dir=tmp_path / "results")
    assert plausibility.contradiction(record) == ""
    assert record.num_epochs == min(2, config.num_epochs)


def test_seeds_that_train_together_do_not_contradict_themselves_and_are_no_copies(make_config, tmp_path):
    config = make_config("configs/fc.py:a", num_epochs=2)
    records = train_seeds(config, (0, 1), tmp_path / "work", results_dir=tmp_path / "results")
    assert [plausibility.contradiction(record) for record in records] == ["", ""]
    paths = {Path(record.name): record for record in records}
    assert not plausibility.marks(paths, {path: np.zeros(record.num_test, bool) for path, record in paths.items()})


# What no training leaves. Here errors are drawn: an image has a difficulty, and a net errs where that and its own
# luck come above a threshold.


def draw_wrong(num_nets: int, *, rate: float = 0.06, own: float = 0.4, seed: int = 0) -> np.ndarray:
    """Errors, bool (num_nets, 10000), at this rate; `own` is the share of luck in a net's."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal(10_000) + own * rng.standard_normal((num_nets, 10_000))
    return scores >= np.quantile(scores, 1 - rate, axis=1, keepdims=True)


@pytest.fixture
def honest(committed) -> tuple[dict[Path, RunRecord], dict[Path, np.ndarray]]:
    """Three seeds of speedrun-94 and one run each of five other entries, with drawn errors."""
    stems = [f"speedrun-94-cpu-amd-epyc-2c-float32-seed{seed}" for seed in range(3)]
    others = ("cnn1+data.remainder=drop", "cnn2+data.remainder=drop", "mlp", "baseline")
    stems += [f"{entry}-cpu-intel-xeon-2c-float32-seed0" for entry in others]
    stems.append("speedrun-93-cpu-amd-epyc-2c-float32-seed0")
    records = {path: committed[path] for path in (RESULTS / "runs" / f"{stem}.json" for stem in stems)}
    return records, dict(zip(records, draw_wrong(len(records)), strict=True))


def test_nets_that_share_errors_as_trained_ones_do_are_not_marked(honest):
    records, wrong = honest
    shared = plausibility.shared_errors(np.stack(list(wrong.values())))
    assert 0.5 < shared[0, 1:].mean() < 0.7
    assert plausibility.marks(records, wrong) == {}


def test_shared_errors_are_those_beyond_chance():
    # Of 100 images a gets 10 wrong, b 20; 6 both. Chance: 2. (6 - 2) / (10 - 2).
    a, b, c = np.zeros((3, 100), bool)
    a[:10] = True
    b[4:24] = True
    c[:] = False
    shared = plausibility.shared_errors(np.stack([a, b, c]))
    assert shared[0, 1] == pytest.approx(0.5)
    assert shared[0, 0] == pytest.approx(1)
    assert np.isnan(shared[0, 2])


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (lambda wrong: np.zeros(10_000, bool), "it makes no error on 10,000 images"),
        (lambda wrong: np.arange(10_000) % 25 == 0, "of its errors with other entries, trained nets 0.57 to 0.70"),
        (lambda wrong: wrong[1], "it shares 1.00 of its errors with speedrun-94-cpu-amd-epyc-2c-float32-seed1"),
        (
            lambda wrong: wrong[1] & (np.arange(10_000) % 10 != 0),
            "it shares 1.00 of its errors with speedrun-94-cpu-amd-epyc-2c-float32-seed1",
        ),
        (lambda wrong: wrong.mean(axis=0) > 0.6, "of its errors with other entries, trained nets"),
    ],
    ids=["the true labels", "random errors", "another seed's", "another's, corrected", "what most get wrong"],
)
def test_forged_predictions_are_marked(honest, forge, said):
    records, wrong = honest
    wrong[FORGED] = forge(np.stack(list(wrong.values())))
    assert said in plausibility.marks(records, wrong)[FORGED]
    # The copied one, too: nobody can tell which of them it is.
    assert len(plausibility.marks(records, wrong)) == (2 if "seed1" in said else 1)


def test_the_same_net_in_another_dtype_may_agree(honest, committed):
    records, wrong = honest
    twin = RESULTS / "runs" / "speedrun-94-cpu-amd-epyc-2c-bfloat16-seed0.json"
    records[twin] = committed[twin]
    wrong[twin] = wrong[FORGED]
    assert plausibility.marks(records, wrong) == {}


def test_few_images_or_few_others_say_nothing_of_errors(honest):
    records, wrong = honest
    few = {path: np.zeros(999, bool) for path in wrong}
    assert plausibility.marks(records, few) == {}
    alone = {path: np.arange(10_000) % (17 + i) == 0 for i, path in enumerate(list(wrong)[:5])}
    assert plausibility.marks(records, alone) == {}  # of two other entries


def with_seconds(record: RunRecord, seconds: float) -> RunRecord:
    """The record with all its times of training shortened alike, to this sum."""
    factor = seconds / record.train_seconds
    epochs = [
        epoch
        | {
            "train_seconds": factor * epoch["train_seconds"],
            "train_core_seconds": factor * epoch["train_core_seconds"],
            "train_images_per_sec": epoch["train_images_per_sec"] / factor,
        }
        for epoch in record.model_dump()["history"]
    ]
    speed = (record.train_images_per_sec or 0) / factor
    core_seconds = factor * record.train_core_seconds
    return changed(
        record, history=epochs, train_seconds=seconds, train_core_seconds=core_seconds, train_images_per_sec=speed
    )


@pytest.mark.parametrize("flops", [None, 1.0], ids=["its FLOPs", "no FLOPs"])
def test_a_time_that_no_processor_takes_is_marked(honest, committed, flops):
    records, wrong = honest
    path = RESULTS / "runs" / ("mlp-cpu-intel-xeon-2c-float32-seed0.json" if flops else FORGED.name)
    records[path] = with_seconds(records[path], 0.5 if flops else 1.0)
    if flops:  # which a forger may claim, but not fewer than the weights ask for
        records[path] = changed(records[path], flops_per_image=flops)
    assert plausibility.contradiction(records[path]) == ""
    (why,) = plausibility.marks(records, wrong).values()
    assert "GFLOP/s of a core, and none does more than 1,000" in why
    assert not plausibility.marks(records | {path: with_seconds(records[path], 60.0)}, wrong)


def test_core_seconds_that_no_processor_takes_are_marked(honest):
    records, wrong = honest
    history = [epoch | {"train_core_seconds": 0.1} for epoch in records[FORGED].model_dump()["history"]]
    records[FORGED] = changed(records[FORGED], history=history, train_core_seconds=0.6)
    assert "GFLOP/s of a core" in plausibility.marks(records, wrong)[FORGED]


def test_accelerators_have_a_bound_of_their_own(honest):
    records, wrong = honest
    gpu = records[FORGED].environment.model_dump() | {"device_platform": "gpu", "device_kind": "NVIDIA H200"}
    records[FORGED] = changed(with_seconds(records[FORGED], 1.0), environment=gpu)
    assert plausibility.marks(records, wrong) == {}
    records[FORGED] = with_seconds(records[FORGED], 0.001)
    assert "GFLOP/s of a device" in plausibility.marks(records, wrong)[FORGED]


@pytest.mark.parametrize("kept", [6, 1], ids=["whole", "its beginning"])
def test_a_copied_history_is_marked(honest, kept):
    records, wrong = honest
    one, other = (records[path] for path in list(records)[:2])
    config = one.config | {"early_stopping_patience": 0}
    records[FORGED] = changed(one, config=config, history=other.model_dump()["history"][:kept])
    assert (
        "its losses are those of speedrun-94-cpu-amd-epyc-2c-float32-seed1"
        in plausibility.marks(records, wrong)[FORGED]
    )


# On the page, with the true labels.


def publish(record: RunRecord, predictions: np.ndarray, labels: np.ndarray, results_dir: Path) -> None:
    """A record that says of these predictions what is true of them."""
    correct = predictions == labels
    per_class = [float(correct[labels == label].mean()) for label in range(10)]
    told = {
        "test_accuracy": float(correct.mean()),
        "test_per_class_accuracy": per_class,
        "predictions_sha256": schema.predictions_sha256(predictions),
    }
    store.write(changed(record, **told), predictions, results_dir / "runs" / record.name)


def render(results_dir: Path, monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["leaderboard", f"--results_dir={results_dir}"])
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0), capsys.readouterr().err
    return 0, (results_dir / "leaderboard.md").read_text()


@pytest.mark.full
def test_no_committed_record_is_marked_and_forged_ones_are(committed, forged, tmp_path, monkeypatch, capsys):
    labels = fashion_mnist.load().test_labels
    predictions = {
        path: store.read_predictions(record, path.with_suffix(".npy")) for path, record in committed.items()
    }
    assert plausibility.marks(committed, {path: found != labels for path, found in predictions.items()}) == {}
    for path, record in committed.items():
        publish(record, predictions[path], labels, tmp_path)
    code, page = render(tmp_path, monkeypatch, capsys)
    assert (code, "Implausible" in page) == (0, False)

    rng = np.random.default_rng(0)
    errors = labels.copy()
    chosen = rng.choice(10_000, 400, replace=False)
    errors[chosen] = (errors[chosen] + rng.integers(1, 10, 400)) % 10
    for fake, why in (
        (labels, "it makes no error on 10,000 images"),
        (errors, "of its errors with other entries"),
    ):
        publish(forged, fake, labels, tmp_path)
        code, page = render(tmp_path, monkeypatch, capsys)
        ranked, _, marked = page.partition("## Implausible")
        assert code == 0
        assert "94.19 ± 0.07 (9)" in ranked
        assert f"| speedrun-94 | 0 | {100 * (fake == labels).mean():.2f} |" in marked
        assert why in marked

    path = tmp_path / "runs" / FORGED.name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"train_seconds": 1.0}))
    code, err = render(tmp_path, monkeypatch, capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "train_seconds is 1, but that of all epochs in history" in err
