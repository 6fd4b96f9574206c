"""The built site, in a browser: it asks no other host, pages are no wider than the window, texts can be read, the search finds."""

from __future__ import annotations

import fcntl
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis.chromium import Chromium

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "embed": "src", "object": "data"}  # fmt: skip
"""Elements that load what an attribute names."""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site, which the workers of one run share."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "site"
    with (shared / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built").exists():
            environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"}
            words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
            done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "WARNING" not in done.stderr
            (folder / "built").touch()
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def pages(site: Path) -> list[Path]:
    return sorted(p for p in site.rglob("*.html") if p.name != "404.html")


class Loaded(HTMLParser):
    """What a page makes a browser load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.found.append(values.get("href") or "")
        if tag in LOADING and values.get(LOADING[tag]):
            self.found.append(values[LOADING[tag]] or "")


@pytest.mark.before_each_merge
def test_no_page_and_no_style_refers_to_another_host(site: Path) -> None:
    away = {}
    for page in site.rglob("*.html"):
        found = [url for url in Loaded(page.read_text("utf-8")).found if re.match(r"[a-z]+:|//", url)]
        if found:
            away[page.relative_to(site).as_posix()] = found
    for style in site.rglob("*.css"):
        text = style.read_text("utf-8")
        found = [
            u for u in re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", text) if re.match(r"https?:|//", u)
        ]
        if found:
            away[style.relative_to(site).as_posix()] = found
    assert away == {}


@pytest.mark.parametrize("package", ["alnico", "alnico.lora", "alnico.recipe", "alnico.testing"])
def test_every_public_name_has_its_place_and_its_text(site: Path, package: str) -> None:
    html = "".join(p.read_text("utf-8") for p in (site / "api").glob("*.html"))
    module = importlib.import_module(package)
    missing = []
    for name in module.__all__:
        value = getattr(module, name)
        paths = {f"{package}.{name}", f"{getattr(value, '__module__', '')}.{name}", f"alnico.api.{name}"}
        if name != "__version__" and not any(f'id="{path}"' in html for path in paths):
            missing.append(name)
    assert missing == [] or (package == "alnico" and missing == ["lora", "recipe"])


OVERFLOWS = """(() => {
  const wide = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= wide) return [];
  return [...document.querySelectorAll("article *")].filter((e) => e.getBoundingClientRect().right > wide + 1
    && !e.parentElement.closest(".md-typeset__scrollwrap, pre, .highlight")).map((e) => e.outerHTML.slice(0, 200)).slice(0, 5);
})()"""

CUT = """[...document.querySelectorAll("article table, article p, article pre")].filter((e) => {
  const box = e.closest(".md-typeset__scrollwrap, pre") || e;
  const style = getComputedStyle(box);
  return e.getBoundingClientRect().width > 0 && box.scrollWidth > box.clientWidth + 8 && !["auto", "scroll"].includes(style.overflowX)
    && !["auto", "scroll"].includes(getComputedStyle(box.firstElementChild || box).overflowX);
}).map((e) => e.outerHTML.slice(0, 200))"""
"""What is wider than its box, which does not scroll."""

FAINT = """(() => {
  const remembered = (compute, known = new Map()) => (key) => known.has(key) ? known.get(key) : (known.set(key, compute(key)), known.get(key));
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const channels = remembered((color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  });
  const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
  const page = channels(getComputedStyle(document.body).backgroundColor).slice(0, 3);
  const ground = remembered((e) => e ? over(channels(getComputedStyle(e).backgroundColor), ground(e.parentElement)) : page);
  const shown = remembered((e) => e ? Number(getComputedStyle(e).opacity) * shown(e.parentElement) : 1);
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const faint = new Map(), looked = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const e = node.parentElement;
    if (looked.has(e) || !node.data.trim()) continue;
    looked.add(e);
    if (e.closest("script, style, .headerlink, .md-search, .md-top, .md-skip, .md-dialog")) continue;
    const [r, g, b, a] = channels(getComputedStyle(e).color), under = ground(e);
    const [one, other] = [light(over([r, g, b, a * shown(e)], under)), light(under)];
    const ratio = (Math.max(one, other) + .05) / (Math.min(one, other) + .05);
    const box = ratio < 4.5 && e.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && e.getBoundingClientRect();
    if (box && box.width && box.height) faint.set(e.className, `${ratio.toFixed(2)} ${e.tagName}.${e.className} "${node.data.trim().slice(0, 40)}"`);
  }
  return [...faint.values()].slice(0, 8);
})()"""

BROKEN = r"""(() => {
  const found = [];
  const walker = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (!node.parentElement.closest("code") || node.parentElement.closest("pre")) continue;
    for (const option of node.data.matchAll(/(?<![^\s|(\[,])--?[a-z][\w-]*(?=[\s=|)\],]|$)/g)) {
      const range = document.createRange();
      range.setStart(node, option.index); range.setEnd(node, option.index + option[0].length);
      if (new Set([...range.getClientRects()].map((r) => Math.round(r.top))).size > 1) found.push(option[0]);
    }
  }
  return found.slice(0, 8);
})()"""
"""Options of commands that are broken over two lines, as if ``--`` were one of them."""

LONELY = """(() => {
  const headings = [...document.querySelectorAll("article :is(h1, h2, h3, h4)")].filter((h) => h.querySelector(".headerlink"));
  const before = headings.map((h) => h.offsetHeight);
  const hidden = document.head.appendChild(Object.assign(document.createElement("style"), { textContent: ".headerlink { display: none !important }" }));
  const found = headings.filter((h, i) => h.offsetHeight !== before[i]).map((h) => h.textContent);
  hidden.remove();
  return found.slice(0, 8);
})()"""
"""Headings whose mark, which is seen only under the pointer, has a line of its own."""

UNHINTED = """[...document.querySelectorAll("article pre > code, article .md-typeset__scrollwrap")].filter((e) =>
  e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).backgroundImage === "none").map((e) => e.textContent.slice(0, 80)).slice(0, 8)"""
"""Code and tables that scroll, without the shadow that says so."""


def wait(browser: Chromium) -> None:
    """Until two frames are drawn."""
    browser.value("new Promise((d) => requestAnimationFrame(() => requestAnimationFrame(d)))")


def show(browser: Chromium, width: int, *, dark: bool) -> None:
    """The page that is open, in a window of this width and this scheme."""
    browser.ask(
        "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.ask(
        "Emulation.setEmulatedMedia", features=[scheme, {"name": "prefers-reduced-motion", "value": "reduce"}]
    )
    wait(browser)


def go(browser: Chromium, page: Path, width: int = 1600, *, dark: bool = False) -> None:
    """Open a page and wait until it is loaded."""
    browser.requests.clear()
    browser.messages.clear()
    show(browser, width, dark=dark)
    browser.loaded = False
    browser.ask("Page.navigate", url=page.as_uri())
    while not browser.loaded:
        browser._next()
    still = "document.head.append(Object.assign(document.createElement('style'), {textContent: '*{transition:none!important;animation:none!important}'}))"
    browser.value(still)
    wait(browser)


PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_every_page_fits_and_can_be_read_and_asks_no_other_host(
    site: Path, browser: Chromium, part: int
) -> None:
    wrong: dict[str, object] = {}
    for page in pages(site)[part::PARTS]:
        name = page.relative_to(site).as_posix()
        go(browser, page)
        for width in (1600, 390):
            for dark in (False, True):
                show(browser, width, dark=dark)
                found = {
                    "overflows": browser.value(OVERFLOWS),
                    "cut": browser.value(CUT),
                    "faint": browser.value(FAINT),
                    "broken": browser.value(BROKEN),
                    "lonely": browser.value(LONELY),
                    "unhinted": browser.value(UNHINTED),
                }
                wrong |= {f"{name} at {width}, dark {dark}: {k}": v for k, v in found.items() if v}
        away = [u for u in browser.requests if not u.startswith(("file:", "data:", "blob:", "about:"))]
        wrong |= {f"{name}: {k}": v for k, v in {"asks": away, "says": browser.messages.copy()}.items() if v}
    assert wrong == {}


@pytest.mark.before_each_merge
def test_the_search_finds_without_a_server(site: Path, browser: Chromium) -> None:
    go(browser, site / "index.html")
    browser.value(
        "(() => { document.querySelector('#__search').click(); const box = document.querySelector('.md-search__input');"
        " box.focus(); box.value = 'frankenmerge'; box.dispatchEvent(new Event('keyup')); box.dispatchEvent(new Event('input')); })()"
    )
    found = browser.value(
        "new Promise((done) => { const end = Date.now() + 60000; const look = () => {"
        " const links = [...document.querySelectorAll('.md-search-result__link')].map((a) => a.getAttribute('href'));"
        " if (links.length || Date.now() > end) done(links); else setTimeout(look, 50); }; look(); })"
    )
    assert any("stack-layers" in link for link in found), found
    assert [m for m in browser.messages if m.startswith(("error", "exception"))] == []
