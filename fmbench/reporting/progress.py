"""The bar, and lines that don't disturb it."""

import sys
import time
from collections.abc import Mapping

import jax
import numpy as np
from tqdm import tqdm

from fmbench.distributed import team

SECONDS_BETWEEN_UPDATES = 0.5


class Progress:
    """Loss, accuracy, images per second and time left, on standard error: of several processes by the first."""

    def __init__(self, *, num_steps: int, first_step: int, batch_size: int):
        self.batch_size = batch_size
        self.speaks = team.present().is_first
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not (self.speaks and sys.stderr.isatty()),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )
        self.last_update, self.last_step = time.perf_counter(), first_step
        self.watched = ""  # the last watched accuracies, as words

    def is_due(self) -> bool:
        """Whether it is time to look at a metric again: never more than twice a second."""
        return time.perf_counter() - self.last_update > SECONDS_BETWEEN_UPDATES

    def update(self, step: int, epoch: int, metrics: Mapping[str, jax.Array]) -> None:
        """Shows the metrics of a step that the device has finished."""
        now = time.perf_counter()
        speed = (step - self.last_step) * self.batch_size / (now - self.last_update)
        self.bar.set_description(f"epoch {epoch}", refresh=False)
        self.bar.set_postfix_str(
            f"loss {np.mean(metrics['loss']):.4f}, accuracy {np.mean(metrics['accuracy']):.2%}, "
            f"{speed:,.0f} img/s{self.watched}",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)
        self.last_update, self.last_step = now, step

    def end_epoch(self, step: int, line: str, watched: str) -> None:
        """Prints an epoch's line, and keeps in the bar what the watched split gave: ', val accuracy 90.12%'."""
        self.watched = watched
        self.bar.update(step - self.bar.n)
        self.line(line)

    def line(self, text: str) -> None:
        """Prints a line without disturbing the bar."""
        if self.speaks:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        self.bar.close()
