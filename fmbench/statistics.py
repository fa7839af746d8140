"""Means, spreads, and whether a difference is more than luck."""

import math
from collections.abc import Sequence

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
