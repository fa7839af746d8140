"""Batches that are read ahead of their steps, by grain."""

from collections.abc import Callable
from typing import Any

from fmbench.system.command_line import needs_extra

THREADS = 4  # that wait for the disk at the same time, a batch each


class Stream:
    """The batches of a run's steps, in their order.

    What grain calls elements are whole batches here, not images: its own work for an element, some 8 microseconds,
    is nearly half of what a small net's step takes for an image.

    Args:
        read: The batch of a step, counted from 0; threads call it.
        num_steps: Of the run.
        ahead: Batches that are read before they are asked for.

    Raises:
        UserError: If grain is not installed.
    """

    def __init__(self, read: Callable[[int], Any], num_steps: int, ahead: int):
        with needs_extra("grain"):
            import grain
        options = grain.ReadOptions(num_threads=min(THREADS, ahead), prefetch_buffer_size=ahead)
        self.read = read
        self._batches = iter(grain.MapDataset.range(num_steps).map(read).to_iter_dataset(options))

    @property
    def position(self) -> dict[str, int]:
        """The state of grain's iterator: the step whose batch comes next."""
        return self._batches.get_state()

    def seek(self, step: int) -> None:
        """Goes on with the batch of this step."""
        if self.position != (there := {"next_index": step}):
            self._batches.set_state(there)

    def take(self, number: int) -> list[Any]:
        """The next batches."""
        return [next(self._batches) for _ in range(number)]
