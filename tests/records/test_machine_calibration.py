"""What the machine reaches, measured for little time."""

import pytest

from fmbench.records import calibration


def test_products_and_sums_are_measured(monkeypatch):
    monkeypatch.setattr(calibration, "SECONDS", 0.0)
    flops, bandwidth = calibration.measure()
    assert set(flops) == {"float32", "bfloat16"}
    assert min(flops.values()) > 1e8
    assert bandwidth > 1e7


def test_the_median_is_that_of_three_calls_after_the_first(monkeypatch):
    # Starts and ends: 9 s for the call that is not counted would spoil it, were it counted.
    monkeypatch.setattr(calibration, "SECONDS", 0.0)
    clock = iter([0.0, 1.0, 1.0, 6.0, 6.0, 8.0])
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: next(clock))
    calls = []
    assert calibration._median_seconds(lambda: calls.append(1)) == 2.0
    assert len(calls) == 4


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_too_little_memory_costs_no_record(error, monkeypatch, beside_a_run):
    def fail():
        raise error

    monkeypatch.setattr(calibration, "measure", fail)
    assert beside_a_run() is None


def test_other_errors_are_not_hidden(monkeypatch, beside_a_run):
    def fail():
        raise RuntimeError("boom")

    monkeypatch.setattr(calibration, "measure", fail)
    with pytest.raises(RuntimeError, match="boom"):
        beside_a_run()


def test_it_is_measured_once_in_a_process(monkeypatch, beside_a_run):
    measured = iter([calibration.Calibration({}, 1.0)])
    monkeypatch.setattr(calibration, "measure", lambda: next(measured))
    assert beside_a_run() is beside_a_run()


REAL = calibration.measure_beside_a_run


@pytest.fixture
def beside_a_run(quick_calibration):
    """The real one, with nothing kept."""
    REAL.cache_clear()
    yield REAL
    REAL.cache_clear()
