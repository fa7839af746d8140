"""Lines in metrics.jsonl, events for TensorBoard, and the bar."""

import io
import json
import re
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from fmbench.reporting.metrics import MetricWriter
from fmbench.reporting.progress import Progress


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def history(*steps: int) -> list[dict]:
    return [{"step": step, "loss": 1 / step} for step in steps]


def write_steps(workdir: Path, steps: range, history: Sequence[dict] = ()) -> None:
    writer = MetricWriter(workdir, history)
    for step in steps:
        writer.write(step=step, loss=1 / step)
    writer.close()


def test_one_line_per_measurement(tmp_path):
    write_steps(tmp_path, range(1, 3))
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    writer = MetricWriter(tmp_path, [])
    writer.write(step=1, loss=1.0)
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]
    writer.close()


def test_resuming_drops_the_lines_whose_steps_come_again(tmp_path):
    write_steps(tmp_path, range(1, 6))
    write_steps(tmp_path, range(4, 7), history(1, 2, 3))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_starting_anew_drops_all_lines(tmp_path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 2))
    assert [line["step"] for line in lines(tmp_path)] == [1]


@pytest.mark.parametrize("content", ['{"step": 2, "lo', "", "\0" * 80, "[" * 100_000, '{"step": 9}\n', None])
def test_what_happened_to_the_file_is_mended_from_the_history(tmp_path, content):
    write_steps(tmp_path, range(1, 3))
    if content is None:
        (tmp_path / "metrics.jsonl").unlink()
    else:
        (tmp_path / "metrics.jsonl").write_text(content)
    write_steps(tmp_path, range(3, 4), history(1, 2))
    assert lines(tmp_path) == history(1, 2, 3)


def test_tensorboard_gets_every_scalar(tmp_path):
    writer = MetricWriter(tmp_path, [])
    writer.write(step=7, train_loss=0.5, val_accuracy=0.75, learning_rate=0.125)
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    scalars: dict[tuple[int, str], float] = {}
    while content:  # a record: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        scalars |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        content = content[16 + length :]
    assert scalars == {(7, "loss/train"): 0.5, (7, "accuracy/val"): 0.75, (7, "run/learning_rate"): 0.125}


def test_the_bar_shows_validation_and_comes_to_its_end(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    display = Progress(num_steps=4, first_step=0, batch_size=8)
    display.end_epoch(2, "epoch 1/2: loss 1.0000", ", val accuracy 90.12%")
    display.update(3, 2, {"loss": jnp.ones(1), "accuracy": jnp.ones(1)})
    display.end_epoch(4, "epoch 2/2: loss 0.5000", ", val accuracy 91.00%")
    display.close()
    said = terminal.getvalue()
    assert "epoch 1/2: loss 1.0000\n" in said
    assert re.search(r"loss 1.0000, accuracy 100.00%, [\d,]+ img/s, val accuracy 90.12%", said)
    assert re.search(r"100%\|", said.rpartition("\r")[2])
