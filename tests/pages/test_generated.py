"""What stands in a record is shown on pages, and does nothing else there."""

import csv
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from fake_records import fake_dataset, make_record, publish
from pydantic import ValidationError

from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.pages import drawing, generated, leaderboard, pareto, speedrun
from fmbench.records import store
from fmbench.throughput.measurements import Measurements

HOSTILE = (
    "Abacus | 9\n\n# <script>alert(1)</script> [here](https://evil.example) ![](x) `$x^2$` @me www.evil.example"
)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("Intel(R) Xeon(R) Processor @ 2.1 GHz", "Intel(R) Xeon(R) Processor &#64; 2.1 GHz"),
        ("vgg_like+num_epochs=2", "vgg_like+num_epochs=2"),
        ("a|b", r"a\|b"),
        ("a\\|b", r"a\\\|b"),  # lest the backslash be escaped, and the cell end
        ("a\n\n# b\tc\u202ed", "a  # b c d"),
        ("<b>&amp;", "&lt;b>&amp;amp;"),
        ("[a](b)", r"\[a\](b)"),
        ("_a_ *b* ~~c~~ `d` $e$", r"\_a\_ \*b\* \~\~c\~\~ \`d\` \$e\$"),
        ("HTTPS://a.b WWW.a.b", "HTTPS&#58;//a.b WWW&#46;a.b"),
    ],
)
def test_text_shows_what_it_is_given(value, shown):
    assert generated.text(value) == shown


@pytest.mark.parametrize(
    ("config_file", "shown"),
    [
        ("configs/mlp.py", "[mlp](../configs/mlp.py)"),
        ("my configs/a(b).py", "[mlp](../my%20configs/a%28b%29.py)"),
        ("a?b#c%2e%2e.py", "[mlp](../a%3Fb%23c%252e%252e.py)"),
        ("https://evil.example/x.py", "mlp (https&#58;//evil.example/x.py)"),
        ("javascript:alert(1)", "mlp (javascript:alert(1))"),
        ("/etc/passwd", "mlp (/etc/passwd)"),
        ("//evil.example/x.py", "mlp (//evil.example/x.py)"),
        ("configs/../../x.py", "mlp (configs/../../x.py)"),
        ("..\\x.py", "mlp (..\\\\x.py)"),
        ("", "mlp ()"),
    ],
)
def test_only_a_path_below_the_repository_is_a_link(config_file, shown):
    assert generated.link("mlp", config_file, "../") == shown


@pytest.mark.parametrize("formula", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "\r=1"])
def test_a_spreadsheet_finds_no_formula(formula):
    assert generated.cell(formula) == f"'{formula}"


@pytest.mark.parametrize("value", ["mlp", "", "vgg_like+num_epochs=2", -1.5, None])
def test_other_cells_are_as_they_are(value):
    assert generated.cell(value) == value


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A results folder with a record whose texts are hostile."""
    monkeypatch.setattr(fashion_mnist, "load", lambda source: fake_dataset())
    record = make_record(
        "speedrun-94",
        config={"config_file": f"javascript:{HOSTILE}"},
        config_file=f"javascript:{HOSTILE}",
        environment={
            "device_kind": HOSTILE,
            "cpu": HOSTILE,
            "git_commit": HOSTILE,
            "versions": {"jax": HOSTILE, "CUDA": HOSTILE},
        },
        model="=cmd()",
    )
    publish(record, tmp_path / "results")
    (tmp_path / "README.md").write_text("\n\n".join(speedrun.README_MARKS))
    return tmp_path / "results"


def test_no_page_does_what_a_record_says(hostile):
    records = store.read_all(hostile)
    pages = leaderboard.files(hostile) | speedrun.render(hostile, records, Measurements())
    text = "\n".join(page for path, page in pages.items() if path.suffix == ".md")
    assert text.count("&lt;script>") >= 6
    for markup in ("<script", "[here](", "![", "://", " @me", "www.", "\n# <", "javascript:alert"):
        assert markup not in text.replace("\\[here\\](", "").replace("!\\[", "")
    lines = [line for line in text.splitlines() if "speedrun-94 (" in line]
    assert len(lines) == 3  # of the leaderboard, of the speed records, and of their part of the README
    for line in lines:
        assert line.endswith("|")
        assert line.replace("\\|", "").count("|") in (6, 11, 18)
    (row,) = csv.DictReader(pages[hostile / "leaderboard.csv"].splitlines())
    assert row["model"] == "'=cmd()"


def test_pictures_show_texts_as_they_are(tmp_path):
    point = pareto.Point("mlp", 1, 90.0, None, 10.0, 1000, True)
    drawing.save(pareto.draw({"1 x $\\frac{ <b> & |": [point]}, 0), tmp_path / "a.svg")
    ET.parse(tmp_path / "a.svg")
    drawing.save(
        drawing.confusion_matrix(np.arange(2), np.arange(2), "$\\frac{", ["$\\frac{", "$"]), tmp_path / "b.svg"
    )
    drawing.save(
        drawing.image_grid(np.zeros((1, 28, 28)), ["$\\frac{"], "x", columns=1, inches=1), tmp_path / "c.svg"
    )


@pytest.mark.parametrize(
    "entry", ["", "../x", "a/b", "a\\b", "=cmd", "-a", ".", "..", "a b", "a|b", "a\n", "$a", "é"]
)
def test_an_entry_is_called_what_a_file_may_be(entry):
    with pytest.raises(ValidationError, match="entry"):
        make_record(entry)


@pytest.mark.parametrize("change", [{"data_version": "unproven-/b"}, {"dtype": "a/b"}], ids=str)
def test_nothing_else_leads_a_records_name_astray(change):
    with pytest.raises(ValidationError, match="which names no file"):
        make_record("mlp", **change)
    assert make_record("_mine.2+a=b-c").name == "_mine.2+a=b-c-cpu-abacus-9-2c-float32-seed0"


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "README.md").write_bytes("<!-- a --> d\xe9j\xe0 <!-- b -->".encode("latin-1"))
    with pytest.raises(UserError, match=r"README\.md is no UTF-8 text \(byte 12\); save it as UTF-8"):
        generated.between_marks(tmp_path / "README.md", ("<!-- a -->", "<!-- b -->"), [])


def test_what_stands_around_the_marks_is_kept(tmp_path):
    page = tmp_path / "page.md"
    page.write_bytes("# Títle\r\n<a>\nold\n<b>\n\nThe end.\r\n".encode())
    written = "# Títle\r\n<a>\n\nnew\n\nnewer\n\n<b>\n\nThe end.\r\n"
    assert generated.between_marks(page, ("<a>", "<b>"), ["new", "newer"]) == {page: written}
    page.write_text("# Title\n")
    assert generated.between_marks(page, ("<a>", "<b>"), ["new"]) == {}


@pytest.mark.parametrize("text", ["<a>", "<b>", "<b><a>", "<a><a><b>", "<a><b><b>", "<a><b><a><b>"])
def test_marks_that_make_no_place_are_refused(tmp_path, text):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(UserError, match=r"page\.md: needs <a> and, below it, <b>, once each"):
        generated.between_marks(tmp_path / "page.md", ("<a>", "<b>"), [])
