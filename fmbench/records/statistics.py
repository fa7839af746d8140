"""Means, spreads, and whether a difference is more than luck."""

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


def paired_p_value(correct_a: np.ndarray, correct_b: np.ndarray) -> float:
    """Two-sided p-value of "both classify these images equally well".

    McNemar's test, carried over to several seeds: with d the difference, image by image, of the share of seeds
    that are right, z = sum(d) / sqrt(sum(d**2)) is standard normal if neither is better. With one seed each
    that is McNemar's z = (b - c) / sqrt(b + c), b and c counting the images that only one of them gets right.

    Args:
        correct_a: bool (seeds_a, num_images).
        correct_b: bool (seeds_b, num_images), on the same images.

    References:
        McNemar, 1947, "Note on the sampling error of the difference between correlated proportions".
    """
    difference = correct_a.mean(axis=0) - correct_b.mean(axis=0)
    norm = math.sqrt(np.square(difference).sum())
    return float(2 * stats.norm.sf(abs(difference.sum()) / norm)) if norm else 1.0


def shared_ranks(correct: Sequence[np.ndarray], *, alpha: float = 0.05) -> list[int]:
    """Ranks of rows that are sorted from best to worst.

    A row that the paired test cannot tell from the best row of the rank above shares that rank; otherwise its
    rank is its place.

    Args:
        correct: Per row, bool (seeds, num_images).
        alpha: Level of the test.
    """
    ranks: list[int] = []
    best = 0
    for place, row in enumerate(correct):
        if place and paired_p_value(correct[best], row) < alpha:
            best = place
        ranks.append(best + 1)
    return ranks


class Difference(NamedTuple):
    """A mean difference of two systems, its 95 % confidence interval, and the p-value of "there is none"."""

    mean: float
    low: float
    high: float
    p_value: float


def corrected_resampled_t_test(
    scores_a: Sequence[float], scores_b: Sequence[float], *, num_train: float, num_test: float
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
    if not standard_error:
        return Difference(mean, mean, mean, 0.0 if mean else 1.0)
    t = stats.t(df=num_folds - 1)
    margin = float(t.ppf(0.975)) * standard_error
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
