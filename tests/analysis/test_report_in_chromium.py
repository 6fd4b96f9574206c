"""What a page does in a real browser; test_pages_in_chromium.py has how it looks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Chromium
from made_analyses import made_analysis, suggestion
from test_report import hostile

from alnico.analysis.report import write_report

pytestmark = pytest.mark.slow

CHOOSE = """(async () => {
  for (const select of document.querySelectorAll("select")) {
    for (let i = 0; i < select.options.length; i += Math.max(1, Math.floor(select.options.length / 4))) {
      select.selectedIndex = i;
      select.dispatchEvent(new Event("change"));
      await new Promise((done) => setTimeout(done));
    }
  }
  for (const details of document.querySelectorAll("details")) details.open = true;
  await new Promise((done) => setTimeout(done, 50));
  return [...document.querySelectorAll("details")].filter((d) => !d.querySelector("td")).length;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def local(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:"))


def test_the_matrices_and_rows_that_are_chosen_are_shown_and_sorted(
    tmp_path: Path, browser: Chromium
) -> None:
    analysis = made_analysis(3, 6)
    write_report(analysis, tmp_path / "report.html")
    browser.open(tmp_path / "report.html", 1600)
    shown = "[...document.querySelectorAll('#matrices > *')].filter((e) => e.offsetHeight).map((e) => e.ariaLabel)"
    assert browser.value(shown) == ["whole model"]
    choose = "(() => {{ const s = document.querySelector('{0}'); s.selectedIndex = {1}; s.dispatchEvent(new Event('change')); }})()"
    browser.value(choose.format("select[data-shows]", 2))
    assert browser.value(shown) == ["attention"]
    browser.value(choose.format("select[data-filters]", 2))
    browser.value(
        "[...document.querySelectorAll('th button')].find((b) => b.textContent === 'relative').click()"
    )
    rows = "[...document.querySelectorAll('#movers-table tbody tr')].filter((r) => !r.hidden)"
    models = browser.value(f"{rows}.map((r) => r.dataset.model)")
    assert set(models) == {"2 math-instruct"}
    shares = browser.value(f"{rows}.map((r) => Number(r.cells[5].dataset.value))")
    assert shares == sorted(shares, reverse=True)
    most = max(c.relative_l2 or 0.0 for t in analysis.tensors if (c := t.changes[1]))
    assert math.isclose(shares[0], most)


def test_names_that_would_run_do_not(tmp_path: Path, browser: Chromium) -> None:
    write_report(
        hostile(made_analysis(3, 4)),
        tmp_path / "report.html",
        suggestion("<script>document.title = 'caught'</script>"),
    )
    browser.open(tmp_path / "report.html", 1600)
    assert browser.value(CHOOSE) == 0
    assert browser.value("document.title").startswith("3 models and the base </script>")
    assert browser.value("document.querySelectorAll('main img, main a').length") == 0
    assert browser.messages == []
    assert [url for url in browser.requests if not local(url)] == []


def test_the_button_copies_the_recipe_from_a_file(tmp_path: Path, browser: Chromium) -> None:
    write_report(made_analysis(2, 2), tmp_path / "report.html", suggestion("Because."))
    browser.open(tmp_path / "report.html", 1600)
    assert browser.value("document.querySelector('.copy button').textContent") == "Copy"
    press = "(async () => {{ {0}; const b = document.querySelector('.copy button'); b.click(); await new Promise((d) => setTimeout(d, 300)); return b.textContent; }})()"
    for without in ("", "Object.defineProperty(navigator, 'clipboard', { value: undefined })"):
        browser.ask(
            "Runtime.evaluate", expression="document.querySelector('.copy button').textContent = 'Copy'"
        )
        copied = browser.ask(
            "Runtime.evaluate",
            expression=press.format(without),
            userGesture=True,
            awaitPromise=True,
            returnByValue=True,
        )
        assert copied["result"]["value"] == "Copied"
    assert browser.value("getSelection().toString()") == "merge_method: ties"
    assert browser.messages == []


def test_the_page_prints_without_a_word(tmp_path: Path, browser: Chromium) -> None:
    write_report(made_analysis(3, 6), tmp_path / "report.html")
    browser.open(tmp_path / "report.html", 1600)
    assert len(browser.ask("Page.printToPDF", preferCSSPageSize=True)["data"]) > 100_000
    assert browser.messages == []
