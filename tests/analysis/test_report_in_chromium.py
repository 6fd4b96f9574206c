"""The page in a real browser, as wide as a desk's screen and as a phone's."""

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

OVERLAPS = """(() => {
  const texts = [...document.querySelectorAll("h1, h2, h3, caption, th, td, label, legend, .legend button, .plot text")]
    .filter((e) => e.textContent.trim() && e.getClientRects().length && !e.closest("details") && !e.querySelector("th, td"));
  const boxes = texts.map((e) => ({ e, r: e.getBoundingClientRect() }));
  const found = [];
  for (const part of document.querySelectorAll("section, header")) {
    const inside = boxes.filter(({ e }) => part.contains(e));
    inside.forEach(({ e, r }, i) => inside.slice(i + 1).forEach(({ e: f, r: s }) => {
      const wide = Math.min(r.right, s.right) - Math.max(r.left, s.left), high = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
      const scrolled = e.closest(".tall")?.contains(f) || e.closest(".tall") || f.closest(".tall");
      if (wide > 2 && high > 3 && !e.contains(f) && !f.contains(e) && !scrolled) found.push(e.textContent + " | " + f.textContent);
    }));
  }
  return found;
})()"""

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


@pytest.mark.parametrize("width", [1600, 390])
@pytest.mark.parametrize(("models", "layers"), [(2, 6), (8, 80)])
def test_the_page_is_legible_and_asks_for_nothing(
    models: int, layers: int, width: int, tmp_path: Path, browser: Chromium
) -> None:
    write_report(made_analysis(models, layers), tmp_path / "report.html", suggestion("Because."))
    browser.open(tmp_path / "report.html", width, dark=width == 390)
    assert browser.value(
        "document.querySelectorAll('.plot .main-svg').length >= document.querySelectorAll('.plot').length"
    )
    assert browser.value("document.documentElement.scrollWidth") == width
    below = "document.documentElement.scrollHeight - scrollY - document.querySelector('footer').getBoundingClientRect().bottom"
    assert browser.value(below) < 100, "the page goes on below its last line"
    assert browser.value(OVERLAPS) == []
    assert browser.value(CHOOSE) == 0, "numbers behind a figure are missing"
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.messages == []
    assert [url for url in browser.requests if not local(url)] == []


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


def test_the_page_prints_without_a_word(tmp_path: Path, browser: Chromium) -> None:
    write_report(made_analysis(3, 6), tmp_path / "report.html")
    browser.open(tmp_path / "report.html", 1600)
    assert len(browser.ask("Page.printToPDF", preferCSSPageSize=True)["data"]) > 100_000
    assert browser.messages == []
