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
        place: Puts batches on the devices, for a call of so many steps.
        num_steps: Of the run.
        ahead: Batches that are read before they are asked for.

    Raises:
        UserError: If grain is not installed.
    """

    def __init__(
        self, read: Callable[[int], Any], place: Callable[[list[Any], int], Any], num_steps: int, ahead: int
    ):
        with needs_extra("grain"):
            import grain
        options = grain.ReadOptions(num_threads=min(THREADS, ahead), prefetch_buffer_size=ahead)
        self._read, self._place = read, place
        self._batches = iter(grain.MapDataset.range(num_steps).map(read).to_iter_dataset(options))

    @property
    def position(self) -> dict[str, int]:
        """The state of grain's iterator: the step whose batch comes next."""
        return self._batches.get_state()

    def seek(self, step: int) -> None:
        """Goes on with the batch of this step."""
        if self.position != (there := {"next_index": step}):
            self._batches.set_state(there)

    def take(self, length: int) -> Any:
        """The next batches, on the devices, for a call of so many steps; 0 is one, too."""
        return self._place([next(self._batches) for _ in range(max(1, length))], length)

    def example(self, step: int, length: int) -> Any:
        """What `take` might give, made of the batch of this step alone; the position stays."""
        return self._place([self._read(step)] * max(1, length), length)
