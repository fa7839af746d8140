"""Numbers that can be worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from fmbench.records.statistics import (
    corrected_resampled_t_test,
    holm,
    mean_and_std,
    median_with_misses,
    paired_p_value,
    shared_ranks,
)


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


# Cross-validation: reference system R0's published folds, in percent.
BASELINE = [91.200, 91.217, 90.958, 91.242, 91.317]
SAME = [90.875, 91.442, 91.242, 91.275, 91.450]


def test_corrected_resampled_t_test_worked_out_by_hand():
    # Differences 1, 2, 3: mean 2, s = 1; a quarter as many test as train images makes the variance 1/3 + 1/4.
    # With 2 degrees of freedom the t distribution has a closed form.
    difference = corrected_resampled_t_test([5, 5, 5], [6, 7, 8], num_train=100, num_test=25)
    standard_error = math.sqrt(1 / 3 + 1 / 4)
    t = 2 / standard_error
    assert difference.mean == 2
    assert difference.p_value == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert difference.low == pytest.approx(2 - 4.302653 * standard_error)  # from a table of t
    assert difference.high == pytest.approx(2 + 4.302653 * standard_error)


def test_corrected_resampled_t_test_without_its_correction_is_the_paired_t_test():
    plain = stats.ttest_rel(SAME, BASELINE)
    difference = corrected_resampled_t_test(BASELINE, SAME, num_train=1, num_test=0)
    interval = plain.confidence_interval()
    assert difference == pytest.approx((np.mean(SAME) - np.mean(BASELINE), *interval, plain.pvalue))
    # 5 folds of 60,000: the factor is 1/5 + 1/4 instead of 1/5.
    corrected = corrected_resampled_t_test(BASELINE, SAME, num_train=48_000, num_test=12_000)
    t = plain.statistic / math.sqrt((1 / 5 + 1 / 4) / (1 / 5))
    assert corrected.p_value == pytest.approx(2 * stats.t.sf(abs(t), df=4))
    assert corrected.low < interval.low < 0 < interval.high < corrected.high


def test_corrected_resampled_t_test_turns_round_with_its_arguments():
    there = corrected_resampled_t_test(BASELINE, SAME, num_train=4, num_test=1)
    back = corrected_resampled_t_test(SAME, BASELINE, num_train=4, num_test=1)
    assert back == pytest.approx((-there.mean, -there.high, -there.low, there.p_value))


def test_corrected_resampled_t_test_of_folds_that_all_differ_alike():
    assert corrected_resampled_t_test([0.5, 0.75], [0.5, 0.75], num_train=1, num_test=1) == (0, 0, 0, 1)
    assert corrected_resampled_t_test([0.5, 0.75], [0.75, 1.0], num_train=1, num_test=1) == (0.25, 0.25, 0.25, 0)


def test_holm():
    # 4 * .01, 3 * .02, 2 * .04, and .045, which must not be smaller than the one before it.
    assert holm([0.04, 0.01, 0.045, 0.02]) == pytest.approx([0.08, 0.04, 0.08, 0.06])
    assert holm([0.7, 0.6]) == [1.0, 1.0]  # no p-value exceeds 1
    assert holm([0.03]) == [0.03]
    assert holm([]) == []
