"""results/index.html in headless Chromium: sorted, filtered, drawn; silent and alone."""

import re
import shutil
from pathlib import Path

import pytest

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGE = Path(__file__).parents[2] / "results" / "index.html"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(360, "light"), (2560, "dark")], ids=["phone", "wide"])
def page(request, browser):
    """The committed page, of which at the end no error is known, and no request but that for itself."""
    width, scheme = request.param
    said, asked = [], []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(PAGE.as_uri())
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing but tables is scrolled aside
    assert (said, asked) == ([], [PAGE.as_uri()])
    context.close()


def column(page, title: str) -> list[str]:
    titles = page.locator("#rows thead th").all_inner_texts()
    return page.locator(f"#rows tbody td:nth-child({titles.index(title) + 1})").all_inner_texts()


def numbers(texts: list[str]) -> list[float]:
    return [float(text.split()[0].replace(",", "")) for text in texts]


def drawn(page, canvas: str) -> str:
    """What a canvas shows, as a PNG in base64."""
    return page.evaluate("(id) => document.getElementById(id).toDataURL()", canvas)


def test_the_table_is_sorted_by_keyboard(page):
    accuracies = numbers(column(page, "test accuracy, %"))
    assert accuracies == sorted(accuracies, reverse=True)
    button = page.get_by_role("button", name="params")
    button.focus()
    for order, reverse in (("descending", True), ("ascending", False)):
        page.keyboard.press("Enter")
        sizes = numbers(column(page, "params"))
        assert sizes == sorted(sizes, reverse=reverse)
        assert (
            page.locator("#rows th[aria-sort]:has(button:text-is('params'))").get_attribute("aria-sort") == order
        )
    assert len(sizes) == page.evaluate("data.entries.length") > 10
    page.get_by_role("button", name="entry", exact=True).click()
    assert column(page, "entry") == sorted(column(page, "entry"))
    for _ in range(2):  # what is missing comes last in both orders
        page.get_by_role("button", name="val. accuracy").click()
        known = column(page, "val. accuracy, %")
        assert set(known[known.index("-") :]) == {"-"} and known[0] != "-"


def test_the_table_is_filtered(page):
    everything = len(column(page, "entry"))
    page.fill("#search", "SPEEDRUN 94")
    assert set(column(page, "entry")) == {"speedrun-94"}
    page.select_option("#dtype", "bfloat16")
    assert set(column(page, "dtype")) == {"bfloat16"}
    assert page.inner_text("#count").startswith(f"{len(column(page, 'entry'))} of {everything} rows")
    page.get_by_role("button", name="Show all").click()
    sync_api.expect(page.locator("#rows tbody tr")).to_have_count(everything)
    condition = page.locator("#condition option").nth(1).get_attribute("value")
    page.select_option("#condition", condition)
    assert set(column(page, "condition")) == {condition}
    page.fill("#search", "there is no such entry")
    assert column(page, "entry") == []


def test_curves_of_chosen_runs_are_drawn_over_each_other(page):
    before = page.evaluate("charts['curves-chart'].data.datasets.length")
    assert before > 0
    page.get_by_role("button", name="Choose none").click()
    assert page.evaluate("charts['curves-chart'].data.datasets.length") == 0
    blank = drawn(page, "curves-chart")
    for name in ("mlp", "cnn1+num_epochs=10"):
        page.fill("#search", name)
        row = page.locator("#rows tbody tr").filter(has=page.get_by_role("button", name=name, exact=True)).first
        row.get_by_role("checkbox").check()
    labels = page.evaluate("charts['curves-chart'].data.datasets.map((dataset) => dataset.label)")
    assert {"mlp, seed 2, train", "cnn1+num_epochs=10, seed 0, validation"} <= set(labels)
    assert drawn(page, "curves-chart") != blank
    curve = page.evaluate("charts['curves-chart'].data.datasets.at(-1).data.map(({ y }) => y / 100)")
    said = page.evaluate(
        "data.runs.findLast((run) => run.of.startsWith('cnn1+num_epochs=10')).curves.train_accuracy"
    )
    assert curve == pytest.approx(said)
    page.select_option("#quantity", "loss")
    page.select_option("#over", "core_seconds")
    assert "core-seconds" in page.get_attribute("#curves-chart", "aria-label")


def test_every_cost_is_drawn_and_every_entry_shown(page):
    views = page.locator("#cost option").count()
    pictures = set()
    for place in range(views):
        page.select_option("#cost", index=place)
        front = page.evaluate("frontOf(views()[at('cost').selectedIndex]).map((entry) => entry.test_accuracy)")
        assert front and front == sorted(set(front))
        assert page.locator("#front li").count() == len(front)
        pictures.add(drawn(page, "costs-chart"))
        outside = """() => { const chart = charts["costs-chart"], { left, right, top, bottom } = chart.chartArea;
            return chart.data.datasets.flatMap((_, which) => chart.getDatasetMeta(which).data)
            .filter(({ x, y }) => !(x >= left && x <= right && y >= top && y <= bottom)).length; }"""
        assert page.evaluate(outside) == 0
    assert len(pictures) == views
    page.locator("#front button").last.click()
    assert page.evaluate("document.activeElement.id") == "which"
    for place in range(page.locator("#which option").count()):
        page.select_option("#which", index=place)
        entry = page.evaluate("byKey.get(at('which').value)")
        assert page.locator("#wrong li").count() == len(entry["wrong"]) > 0
        cells = page.locator("#confusion tbody td").all_inner_texts()
        assert sum(int(cell.replace(",", "")) for cell in cells if cell != "·") == 10_000 * entry["num_seeds"]
    never = page.evaluate("[...document.querySelectorAll('#never-pictures canvas')].map((one) => one.toDataURL())")
    assert len(set(never)) == len(never) == page.evaluate("data.never_right.count") > 20


def test_hostile_texts_are_shown_as_texts(browser):
    html = PAGE.read_text()
    hostile = "\\u003cimg src=x onerror=alert(1)\\u003e"
    html = re.sub(r'("model": ")[^"]*', lambda match: match[1] + hostile, html)
    page = browser.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.dismiss() or "opened"))
    page.set_content(html)
    assert "<img src=x onerror=alert(1)>" in page.inner_text("#facts")
    assert page.locator("img").count() == 0 and dialogs == []
    # Were there markup after all, the policy would stop it.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p onclick=\"alert(1)\" id=bad>x</p>')")
    page.click("#bad")
    assert dialogs == []
