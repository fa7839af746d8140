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
    recipe_difference,
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


def test_recipes_whose_seeds_change_nothing_are_compared_by_the_paired_t_test_over_images():
    a, b = rights(range(25)), rights(range(20, 35))
    plain = stats.ttest_rel(b[0].astype(int), a[0].astype(int))
    interval = plain.confidence_interval()
    difference = recipe_difference(np.repeat(a, 3, axis=0), np.repeat(b, 2, axis=0))
    assert difference == pytest.approx((0.1, *interval, plain.pvalue))


def test_recipes_that_agree_on_the_images_but_for_chance_are_compared_by_welchs_t_test():
    # No image is harder than another: each is got wrong by one seed of each recipe.
    a = rights(range(20), range(20, 50), range(50, 100))
    b = rights(range(10), range(10, 45), range(45, 80), range(80, 100))
    welch = stats.ttest_ind(b.mean(axis=1), a.mean(axis=1), equal_var=False)
    interval = welch.confidence_interval()
    assert recipe_difference(a, b) == pytest.approx((1 / 12, *interval, welch.pvalue))


def test_recipe_difference_worked_out_by_hand():
    a = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    b = np.array([[0, 0, 1, 1], [0, 0, 1, 1]], bool)
    # Seeds of a: accuracies 3/4 and 1/2, variance 1/32, of their mean 1/64. Seeds of b change nothing.
    # Rests of a: three images with -1/8 and 1/8, one with 3/8 and -3/8; mean square 3/8 over 3, of the mean 1/16.
    # Images: shares differ by -1, -1, 1/2 and 1, variance 17/16; (17/16 - 1/16) / 4 is theirs.
    variance = 1 / 64 + 1 / 4
    df = variance**2 / ((1 / 64) ** 2 / 1 + (1 / 4) ** 2 / 3)
    t = stats.t(df)
    margin = t.ppf(0.975) * math.sqrt(variance)
    p_value = 2 * t.sf(1 / 8 / math.sqrt(variance))
    assert recipe_difference(a, b) == pytest.approx((-1 / 8, -1 / 8 - margin, -1 / 8 + margin, p_value))


def test_seeds_that_are_close_by_luck_are_still_few():
    a = np.array([[1, 1, 1, 0], [1, 1, 0, 1]], bool)  # as accurate as each other, on other images
    b = np.array([[0, 0, 1, 1], [0, 0, 1, 1]], bool)
    # Images: (3/4 - 1/6) / 4 = 7/48. The rests alone, 1/6 of the mean, make 1/24 of a's seeds, on one degree of
    # freedom.
    df = (2 + 7) ** 2 / (2**2 / 1 + 7**2 / 3)
    assert recipe_difference(a, b).p_value == pytest.approx(2 * stats.t(df).sf(1 / 4 / math.sqrt(7 / 48)))


def test_recipe_difference_turns_round_with_its_arguments():
    a, b = rights(range(9), range(12)), rights(range(5, 30), range(20), range(10, 40))
    there, back = recipe_difference(a, b), recipe_difference(b, a)
    assert back == pytest.approx((-there.mean, -there.high, -there.low, there.p_value))


def test_equal_rights_cannot_be_told_apart_whatever_the_number_of_seeds():
    thirds = rights(range(5), range(5, 10), range(0))
    assert recipe_difference(thirds, np.repeat(thirds, 2, axis=0))[::3] == (0.0, 1.0)
    assert recipe_difference(rights(range(0), range(0)), rights(range(0), range(0))) == (0, 0, 0, 1)


@pytest.mark.parametrize(("num_a", "num_b"), [(1, 5), (5, 1), (1, 1)])
def test_a_single_seed_makes_no_test(num_a, num_b):
    with pytest.raises(ValueError, match="two seeds"):
        recipe_difference(rights(*[range(3)] * num_a), rights(*[range(4)] * num_b))


@pytest.mark.parametrize(("of_seeds", "of_images"), [(0.0, 0.0), (0.6, 0.0), (0.0, 2.0), (0.6, 2.0)])
def test_false_alarms_are_as_rare_as_the_level_says(of_seeds, of_images):
    rng = np.random.default_rng(0)
    alarms = []
    for _ in range(400):
        image = rng.normal(2, 2, 500) + of_images * rng.standard_normal((2, 1, 500))
        chance = 1 / (1 + np.exp(-image - of_seeds * rng.standard_normal((2, 4, 1))))
        alarms.append(recipe_difference(*(rng.random(chance.shape) < chance)).p_value < 0.05)
    assert 0.02 < np.mean(alarms) < 0.08


def test_shared_ranks():
    # Against the row above, each has 4 more wrong, p = 0.045, or 12, p = 0.0004; six pairs are corrected for.
    rows = [rights(range(wrong), range(wrong)) for wrong in (0, 4, 16, 20)]
    assert recipe_difference(*rows[:2]).p_value < 0.05
    assert shared_ranks(rows) == [1, 1, 3, 3]
    assert shared_ranks(rows[:2]) == [1, 2]
    # Told from the best row, though not from the one above: p = 0.0042 and 0.045, three pairs.
    assert shared_ranks([rights(range(wrong), range(wrong)) for wrong in (0, 4, 8)]) == [1, 1, 3]
    assert shared_ranks(rows[:1]) == [1]
    assert shared_ranks([]) == []


def test_a_row_of_one_seed_has_no_rank_and_is_not_counted():
    rows = [rights(*[range(wrong)] * num_seeds) for wrong, num_seeds in ((0, 1), (2, 2), (9, 1), (40, 2), (90, 1))]
    assert shared_ranks(rows) == [None, 1, None, 2, None]
    assert shared_ranks(rows[:1]) == [None]


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
