"""results/index.html: what stands in it is what the records say, and does nothing else there."""

import base64
import dataclasses
import hashlib
import json
import re
from typing import Any

import numpy as np
import pytest
from fake_records import EPOCH, LABELS, fake_dataset, make_record, publish

from fmbench import leaderboard as command
from fmbench.board import page
from fmbench.data import fashion_mnist
from fmbench.pages import leaderboard
from fmbench.records import store

HOSTILE = (
    "</script><script>alert(1)</script><!--<script> & \u2028 \u202e {{script}} 'x' \"y\" \n "
    "<img src=x onerror=alert(1)>"
)


@pytest.fixture(autouse=True)
def fake_data(monkeypatch):
    """A data set of 200 test images, each of its own grey levels."""
    images = np.random.default_rng(0).integers(0, 256, (len(LABELS), 28, 28), dtype=np.uint8)
    dataset = dataclasses.replace(fake_dataset(), test_images=images)
    monkeypatch.setattr(fashion_mnist, "load", lambda source: dataset)
    return images


@pytest.fixture
def results_dir(tmp_path):
    return tmp_path / "results"


def render(results_dir) -> str:
    tables = leaderboard.rows_by_condition(store.read_all(results_dir))
    (text,) = page.files(results_dir, tables).values()
    return text


def scripts(text: str) -> list[tuple[str, str]]:
    """Attributes and content of each script element, as a browser would find them."""
    return re.findall(r"<script([^>]*)>(.*?)</script>", text, flags=re.DOTALL)


def data_of(text: str) -> dict:
    (content,) = [content for attributes, content in scripts(text) if 'id="data"' in attributes]
    return json.loads(content)


def test_the_data_are_those_of_the_records(results_dir):
    epochs = [EPOCH | {"epoch": 2, "train_core_seconds": 5.0, "val_accuracy": 0.123456, "train_loss": 0.25}]
    for seed, wrong in ((0, 20), (1, 22)):
        publish(
            make_record(seed=seed, wrong=wrong, history=[EPOCH, *epochs], flops_per_image=3.0, batch_size=256),
            results_dir,
            wrong=wrong,
        )
    publish(make_record("cnn1", dtype="bfloat16", watched=None), results_dir)
    data = data_of(render(results_dir))
    mlp = next(entry for entry in data["entries"] if entry["entry"] == "mlp")
    assert (mlp["num_seeds"], mlp["test_accuracy"], mlp["test_std"]) == (2, 0.895, 0.00707)
    assert (mlp["flops"], mlp["core_seconds"], mlp["dtype"]) == (3.0 * 256 * 10, 20, "float32")
    assert [(run["of"], run["seed"]) for run in data["runs"] if run["of"] == mlp["key"]] == [
        (mlp["key"], 0),
        (mlp["key"], 1),
    ]
    curves = next(run["curves"] for run in data["runs"] if run["of"] == mlp["key"])
    assert curves["held_out_accuracy"] == [0.85, 0.12346]
    assert (curves["train_loss"], curves["core_seconds"]) == ([0.5, 0.25], [20, 25])
    assert np.trace(mlp["confusion"]) == 180 + 178
    assert mlp["confusion"][0][:2] == [0, 40]  # all of the first class, in both runs
    assert mlp["confusion"][1][1:3] == [38, 2]
    assert mlp["wrong"] == [[index, 0, 1, 2] for index in range(page.MOST_WRONG)]


def test_what_no_run_gets_right_is_counted_over_all_runs(results_dir):
    for entry, wrong in (("mlp", 5), ("cnn1", 30)):
        publish(make_record(entry, wrong=wrong), results_dir, wrong=wrong)
    never = data_of(render(results_dir))["never_right"]
    assert never == {"runs": 2, "count": 5, "images": [[index, 0, 1, 2] for index in range(5)]}


def test_pictures_have_16_grey_levels(results_dir, fake_data):
    publish(make_record(), results_dir)
    images = data_of(render(results_dir))["images"]
    assert list(images) == [str(index) for index in range(20)]
    packed = np.frombuffer(base64.b64decode(images["7"]), np.uint8)
    unpacked = np.stack([packed >> 4, packed & 15], axis=1).reshape(28, 28) * 17.0
    assert np.abs(unpacked - fake_data[7]).max() <= 8.5


def test_a_record_adds_a_line_and_changes_few(results_dir):
    publish(make_record("mlp"), results_dir)
    before = render(results_dir).splitlines()
    publish(make_record("cnn1", wrong=20), results_dir)
    after = render(results_dir).splitlines()
    assert len([line for line in before if line not in after]) == 1  # how many runs there are
    assert len([line for line in after if line not in before]) == 3  # that, an entry, and its run


def test_hostile_texts_end_no_script(results_dir):
    fields: dict[str, Any] = {"config_file": f"x{HOSTILE}"}
    publish(make_record(config=fields, **fields, model=HOSTILE, environment={"cpu": HOSTILE}), results_dir)
    text = render(results_dir)
    assert len(scripts(text)) == text.count("<script") - page._read("chart.umd.min.js").count("<script") == 3
    assert "<img" not in text
    (entry,) = data_of(text)["entries"]
    assert entry["model"] == HOSTILE.replace("\u2028", " ").replace("\u202e", " ").replace("\n", " ")
    assert "\u202e" not in text


def test_the_policy_allows_the_pages_scripts_and_nothing_else(results_dir):
    publish(make_record(), results_dir)
    text = render(results_dir)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    hashes = {
        base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for _, content in scripts(text)[1:]
    }
    assert set(re.findall(r"'sha256-([^']*)'", policy)) == hashes
    assert policy.startswith("default-src 'none'; ")
    assert not re.search(r"(src|href)=\"(?!#)", text.replace(page._read("chart.umd.min.js"), ""))
    assert "sourceMappingURL" not in text


def test_it_is_written_and_checked_with_the_tables(results_dir, monkeypatch, capsys):
    published = publish(make_record(), results_dir)
    monkeypatch.setattr("sys.argv", ["leaderboard", f"--results_dir={results_dir}"])
    command.main()
    assert "index.html written." in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["leaderboard", f"--results_dir={results_dir}", "--check"])
    command.main()
    # Nothing of this is in the tables.
    published.write_text(published.read_text().replace('"train_loss": 0.5', '"train_loss": 0.75'))
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        f"{results_dir / 'index.html'} is not what the records say; run python -m fmbench.leaderboard.\n"
    )


def test_without_records_there_is_a_page(results_dir):
    data = data_of(render(results_dir))
    assert (data["entries"], data["runs"], data["images"]) == ([], [], {})
