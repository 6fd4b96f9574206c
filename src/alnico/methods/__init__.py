"""Finds merge methods: one file per method, and the entry points of other packages.

A file has the name of its method; files that begin with ``_`` hold what several methods share. To add a
method to another package, point the entry-point group ``alnico.methods`` at an object made by
:func:`alnico.methods.base.method`. A method made in a running process, such as a cell of a notebook, is found
there, too.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from alnico.errors import MethodError, near_name
from alnico.methods.base import MADE_HERE, Method
from alnico.methods.shared.other_words import METHOD_SYNONYMS, find_word


class InstalledMethods(Mapping[str, Method]):
    """Methods by name, ours first.

    A file of ours is imported when its method is asked for: a merge needs one of forty. Entry points are read when a name is
    none of ours, or all are listed, so that a broken package stops only those who use it.
    Errors: MethodError for two methods of one name.
    """

    @functools.cached_property
    def _own(self) -> tuple[str, ...]:
        return tuple(
            sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg and m.name != "base")
        )

    @functools.cached_property
    def others(self) -> Mapping[str, Method]:
        import importlib.metadata  # a tenth of the imports of a small merge

        others: dict[str, Method] = {}
        for entry in importlib.metadata.entry_points(group="alnico.methods"):
            loaded = entry.load()
            if not isinstance(loaded, Method) or loaded.name in (*self._own, *others):
                raise MethodError(
                    f"entry point {entry.name} ({entry.value}) is not a Method, or its name is taken; uninstall that package."
                )
            others[loaded.name] = loaded
        return others

    def __getitem__(self, name: str) -> Method:
        if name in self._own:
            return getattr(importlib.import_module(f"{__name__}.{name}"), name)  # type: ignore[no-any-return]
        return self.others[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._own, *self.others))

    def __len__(self) -> int:
        return len(self._own) + len(self.others)

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self.others


@functools.cache
def registry() -> InstalledMethods:
    """Return the installed methods by name, ours first."""
    return InstalledMethods()


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


def known_methods() -> dict[str, Method]:
    """Return the installed methods by name, and those that this process has made."""
    return {**registry(), **MADE_HERE}


def find(name: str | Method) -> Method:
    """Return one method, by its name, a synonym or the object.

    Errors: MethodError with the nearest names; also for two methods of one name, and as in :func:`method_name`.

    >>> find("dare").name
    'dare_linear'
    """
    if isinstance(name, Method):
        name = str(method_name(name))
    if not isinstance(name, str):
        raise MethodError(
            f"a merge method is of type {type(name).__name__}; expected its name, as `alnico methods` lists it."
        )
    methods = registry()
    made = MADE_HERE.get(name)
    if made is not None:
        installed = methods.get(name, made)
        if installed.factory.__module__ != made.factory.__module__:
            raise MethodError(
                f"{name} is a merge method of {made.factory.__module__} and of the installed "
                f"{installed.factory.__module__}; expected one method of this name. Rename yours."
            )
        return made
    if name not in methods and name in METHOD_SYNONYMS:
        name = METHOD_SYNONYMS[name].words[0]
    if name not in methods:
        hint = f" {_hint(name, known_methods())}".rstrip()
        raise MethodError(
            f"unknown merge method {name!r}; expected one of those that `alnico methods` lists.{hint}"
        )
    return methods[name]


def method_name(method: Any) -> Any:
    """Return the name of a method that is passed as an object; anything else unchanged.

    Errors: MethodError for an object whose name means another method by now, and for a function that is no
    method.

    >>> method_name(find("ties")), method_name("ties")
    ('ties', 'ties')
    """
    if isinstance(method, Method):
        if find(method.name) != method:
            raise MethodError(
                f"method: this {method.name} was replaced by a later method of its name; expected the later "
                f"one. Pass {method.name!r} or the new object, or give the functions two names."
            )
        return method.name
    if callable(method):
        name = getattr(method, "__name__", type(method).__name__)
        place = getattr(method, "__module__", "") or ""
        raise MethodError(
            f"method is {place + '.' if place not in ('', '__main__') else ''}{name}, a {type(method).__name__}; expected "
            "the name of a merge method, or an object made by @alnico.method. Decorate your function with "
            "@alnico.method(space=..., source=...), as docs/python.md shows."
        )
    return method


def digests_of_foreign(names: Iterable[str]) -> dict[str, str]:
    """Return a digest of the source of each method that is not alnico's: it may change under its name."""
    digests = {}
    for found in map(find, names):
        if not found.is_own:
            try:
                text = inspect.getsource(found.factory)
            except (OSError, TypeError):
                text = found.factory.__code__.co_code.hex()
            digests[found.name] = hashlib.sha256(text.encode()).hexdigest()
    return digests
