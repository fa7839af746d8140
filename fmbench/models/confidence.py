"""How much a trained model's probabilities are worth, and the temperature that makes them worth more."""

from typing import NamedTuple

import numpy as np
from scipy import optimize, special

NUM_BINS = 15  # of confidence, as Guo et al. have them


class Bins(NamedTuple):
    """Images by the probability of their predicted class, in `NUM_BINS` bins of equal width; each (NUM_BINS,)."""

    counts: np.ndarray  # int
    confidence: np.ndarray  # mean probability of the predicted class; NaN in an empty bin
    accuracy: np.ndarray  # likewise

    @property
    def calibration_error(self) -> float:
        """The expected calibration error (ECE): |accuracy - confidence|, weighted by the bins' images."""
        gaps = np.abs(np.nan_to_num(self.accuracy) - np.nan_to_num(self.confidence))
        return float((self.counts * gaps).sum() / self.counts.sum())


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature), float32 (n, 10)."""
    return special.softmax(logits / np.float32(temperature), axis=-1)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature at which the labels are likeliest.

    Follows Guo et al. 2017, "On calibration of modern neural networks".

    Args:
        logits: Of images that were not trained on, (n, 10).
        labels: Their classes, integers (n,).

    Returns:
        Between 0.05 and 20. Dividing by it changes no prediction.
    """
    logits = logits.astype(np.float64)

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float((special.logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]).mean())

    bounds = (np.log(0.05), np.log(20))
    return float(np.exp(optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x))


def bins(probabilities: np.ndarray, labels: np.ndarray) -> Bins:
    """Sorts images, by their probabilities (n, 10), into bins of confidence; `labels` are integers (n,)."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    is_right = probabilities.argmax(axis=1) == labels
    index = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    counts, confidences, rights = (
        np.bincount(index, weights, NUM_BINS) for weights in (None, confidence, is_right)
    )
    with np.errstate(invalid="ignore"):
        return Bins(counts, confidences / counts, rights / counts)
