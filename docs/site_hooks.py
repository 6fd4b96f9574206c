"""Takes files from outside docs/ into the site, and prepares Markdown for the site's renderer.

The pages are written for two readers: the repository, where ``../CONTRIBUTING.md`` is a file, and the site. CONTRIBUTING, CHANGELOG,
SECURITY, STYLE and CITATION become pages of the site. Any other file of the repository that a page links to, such as an example,
becomes a page that shows it. Links follow.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

PROJECT = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "STYLE.md": "project/style.md",
    "CITATION.cff": "project/citation.md",
    "README.md": "index.md",
    "docs/": "index.md",
}
"""Files in the root, and the pages of the site that they become."""

LINK = re.compile(r"(?<=\]\()([^()\s<>#]+)(?=[)#\s])")
LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".cff": "yaml", ".toml": "toml", ".sh": "bash", ".json": "json"}  # fmt: skip

_origins: dict[str, str] = {}
"""The file in the repository from which a page of the site was made."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that come from outside docs/."""
    _origins.clear()
    for file in files.documentation_pages():
        _origins[file.src_uri] = f"docs/{file.src_uri}"
    for name, uri in PROJECT.items():
        if uri not in _origins and (ROOT / name).is_file():
            _add(files, config, name, uri)
    waiting = list(_origins)
    while waiting:
        page = waiting.pop()
        for target in _links(page):
            uri = _page_of(target)
            if uri not in _origins and uri.startswith("repository/"):
                _add(files, config, target, uri)
                waiting.append(uri)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository into links to pages, and indented code into fences that name their language."""
    origin = _origins[page.file.src_uri]
    folder = posixpath.dirname(page.file.src_uri)

    def linked(found: re.Match[str]) -> str:
        target = _target(origin, found[1])
        return posixpath.relpath(_page_of(target), folder or ".") if target else found[1]

    return prepared(LINK.sub(linked, markdown))


NUMBERS = re.compile(
    r"<td>(?=[^<]*\d)([\d\s./%(),+x\[\]\u00b1\u2013\u2212-]{2,30}(?: ?(?:s|min|h|MiB|GB|MB|kB))?)</td>"
)


def on_page_content(html: str, **_: Any) -> str:
    """Let long names in code break after their parts; keep cells that hold only numbers, and options, on one line."""
    html = NUMBERS.sub(r'<td class="number">\1</td>', html)
    html = re.sub(r"(?<!<pre>)(?<!</span>)<code>([^<]*)</code>", _breakable, html)
    return re.sub(r"(?<!<pre>)(?<!</span>)<code>((?:[^<]|<wbr>)*)</code>", _with_whole_options, html)


OPTION = re.compile(r"(?<![^\s|(\[,])--?[a-z][\w-]*(?=[\s=|)\],]|$)|'\.\[[\w,]+\]'")
"""An option of a command, or what pip installs with extras."""


def _with_whole_options(code: re.Match[str]) -> str:
    """Code in a sentence, whose options no line breaks after a hyphen."""
    return f"<code>{OPTION.sub(_whole, code[1])}</code>"


def _whole(option: re.Match[str]) -> str:
    return f'<span class="option">{option[0]}</span>'


def _breakable(code: re.Match[str]) -> str:
    words = (re.sub(r"(::|[/_.])", r"\1<wbr>", w) if len(w) > 30 else w for w in code[1].split(" "))
    return f"<code>{' '.join(words)}</code>"


def prepared(markdown: str) -> str:
    """Markdown of the repository, which is CommonMark, as the renderer of the site must have it to make the same blocks of it."""
    return _fenced(_with_deep_lists(_with_free_comments(markdown)))


def _with_free_comments(markdown: str) -> str:
    """Put empty lines around comments, so that a table next to one is a table."""
    return re.sub(r"^(<!-- .* -->)$", r"\n\1\n", markdown, flags=re.MULTILINE)


MARKER = re.compile(r" *([-*+]|\d+[.)]) +")


def _with_deep_lists(markdown: str) -> str:
    """Indent what is inside of list items by four for each level, and put an empty line before a list."""
    lines = markdown.split("\n")
    starts: dict[int, int] = {}
    columns = [0] * len(lines)  # where the content of the innermost item begins, in the source
    depths = [0] * len(lines)
    for token in MarkdownIt("commonmark").parse(markdown):
        if token.type != "list_item_open" or token.map is None:
            continue
        first, last = token.map
        marker = MARKER.match(lines[first])
        if marker is None:
            return markdown  # an item without text
        starts[first] = len(marker[0]) - len(marker[0].lstrip())
        for number in range(first, last):
            depths[number] += 1
            columns[number] = len(marker[0])
    made: list[str] = []
    for number, line in enumerate(lines):
        column, depth = columns[number], depths[number]
        if number in starts:
            is_after_text = number > 0 and bool(lines[number - 1].strip())
            if is_after_text and depth == 1 and (not depths[number - 1] or _is_loose(lines, starts, number)):
                made.append("")
            line = " " * 4 * (depth - 1) + line[starts[number] :]
        elif depth and line[:column].isspace():
            line = " " * 4 * depth + line[column:]
        made.append(line)
    return "\n".join(made)


def _add(files: Files, config: MkDocsConfig, name: str, uri: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    if not name.endswith(".md"):
        fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
        language = LANGUAGES.get(posixpath.splitext(name)[1], "text")
        title = "Citation" if name == "CITATION.cff" else f"`{name}`"
        text = f"# {title}\n\nThe file `{name}` of the repository.\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"
    if uri.startswith("repository/"):
        text = f"---\nsearch:\n  exclude: true\n---\n{text}"
    files.append(File.generated(config, uri, content=text))
    _origins[uri] = name


def _links(page: str) -> list[str]:
    origin = _origins[page]
    if not origin.endswith(".md"):
        return []
    found = (_target(origin, m[1]) for m in LINK.finditer((ROOT / origin).read_text("utf-8")))
    return [target for target in found if target]


def _target(origin: str, link: str) -> str | None:
    """The file of the repository that a link leads to; None if the link needs no change."""
    if re.match(r"[a-z]+:|/", link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    if (ROOT / path).is_dir():
        front = (
            "docs/index.md" if path.startswith("docs") else path
        )  # of a folder of pages, the front page has the list
        path = next((p for p in (f"{path}/README.md", f"{path}/index.md") if (ROOT / p).is_file()), front)
    in_place = (
        origin.startswith("docs/") and path.startswith("docs/") and link.endswith(posixpath.basename(path))
    )
    return None if in_place or path.startswith("..") or not (ROOT / path).is_file() else path


def _page_of(target: str) -> str:
    if target in PROJECT:
        return PROJECT[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"repository/{target if target.endswith('.md') else f'{target}.md'}"


def _is_loose(lines: list[str], starts: dict[int, int], number: int) -> bool:
    """Whether the item before this one has several paragraphs."""
    before = max((n for n in starts if n < number), default=number)
    return any(not line.strip() for line in lines[before:number])


def _fenced(markdown: str) -> str:
    """Turn indented code outside of lists into fences, so that the site colours it and offers to copy it.

    Of the words after a fence the language and a title are the site's; others are for the tests that run the page.
    """
    lines = markdown.split("\n")
    for token in reversed(MarkdownIt("commonmark").parse(markdown)):
        if token.type == "fence" and token.map is not None and " " in token.info.strip():
            before, fence, _ = lines[token.map[0]].partition(token.markup)
            language, _, rest = token.info.strip().partition(" ")
            title = re.search(r'title="[^"]*"', rest)
            lines[token.map[0]] = f"{before}{fence}{language}{f' {title[0]}' if title else ''}"
        if token.type != "code_block" or token.level != 0 or token.map is None:
            continue
        first, last = token.map
        while last > first and not lines[last - 1].strip():
            last -= 1
        code = [line[4:] for line in lines[first:last]]
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", "\n".join(code)))])
        lines[first:last] = [f"{fence}{_language(code)}", *code, fence]
    return "\n".join(lines)


def _language(code: list[str]) -> str:
    first = next((line for line in code if line.strip() and not line.startswith("#")), "")
    if first.startswith(">>>"):
        return "pycon"
    if re.match(r"(\$ )?(alnico|pip|python|git|apt-get|curl|export|cd|\./check|mergekit-\w+|hf)\b", first):
        return "console" if first.startswith("$ ") else "bash"
    if re.match(r"(from \w[\w.]* import|import|def|@|class) ?\w", first):
        return "python"
    if re.match(r"- ?\w|\w+:( |$)", first):
        return "yaml"
    if first.startswith("["):
        return "toml"
    return "text"
