"""A package of a third party runs the laws on its own method: right methods pass, wrong ones fail in words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = '''
from typing import Annotated

from alnico.methods.base import Between, Merge, method


@method(space="delta", models=(1, 2), source="an example")
def halfway(*, t: Annotated[float, Between(0, 1)] = 0.5) -> Merge:
    """Go a part of the way from the base to the mean of the models.

    ``out = base + t * mean_i(model_i - base)``.

    Use when: an example is needed.

    Options:
        t: the part of the way, in [0, 1].
    Shapes: one task-vector entry per model in, one number out.
    Measures: nothing; one pass. Memory: blocks. Grain: element.
    Edge cases: at t 0 the base is copied.
    Differs from the source: nothing.
    Source: an example.

    >>> halfway.bind({"t": 0}, 2).copies
    'base'
    """

    def mix(delta, t):
        total = 0.0
        for i in range(len(delta)):
            total += delta[i]
        return t * total / len(delta)

    return Merge(mix, (t,), copies="base" if t == 0 else None)
'''

TESTS = """
import numpy as np
from alnico.testing import MethodLaws
from outside import halfway


class TestHalfway(MethodLaws):
    method = halfway
    settings = [{"t": 0.25}, {}]

    def reference(self, models, base, options, noise):
        return base + options.get("t", 0.5) * np.mean([model - base for model in models], axis=0)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with a method, its entry point as pip writes it, and a test of its laws."""
    (tmp_path / "outside.py").write_text(RIGHT)
    (tmp_path / "test_outside.py").write_text(TESTS)
    folder = tmp_path / "outside-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[alnico.methods]\nhalfway = outside:halfway\n")
    return tmp_path


def run_laws(package: Path, *words: str) -> tuple[int, str]:
    """Run the package's tests as its author does."""
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-rA", *words],
        cwd=package,
        env={**os.environ, "PYTHONPATH": path, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
    )
    return ended.returncode, ended.stdout


def change(package: Path, file: str, old: str, new: str) -> None:
    text = (package / file).read_text()
    assert old in text
    (package / file).write_text(text.replace(old, new))


@pytest.mark.slow
def test_a_method_of_another_package_passes_all_laws(package: Path) -> None:
    code, shown = run_laws(package)
    assert code == 0, shown
    for law in (
        "test_a_recipe_finds_the_method",
        "test_threads_and_blocks_change_no_bit[setting1]",
        "test_the_tile_changes_no_bit",
        "test_a_gpu_computes_the_equation_with_the_same_numbers[setting0]",
        "test_it_agrees_with_the_reference[setting0]",
        "test_a_merge_stays_inside_its_memory_budget",
    ):
        assert f"PASSED test_outside.py::TestHalfway::{law}" in shown
    assert "SKIPPED" not in shown


WRONG = [
    pytest.param(
        "test_outside.py",
        'options.get("t", 0.5) *',
        'options.get("t", 0.5) * 1.01 *',
        "agrees_with_the_reference",
        "halfway with {'t': 0.25}: a.weight[",
        "Compare mix with the equation of the source.",
        id="another reference",
    ),
    pytest.param(
        "outside.py",
        "    Edge cases: at t 0 the base is copied.\n",
        "",
        "docstring",
        "halfway: the docstring has no Edge cases:; expected the parts Use when:",
        "each at the start of a line. Add what is missing.",
        id="a part of the docstring",
    ),
    pytest.param(
        "outside.py",
        "to the mean of the models.",
        "to the mean\n    of the models.",
        "docstring",
        "halfway: the docstring begins with 'Go a part of the way from the base to the mean'; expected one line that ends",
        "Shorten the summary.",
        id="a summary of two lines",
    ),
    pytest.param(
        "outside.py",
        "        t: the part of the way, in [0, 1].\n",
        "        part: the part of the way, in [0, 1].\n",
        "docstring",
        "halfway: the docstring does not explain the option t; expected a line `    t: ...` under Options.",
        "Add it.",
        id="an option without a text",
    ),
    pytest.param(
        "outside.py",
        "Annotated[float, Between(0, 1)]",
        "float",
        "options_have_ranges",
        "halfway: the option t has no range; expected a range (Annotated[float, Between(low, high)])",
        "Declare its range.",
        id="an option without a range",
    ),
    pytest.param(
        "outside.py",
        'copies="base" if t == 0 else None)',
        'copies="base" if 1 / t == 0 else None)',
        "options_have_ranges",
        "halfway: t = 0 raises ZeroDivisionError: float division by zero; expected a Merge or a MethodError.",
        "Narrow the range of the option, or raise MethodError.",
        id="an end of a range",
    ),
    pytest.param(
        "outside.py",
        "return t * total / len(delta)",
        "return t * total / len(delta) + 0.001",
        "equal_models_give",
        "halfway with {'t': 0.25}: models that equal the base in F32 change w; expected the base's values.",
        "Return exactly 0 for task vectors of zeros",
        id="something added to zeros",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new", "law", "problem", "advice"), WRONG)
def test_a_wrong_method_fails_and_the_law_says_why(
    file: str, old: str, new: str, law: str, problem: str, advice: str, package: Path
) -> None:
    change(package, file, old, new)
    code, shown = run_laws(package, "-k", law)
    assert code == 1, shown
    assert f"BrokenLaw: {problem}" in shown
    assert advice in shown


DECLARED = '''
from alnico.methods.base import Merge, method


@method(space="weight", source="an example")
def halfway() -> Merge:
    """Average the models."""

    def mix(value):
        total = 0.0
        for i in range(len(value)):
            total += value[i]
        return total * 0.3333

    return Merge(mix, fixes_equal_inputs=FIXES)
'''


@pytest.mark.slow
def test_a_declaration_of_equal_inputs_is_compared_with_what_the_method_does(package: Path) -> None:
    (package / "test_outside.py").write_text(TESTS.replace('[{"t": 0.25}, {}]', "[{}]"))
    (package / "outside.py").write_text(DECLARED.replace("FIXES", "False"))
    code, shown = run_laws(package, "-k", "equal_inputs")
    assert code == 0, shown
    (package / "outside.py").write_text(
        DECLARED.replace("FIXES", "False").replace("total * 0.3333", "value[0]")
    )
    code, shown = run_laws(package, "-k", "equal_inputs")
    assert code == 1
    assert (
        "BrokenLaw: halfway: keeps all elements on which the models agree and does not declare it; "
        "expected fixes_equal_inputs=True. Declare it."
    ) in shown
    (package / "outside.py").write_text(DECLARED.replace("FIXES", "True").replace("0.3333", "0.5"))
    code, shown = run_laws(package, "-k", "equal_inputs")
    assert code == 1
    assert "BrokenLaw: halfway: declares fixes_equal_inputs, but " in shown
    assert (
        "expected that value. Do not declare fixes_equal_inputs, or let the coefficients sum to 1." in shown
    )


def test_a_method_without_an_entry_point_is_told_what_to_add(package: Path) -> None:
    (package / "outside-1.0.dist-info" / "entry_points.txt").write_text("")
    code, shown = run_laws(package, "-k", "recipe_finds")
    assert code == 1
    assert (
        "BrokenLaw: halfway is not registered; expected the entry point `halfway = outside:halfway` in the group alnico.methods. "
        "Add it to your package's pyproject.toml and install the package (pip install -e .)."
    ) in shown
