"""Draws results/pareto.svg: what accuracy costs, in core-seconds of training on each machine and in parameters.

python -m fmbench.pareto
"""

import itertools
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from fmbench.records.schema import RunRecord
from fmbench.records.statistics import mean_and_std

LEAST_ACCURACY = 85.0  # percent; below lie mistakes, which would squash the rest
BLUE, VERMILLION = "#0072b2", "#d55e00"  # of Okabe and Ito, which the colour-blind can tell apart
FONT_SIZE, SMALL_FONT_SIZE = 9, 7.5
CAPTION_WIDTH = 130  # characters in a line of the small font
BESIDE = 5  # points from a marker to the label next to it
# Where a label may stand: points right of and above its marker, and how it is aligned there.
Place = tuple[float, float, str, str]
PLACES: list[Place] = [
    (dx, dy, horizontal, vertical)
    for distance in (BESIDE, 12, 20)
    for dx, dy, horizontal, vertical in (
        (distance, 0, "left", "center"),
        (-distance, 0, "right", "center"),
        (0, -distance, "center", "top"),
        (0, distance, "center", "bottom"),
        (distance, -distance, "left", "top"),
        (-distance, distance, "right", "bottom"),
        (distance, distance, "left", "bottom"),
        (-distance, -distance, "right", "top"),
    )
]


class Point(NamedTuple):
    """An entry over its seeds."""

    entry: str
    num_seeds: int
    accuracy: float  # test, percent, mean
    std: float | None  # None for a single seed
    core_seconds: float  # of training, median; not a number for runs that shared their machine
    num_params: int
    competes: bool  # not, if the costs are a head's alone


# Points, what they cost, and its name.
Panel = tuple[Sequence[Point], Callable[[Point], float], str]


def point_of(runs: Sequence[RunRecord]) -> Point:
    """The point of an entry, from its completed runs over seeds."""
    first = runs[0]
    mean, std = mean_and_std([100 * (run.test_accuracy or 0) for run in runs])
    features = first.config.get("features")  # which older records don't have
    is_head = bool(features and features["backbone"])
    return Point(
        entry=first.entry,
        num_seeds=len(runs),
        accuracy=mean,
        std=std,
        core_seconds=math.nan
        if first.environment.shared_by
        else statistics.median(run.train_core_seconds for run in runs),
        num_params=first.num_params,
        competes=not is_head,
    )


def front(points: Sequence[Point], cost: Callable[[Point], float]) -> list[Point]:
    """The competing points that no other beats: those more accurate than all that cost no more, cheapest first."""
    best: list[Point] = []
    competing = [point for point in points if point.competes]
    for point in sorted(competing, key=lambda point: (cost(point), -point.accuracy, point.entry)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def draw(
    conditions: Mapping[str, Sequence[Point]], num_elsewhere: int, least_accuracy: float = LEAST_ACCURACY
) -> Figure:
    """Accuracy over core-seconds, a panel for each condition that has them, and over parameters, all in one.

    Args:
        conditions: Entries on the same data, by the title of their condition. Of an entry in several, the one with
            the most seeds (of equals, the first) stands over parameters.
        num_elsewhere: Entries on other data, which are not drawn.
        least_accuracy: Percent; entries below are not drawn.
    """
    shown = {
        title: [point for point in points if point.accuracy >= least_accuracy]
        for title, points in conditions.items()
    }
    most_seeds: dict[str, Point] = {}
    for point in itertools.chain.from_iterable(shown.values()):
        if point.entry not in most_seeds or point.num_seeds > most_seeds[point.entry].num_seeds:
            most_seeds[point.entry] = point
    timed = {
        title: points
        for title, points in shown.items()
        if not any(math.isnan(point.core_seconds) for point in points)
    }
    panels: list[Panel] = [
        (points, _core_seconds, "core-seconds of training (median)") for points in timed.values()
    ]
    panels.append((list(most_seeds.values()), _num_params, "parameters"))
    # 900 pixels wide, as a README shows it
    figure = Figure(figsize=(9.4, 4.2 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (points, cost, name) in zip(all_axes, panels, strict=True):
        _draw_panel(axes, points, cost, name)
    for axes, title in zip(all_axes, timed, strict=False):  # the last panel is of all conditions
        axes.set_title(title, fontsize=FONT_SIZE, parse_math=False)
        axes.sharex(all_axes[0])
    below = [p for points in conditions.values() for p in points if p.accuracy < least_accuracy]
    figure.supxlabel(_caption(below, num_elsewhere), fontsize=SMALL_FONT_SIZE, parse_math=False)
    figure.draw_without_rendering()  # lays out: from here on the places of points and labels are known
    for axes, (points, cost, _) in zip(all_axes, panels, strict=True):
        _label(axes, points, cost)
    return figure


def _core_seconds(point: Point) -> float:
    return point.core_seconds


def _num_params(point: Point) -> float:
    return point.num_params


def _caption(below: Sequence[Point], num_elsewhere: int) -> str:
    lines = [
        "Test accuracy after the last epoch: mean over seeds, with ± standard deviation where there are several.",
        "The line is the front: no other entry is as accurate for less. Hollow points do not compete: heads on a\n"
        "frozen net, whose costs are the head's alone.",
    ]
    if below:
        names = ", ".join(f"{point.entry} ({point.accuracy:.2f} %)" for point in sorted(below))
        line = f"Not drawn: {len(below)} below {LEAST_ACCURACY:g} %: {names}."
        lines += textwrap.wrap(line, CAPTION_WIDTH, break_on_hyphens=False)
    if num_elsewhere:
        lines.append(f"Not drawn: {num_elsewhere} trained on other data.")
    return "\n".join(lines)


def _draw_panel(axes: Axes, points: Sequence[Point], cost: Callable[[Point], float], name: str) -> None:
    best = front(points, cost)
    axes.step(
        [cost(point) for point in best],
        [point.accuracy for point in best],
        where="post",
        color=VERMILLION,
        linewidth=1.2,
        zorder=1,
    )
    for point in points:
        axes.errorbar(
            cost(point),
            point.accuracy,
            yerr=point.std,
            fmt="o",
            color=BLUE,
            markerfacecolor=BLUE if point.competes else "white",
            markersize=5,
            capsize=2,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    costs = [cost(point) for point in points]
    if costs and max(costs) < 30 * min(costs):  # else powers of ten are marks enough
        axes.xaxis.set_minor_formatter(lambda x, _: f"{x:,.0f}" if f"{x:e}"[0] in "25" else "")
        axes.tick_params(which="minor", labelsize=FONT_SIZE - 1)
    axes.margins(x=0.1, y=0.1)
    axes.set_xlabel(name, fontsize=FONT_SIZE)
    axes.set_ylabel("test accuracy (%)", fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.grid(alpha=0.3)


def _label(axes: Axes, points: Sequence[Point], cost: Callable[[Point], float]) -> None:
    """Writes each entry's name inside the panel, where it covers the least of points, front and other names."""
    pixels = axes.transData.transform
    taken = []
    for point in points:
        x, low = pixels((cost(point), point.accuracy - (point.std or 0)))
        _, high = pixels((cost(point), point.accuracy + (point.std or 0)))
        taken.append(Bbox.from_extents(x - 4, low - 4, x + 4, high + 4))
    for here, there in itertools.pairwise(front(points, cost)):
        corner = (cost(there), here.accuracy)
        taken.append(Bbox([pixels((cost(here), here.accuracy)), pixels(corner)]).padded(1))
        taken.append(Bbox([pixels(corner), pixels((cost(there), there.accuracy))]).padded(1))
    for point in sorted(points, key=lambda point: (-point.accuracy, point.entry)):
        label = axes.annotate(
            point.entry,
            (cost(point), point.accuracy),
            (0, 0),
            textcoords="offset points",
            fontsize=SMALL_FONT_SIZE,
            parse_math=False,
            in_layout=False,  # lest the panels move when the figure is saved, and the labels' places be others
            arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 5},
        )
        badness = [_badness(_move(label, place), axes.bbox, taken) for place in PLACES]
        place = PLACES[badness.index(min(badness))]
        taken.append(_move(label, place))
        if label.arrow_patch:  # the line, of which a label beside its marker has no need
            label.arrow_patch.set_visible(abs(place[0]) + abs(place[1]) > BESIDE)


def _move(label: Annotation, place: Place) -> Bbox:
    """Puts the label there and returns what it covers, in pixels."""
    label.set(position=place[:2], horizontalalignment=place[2], verticalalignment=place[3])
    label.get_window_extent()  # puts the text in its place, and counts the line to the marker, too
    return Text.get_window_extent(label)


def _badness(box: Bbox, panel: Bbox, taken: Sequence[Bbox]) -> int:
    margin = 0.05 * box.width  # texts are wider at other resolutions than the one they are measured at
    is_inside = panel.contains(box.x0 - margin, box.y0) and panel.contains(box.x1 + margin, box.y1)
    return box.count_overlaps(taken) + (0 if is_inside else len(taken))
