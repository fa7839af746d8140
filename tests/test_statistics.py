"""Numbers that can be worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from fmbench.statistics import mean_and_std, median_with_misses, paired_p_value, shared_ranks


def rights(*wrong: range, num_images: int = 100) -> np.ndarray:
    """One row per seed, False at the images in `wrong`."""
    correct = np.ones((len(wrong), num_images), bool)
    for row, images in zip(correct, wrong, strict=True):
        row[list(images)] = False
    return correct


def test_std_is_the_sample_std():
    mean, std = mean_and_std([0.90, 0.92, 0.97])
    assert mean == pytest.approx(0.93)
    assert std == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))


def test_a_single_value_has_no_std():
    assert mean_and_std([0.9]) == (0.9, None)


@pytest.mark.parametrize(
    ("seconds", "median"),
    [
        ([3.0, 1.0, 2.0], 2.0),
        ([4.0, 1.0], 2.5),
        ([None, 1.0, 2.0], 2.0),  # a miss is later than everything, ...
        ([None, 1.0, None], None),
        ([None, 1.0], None),  # ... so halfway to it is a miss, too
        ([None], None),
        ([0.0], 0.0),
    ],
)
def test_median_with_misses(seconds, median):
    assert median_with_misses(seconds) == median


@pytest.mark.parametrize(("b", "c"), [(25, 10), (10, 25), (6, 0), (1, 1), (40, 39)])
def test_paired_p_value_of_single_seeds_is_mcnemars(b, c):
    only_a, only_b = range(c, b + c), range(c)
    p = paired_p_value(rights(only_b), rights(only_a))
    z = (b - c) / math.sqrt(b + c)
    assert p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)))
    assert p == pytest.approx(stats.chi2.sf((b - c) ** 2 / (b + c), df=1))


def test_paired_p_value_from_a_table():
    # z = 15 / sqrt(35) = 2.535
    assert paired_p_value(rights(range(25)), rights(range(25, 35))) == pytest.approx(0.01123, abs=5e-6)


def test_paired_p_value_over_seeds_compares_shares_image_by_image():
    # Two seeds against one: shares of rights differ by 1/2 on image 0, by 1 on image 1, and by -1/2 on image 2.
    a = rights(range(2, 3), range(0))
    b = rights(range(2))
    b[0, 0] = False
    a[0, 0] = False
    difference = np.array([0.5, 1.0, -0.5])
    z = difference.sum() / math.sqrt((difference**2).sum())
    assert paired_p_value(a, b) == pytest.approx(2 * stats.norm.sf(z))


def test_equal_rights_cannot_be_told_apart_whatever_the_number_of_seeds():
    thirds = rights(range(5), range(5, 10), range(0))
    assert paired_p_value(thirds, np.repeat(thirds, 2, axis=0)) == 1.0
    assert paired_p_value(rights(range(0)), rights(range(0))) == 1.0


def test_paired_p_value_does_not_depend_on_the_order_of_the_rows():
    a, b = rights(range(9), range(12)), rights(range(5, 30))
    assert paired_p_value(a, b) == paired_p_value(b, a)


def test_false_alarms_are_as_rare_as_the_level_says():
    rng = np.random.default_rng(0)
    chance = rng.beta(4, 1, size=2000)  # of getting each image right, the same for both
    draws = rng.random((500, 2, 3, 2000)) < chance
    alarms = np.mean([paired_p_value(a, b) < 0.05 for a, b in draws])
    assert 0.02 < alarms < 0.08


def test_shared_ranks():
    # Against the row above, each of these has 3 more wrong: z = 1.7. Against the second above, 6: z = 2.4.
    rows = [rights(range(wrong)) for wrong in (0, 3, 6, 9, 12)]
    assert shared_ranks(rows) == [1, 1, 3, 3, 5]
    assert shared_ranks(rows, alpha=0.1) == [1, 2, 3, 4, 5]
    assert shared_ranks(rows[:1]) == [1]
    assert shared_ranks([]) == []
