"""Time asleep: noticed, and in no other time."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fmbench.system import suspension, timing
from fmbench.system.suspension import BEAT, Watch

REPOSITORY = Path(__file__).parents[2]


class Clocks:
    """Stands in for the module `time`."""

    CLOCK_MONOTONIC, CLOCK_BOOTTIME = 1, 7

    def __init__(self):
        self.now, self.processor, self.slept = 1000.0, 5.0, 0.0

    def perf_counter(self):
        return self.now

    def process_time(self):
        return self.processor

    def clock_gettime(self, clock):
        return self.now + (self.slept if clock == self.CLOCK_BOOTTIME else 0)


@pytest.fixture
def clocks(monkeypatch):
    clocks = Clocks()
    monkeypatch.setattr(suspension, "time", clocks)
    monkeypatch.setattr(suspension.os, "cpu_count", lambda: 2)
    return clocks


def test_a_stopped_process_is_asleep(clocks):
    watch = Watch()
    before = watch.awake()
    clocks.now += 60
    clocks.processor += 0.9  # until the next look was due, on two cores
    assert watch.awake() - before == BEAT
    assert watch.asleep_seconds() == 60 - BEAT
    clocks.now += 0.4
    assert watch.awake() - before == pytest.approx(BEAT + 0.4)


def test_a_process_that_computes_is_awake_though_its_watch_is_kept_from_looking(clocks):
    watch = Watch()
    clocks.now += 60
    clocks.processor += 60
    assert watch.asleep_seconds() == 0


def test_a_short_delay_is_none(clocks):
    watch = Watch()
    for _ in range(100):
        clocks.now += 1.9
        assert watch.asleep_seconds() == 0


def test_a_machine_that_sleeps_stops_the_clock_and_is_noticed(clocks):
    watch = Watch()
    before = watch.awake()
    clocks.slept += 3600
    clocks.now += 1
    assert watch.asleep_seconds() == 3600
    assert watch.awake() - before == 1
    assert watch.asleep_seconds() == 3600  # once


def test_laps_leave_the_time_asleep_out_and_tell_it(clocks):
    stopwatch = timing.Stopwatch(Watch())
    with stopwatch("train"):
        clocks.now += 1
    clocks.now += 61
    with stopwatch("train") as lap:
        clocks.now += 1
        stopwatch._watch.awake()
        clocks.now += 31
    assert lap.gap == pytest.approx(BEAT)
    assert lap.seconds == pytest.approx(1 + BEAT)
    assert lap.asleep == pytest.approx(61 - BEAT + 31 - BEAT)
    assert stopwatch.seconds["train"] == pytest.approx(2 + BEAT)


def test_a_real_stop_is_noticed():
    program = (
        "import time\n"
        "from fmbench.system.suspension import Watch\n"
        "with Watch() as watch:\n"
        "    before = watch.awake()\n"
        "    print('ready', flush=True)\n"
        "    input()\n"
        "    print(watch.asleep_seconds(), watch.awake() - before)\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        answer, _ = process.communicate("\n")
    asleep, awake = map(float, answer.split())
    assert 3.4 <= asleep <= 4.5
    assert awake < 2


def test_no_duration_is_of_a_clock_that_can_be_set(monkeypatch):
    began = timing.seconds_since_process_start()
    assert 0 < began < 24 * 3600
    monkeypatch.setattr(time, "time", lambda: 0.0)  # 1970
    assert began <= timing.seconds_since_process_start() < began + 60
    sources = {path: path.read_text() for path in (REPOSITORY / "fmbench").rglob("*.py")}
    settable = {path.name for path, text in sources.items() if "time.time()" in text}
    assert settable == {
        "timing.py",
        "tensorboard.py",
    }  # where a system has no other; TensorBoard's events have a date
