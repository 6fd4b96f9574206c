"""Writes the tables of docs/recipes.md and docs/tuning.md from the code: ``python docs/make_recipes.py``.

The pages are written by hand, except between marks such as ``<!-- keys TOP -->`` and ``<!-- /keys -->``. A test fails when a page
is out of date.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from alnico.evaluation import task_file
from alnico.methods import registry
from alnico.methods.shared.documentation import one_line
from alnico.methods.shared.other_words import SYNONYMS
from alnico.plan.families import MODULES
from alnico.recipe import dialect, keys
from alnico.tune.search import settings, space, stack
from alnico.vocabulary.chat_template import NAMES

PAGES = tuple(Path(__file__).with_name(name) for name in ("recipes.md", "tuning.md"))

OUTSIDE_RECIPES: dict[str, keys.Keys] = {
    "SEARCH": settings.KEYS,
    "HALVING": settings.HALVING_KEYS,
    "SEARCHED": space.SEARCH_KEYS,
    "STACK": stack.STACK_KEYS,
    "WINDOW": stack.WINDOW_KEYS,
    **{
        name: getattr(task_file, name) for name in ("TASK", "CLASSIFICATION", "PERPLEXITY", "CALL", "LM_EVAL")
    },
}


def page(written: str) -> str:
    """Return the page with new tables."""
    return re.sub(r"<!-- (\w+)(?: (\w+))? -->\n.*?<!-- /\1 -->", _made, written, flags=re.DOTALL)


def _made(mark: re.Match[str]) -> str:
    kind, name = mark.groups()
    lines = _keys(name) if name else MAKERS[kind]()
    return "\n".join([mark[0].partition("\n")[0], *lines, f"<!-- /{kind} -->"])


def _keys(name: str) -> list[str]:
    meanings: keys.Keys = OUTSIDE_RECIPES[name] if name in OUTSIDE_RECIPES else getattr(keys, name)
    return _table(("key", "meaning"), ((f"`{key}`", meaning) for key, meaning in meanings.items()))


def _aliases() -> list[str]:
    rows = [
        (f"`{name}`", f"`{a.option}`" + "".join(f"; {_truth(v)}: `{w}`" for v, w in a.values.items()))
        for name, a in dialect.ALIASES.items()
    ]
    rows += [
        (f"`{name}`", f"nothing, at any level: it {why}") for name, why in dialect.WITHOUT_EFFECT.items()
    ]
    at_the_top = {
        name: why
        for name, why in dialect.WITHOUT_EFFECT_AT_THE_TOP.items()
        if name not in dialect.WITHOUT_EFFECT
    }
    rows += [(f"`{name}`", f"nothing, at the top: it {why}") for name, why in at_the_top.items()]
    return _table(("mergekit", "here"), rows)


def _synonyms() -> list[str]:
    places = {
        "method": "method",
        "option": "option of a method",
        "command": "command",
        "flag": "option of a command",
        "function": "function in Python",
    }
    words = {"command": "alnico {}", "function": "alnico.{}"}
    rows = [(f"`{words.get(s.kind, '{}').format(s.word)}`", places[s.kind], s.meaning) for s in SYNONYMS]
    return _table(("word", "kind", "what it is"), rows)


def _truth(value: object) -> str:
    return str(value).lower()


def _presets() -> list[str]:
    own = [m for m in registry().values() if m.factory.__module__.startswith("alnico.")]
    rows = [
        (f"`{m.name}`", f"`{preset}`", f"`{one_line(values)}`")
        for m in own
        for preset, values in m.presets.items()
    ]
    return _table(("method", "preset", "options"), rows)


def _modules() -> list[str]:
    rows = [(f"`{name}`", " ".join(f"`{p}`" for p in prefixes)) for name, prefixes in MODULES.items()]
    return _table(("module", "names begin with"), rows)


def _templates() -> list[str]:
    return [", ".join(f"`{name}`" for name in NAMES) + "."]


MAKERS: dict[str, Callable[[], list[str]]] = {
    "aliases": _aliases,
    "synonyms": _synonyms,
    "presets": _presets,
    "modules": _modules,
    "templates": _templates,
}


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [heads, ("---",) * len(heads), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text("utf-8")), "utf-8")
