"""The figure's numbers, its front, and that the same records give the same bytes."""

import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from fake_records import make_record, make_unfinished, publish
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from fmbench import pareto as command
from fmbench.pages import pareto
from fmbench.pages.pareto import Point

TITLE = "1 x Abacus 9"


def point(
    entry: str, accuracy: float, core_seconds: float, num_params: int = 1, *, competes: bool = True
) -> Point:
    return Point(entry, 1, accuracy, None, core_seconds, num_params, competes)


POINTS = [
    point("cheap", 90.0, 10.0, 3000),
    point("beaten", 89.0, 20.0, 2000),
    point("equal", 90.0, 30.0, 1000),
    point("good", 93.0, 40.0, 5000),
    point("same cost", 92.0, 40.0, 4000),
    point("a head", 95.0, 1.0, 10, competes=False),
    point("bug", 50.0, 5.0, 500),
]


def names(figure: Figure) -> list[set[str]]:
    """What stands beside the points of each panel."""
    return [{text.get_text() for text in axes.texts} for axes in figure.axes]


def caption(figure: Figure) -> str:
    return figure._supxlabel.get_text()  # type: ignore[attr-defined]


# Numbers.


def test_a_point_is_its_entry_over_seeds():
    runs = [
        make_record(seed=seed, wrong=wrong, train_core_seconds=seconds)
        for seed, (wrong, seconds) in enumerate([(10, 1.0), (20, 2.0), (30, 60.0)])  # 95, 90 and 85 %
    ]
    found = pareto.point_of(runs)
    assert (found.accuracy, found.std) == pytest.approx((90.0, 5.0))
    assert (found[1], *found[4:]) == (3, 2.0, 384_854, True)
    assert pareto.point_of(runs[:1]) == Point("mlp", 1, 95.0, None, 1.0, 384_854, competes=True)


@pytest.mark.parametrize(
    ("entry", "features", "competes"),
    [
        ("speedrun-94", {"backbone": ""}, True),
        ("transfer-vgg19", {"backbone": "vgg19"}, False),
    ],
)
def test_heads_do_not_compete(entry, features, competes):
    assert pareto.point_of([make_record(entry, config={"features": features})]).competes == competes


def test_a_record_from_before_there_were_heads_competes():
    record = make_record()
    del record.config["features"]
    assert pareto.point_of([record]).competes


def test_the_front_is_what_no_other_beats():
    shown = POINTS[:-1]
    assert [p.entry for p in pareto.front(shown, lambda p: p.core_seconds)] == ["cheap", "good"]
    assert [p.entry for p in pareto.front(shown, lambda p: p.num_params)] == ["equal", "same cost", "good"]
    assert [p.entry for p in pareto.front(shown[::-1], lambda p: p.core_seconds)] == ["cheap", "good"]
    assert pareto.front([], lambda p: p.core_seconds) == []


# The figure.


def test_both_panels_name_what_is_drawn_and_the_caption_what_is_not():
    figure = pareto.draw({TITLE: POINTS}, 0)
    drawn = {"cheap", "beaten", "equal", "good", "same cost", "a head"}
    assert names(figure) == [drawn, drawn]
    assert caption(figure).endswith("\nNot drawn: 1 below 85 %: bug (50.00 %).")
    assert [axes.get_title() for axes in figure.axes] == [TITLE, ""]
    assert [axes.get_ylim()[0] > 85 for axes in figure.axes] == [True, True]
    edge = pareto.draw({TITLE: [point("edge", 85.0, 1.0)]}, 3)
    assert names(edge) == [{"edge"}, {"edge"}]
    assert caption(edge).endswith("head's alone.\nNot drawn: 3 trained on other data.")


def test_all_that_is_not_drawn_is_named_within_the_figure():
    below = [point(f"a-long-name-with-$-and-$-{number}", 84.96 - number, 1.0) for number in range(20)]
    figure = pareto.draw({TITLE: POINTS[:2], "elsewhere": below}, 0)
    words = " ".join(caption(figure).split())
    assert "Not drawn: 20 below 85 %: a-long-name-with-$-and-$-0 (84.96 %), " in words
    assert all(f"{p.entry} ({p.accuracy:.2f} %)" in words for p in below)
    box = figure._supxlabel.get_window_extent()  # type: ignore[attr-defined]
    assert figure.bbox.contains(box.x0, box.y0)
    assert figure.bbox.contains(box.x1, box.y1)


def test_machines_have_panels_of_their_own_and_share_that_of_parameters():
    """Of an entry in both, the one with the most seeds stands over parameters; the first, if they have as many."""
    here = [Point(entry, 2, 90.0, None, 10.0, 100, competes=True) for entry in ("a", "b", "c")]
    there = [
        Point(entry, seeds, 91.0, None, 9.0, 100, competes=True)
        for entry, seeds in zip("abd", (3, 2, 1), strict=True)
    ]
    figure = pareto.draw({"here": here, "there": there}, 0)
    assert [axes.get_title() for axes in figure.axes] == ["here", "there", ""]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim() != figure.axes[2].get_xlim()
    assert names(figure) == [{"a", "b", "c"}, {"a", "b", "d"}, {"a", "b", "c", "d"}]
    markers = [line.get_xydata().tolist() for line in figure.axes[2].lines if line.get_marker() == "o"]  # type: ignore[union-attr]
    assert markers == [[[100, accuracy]] for accuracy in (91, 90, 90, 91)]  # a, b, c, d


def test_runs_that_shared_their_machine_stand_over_parameters_alone():
    assert math.isnan(pareto.point_of([make_record(environment={"shared_by": 2})]).core_seconds)
    shared = [Point("a", 1, 90.0, None, math.nan, 100, competes=True)]
    figure = pareto.draw({"here": [point("b", 91.0, 10.0, 200)], "shared": shared}, 0)
    assert [axes.get_title() for axes in figure.axes] == ["here", ""]
    assert names(figure) == [{"b"}, {"a", "b"}]
    assert names(pareto.draw({"shared": shared}, 0)) == [{"a"}]


def test_the_line_steps_from_front_to_front():
    upper, lower = pareto.draw({TITLE: POINTS}, 0).axes
    for axes, path in [
        (upper, [[10, 90], [40, 93]]),
        (lower, [[1000, 90], [4000, 92], [5000, 93]]),
    ]:
        line = axes.lines[0]
        assert line.get_drawstyle() == "steps-post"
        assert line.get_xydata().tolist() == path  # type: ignore[union-attr]
        assert axes.get_xscale() == "log"


def test_what_does_not_compete_is_hollow_and_spread_is_a_bar():
    wide = Point("wide", 2, 90.0, 2.0, 10.0, 100, competes=True)
    axes = pareto.draw({TITLE: [wide, point("a head", 91.0, 1.0, competes=False)]}, 0).axes[0]
    markers = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() for line in markers] == [pareto.BLUE, "white"]
    (bar,) = (c for container in axes.containers for c in container[2] if len(c.get_segments()))
    assert bar.get_segments()[0].tolist() == [[10.0, 88.0], [10.0, 92.0]]


def test_labels_of_close_points_neither_overlap_nor_leave_the_panel():
    close = [point(f"entry-{number}", 90 + 0.05 * number, 10 + number) for number in range(6)]
    for axes in pareto.draw({TITLE: [*close, point("far+its_name_is_long=1", 88.0, 1000.0, 9)]}, 0).axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # without lines to markers
        assert [box.count_overlaps(boxes) for box in boxes] == [1] * 7  # itself
        assert all(axes.bbox.contains(x, y) for box in boxes for x, y in box.corners())


def test_a_label_that_stands_apart_has_a_line_to_its_marker():
    crowd = [point(f"a-name-of-some-length-{number}", 90 + 0.001 * number, 10.0) for number in range(12)]
    crowd.append(point("elsewhere", 94.0, 100.0, 9))
    figure = pareto.draw({TITLE: crowd}, 0)
    figure.draw_without_rendering()
    for axes in figure.axes:
        distances, lengths = [], []
        for text in axes.texts:
            assert isinstance(text, Annotation) and text.arrow_patch
            is_apart = sum(map(abs, text.get_position())) > pareto.BESIDE
            assert text.arrow_patch.get_visible() == is_apart
            box, marker = Text.get_window_extent(text), axes.transData.transform(text.xy)
            distances.append(max(box.x0 - marker[0], marker[0] - box.x1, box.y0 - marker[1], marker[1] - box.y1))
            path = text.arrow_patch.get_transform().transform_path(text.arrow_patch.get_path())
            lengths.append(np.hypot(*path.get_extents().size))
        assert max(distances) > 15  # pixels; else there is nothing to see here
        for distance, length in zip(distances, lengths, strict=True):
            assert length > distance - 12  # of which the marker and the text cover some


@pytest.mark.parametrize("points", [[point("bug", 50.0, 5.0)], [point("one", 90.0, 5.0)]])
def test_few_points_make_a_figure_without_warnings(points):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pareto.draw({TITLE: points}, 0)


# The command.


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `fmbench.pareto` on <tmp_path>: exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pareto", f"--results_dir={tmp_path}", *arguments])
        code = 0
        try:
            command.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[dict[str, list[Point]], int, float]]:
    """What is drawn, in place of drawing it."""
    calls: list[tuple[dict[str, list[Point]], int, float]] = []

    def draw(*arguments) -> Figure:
        calls.append(arguments)
        return Figure()

    monkeypatch.setattr(pareto, "draw", draw)
    return calls


def test_the_conditions_of_the_data_with_the_most_entries_are_drawn(tmp_path, run, drawn):
    records = [
        make_record("a", 0, dtype="bfloat16"),
        make_record("a", 1, dtype="bfloat16"),
        make_record("a", 2, dtype="bfloat16"),
        make_record("b"),
        make_record("c"),
        make_record("d", data_version="sample"),
        make_record("e", data_version="sample"),
        make_record("f", data_version="sample"),
        make_record("d", data_version="unproven-00000000"),
        make_record("g", data_version="old"),
        make_unfinished("diverged", "h"),
    ]
    for record in records:
        publish(record, tmp_path)
    assert run() == (0, f"{tmp_path / 'pareto.svg'}: 3 entries.\n", "")
    ((conditions, num_elsewhere, least_accuracy),) = drawn
    title = "1 x Abacus 9 (2 cores), {}, data of 2017-08-31"
    found = {title: [(p.entry, p.num_seeds) for p in points] for title, points in conditions.items()}
    assert found == {title.format("bfloat16"): [("a", 3)], title.format("float32"): [("b", 1), ("c", 1)]}
    assert (num_elsewhere, least_accuracy) == (1, 85.0)  # g


def test_chosen_entries_are_drawn_whatever_they_reach(tmp_path, run, drawn):
    for entry, wrong in (("small", 100), ("good", 10), ("other", 12)):
        publish(make_record(entry, wrong=wrong), tmp_path, wrong=wrong)
    path = tmp_path / "few.pdf"
    assert run("--entries=small,good", f"--figure={path}") == (0, f"{path}: 2 entries.\n", "")
    ((conditions, _, least_accuracy),) = drawn
    ((small, good),) = ([(p.entry, p.accuracy) for p in points] for points in conditions.values())
    assert {small, good} == {("small", 50.0), ("good", 95.0)}
    assert least_accuracy == 0
    assert path.read_bytes().startswith(b"%PDF")
    assert not (tmp_path / "pareto.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--entries=small"], "--entries draws another picture than pareto.svg; name its file, as in --figure="),
        (["--entries=smal", "--figure=x.svg"], "has no completed run of smal; the nearest is small."),
        (["--figure=x.jpg"], "--figure=x.jpg: expected a file that ends in .svg, .png, .pdf."),
    ],
)
def test_a_choice_that_cannot_be_drawn_is_one_line(tmp_path, run, arguments, said):
    publish(make_record("small"), tmp_path)
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_the_same_records_give_the_same_bytes(tmp_path, run):
    for seed in range(2):
        publish(make_record("a", seed), tmp_path)
        publish(make_record("b", seed, train_core_seconds=5.0 + seed), tmp_path)
    path: Path = tmp_path / "pareto.svg"
    assert run()[0] == 0
    first = path.read_bytes()
    assert run()[0] == 0
    assert path.read_bytes() == first
    text = first.decode()
    assert "<dc:date>" not in text
    width = re.search(r'<svg [^>]*width="([0-9.]+)pt"', text)
    assert width
    assert 600 < float(width[1]) < 720  # 900 pixels are 675 points


def test_nothing_to_draw_is_one_line(tmp_path, run):
    publish(make_unfinished("interrupted"), tmp_path)
    assert run() == (2, "", f"fmbench.pareto: {tmp_path} has no records of completed runs to draw.\n")


def test_a_figure_that_cannot_be_written_is_one_line(tmp_path, run, drawn):
    publish(make_record(), tmp_path)
    (tmp_path / "pareto.svg").mkdir()
    code, _, err = run()
    assert code == 2
    assert re.fullmatch(r"fmbench.pareto: .*pareto.svg: cannot write the figure .*\n", err)
