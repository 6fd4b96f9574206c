"""Results in a shell and in a notebook: one line, and small tables that no name can break out of."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_analyses import made_analysis
from made_pages import HOSTILE_NAMES, NAMES, TASKS, made_card, made_curve, made_search, renamed

import alnico
from alnico.analysis import page
from alnico.analysis.diff import diff
from alnico.analysis.retention import measure_retention
from alnico.analysis.scores import Accuracy
from alnico.analysis.suggest_rules import suggest_recipe
from alnico.engine.norm_weights import NormWeights
from alnico.lora.combine import Combined, CombinedModule
from alnico.lora.extract_result import ExtractedTensor, Extraction
from alnico.notebook import MOST_ROWS, ResultTable, never_fails, result_html, result_line
from alnico.recipe.load import load_recipe
from alnico.recipe.schema import NormWeight
from alnico.tune.adamerge import AdaMergingResult, LearningStep
from alnico.tune.soup import Soup, SoupStep
from alnico.tune.weight_trials import WeightSearch, WeightTrial
from alnico.verification.reproduce import Reproduction
from alnico.verification.verify import Verification
from made import family


def made_results(names: tuple[str, ...]) -> Mapping[str, Any]:
    analysis = renamed(made_analysis(3, 4), names)
    kept = dataclasses.replace(
        measure_retention(analysis, 2),
        scores=(Accuracy(names[0], 0.7, names[1], 0.8, 0.5, 0.875, 0.6, 0.3),),
        notes=(names[0],),
    )
    alone = {name: 0.5 + 0.1 * i for i, name in enumerate(names[:4])}
    steps = tuple(
        SoupStep(n, {n: 1}, 0.6 + 0.05 * i, 0.6 if i else None, i % 2 == 0) for i, n in enumerate(alone)
    )
    course = tuple(
        LearningStep(i, 2 - 0.1 * i, dict.fromkeys(names[:2], 1 - 0.05 * i), np.full((2, 2), 0.3 + 0.01 * i))
        for i in range(4)
    )
    lines = tuple(name.partition("\n")[0] for name in names)  # a recipe takes no others
    recipe = load_recipe(
        {"merge_method": "ties", "base_model": lines[0], "models": [{"model": n} for n in lines[1:3]]}
    )
    return {
        "analysis": analysis,
        "analysis of one": renamed(made_analysis(1, 0), names),
        "retention": kept,
        "suggestion": suggest_recipe(analysis),
        "scorecard": made_card(names[:3], [*TASKS[:2], names[4]], 1),
        "search": made_search(lines[:2], [*TASKS[:1], lines[4]], 12),
        "curve": made_curve("line", names[:2], [*TASKS[:1], names[4]]),
        "path": made_curve("path", names[:2], [names[4]], known=False),
        "surface": made_curve("surface", names[:2], [names[4]]),
        "soup": Soup({names[0]: 1}, 0.9, alone, 0.7, "sorted", names[5], "max", steps),
        "adamerging": AdaMergingResult(names[:2], names[2], "layer", ("0", names[3]), course[-1].coefficients, course, {names[0]: 3}, (names[1],), {}, "x"),
        "weight search": WeightSearch((0.4, 0.6), 0.9, tuple(WeightTrial((i / 4, 1 - i / 4), i / 4 if i else None) for i in range(4)), names[:2]),
        "recipe": dataclasses.replace(recipe, text=f"# {names[0]}\n"),
        "weights": NormWeights(NormWeight(), names[0], names[:2], ("",), ((1.0, 2.0),), ((0.4, 0.6),), (names[1],)),
        "weights per layer": NormWeights(NormWeight(per="layer"), names[0], names[:2], ("0", "1"), ((1.0, 2.0),) * 2, ((0.4, 0.6),) * 2, ()),
        "method": alnico.methods()["ties"],
        "method without options": alnico.methods()["linear"],
        "combined": Combined(Path(names[0]), "svd", (CombinedModule(names[1], 8, 0.1),), 0.1, 1000, (names[2],), 1.0),
        "extraction": Extraction(Path(names[0]), names[1], names[2], {}, (ExtractedTensor(names[3], (2, 2), "factors", "", 1, 8, 1.0, 0.5),), (), 1000, 2000, True, 1.0, 0),
        "verification": Verification(names[0], 3, 1000, 2, (names[1],), None, names[2]),
        "reproduction": Reproduction(names[0], names[1], 3, 2, 1000, ("1", names[2]), 1.0),
    }  # fmt: skip


@pytest.fixture(scope="module")
def real_results(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Results of models that are gone when they are drawn."""
    folder = tmp_path_factory.mktemp("notebook")
    base, (one, other) = family(folder, 2)
    recipe = {"merge_method": "linear", "models": [str(one), str(other)], "parameters": {"weight": 0.5}}
    plan = alnico.plan(recipe)
    found = {
        "plan": plan,
        "task vector": alnico.TaskVector(one, base) - 0.5 * alnico.TaskVector(other, base),
        "lazy model": alnico.TaskVector(one, base).on(base),
        "merge": alnico.merge(recipe, folder / "merged"),
        "diff": diff(one, other),
        "equal": diff(one, one),
        "inspection": alnico.inspect(one),
        "compare": alnico.compare([one, other], folder / "merged", base=base),
    }
    shutil.rmtree(folder)
    return found


class Drawn(HTMLParser):
    """What HTML has: tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attributes}

    def handle_data(self, data: str) -> None:
        self.words += data


HARMLESS = {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td", "pre", "svg", "g", "path", "defs", "use", "clippath", "rect", "image", "text"}  # fmt: skip


def check(name: str, result: Any) -> Drawn:
    html = result._repr_html_()
    assert len(html.encode()) < 200_000, name
    drawn = Drawn(html)
    assert drawn.tags <= HARMLESS, name
    assert not [a for a in drawn.names if a.startswith("on")], name
    assert set(re.findall(r"https?://[^\"' <&]+", re.sub(r"<[^>]*>", lambda t: t[0], html))) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }, name
    line = repr(result)
    assert str(result) == line
    assert "\n" not in line, name
    assert 10 < len(line) < 1000, name
    assert line.startswith("<"), name
    return drawn


def test_every_result_draws_itself_with_the_names_it_has() -> None:
    for name, result in made_results(NAMES).items():
        drawn = check(name, result)
        assert drawn.words.strip(), name
        if name in (
            "analysis",
            "analysis of one",
            "retention",
            "scorecard",
            "search",
            "soup",
            "adamerging",
            "weight search",
            "curve",
            "path",
            "surface",
        ):
            assert "svg" in drawn.tags, name


def test_no_name_writes_html_or_a_second_line() -> None:
    hostile = tuple(f"{name}\n\x1b[2K\u202e" for name in HOSTILE_NAMES)
    for name, result in made_results(hostile).items():
        drawn = check(name, result)
        assert "script" not in drawn.tags, name
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", drawn.words), name


def test_results_of_models_that_are_gone_draw_themselves(real_results: Mapping[str, Any]) -> None:
    for name, result in real_results.items():
        check(name, result)
    assert repr(real_results["equal"]).startswith("<no difference between ")
    assert repr(real_results["merge"]).startswith("<merge in ")
    assert "Map of the base" in real_results["compare"]._repr_html_()


def test_without_the_extra_results_are_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "EXTRA", ("no_such_package",))
    for name, result in made_results(NAMES).items():
        assert "svg" not in check(name, result).tags, name


def test_pictures_take_the_colours_of_the_notebook() -> None:
    html = made_results(NAMES)["analysis"]._repr_html_()
    assert "currentColor" in html
    assert "#01020" not in html
    assert "<style" not in html


def test_what_cannot_be_drawn_is_shown_as_text() -> None:
    class Broken:
        def __repr__(self) -> str:
            return "<b>broken</b>"

        @never_fails
        def _repr_html_(self) -> str:
            raise ValueError

    assert Broken()._repr_html_() == "<pre>&lt;b&gt;broken&lt;/b&gt;</pre>"

    def fails() -> str:
        raise ValueError

    assert "svg" not in result_html("x", picture=fails)
    assert "svg" not in result_html("x", picture=lambda: "<svg>" + "a" * 200_000)


def test_long_tables_say_what_is_left_out() -> None:
    rows = [[i, 0.5] for i in range(100)]
    html = result_html("x", ResultTable(("a", "b"), rows))
    assert html.count("<tr>") == MOST_ROWS + 1
    assert f"… {100 - MOST_ROWS} more rows" in html
    assert result_line("a", "b\nc") == "<a: b\\nc>"


def test_showing_a_result_in_a_shell_loads_no_drawing_library() -> None:
    code = (
        "import sys; from alnico.recipe.load import load_recipe; r = load_recipe({'merge_method': 'linear', 'models': ['a', 'b']}); "
        "r._repr_html_(); repr(r); print(sorted({'matplotlib', 'plotly', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("retention", ("map", "kept", "layers", "scores")),
        ("scorecard", ("bars", "radar")),
        ("search", ("history", "front", "importance", "values", "parallel")),
        ("curve", (None,)),
        ("path", (None,)),
        ("surface", (None,)),
        ("soup", (None,)),
        ("adamerging", (None,)),
        ("weight search", (None,)),
    ],
)
def test_results_plot_their_pictures_and_know_no_others(name: str, pictures: tuple[str | None, ...]) -> None:
    for names in (NAMES, HOSTILE_NAMES):
        result = made_results(names)[name]
        for picture in pictures:
            figure = result.plot() if picture is None else result.plot(picture, dark=True, figsize=(6, 4))
            assert figure.axes
            figure.canvas.draw()
    if pictures[0] is not None:
        with pytest.raises(
            alnico.errors.AlnicoError,
            match=rf"has no picture '{pictures[0]}s?x'.* Did you mean '{pictures[0]}'\?",
        ):
            result.plot(f"{pictures[0]}x")
