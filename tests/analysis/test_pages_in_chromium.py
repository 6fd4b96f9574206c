"""Every page in a real browser, wide and light, narrow and dark: widths of cards, contrast, overflow, labels and hints are measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Chromium
from made_pages import every_page, together
from test_report_in_chromium import local

pytestmark = pytest.mark.slow

FAULTS, OVERLAPS = (
    (Path(__file__).parent / f"page_{what}.js").read_text("utf-8") for what in ("faults", "overlaps")
)

OTHERS = """(async () => {
  for (const select of document.querySelectorAll("select")) {
    select.selectedIndex = select.options.length - 1;
    select.dispatchEvent(new Event("change"));
  }
  for (const details of document.querySelectorAll("details")) details.open = true;
  await new Promise((done) => setTimeout(done, 50));
  return [...document.querySelectorAll("details")].filter((d) => !d.querySelector("td")).length;
})()"""
"""Shows the last of all choices and all numbers; gives how many figures have none."""

PAGES = dict(every_page())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.mark.parametrize("kind", ["analysis", "compare", "evaluation", "search", "curve"])
def test_pages_of_all_models_and_tasks_have_no_fault_that_can_be_measured(
    kind: str, tmp_path: Path, browser: Chromium, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {name: write for name, write in PAGES.items() if name.startswith(kind)}
    together(pages, tmp_path / "pages.html", monkeypatch)
    browser.open(tmp_path / "pages.html", 1600)
    assert browser.value("document.querySelectorAll('.frame').length") == len(pages)
    assert browser.value(FAULTS) == []
    assert browser.value(OVERLAPS) == []
    browser.show(390, dark=True)
    assert browser.value(FAULTS) == []
    assert browser.value(OVERLAPS) == []
    assert browser.value(OTHERS) == 0, "numbers behind a figure are missing"
    assert browser.value(FAULTS) == []
    assert browser.value("document.title") != "caught"
    assert browser.value("document.querySelectorAll('main img, main a').length") == 0
    assert browser.messages == []
    assert [url for url in browser.requests if not local(url)] == []
