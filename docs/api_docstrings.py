"""Reads alnico's docstrings for the site: a griffe extension for mkdocstrings.

Our docstrings have sections of their own (STYLE.md). ``Options:`` becomes the table of parameters, with the help that options share
(``alnico.run_options``); ``Errors:``, ``Shapes:``, ``Source:`` and the others become paragraphs with a bold first word; doctests become
code; roles such as ``:func:`` become links to what this reference has, and plain names otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import griffe

from alnico.run_options import SHARED_OPTIONS

WORDS = (
    "Errors", "Shapes", "Measures", "Memory", "Grain", "Edge cases", "Use when", "Start with", "Differs from the source", "Source",
)  # fmt: skip
SECTION = re.compile(rf"^({'|'.join(WORDS)}): ?", re.MULTILINE)
OPTIONS = re.compile(r"^Options:\n((?:(?: +.*)?\n)*(?: +.*\n?)?)", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|mod|meth|data|attr|exc):`~?([\w.]+)`")
SIZES = {"DEFAULT_BUDGET_BYTES": '"2GiB"', "DEFAULT_MAX_SHARD_BYTES": '"5GB"'}
"""Sizes among the defaults, as a caller may write them."""
WATCH = "Called with each event of :mod:`alnico.events`."

PAGES = Path(__file__).with_name("api")


@cache
def documented() -> dict[str, str]:
    """The objects that the pages of docs/api show, by the last part of their path."""
    shown = (
        p for page in PAGES.glob("*.md") for p in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.M)
    )
    return {path.rpartition(".")[2]: path for path in shown}


class AlnicoDocstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed, and shows the values of constants that are defaults."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value, obj)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for function in _functions(pkg):
            for parameter in function.parameters:
                parameter.default = _shown(parameter.default, pkg)


def _functions(obj: griffe.Object) -> Iterator[griffe.Function]:
    for member in obj.members.values():
        if isinstance(member, griffe.Function):
            yield member
        elif isinstance(member, griffe.Object):
            yield from _functions(member)


def _shown(default: Any, pkg: griffe.Module) -> Any:
    """What a caller would write for a default that is a constant of alnico."""
    if not isinstance(default, griffe.ExprName) or not default.name.isupper():
        return default
    if default.name in SIZES:
        return SIZES[default.name]
    try:
        constant = pkg.modules_collection[default.canonical_path]
    except KeyError:
        return default  # a constant of another package
    return getattr(constant, "value", None) or default


def rewritten(text: str, obj: griffe.Object | None = None) -> str:
    """A docstring in the words of Google's style and of Markdown.

    >>> print(rewritten("Do it.\\n\\nErrors: none, as :func:`alnico.plan.build.no_such` says."))
    Do it.
    <BLANKLINE>
    **Errors:** none, as `no_such` says.
    """
    text = _with_shared_options(text, obj)
    text = _with_code(text)
    text = ROLE.sub(_named, text)
    return _with_paragraphs(text)


def _with_shared_options(text: str, obj: griffe.Object | None) -> str:
    found = OPTIONS.search(text)
    own = found[1].rstrip("\n").split("\n") if found and found[1].strip() else []
    if isinstance(obj, griffe.Function) and obj.is_public:
        listed = {m[1] for line in own if (m := re.match(r"    (\w+): ", line))}
        if found or {p.name for p in obj.parameters} & set(SHARED_OPTIONS):
            shared = {**SHARED_OPTIONS, "watch": WATCH}
            left = [p.name for p in obj.parameters if p.name in shared and p.name not in listed]
            own += [f"    {name}: {shared[name]}" for name in left]
    if not own:
        return text
    entries = [
        re.sub(r"^(    \w+: )(\w)", lambda m: m[1] + m[2].upper(), line) for line in own if line.strip()
    ]
    section = "\n".join(["", "Args:", *entries, "", ""])
    if found:
        return text[: found.start()] + section + text[found.end() :]
    before, errors, after = text.partition("\nErrors:")
    return before + "\n" + section + errors.lstrip("\n") + after


def _with_code(text: str) -> str:
    """Put doctests into fences; the reader of sections would take ``>>>`` for a quotation."""
    lines: list[str] = []
    inside = False
    for line in text.split("\n"):
        if line.startswith(">>>") and not inside:
            lines += ["```pycon"]
            inside = True
        elif inside and not line.strip():
            lines += ["```"]
            inside = False
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)


def _with_paragraphs(text: str) -> str:
    lines: list[str] = []
    in_section = in_code = False
    for line in text.split("\n"):
        in_code ^= line.startswith("```")
        if not in_code and SECTION.match(line):
            lines += [""] if lines and lines[-1].strip() else []
            lines.append(SECTION.sub(r"**\1:** ", line))
            in_section = True
        elif in_section and line.startswith("    "):
            lines.append(line.strip())
        else:
            in_section = False
            lines.append(line)
    return "\n".join(lines)


def _named(found: re.Match[str]) -> str:
    name = found[1].rpartition(".")[2]
    path = documented().get(name)
    return f"[`{name}`][{path}]" if path else f"`{name}`"
