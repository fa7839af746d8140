"""Lines in metrics.jsonl, and events for TensorBoard."""

import json
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from fmbench.training.reporting import MetricWriter


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write_steps(workdir: Path, steps: range, first_step: int = 0) -> None:
    writer = MetricWriter(workdir, first_step)
    for step in steps:
        writer.write(step=step, loss=1 / step)
    writer.close()


def test_one_line_per_measurement(tmp_path):
    write_steps(tmp_path, range(1, 3))
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(step=1, loss=1.0)
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]
    writer.close()


def test_resuming_drops_the_lines_whose_steps_come_again(tmp_path):
    write_steps(tmp_path, range(1, 6))
    write_steps(tmp_path, range(4, 7), first_step=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_starting_anew_drops_all_lines(tmp_path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 2))
    assert [line["step"] for line in lines(tmp_path)] == [1]


@pytest.mark.parametrize("cut", ['{"step": 2, "lo', '{"step": 2, "loss": 0.5}'])
def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path, cut):
    write_steps(tmp_path, range(1, 2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    write_steps(tmp_path, range(3, 4), first_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


def test_tensorboard_gets_every_scalar(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(step=7, loss=0.5, accuracy=0.75)
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    scalars: dict[tuple[int, str], float] = {}
    while content:  # a record: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        scalars |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        content = content[16 + length :]
    assert scalars == {(7, "loss"): 0.5, (7, "accuracy"): 0.75}
