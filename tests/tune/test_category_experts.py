"""The choice of candidates from a table of scores by category finds planted experts, and says what is wrong with a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.errors import EvaluationError, RecipeError
from alnico.tune.category_experts import choose_experts

SKILLS = {"code": ("python", "sql", "shell"), "maths": ("algebra", "proofs"), "chat": ("help", "style")}
EXPERTS = {"code": "m3", "maths": "m0", "chat": "m5"}


def planted(seed: int, noise: float = 0.02) -> dict[str, dict[str, float]]:
    """Eight models with independent skills; each category of a skill measures it on a scale of its own."""
    random = np.random.default_rng(seed)
    models = [f"m{i}" for i in range(8)]
    table: dict[str, dict[str, float]] = {model: {} for model in models}
    for number, (skill, categories) in enumerate(SKILLS.items()):
        # The same values in orders that are hardly correlated: i * step mod 8 for odd steps.
        level = np.array([(i * (1, 3, 5)[number]) % 8 for i in range(8)], np.float64)
        best, top = models.index(EXPERTS[skill]), int(level.argmax())
        level[best], level[top] = level[top], level[best]
        for category in categories:
            measured = random.uniform(1, 100) * (level / 8 + noise * random.standard_normal(8))
            table |= {m: {**table[m], category: float(v)} for m, v in zip(models, measured, strict=True)}
    return table


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("clusters", [None, 3])
def test_the_planted_experts_are_found(seed: int, clusters: int | None) -> None:
    table = planted(seed)
    found = choose_experts(table, list(table), clusters=clusters)
    assert {c.categories: c.expert for c in found.clusters} == {
        categories: EXPERTS[skill] for skill, categories in SKILLS.items()
    }
    assert found.models == ("m3", "m0", "m5")
    assert all(c.outside is not None and c.outside < 0.5 for c in found.clusters)
    assert found.clusters[0].scores == {name: table["m3"][name] for name in SKILLS["code"]}


def test_the_order_of_categories_and_scales_change_nothing() -> None:
    table = planted(0)
    turned = {m: {n: 1e200 * row[n] - 7e200 for n in reversed(row)} for m, row in reversed(table.items())}
    first, second = (choose_experts(t, list(table)) for t in (table, turned))
    assert {frozenset(c.categories): c.expert for c in first.clusters} == {
        frozenset(c.categories): c.expert for c in second.clusters
    }


def test_other_models_count_for_correlations_alone() -> None:
    table = planted(1)
    rest = [m for m in table if m != "m3"]
    found = choose_experts(table, rest)
    code = max(rest, key=lambda m: table[m]["python"])
    assert [c.expert for c in found.clusters] == [code, "m0", "m5"]
    assert [c.categories for c in found.clusters] == list(SKILLS.values())


def test_one_cluster_has_one_expert_and_as_many_as_categories_have_their_own() -> None:
    table = planted(2)
    (one,) = choose_experts(table, list(table), clusters=1).clusters
    assert one.categories == tuple(n for names in SKILLS.values() for n in names)
    assert one.outside is None
    spread = {n: np.std([row[n] for row in table.values()]) for n in one.categories}
    assert one.expert == max(table, key=lambda m: sum(table[m][n] / spread[n] for n in one.categories))
    each = choose_experts(table, list(table), clusters=7).clusters
    assert {c.categories[0]: c.expert for c in each} == {
        n: max(table, key=lambda m: table[m][n]) for n in one.categories
    }


def test_a_category_in_which_all_are_equal_is_left_out() -> None:
    table = {m: {**row, "same": 0.1} for m, row in planted(3).items()}
    found = choose_experts(table, list(table))
    assert found.left_out == ("same",)
    assert "same" not in {name for c in found.clusters for name in c.categories}


def csv_of(table: dict[str, dict[str, float]], folder: str = "") -> str:
    categories = list(next(iter(table.values())))
    lines = [",".join(["model", *categories])]
    lines += [",".join([folder + model, *(repr(row[n]) for n in categories)]) for model, row in table.items()]
    return "\n".join(lines) + "\n"


def test_a_file_is_the_same_table(tmp_path: Path) -> None:
    table = planted(4)
    (tmp_path / "scores.csv").write_text("\ufeff" + csv_of(table, "org/"))
    of_file = choose_experts(tmp_path / "scores.csv", ["/models/m0", "m3", "m5/"])
    of_table = choose_experts(table, ["m0", "m3", "m5"])
    assert [c.categories for c in of_file.clusters] == [c.categories for c in of_table.clusters]
    assert of_file.models == ("m3", "/models/m0", "m5/")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model\na\nb\nc\n", "scores.csv: has 0 categories; expected 1 to 1,000 categories, each with another name. Correct the header: a column for the model, and one for each category."),
        ("", "scores.csv: has 0 categories; expected 1 to 1,000"),
        ("model,x,x\na,1,2\n", "scores.csv: has the category 'x' twice; expected 1 to"),
        ("model,x,\na,1,2\n", "scores.csv: has the category ''; expected 1 to"),
        ("model,x\na,1,2\n", "scores.csv:2: has 3 columns; expected 2, those of the header: a model and its score in each category. Correct the line."),
        ('model,x\na,"1\n', "scores.csv:2: is not CSV (unexpected end of data); expected a header with categories, and one line per model. Correct the line."),
        ("model,x\na,1\nb,high\nc,3\n", "scores.csv:3: the score of b in x is 'high'; expected a number. Complete the table, or leave out the category."),
        ("model,x\na,1\nb,\nc,3\n", "scores.csv:3: the score of b in x is ''; expected a number."),
        ("model,x\na,1\nb,nan\nc,3\n", "scores.csv:3: the score of b in x is 'nan'; expected a number."),
        ("model,x\na,1\nb,inf\nc,3\n", "scores.csv:3: the score of b in x is 'inf'; expected a number."),
        ("model,x\na,1\na,2\nc,3\n", "scores.csv:3: has the model 'a' a second time; expected one line per model. Remove one."),
        ("model,x\na,1\nb,2\n", "scores.csv: has 2 models; expected 3 or more: with fewer, correlations between categories mean nothing. Add scores of other models; they need not be candidates."),
        ("model,x\na,1\nb,1\nc,1\n", "scores.csv: all models have the same scores; expected scores that differ. Check the table."),
        ("model,x\na,1\nbx,2\nc,1\n", "scores.csv: has no row for the model b; expected one. Did you mean 'bx'?"),
        ("model,x\na,1\nu/b,2\nv/b,1\n", "scores.csv: 2 rows are called b; expected one for the model b. Write the model in the table as it is given."),
    ],
)  # fmt: skip
def test_a_table_that_is_none_is_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scores.csv").write_text(text)
    with pytest.raises(EvaluationError) as caught:
        choose_experts("scores.csv", ["a", "b"])
    assert str(caught.value).startswith(message)


def test_clusters_and_rows_in_python_are_checked() -> None:
    table: dict[str, Any] = planted(5)
    for clusters in (0, 8):
        with pytest.raises(EvaluationError) as caught:
            choose_experts(table, ["m0", "m1"], clusters=clusters)
        assert str(caught.value) == (
            f"clusters is {clusters}, and scores has 7 categories with scores that differ; expected 1 to 7. Choose such a number."
        )
    with pytest.raises(EvaluationError) as caught:
        choose_experts({**table, "m0": 3}, ["m0", "m1"])
    assert str(caught.value) == (
        'scores[\'m0\'] is a int; expected a mapping from categories to scores. Write {"model": {"category": 0.5}}.'
    )


POINTS = {f"m{i}": np.float32([i == 3, i == 0, i == 5]) for i in range(8)}
"""Experts are the unit vectors, all others are zero."""
MODELS = [{"w": w} for w in POINTS.values()]
NEEDS = np.array([0.2, 0.5, 0.3])


def near(model: Any) -> float:
    return -float(np.abs(model["w"] - NEEDS).sum())


def test_the_grid_finds_the_planted_weights_of_the_experts() -> None:
    found = alnico.soup(MODELS, near, scores=planted(6), names=list(POINTS))
    assert found.counts == {"m0": 5, "m3": 2, "m5": 3}
    assert found.score == pytest.approx(0, abs=1e-6)
    assert len(found.steps) == 1 + 36  # equal weights, and C(9, 2) of the grid
    assert sum(step.is_kept for step in found.steps) > 1
    assert set(found.alone) == {"m0", "m3", "m5"}
    assert found.uniform == pytest.approx(near({"w": np.ones(3) / 3}), abs=1e-6)
    assert found.state_dict()["w"] == pytest.approx(NEEDS, abs=1e-6)
    assert found.data()["clusters"][0]["expert"] == "m3"
    assert "expert" in found._repr_html_()
    lower = alnico.soup(MODELS, lambda m: -near(m), minimize=True, scores=planted(6), names=list(POINTS))
    assert lower.counts == found.counts


def test_without_tasks_the_experts_have_equal_weights() -> None:
    found = alnico.soup(MODELS, scores=planted(7), clusters=3, names=list(POINTS))
    assert found.counts == {"m0": 1, "m3": 1, "m5": 1}
    assert (found.score, found.uniform, found.steps) == (None, None, ())
    assert found.alone == pytest.approx({m: np.mean(list(planted(7)[m].values())) for m in found.counts})
    assert found.state_dict()["w"] == pytest.approx([1 / 3] * 3)
    assert "soup of 3 of 3 models" in repr(found)


def test_a_grid_weighs_given_models_without_a_table() -> None:
    found = alnico.soup([MODELS[3], MODELS[0], MODELS[5]], near, order="grid")
    assert tuple(found.counts.values()) == (2, 5, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "tasks is missing; expected tasks to choose the models by, or a table of scores. Give tasks (--tasks), or scores (--scores)."),
        ({"tasks": near, "clusters": 3}, "clusters is 3, and there is no table of scores; expected one whose categories it joins. Give scores, or leave out clusters."),
        ({"scores": {}, "order": "sorted"}, "order is sorted, and there are no tasks that score averages; expected tasks with it. Give tasks, or leave it out."),
        ({"scores": {}, "report": near}, "report is given, and there are no tasks that score averages; expected tasks with it. Give tasks, or leave it out."),
        ({"tasks": near, "order": "grid", "models": [{"w": np.float32([i])} for i in range(11)]}, "order is grid, and there are 11 models; expected at most 10, as each gets a tenth or more. Choose fewer clusters, or order sorted."),
        ({"tasks": near, "order": "grid", "method": "tsv"}, "order is grid with the method tsv; expected linear, whose weights it tries. Choose order sorted, all or uniform."),
        ({"scores": planted(0), "clusters": 1, "method": "tsv", "names": list(POINTS)}, "scores: m6 is the best model of every cluster of categories, and method is tsv; expected two experts to merge. Raise clusters, or use the model."),
    ],
)  # fmt: skip
def test_options_that_need_tasks_or_a_table_are_refused_without(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        alnico.soup(**{"models": MODELS, **options})
    assert str(caught.value) == message


def test_the_command_chooses_says_why_and_writes_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from alnico.cli.main import app
    from made import save_model

    monkeypatch.chdir(tmp_path)
    for name, w in POINTS.items():
        save_model(tmp_path / name, {"w": ("F32", w)})
    (tmp_path / "scores.csv").write_text(csv_of(planted(8)))
    app(
        ["soup", *POINTS, "--scores", "scores.csv", "--clusters", "3", "-o", "soup.yml"],
        standalone_mode=False,
    )
    printed = capsys.readouterr()
    assert printed.out.strip() == "soup.yml"
    assert "m3 is best in python " in printed.err
    assert "No average was scored: the experts have equal weights. --tasks finds weights." in printed.err
    recipe = (tmp_path / "soup.yml").read_text()
    assert "# A uniform soup of 3 of 3 models.\n# m3 is best in python " in recipe
    assert list(alnico.load_recipe("soup.yml").references) == ["m0", "m3", "m5"]
    app(["soup", *POINTS, "--scores", "scores.csv", "--json"], standalone_mode=False)
    data = json.loads(capsys.readouterr().out)
    assert data["score"] is None
    assert [c["expert"] for c in data["clusters"]] == ["m3", "m0", "m5"]
