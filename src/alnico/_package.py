"""Makes packages that import their public names on first use."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

TYPE_CHECKING = False  # importing typing would double the time until alnico handles Ctrl-C

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any


class LazyPackage(ModuleType):
    """A package whose public names are imported on first use, and win over modules of the same name.

    Importing ``alnico.plan.build`` binds the module ``plan`` on the package ``alnico``; users call
    ``alnico.plan`` as a function. Inside alnico, modules are imported with ``from alnico.plan.build import
    ...``, which does not use the attributes of the package.
    """

    _modules_of: Mapping[str, str]
    _public: Sequence[str]
    _explain: Callable[[str], str]
    _synonym: Callable[[str], str]

    def __getattr__(self, name: str) -> Any:
        module = self._modules_of.get(name)
        if module is None and (meant := self._synonym(name)):
            return getattr(self, meant)
        if module is None:
            import difflib  # on mistakes only: importing alnico stays fast

            near = [] if name[:2] == "__" else difflib.get_close_matches(name, self._public, 1, 0.5)
            hint = self._explain(name) or (f"Did you mean {near[0]!r}? " if near else "")
            raise AttributeError(
                f"module {self.__name__!r} has no attribute {name!r}. {hint}It has {', '.join(self._public)}"
            )
        if not module:  # a public package
            return importlib.import_module(f"{self.__name__}.{name}")
        value = getattr(importlib.import_module(module), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        if not (self._modules_of.get(name) and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return list(self._public)


def make_lazy(
    package: str,
    modules: Mapping[str, Sequence[str]],
    others: Sequence[str] = (),
    explain: Callable[[str], str] = lambda _: "",
    synonym: Callable[[str], str] = lambda _: "",
) -> list[str]:
    """Make a package lazy; returns its public names, sorted.

    Args:
        package: its name in ``sys.modules``.
        modules: the public names of each module; those under the empty name are public packages.
        others: public names that the package already has.
        explain: returns a sentence about a name that is not public, or nothing.
        synonym: returns the public name that another word means, or nothing; these words are not listed.
    """
    this = sys.modules[package]
    names = {name: module for module, listed in modules.items() for name in listed}
    public = sorted([*names, *others])
    vars(this)["_modules_of"] = names
    vars(this)["_public"] = public
    vars(this)["_explain"] = explain
    vars(this)["_synonym"] = synonym
    this.__class__ = LazyPackage
    return public
