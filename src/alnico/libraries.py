"""Imports numba, numba-cuda and matplotlib without the settings files of the working directory.

numba and numba-cuda read ``.numba_config.yaml`` there, and matplotlib ``matplotlibrc``; in a downloaded folder these may be
a stranger's. The user's own settings, from the environment and the home directory, still apply.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

SETTINGS: Mapping[str, Mapping[str, str]] = {
    "numba.core.config": {"_config_fname = '.numba_config.yaml'": "_config_fname = ''"},
    "numba.cuda.core.config": {'_config_fname = ".numba_config.yaml"': '_config_fname = ""'},
    "matplotlib": {"yield 'matplotlibrc'": "yield ''"},
}
"""Text that is replaced in the source of a module while it is imported."""


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
    """Modules first imported in this block ignore settings files in the working directory."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
