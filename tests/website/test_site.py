"""The site is whole: every page is in the navigation, every public name in the reference, and pages read the same here and there."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markdown
import pytest
import yaml
from markdown_it import MarkdownIt

import alnico

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md"))
PROJECT = [
    ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "STYLE.md", "README.md")
]


def loaded(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def settings() -> dict[str, Any]:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python", lambda *_: None)
    found: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)
    return found


def leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    if isinstance(nav, dict):
        nav = list(nav.values())
    return [leaf for item in nav for leaf in leaves(item)]


def test_the_page_of_errors_is_up_to_date() -> None:
    maker = loaded(DOCS / "make_errors.py")
    assert maker.PAGE.read_text("utf-8") == maker.page(), "run: python docs/make_errors.py"


def test_the_page_of_errors_has_every_exit_code() -> None:
    text = (DOCS / "errors.md").read_text("utf-8")
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    errors = alnico.errors
    raised = {
        c.exit_code for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, errors.AlnicoError)
    }
    assert codes == raised | {0, 1, 2, 129, 143, errors.INTERRUPTED, errors.DIFFERENT}


def test_every_page_is_in_the_navigation_once() -> None:
    listed = leaves(settings()["nav"])
    assert sorted(listed) == sorted(set(listed))
    here = {p.relative_to(DOCS).as_posix() for p in PAGES}
    assert {leaf for leaf in listed if not leaf.startswith("project/")} == here


def test_the_navigation_has_the_five_parts() -> None:
    parts = [next(iter(part)) for part in settings()["nav"]]
    assert parts == ["Getting started", "How-to", "Reference", "Explanation", "Project"]


@pytest.mark.parametrize(
    "package", ["alnico", "alnico.lora", "alnico.testing", "alnico.errors", "alnico.events"]
)
def test_every_public_name_is_in_the_python_reference(package: str) -> None:
    shown = {
        p
        for page in (DOCS / "api").glob("*.md")
        for p in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.M)
    }
    shown |= {
        re.sub(r"^alnico\.api\.|(?<=\.)(\w+)\.(?=\1$)", lambda m: "alnico." if m[1] is None else "", path)
        for path in shown
    }
    text = (DOCS / "api" / "index.md").read_text("utf-8")
    module = importlib.import_module(package)
    if package in shown:
        return  # the whole module is
    missing = [
        name
        for name in module.__all__
        if f"{package}.{name}" not in shown
        and f"`{package}.{name}`" not in text
        and not any(path.startswith(f"{package}.{name}.") for path in shown)
    ]
    assert missing == []


def test_every_extra_is_on_the_page_of_installing() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "install.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(project["optional-dependencies"])


class Outline(HTMLParser):
    """The blocks of a page: headings with their text, tables with the cells of each row, items, code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.blocks: list[Any] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("table", "pre", "blockquote", "h1", "h2", "h3", "h4", "li"):
            self.blocks.append(tag)
        elif tag == "tr":
            self.blocks.append([tag, 0])
        elif tag in ("td", "th"):
            row = next(b for b in reversed(self.blocks) if isinstance(b, list))
            row[1] += 1


def rendered_by_the_site(text: str) -> str:
    """As mkdocs does, with the extensions that make blocks."""
    hooks = loaded(DOCS / "site_hooks.py")
    extensions = [
        "attr_list",
        "md_in_html",
        "sane_lists",
        "tables",
        "pymdownx.superfences",
        "pymdownx.saneheaders",
    ]
    return markdown.markdown(hooks.prepared(text), extensions=extensions)


@pytest.mark.parametrize("page", [*PAGES, *PROJECT], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_page_has_the_same_blocks_in_the_repository_and_on_the_site(page: Path) -> None:
    text = page.read_text("utf-8")
    here = Outline(MarkdownIt("commonmark").enable("table").render(text)).blocks
    there = Outline(rendered_by_the_site(text)).blocks
    assert there == here


@pytest.mark.parametrize("page", [*PAGES, *PROJECT], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_row_of_a_table_has_the_cells_of_its_head(page: Path) -> None:
    """A `|` in a cell is written `\\|`, also in code: otherwise the cells after it are lost without a word."""
    in_code = False
    width = 0
    wrong = []
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        in_code ^= line.lstrip().startswith("```")
        if in_code or not line.startswith("|"):
            width = 0
            continue
        cells = len(re.findall(r"(?<!\\)\|", line.strip())) - 1
        width = width or cells
        if cells != width:
            wrong.append(f"line {number}: {cells} cells, expected {width}")
    assert wrong == []


def slug(heading: str, seen: dict[str, int]) -> str:
    """The anchor of a heading where repositories are read: lower case, without punctuation, spaces as dashes."""
    text = re.sub(r"[^\w\- ]", "", re.sub(r"`|\*|\[|\]\([^)]*\)", "", heading).strip().lower()).replace(
        " ", "-"
    )
    seen[text] = seen.get(text, -1) + 1
    return text if not seen[text] else f"{text}-{seen[text]}"


def anchors(page: Path) -> set[str]:
    seen: dict[str, int] = {}
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))
    return {
        slug(tokens[i + 1].content, seen) for i, token in enumerate(tokens) if token.type == "heading_open"
    }


@pytest.mark.parametrize("page", [*PAGES, *PROJECT], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_of_the_repository(page: Path) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))
    links = [
        str(child.attrs["href"])
        for token in tokens
        for child in token.children or ()
        if child.type == "link_open"
    ]
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []
