"""Temperature and calibration error, where the right numbers are known."""

import numpy as np
import pytest

from fmbench.models import confidence


def drawn(temperature: float, number: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels that are as likely as the logits say at this temperature."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (number, 10))
    # The largest of logits with Gumbel noise is a draw from their softmax.
    return logits, (logits / temperature + rng.gumbel(size=logits.shape)).argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found_and_calibrates(temperature):
    logits, labels = drawn(temperature)
    fitted = confidence.fit_temperature(logits, labels)
    assert fitted == pytest.approx(temperature, rel=0.03)
    before, after = (
        confidence.bins(confidence.probabilities(logits, t), labels).calibration_error for t in (1.0, fitted)
    )
    assert after < 0.015
    assert (before > 0.05) == (temperature != 1)


def test_a_temperature_changes_no_prediction():
    logits, _ = drawn(1.0, 500)
    hot = confidence.probabilities(logits.astype(np.float32), 7.3)
    assert hot.dtype == np.float32
    np.testing.assert_array_equal(hot.argmax(axis=1), logits.argmax(axis=1))
    np.testing.assert_allclose(hot.sum(axis=1), 1, rtol=1e-5)


def test_the_calibration_error_is_the_weighted_gap_of_the_bins():
    """Of three images with confidence 0.9 two are right, and one of 0.5 is: 3/4 |2/3 - 0.9| + 1/4 |1 - 0.5|."""
    rows = np.full((4, 10), 0.1 / 9)
    rows[:3, 0] = 0.9
    rows[3] = 0.5 / 9
    rows[3, 4] = 0.5
    found = confidence.bins(rows, np.array([0, 0, 1, 4]))
    assert found.calibration_error == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.5)
    assert found.counts.sum() == 4 and found.counts[7] == 1 and found.counts[13] == 3
    assert np.isnan(found.accuracy[0])
    certain = confidence.bins(np.eye(10), np.arange(10))  # a probability of 1 has a bin
    assert (certain.counts[-1], certain.calibration_error) == (10, 0)
