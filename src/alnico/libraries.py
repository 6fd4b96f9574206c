"""Importing libraries that read settings from the working directory, without that: what lies there may be a stranger's.

numba reads ``.numba_config.yaml`` there, and matplotlib ``matplotlibrc``. Settings of the user's own, from the environment and from the home
directory, stay.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

SETTINGS: Mapping[str, Mapping[str, str]] = {
    "numba.core.config": {"_config_fname = '.numba_config.yaml'": "_config_fname = ''"},
    "matplotlib": {"yield 'matplotlibrc'": "yield ''"},
}
"""What is replaced in the source of a module while it is imported."""


class _PatchingLoader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        source = self.get_source(fullname) or ""
        for old, new in SETTINGS[fullname].items():
            source = source.replace(old, new)
        return compile(source, self.path, "exec", dont_inherit=True)


class _Finder:
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in SETTINGS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _PatchingLoader(spec.loader.name, spec.loader.path)
        return spec


@contextmanager
def without_local_settings() -> Iterator[None]:
    """What is imported for the first time in this block takes no settings from the working directory."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
