"""What methods say of themselves, and the page that is made of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import alnico
from alnico.methods import registry
from alnico.methods.shared.documentation import first_recipe, read_documentation, recipe_text
from alnico.testing import MethodCase, check_first_recipe, check_options

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_methods", DOCS / "make_methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_methods_is_what_the_docstrings_say(generator: ModuleType) -> None:
    written = (DOCS / "methods.md").read_text("utf-8")
    assert written == generator.page(), "docs/methods.md is out of date: run `python docs/make_methods.py`"


def test_the_page_has_every_option_with_its_range_and_default() -> None:
    page = (DOCS / "methods.md").read_text("utf-8")
    for method in registry().values():
        rows = page.partition(f"\n## {method.name}\n")[2].partition("\n## ")[0].splitlines()
        cells = [row.replace("\\|", "/").split(" | ") for row in rows if row.startswith("| `")]
        assert [c[:2] for c in cells] == [
            [f"| `{o.name}`", o.describe().replace("|", "/")] for o in method.options.values()
        ]


@pytest.mark.parametrize("name", list(registry()))
def test_the_first_recipe_of_a_method_is_one(name: str) -> None:
    check_first_recipe(MethodCase(registry()[name]))
    shown = yaml.safe_load(recipe_text(first_recipe(registry()[name])))
    assert alnico.load_recipe(shown).merge_method == name


@pytest.mark.parametrize("name", list(registry()))
def test_every_option_is_explained_and_has_a_range(name: str) -> None:
    method = registry()[name]
    assert set(read_documentation(method).options) == set(method.options)
    check_options(MethodCase(method, models=method.models[0] if method.models[1] else 3))
