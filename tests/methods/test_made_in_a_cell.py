"""Methods that a running process makes, as a cell of a notebook does: known by name and as objects."""

from __future__ import annotations

import linecache
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.errors import EvaluationError, MethodError, RecipeError, UncheckedError
from alnico.methods import known_methods, registry
from alnico.methods.base import MADE_HERE, Method
from made import save_model

CELL = '''
import alnico

@alnico.method(space="weight", source="a notebook")
def mine(*, part: float = 0.5) -> alnico.Merge:
    """Add a part of each model.

    Options:
        part: what each model is multiplied by, any number.
    """
    def mix(value, part):
        total = 0.0
        for i in range(len(value)):
            total += part * value[i]
        return total

    return alnico.Merge(mix, (part,))
'''
MODELS = [{"w": np.float32([1, 2]), "v": np.float32([8])}, {"w": np.float32([3, 6]), "v": np.float32([4])}]


def run_cell(text: str, name: str = "<cell 1>") -> Method:
    """Run text as IPython runs a cell: its lines are in linecache, its module is __main__."""
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text, name, "exec"), names)
    made = names["mine"]
    assert isinstance(made, Method)
    return made


@pytest.fixture
def mine() -> Any:
    yield run_cell(CELL)
    MADE_HERE.pop("mine", None)


def test_a_method_made_in_a_cell_merges_by_its_name_and_as_an_object(mine: Method) -> None:
    for method in ("mine", mine):
        assert alnico.merge_state_dicts(MODELS, method)["w"].tolist() == [2, 4]
        assert alnico.merge_state_dicts(MODELS, method, part=1)["w"].tolist() == [4, 8]
        layers = {"v": {"method": method, "part": 0.25}}
        assert alnico.merge_state_dicts(MODELS, "linear", layers=layers)["v"].tolist() == [3]
        assert alnico.make_recipe(["a", "b"], method, part=2).merge_method == "mine"
    assert alnico.load_recipe({"merge_method": mine, "models": ["a", "b"]}).merge_method == "mine"
    assert alnico.methods("mine") == {"mine": mine}
    assert alnico.methods()["mine"] is mine
    assert "mine" not in registry(), "a method of one process is not an installed one"


def test_a_method_of_the_list_merges_as_an_object() -> None:
    base = {"w": np.float32([0, 0]), "v": np.float32([0])}
    ties = alnico.methods()["ties"]
    by_name = alnico.merge_state_dicts(MODELS, "ties", base=base, density=0.5)
    assert (
        alnico.merge_state_dicts(MODELS, ties, base=base, density=0.5)["w"].tobytes()
        == by_name["w"].tobytes()
    )


def test_a_cell_that_runs_again_replaces_its_method(mine: Method) -> None:
    other = run_cell(CELL.replace("+= part", "+= 10 * part"), "<cell 2>")
    assert alnico.merge_state_dicts(MODELS, "mine")["w"].tolist() == [20, 40]
    assert alnico.merge_state_dicts(MODELS, other)["w"].tolist() == [20, 40]
    with pytest.raises(MethodError) as caught:
        alnico.merge_state_dicts(MODELS, mine)
    assert str(caught.value) == (
        "method: this mine was replaced by a later method of its name; expected the later one. "
        "Pass 'mine' or the new object, or give the functions two names."
    )


def test_the_name_of_a_method_of_alnico_is_refused() -> None:
    with pytest.raises(MethodError) as caught:
        run_cell(CELL.replace("mine", "ties"))
    assert str(caught.value) == (
        "ties is the name of a method of alnico; expected another name, so that recipes keep their meaning. "
        "Rename the function."
    )
    assert known_methods()["ties"] is registry()["ties"]
    with pytest.raises(
        MethodError, match=r"^<lambda>: is no name for a merge method; expected a function written with def"
    ):
        alnico.method(space="weight", source="nobody")(lambda: None)  # type: ignore[arg-type,return-value]


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(MethodError) as caught:
        alnico.merge_state_dicts(MODELS, np.linalg.norm)  # type: ignore[arg-type]
    assert str(caught.value).startswith("method is numpy.linalg.norm, a ")
    assert str(caught.value).endswith(
        "; expected the name of a merge method, or an object made by @alnico.method. Decorate your function "
        "with @alnico.method(space=..., source=...), as docs/python.md shows."
    )


def test_a_method_without_source_says_why() -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(CELL, names)
    try:
        with pytest.raises(MethodError) as caught:
            alnico.merge_state_dicts(MODELS, "mine")
    finally:
        MADE_HERE.pop("mine")
    assert str(caught.value) == (
        "mine.<locals>.mix: its source is not available, as after exec() and in a plain interpreter; expected a "
        "function in a file or in a cell of a notebook. Write it into a file, and import it."
    )


@pytest.fixture
def on_disk(tmp_path: Path, mine: Method) -> Path:
    for i, model in enumerate(MODELS):
        save_model(tmp_path / f"m{i}", {n: ("F32", v) for n, v in model.items()})
    alnico.merge({"merge_method": mine, "models": [tmp_path / "m0", tmp_path / "m1"]}, tmp_path / "out")
    return tmp_path / "out"


def test_a_merge_on_disk_says_which_method_it_needs(on_disk: Path) -> None:
    alnico.verify(on_disk, against_inputs=True)
    del MADE_HERE["mine"]
    alnico.verify(on_disk)
    with pytest.raises(UncheckedError) as caught:
        alnico.verify(on_disk, against_inputs=True)
    assert (
        "alnico.lock.json: its recipe needs the merge method mine, which this version of alnico does not have."
        in str(caught.value)
    )
    assert "If it was made by @alnico.method in a notebook, define it again" in str(caught.value)
    with pytest.raises(RecipeError, match="unknown merge method 'mine'"):
        alnico.load_recipe({"merge_method": "mine", "models": ["a", "b"]})


@pytest.mark.usefixtures("mine")
def test_a_merge_that_another_equation_began_is_not_resumed(tmp_path: Path) -> None:
    recipe = {"merge_method": "mine", "models": [str(tmp_path / "m0"), str(tmp_path / "m1")]}
    for i, model in enumerate(MODELS):
        save_model(tmp_path / f"m{i}", {n: ("F32", v) for n, v in model.items()})
    first = alnico.plan(recipe).fingerprint()
    assert alnico.plan(recipe).fingerprint() == first
    run_cell(CELL.replace("+= part", "+= 10 * part"), "<cell 2>")
    assert alnico.plan(recipe).fingerprint() != first
    assert "methods" not in alnico.plan({**recipe, "merge_method": "linear"}).fingerprint()


@pytest.mark.usefixtures("mine")
def test_adapters_are_combined_by_a_method_of_a_cell() -> None:
    from alnico.lora.combine_options import check_options

    delta = run_cell(CELL.replace('space="weight"', 'space="delta"'), "<cell 3>")
    assert check_options("mine", 2, None, None, {}).method == "mine"
    assert check_options(delta, 2, None, None, {"part": 1}).options == {"part": 1}


def test_a_module_that_is_imported_makes_its_methods_known(tmp_path: Path) -> None:
    (tmp_path / "my_methods.py").write_text(CELL)
    code = (
        "import my_methods, alnico, numpy as np; "
        "print(alnico.merge_state_dicts([{'w': np.float32([1])}, {'w': np.float32([3])}], 'mine')['w'])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert shown == "[2.]\n"


def test_a_search_with_a_method_of_this_process_needs_this_process(mine: Method) -> None:
    from alnico.tune.search.settings import read_search
    from alnico.tune.search.workers import WorkerSpec, _pickled

    recipe = """
merge_method: mine
models: [a, b]
parameters: {part: {search: [0, 1]}}
search: {objective: f, trials: 4}
"""
    space, _ = read_search(recipe)
    assert space.methods == (mine.name,)
    with pytest.raises(EvaluationError) as caught:
        _pickled(WorkerSpec(space, (), (1.0,), None, dict))  # type: ignore[arg-type]
    assert str(caught.value) == (
        "the merge method mine was made in this process, and workers are other processes; expected a method that "
        "they can import. Search with one worker, or put the method into a package with the entry point "
        "alnico.methods."
    )
    before = space.data()
    run_cell(CELL.replace("+= part", "+= 10 * part"), "<cell 2>")
    assert space.data() != before, "trials of two equations are not mixed"
