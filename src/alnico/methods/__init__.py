"""Finds merge methods: one file per method, and the entry points of other packages.

A file has the name of its method; files that begin with ``_`` hold what several methods share. To add a
method to another package, point the entry-point group ``alnico.methods`` at an object made by
:func:`alnico.methods.base.method`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping

from alnico.errors import MethodError
from alnico.methods.base import Method


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


def find(name: str) -> Method:
    """Return one method. Errors: MethodError with the nearest names."""
    methods = registry()
    if not isinstance(name, str):
        raise MethodError(
            f"a merge method is of type {type(name).__name__}; expected its name, as `alnico methods` lists it."
        )
    if name not in methods:
        near = difflib.get_close_matches(name, methods, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise MethodError(
            f"unknown merge method {name!r}; expected one of those that `alnico methods` lists.{hint}"
        )
    return methods[name]
