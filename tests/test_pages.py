"""The pages for readers: what they name exists, what they link to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "cluster/README.md", "jobs/benchmarks/README.md")
# Folders whose files a page may name by their paths from the root.
NAMED = re.compile(r"(?<![\w/.-])(?:cluster|jobs|llkd_ray|tests|\.ci)/[\w./-]*\w")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings get where pages are shown."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_exists(name: str) -> None:
    found = NAMED.findall((ROOT / name).read_text(encoding="utf-8"))
    assert found
    assert [path for path in found if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_links_to_is_there(name: str) -> None:
    page = ROOT / name
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
