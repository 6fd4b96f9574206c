"""Finds merge methods: one file per method, and the entry points of other packages.

A file has the name of its method; files that begin with ``_`` hold what several methods share. To add a
method to another package, point the entry-point group ``alnico.methods`` at an object made by
:func:`alnico.methods.base.method`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping

from alnico.errors import MethodError, near_name
from alnico.methods.base import Method
from alnico.methods.shared.other_words import METHOD_SYNONYMS, find_word


@functools.cache
def registry() -> Mapping[str, Method]:
    """Return all methods by name, ours first. Errors: MethodError for two methods of one name."""
    methods: dict[str, Method] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg):
        if module != "base":
            methods[module] = getattr(importlib.import_module(f"{__name__}.{module}"), module)
    for entry in importlib.metadata.entry_points(group="alnico.methods"):
        loaded = entry.load()
        if not isinstance(loaded, Method) or loaded.name in methods:
            raise MethodError(
                f"entry point {entry.name} ({entry.value}) is not a Method, or its name is taken; uninstall that package."
            )
        methods[loaded.name] = loaded
    return methods


def _hint(name: str, methods: Mapping[str, Method]) -> str:
    """Suggest the method that a name means.

    >>> _hint("average", registry()), _hint("DARE-TIES", registry())
    ('Did you mean linear?', 'Did you mean dare_ties?')
    """
    known = find_word(name)
    if known is not None:
        return f"Did you mean {known.method}?" if known.method else known.answer
    near = near_name(name, methods)
    return f"Did you mean {near}?" if near else ""


def find(name: str) -> Method:
    """Return one method, by its name or a synonym. Errors: MethodError with the nearest names.

    >>> find("dare").name
    'dare_linear'
    """
    methods = registry()
    if not isinstance(name, str):
        raise MethodError(
            f"a merge method is of type {type(name).__name__}; expected its name, as `alnico methods` lists it."
        )
    if name not in methods and name in METHOD_SYNONYMS:
        name = METHOD_SYNONYMS[name].words[0]
    if name not in methods:
        hint = f" {_hint(name, methods)}".rstrip()
        raise MethodError(
            f"unknown merge method {name!r}; expected one of those that `alnico methods` lists.{hint}"
        )
    return methods[name]
