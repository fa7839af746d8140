"""A profile of a program that JAX's profiler has recorded: the wall time of each of its operations."""

import dataclasses
import heapq
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# What XLA's threads tell on CPUs beside operations: that a task is handed to another thread, which one a thread
# takes up, and that it is done with it; and that a thread looks for the operation to come, or waits.
RECORD, START, STOP = (f"ThreadpoolListener::{what}" for what in ("Record", "StartRegion", "StopRegion"))
EXECUTOR = ("ThunkExecutor::", "end: ")


class Event(NamedTuple):
    """What a thread or a stream of a device did from `start` to `end`, in nanoseconds."""

    name: str
    start: float
    end: float
    stats: Mapping[str, Any] = {}


def read(directory: Path) -> list[list[Event]]:
    """The events of each thread or, where there are accelerators, of each stream of the first of them.

    Args:
        directory: Which was given to `jax.profiler.trace`.
    """
    from jax.profiler import ProfileData

    (path,) = directory.glob("**/*.xplane.pb")
    planes = list(ProfileData.from_file(str(path)).planes)
    devices = sorted(
        (plane for plane in planes if plane.name.startswith("/device:")), key=lambda plane: plane.name
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its types lack a module's name
        return [
            [Event(event.name, event.start_ns, event.end_ns, dict(event.stats)) for event in line.events]
            for plane in devices[:1] or planes
            for line in plane.lines
            # Of TPUs other lines say the same by module, by step and by name in Python.
            if not plane.name.startswith("/device:TPU") or line.name == "XLA Ops"
        ]


def operation_seconds(threads: Iterable[Iterable[Event]], module: str) -> dict[str, float]:
    """The wall time of each operation of a program, by its name in the program that XLA has optimised.

    Time that several threads work in is shared among them equally; so the sum is the time in which any worked.
    An operation has the tasks that it handed to other threads, too. What oneDNN's own threads do is not seen: its
    operation counts as one thread.

    Args:
        threads: As `read` gives them.
        module: The program's name, as 'jit_train_step'.
    """
    owners: dict[int, _Item] = {}
    spans = [span for thread in threads for span in _innermost(thread, owners, module)]
    changes: list[tuple[float, int, str]] = []
    for span in spans:
        name = _owner(span.item, owners)
        if name is not None and span.end > span.start:
            changes += [(span.start, 1, name), (span.end, -1, name)]
    heapq.heapify(changes)
    seconds: dict[str, float] = defaultdict(float)
    working: dict[str, int] = defaultdict(int)
    before = 0.0
    while changes:
        time, change, name = heapq.heappop(changes)
        if total := sum(working.values()):
            for worker, threads_of_it in working.items():
                seconds[worker] += (time - before) * threads_of_it / total / 1e9
        before = time
        working[name] += change
        if not working[name]:
            del working[name]
    return dict(seconds)


@dataclasses.dataclass(frozen=True)
class _Item:
    """An operation, or a task that some operation handed over."""

    operation: str | None = None
    task: int | None = None


class _Span(NamedTuple):
    """When a thread worked at an item and at nothing within it."""

    item: _Item
    start: float
    end: float


def _innermost(thread: Iterable[Event], owners: dict[int, "_Item"], module: str) -> Iterator[_Span]:
    """The thread's time by what it worked at; enters into `owners` the item that each task was handed over by."""
    stack: list[tuple[_Item, float]] = []  # items and when they end
    before = 0.0

    def until(time: float) -> Iterator[_Span]:
        nonlocal before
        while stack and stack[-1][1] <= time:
            item, end = stack.pop()
            yield _Span(item, before, end)
            before = max(before, end)
        if stack:
            yield _Span(stack[-1][0], before, time)
        before = time

    def end_task() -> None:
        """Takes the innermost task off, if there is one, and what is within it."""
        tasks = [index for index, (item, _) in enumerate(stack) if item.task is not None]
        del stack[tasks[-1] if tasks else len(stack) :]

    # Of what begins at once the outer first; but a task ends before the next thing begins.
    for event in sorted(thread, key=lambda event: (event.start, event.name != STOP, -event.end)):
        item, end = None, event.end
        if event.name == RECORD:
            owners[event.stats["_p"]] = stack[-1][0] if stack else _Item()
        elif event.name in (START, STOP):
            yield from until(event.start)
            end_task()  # also one of which no end was seen
            if event.name == START:
                item, end = _Item(task=event.stats["_c"]), math.inf
        elif event.name.startswith(EXECUTOR):
            item = _Item()
        elif name := _operation(event, module):
            item = _Item(operation=name)
        if item is not None:
            yield from until(event.start)
            stack.append((item, end))
    yield from until(max((end for _, end in stack if end < math.inf), default=before))


def _operation(event: Event, module: str) -> str | None:
    """The operation's name, if the event is one of the program's."""
    name, of = event.stats.get("hlo_op"), event.stats.get("hlo_module", module)
    if name is None and event.name.startswith("%"):  # on TPUs, the whole line of the program
        name = event.name
    return str(name).partition(" = ")[0].lstrip("%") if name and of == module else None


def _owner(item: _Item, owners: Mapping[int, _Item]) -> str | None:
    """The operation that an item belongs to."""
    while item.task is not None:
        item = owners.get(item.task) or _Item()
    return item.operation
