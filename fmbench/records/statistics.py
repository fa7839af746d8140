"""Means, spreads, and whether a difference is more than luck."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof 1), which a single value doesn't have."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def median_with_misses(values: Sequence[float | None]) -> float | None:
    """Median in which None, a miss, counts as later than everything; None if the median is a miss."""
    ordered = sorted(math.inf if value is None else value for value in values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return median if math.isfinite(median) else None


LEVEL = 0.05  # of the tests of differences


class Difference(NamedTuple):
    """A mean difference of two systems, its 95 % confidence interval, and the p-value of "there is none"."""

    mean: float
    low: float
    high: float
    p_value: float


def recipe_difference(correct_a: np.ndarray, correct_b: np.ndarray) -> Difference:
    """Two-sided test of the mean accuracy of recipe b minus that of recipe a; seeds and images are both chance.

    It asks whether the difference would be there with other seeds and other test images. For each recipe these
    are crossed random effects, y[seed, image] = mean + seed effect + image effect + rest, and both recipes see
    the same images. With s2 the variance over seeds of a recipe's accuracy, rest2 the mean square of its rests,
    and d2 the variance over m images of the difference of the shares of seeds that are right, their expectations
    say

        variance of the difference = sum of (s2 / n over the recipes) + (d2 - sum of (rest2 / n)) / m.

    The first term is Welch's, and has the rests' own chance in it, which d2 / m has too: hence what is taken off.
    The second term, never taken as negative, is the part of the images.

    Degrees of freedom are Satterthwaite's, in which a recipe's s2 counts at least rest2 / m, what it would be if
    there were no seed effects: two or three seeds lie close to each other by luck, and would leave the variance to
    the images with their thousands of degrees of freedom. If the recipes agree on every image but for chance, this
    is Welch's t-test of the seeds' accuracies; if seeds change nothing, it is the paired t-test over the images.

    Seeds are taken as independent, those with equal numbers too: different recipes draw different things from
    them.

    Args:
        correct_a: bool (seeds >= 2, num_images).
        correct_b: bool (seeds >= 2, num_images), on the same images.

    Returns:
        The difference, a fraction. If neither seeds nor images vary, the interval is a point, and the p-value 0,
        or 1 if there is no difference.

    Raises:
        ValueError: If a recipe has one seed, which says nothing of the chance of seeds.

    References:
        Searle, Casella and McCulloch, 1992, "Variance components", for the expectations of the mean squares.
        Owen, 2007, "The pigeonhole bootstrap", on means over two crossed samples.
        Satterthwaite, 1946, "An approximate distribution of estimates of variance components".
        Bouthillier et al., 2021, "Accounting for variance in machine learning benchmarks".
    """
    if min(len(correct_a), len(correct_b)) < 2:
        raise ValueError("no test without two seeds of each recipe")
    num_images = correct_a.shape[1]
    of_images = (correct_b.mean(axis=0) - correct_a.mean(axis=0)).var(ddof=1)
    of_seeds, at_least, seeds_df = np.zeros(2), np.zeros(2), np.zeros(2)
    for recipe, correct in enumerate((correct_a, correct_b)):
        num_seeds = len(correct)
        rest = correct - correct.mean(axis=0) - correct.mean(axis=1, keepdims=True) + correct.mean()
        of_rest = np.square(rest).sum() / ((num_seeds - 1) * (num_images - 1)) / num_seeds
        of_images -= of_rest
        # The variance of whole numbers is exactly 0 where they are equal.
        of_seeds[recipe] = correct.sum(axis=1).var(ddof=1) / num_images**2 / num_seeds
        at_least[recipe] = of_rest / num_images
        seeds_df[recipe] = num_seeds - 1
    of_images = max(0.0, of_images) / num_images
    weights = np.append(np.maximum(of_seeds, at_least), of_images)
    df = weights.sum() ** 2 / (weights**2 / [*seeds_df, num_images - 1]).sum() if weights.any() else 1.0
    variance = of_seeds.sum() + of_images
    return _t_test(float(correct_b.mean() - correct_a.mean()), math.sqrt(variance), df)


def shared_ranks(correct: Sequence[np.ndarray]) -> list[int | None]:
    """Ranks of rows that are sorted from best to worst; a row of one seed has none, and is not counted.

    A row that cannot be told from the best row of the rank above shares that rank; otherwise its rank is its
    place. The p-values are those of `recipe_difference` after Holm's correction over all pairs, so that the
    chance that any two recipes of a table are told apart without being different is at most LEVEL.

    Args:
        correct: Per row, bool (seeds, num_images), all on the same images.
    """
    ranks: list[int | None] = [None] * len(correct)
    tested = [row for row, of_row in enumerate(correct) if len(of_row) > 1]
    pairs = list(itertools.combinations(tested, 2))
    p_values = holm([recipe_difference(correct[a], correct[b]).p_value for a, b in pairs])
    p_value_of = dict(zip(pairs, p_values, strict=True))
    best = 0
    for place, row in enumerate(tested):
        if place and p_value_of[tested[best], row] < LEVEL:
            best = place
        ranks[row] = best + 1
    return ranks


def welch_t_test(values_a: Sequence[float], values_b: Sequence[float], *, level: float = LEVEL) -> Difference:
    """Two-sided test of the mean of b minus that of a, of two or more independent values each.

    The interval is the 1 - `level` one. Two systems are equivalent within m at the level LEVEL if that of
    2 * LEVEL lies between -m and m: Schuirmann's two one-sided tests.

    References:
        Welch, 1947, "The generalization of 'Student's' problem when several different population variances are
        involved". Schuirmann, 1987, "A comparison of the two one-sided tests procedure and the power approach for
        assessing the equivalence of average bioavailability".
    """
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (values_a, values_b)]
    variance = sum(parts)
    freedoms = [len(values) - 1 for values in (values_a, values_b)]
    df = variance**2 / sum(part**2 / n for part, n in zip(parts, freedoms, strict=True)) if variance else 1.0
    return _t_test(float(np.mean(values_b) - np.mean(values_a)), math.sqrt(variance), df, level)


def corrected_resampled_t_test(
    scores_a: Sequence[float],
    scores_b: Sequence[float],
    *,
    num_train: float,
    num_test: float,
    level: float = LEVEL,
) -> Difference:
    """Two-sided paired t-test of b minus a over folds, which share most of their train images.

    For that reason the folds' scores are not independent, and the usual t-test finds differences far too often.
    Nadeau and Bengio replace the variance of the mean, s**2 / k, by (1 / k + num_test / num_train) * s**2; the
    degrees of freedom remain k - 1. They derive it for random splits; for the folds of one cross-validation it is
    an approximation.

    Args:
        scores_a: Of k >= 2 folds.
        scores_b: Of the same folds in the same order.
        num_train: Images that a fold trains on.
        num_test: Images that a fold is scored on.
        level: The interval is the 1 - `level` one.

    Returns:
        The difference in the unit of the scores. If it is the same in all folds, the interval is a point, and the
        p-value 0, or 1 if there is none.

    References:
        Nadeau and Bengio, 2003, "Inference for the generalization error", Machine Learning 52.
    """
    differences = np.subtract(scores_b, scores_a)
    num_folds = len(differences)
    mean = float(differences.mean())
    standard_error = math.sqrt((1 / num_folds + num_test / num_train) * differences.var(ddof=1))
    return _t_test(mean, standard_error, num_folds - 1, level)


def _t_test(mean: float, standard_error: float, df: float, level: float = LEVEL) -> Difference:
    if not standard_error:
        return Difference(mean, mean, mean, 0.0 if mean else 1.0)
    t = stats.t(df=df)
    margin = float(t.ppf(1 - level / 2)) * standard_error
    return Difference(mean, mean - margin, mean + margin, float(2 * t.sf(abs(mean) / standard_error)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values for as many tests at once: the chance that any of them alarms falsely stays below the level.

    The i-th smallest of m is multiplied by m - i + 1, and is never smaller than the one before it.

    References:
        Holm, 1979, "A simple sequentially rejective multiple test procedure".
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
