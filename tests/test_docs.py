"""The pages hang together: links lead somewhere, and the index of docs/ has them all."""

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

REPOSITORY = Path(__file__).parents[1]
LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, check=True, text=True)
PAGES = [REPOSITORY / name for name in LISTED.stdout.split()]


def prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    text = prose(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)", text, re.MULTILINE)
    for target in targets:
        if not target.startswith(("https://", "http://")):
            name, _, anchor = unquote(target).partition("#")
            place = (page.parent / name).resolve() if name else page
            assert place.exists(), target
            assert not anchor or anchor in anchors(place), target


def test_the_index_names_every_page_of_docs_once():
    (folder,) = {page.parent for page in PAGES if page.parent.name == "docs"}
    named = re.findall(r"^\| \[\w+\]\((\w+\.md)\)", (folder / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted({page.name for page in folder.glob("*.md")} - {"README.md"})
