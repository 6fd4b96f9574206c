"""Curves: every score against plain torch in float64, barriers in closed form, intervals, resuming, files and mistakes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import alnico
from alnico.cli.main import app
from alnico.errors import AlnicoError, EvaluationError, MethodError, OutputError, RecipeError
from alnico.evaluation.tasks import Score
from alnico.tune.curve.scales import read_scales, scale_axes
from made import save_model

no_pictures = pytest.mark.usefixtures("without_report")


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write no page and no picture, as without the extra [report]."""
    monkeypatch.setattr("alnico.tune.curve.files.has_report", lambda: False)


INPUTS = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(20, 3)


def network(seed: int, near: torch.nn.Module | None = None) -> torch.nn.Module:
    torch.manual_seed(seed)
    made = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    if near is not None:
        with torch.no_grad():
            for own, its in zip(made.parameters(), near.parameters(), strict=True):
                own.copy_(its + 0.3 * own)
    return made


BASE = network(0)
ONE, TWO = network(1, BASE), network(2, BASE)


def size(model: torch.nn.Module) -> float:
    with torch.no_grad():
        return float((model.double()(INPUTS) ** 2).mean())


def first(model: torch.nn.Module) -> Score:
    """With the contribution of every example."""
    with torch.no_grad():
        each = model.double()(INPUTS)[:, 0].numpy()
    return Score(float(each.mean()), each)


def keep_float(score: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A score of a copy in float64: candidates share their module."""
    import copy

    def scored(model: torch.nn.Module) -> Any:
        return score(copy.deepcopy(model))

    scored.__name__ = score.__name__
    return scored


SIZE, FIRST = keep_float(size), keep_float(first)


def added(factors: dict[int, float], parts: list[torch.nn.Module]) -> torch.nn.Module:
    """``BASE + sum of factor * (part - BASE)`` in float64."""
    made = network(0).double()
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            start = list(BASE.parameters())[i].double()
            change = sum(f * (list(parts[k].parameters())[i].double() - start) for k, f in factors.items())
            p.copy_(start + change)
    return made


def test_every_score_of_a_curve_is_that_of_the_merge_in_float64() -> None:
    found = alnico.curve(BASE, [ONE, TWO], {"size": SIZE, "first": FIRST}, scale="-0.5:1.5:0.5")
    assert [p.scales for p in found.points] == [(-0.5,), (0.0,), (0.5,), (1.0,), (1.5,)]
    for point in found.points:
        merged = added({0: point.scales[0], 1: point.scales[0]}, [ONE, TWO])
        assert point.scores["size"].value == pytest.approx(size(merged), abs=1e-6)
        assert point.scores["first"].value == pytest.approx(first(merged).value, abs=1e-6)
        assert point.mean is not None
        assert point.mean.value == pytest.approx((size(merged) + first(merged).value) / 2, abs=1e-6)
    assert [line.reference for line in found.lines] == ["base", "models[0]", "models[1]"]
    assert found.lines[1].scores["size"].value == pytest.approx(size(network(1, BASE)), abs=1e-6)
    assert found.best is max(found.points, key=lambda p: p.mean.value)  # type: ignore[union-attr]
    assert found.best_on("size") is max(found.points, key=lambda p: p.scores["size"].value)


def test_a_surface_has_a_scale_for_each_of_two_models() -> None:
    found = alnico.curve(BASE, [ONE, TWO], SIZE, scale=["0:1:0.5", [0, 2]])
    assert (found.kind, found.axes) == ("surface", ((0.0, 0.5, 1.0), (0.0, 2.0)))
    for point in found.points:
        merged = added(dict(enumerate(point.scales)), [ONE, TWO])
        assert point.scores["size"].value == pytest.approx(size(merged), abs=1e-6)
    assert alnico.merge_models(
        [ONE, TWO], "task_arithmetic", base=BASE, weights=list(found.best.scales)
    ) is not None  # fmt: skip


@pytest.mark.parametrize("method", ["ties", "dare_linear", "breadcrumbs"])
def test_a_curve_of_another_method_scores_what_merge_models_makes(method: str) -> None:
    found = alnico.curve(BASE, [ONE, TWO], SIZE, scale=[0.5, 1], method=method, density=0.5, seed=3)
    for point in found.points:
        merged = alnico.merge_models(
            [ONE, TWO], method, base=BASE, density=0.5, seed=3, scale=point.scales[0]
        )
        assert point.scores["size"].value == pytest.approx(SIZE(merged), abs=1e-12)


def test_weights_are_multiplied_by_the_scale() -> None:
    found = alnico.curve(BASE, [ONE, TWO], SIZE, scale=[0.5], weights=[1, -1])
    assert found.best.scores["size"].value == pytest.approx(
        size(added({0: 0.5, 1: -0.5}, [ONE, TWO])), abs=1e-6
    )


def test_a_path_is_the_straight_line_between_two_models() -> None:
    found = alnico.curve(ONE, [TWO], SIZE, path=True, scale="0:1:0.25", minimize=True)
    for point in found.points:
        (t,) = point.scales
        merged = network(0).double()
        with torch.no_grad():
            for p, a, b in zip(merged.parameters(), ONE.parameters(), TWO.parameters(), strict=True):
                p.copy_((1 - t) * a.double() + t * b.double())
        assert point.scores["size"].value == pytest.approx(size(merged), abs=1e-6)
    again = alnico.curve(BASE, [ONE, TWO], SIZE, path=True, scale="0:1:0.25", minimize=True)
    assert again.points == found.points
    assert [line.reference for line in again.lines] == ["base"]


def vector(*values: float) -> dict[str, np.ndarray]:
    return {"w": np.array(values, np.float32)}


def square(model: dict[str, np.ndarray]) -> float:
    return float(model["w"][0]) ** 2


@pytest.mark.parametrize(("minimize", "sign"), [(False, 1.0), (True, -1.0)])
def test_the_barrier_is_the_drop_below_the_line_between_the_ends(minimize: bool, sign: float) -> None:
    """On the path from -1 to 1 the score w^2 is (2t - 1)^2: it drops by 1 in the middle; the loss -w^2 rises by 1."""
    found = alnico.curve(
        vector(-1), [vector(1)], lambda m: sign * square(m), path=True, minimize=minimize, unrelated="allow"
    )
    barrier = found.barrier
    assert barrier is not None
    assert (barrier.height.value, barrier.at) == (1.0, 0.5)
    assert {t: d.value for t, d in barrier.drops.items()} == {
        t: pytest.approx(4 * t * (1 - t), abs=1e-6) for t in read_scales("0:1:0.05")
    }


def test_a_barrier_is_measured_from_the_line_and_not_from_the_better_end() -> None:
    """From 0 to 2 the score (w - 1)^2 + w has the line 1 + 2t and drops by 4t(1 - t) below it."""
    found = alnico.curve(
        vector(0), [vector(2)], lambda m: (m["w"][0] - 1) ** 2 + m["w"][0], path=True, scale="0.5,0.75", unrelated="allow"
    )  # fmt: skip
    assert found.axes == ((0.0, 0.5, 0.75, 1.0),)
    assert found.barrier is not None
    assert (found.barrier.height.value, found.barrier.at) == (pytest.approx(1.0), 0.5)


def test_a_path_that_is_nowhere_worse_than_the_line_has_no_barrier() -> None:
    found = alnico.curve(vector(-1), [vector(1)], lambda m: -square(m), path=True, unrelated="allow")
    assert found.barrier is not None
    assert (found.barrier.height.value, found.barrier.at) == (0.0, None)


def noisy(scale: float) -> Callable[[Any], Score]:
    """Examples ``w + noise``, the same noise for all models."""
    noise = np.random.default_rng(0).normal(0, scale, 400)

    def score(model: dict[str, np.ndarray]) -> Score:
        each = float(model["w"][0]) ** 2 + noise
        return Score(float(each.mean()), each)

    return score


def test_intervals_are_as_wide_as_the_examples_spread_and_those_of_a_drop_are_paired() -> None:
    found = alnico.curve(vector(-1), [vector(1)], noisy(0.5), path=True, unrelated="allow")
    error = 1.96 * 0.5 / math.sqrt(400)
    for point in found.points:
        estimate = point.scores["score"]
        assert estimate.low is not None
        assert estimate.high is not None
        assert (estimate.high - estimate.low) / 2 == pytest.approx(error, rel=0.15)
    assert found.barrier is not None
    height = found.barrier.height
    assert (height.low, height.high) == (pytest.approx(1.0, abs=1e-6), pytest.approx(1.0, abs=1e-6))


def test_a_path_along_the_arc_is_slerps() -> None:
    found = alnico.curve(
        vector(1, 0), [vector(0, 1)], lambda m: m["w"][0], path=True, method="slerp", unrelated="allow"
    )
    assert {p.scales[0]: p.on("score").value for p in found.points} == {
        t: pytest.approx(math.cos(t * math.pi / 2), abs=1e-6) for t in read_scales("0:1:0.05")
    }


@no_pictures
def test_models_have_the_names_that_are_given(tmp_path: Path) -> None:
    found = alnico.curve(
        vector(0), [vector(1), vector(2)], square, scale=[1], names=["one", "two"], out=tmp_path / "out"
    )
    assert (found.base, found.models) == ("base", ("one", "two"))
    assert [line.name for line in found.lines] == ["base", "one", "two"]
    mixed = alnico.curve(
        str(save_model(tmp_path / "zero", {"w": ("F32", np.zeros(1, np.float32))})),
        [vector(1)],
        square,
        scale=[1],
    )
    assert (mixed.base, mixed.models) == (str(tmp_path / "zero"), ("models[0]",))


def test_the_mean_is_over_what_can_be_averaged() -> None:
    def a(_model: Any) -> float:
        return 2.0

    def b(_model: Any) -> float:
        return 4.0

    def ends(minimize: Any, objective: str = "mean") -> tuple[Any, ...]:
        found = alnico.curve(
            vector(0), [vector(1)], [a, b], scale=[1], minimize=minimize, objective=objective
        )
        return found.views, found.objective, found.best.mean and found.best.mean.value

    assert ends(False) == (("mean", "a", "b"), "mean", 3.0)
    assert ends(True) == (("mean", "a", "b"), "mean", 3.0)
    assert ends(["b"]) == (("a", "b"), "a", None)
    assert ends(["b"], "b") == (("a", "b"), "b", None)


def test_steps_are_exact_and_lists_are_sorted() -> None:
    assert read_scales("0:2:0.1") == tuple(i / 10 for i in range(21))
    assert read_scales("0:1:0.3") == (0.0, 0.3, 0.6, 0.9)
    assert read_scales("-1:1:1") == (-1.0, 0.0, 1.0)
    assert read_scales(np.array([1.0, 0.5])) == (0.5, 1.0)
    assert scale_axes(("0,1", "2")) == ((0.0, 1.0), (2.0,))


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("curves")
    values = {"base": (0.0, 0.0), "news": (1.0, 0.0), "spam": (0.0, 1.0)}
    return [str(save_model(root / n, {"w": ("F32", np.array(v, np.float32))})) for n, v in values.items()]


def near(model: dict[str, Any]) -> Score:
    """Best where both values are 0.7."""
    each = np.concatenate([-((np.asarray(model["w"], np.float64) - 0.7) ** 2)] * 10)
    return Score(float(each.mean()), each)


def total(model: dict[str, Any]) -> float:
    return float(np.asarray(model["w"]).sum())


def drawn(models: list[str], out: Path, **options: Any) -> Any:
    base, *others = models
    return alnico.curve(
        base, others, {"near": near, "total": total}, out=out, **{"scale": "0:1:0.25", **options}
    )


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".html"}


class Stop(KeyboardInterrupt):
    pass


def test_an_interrupted_curve_goes_on_and_ends_with_the_same_files(
    on_disk: list[str], tmp_path: Path
) -> None:
    whole = drawn(on_disk, tmp_path / "whole")
    seen: list[str] = []

    def watch(event: Any) -> None:
        seen.append(event.place)
        if len(seen) == 5:
            raise Stop

    with pytest.raises(Stop):
        drawn(on_disk, tmp_path / "cut", watch=watch)
    kept = (tmp_path / "cut" / "points.jsonl").read_bytes()
    (tmp_path / "cut" / "points.jsonl").write_bytes(kept + b'{"point": ["line", 0.5], "sco')  # a kill
    assert drawn(on_disk, tmp_path / "cut", watch=watch) == whole
    assert len(seen) == len(set(seen)) == 8, "a point was scored twice"
    assert files_in(tmp_path / "cut") == files_in(tmp_path / "whole")
    assert {"curve.csv", "curve.json", "curve.png", "best.yml", "points.jsonl"} == set(
        files_in(tmp_path / "cut")
    )


@no_pictures
def test_further_scales_are_added_to_those_that_are_kept(on_disk: list[str], tmp_path: Path) -> None:
    drawn(on_disk, tmp_path / "out", scale="0:1:0.5")
    seen: list[str] = []
    found = drawn(on_disk, tmp_path / "out", watch=lambda event: seen.append(event.place))
    assert seen == ["scale 0.25", "scale 0.75"]
    assert [p.scales[0] for p in found.points] == [0, 0.25, 0.5, 0.75, 1]


@no_pictures
def test_points_of_other_models_tasks_or_options_are_refused(on_disk: list[str], tmp_path: Path) -> None:
    base, news, spam = on_disk
    out = tmp_path / "out"
    drawn([base, news], out)
    place = out / "points.jsonl"
    advice = "expected those of this curve. Choose another folder, or discard the points with restart."
    with pytest.raises(OutputError) as error:
        drawn([base, spam], out)
    assert str(error.value) == f"{place}: the points are of another method, or have other options; {advice}"
    with pytest.raises(OutputError) as error:
        alnico.curve(base, [news], near, scale="0:1:0.25", out=out)
    assert str(error.value) == f"{place}: the points are on other tasks; {advice}"
    save_model(tmp_path / "a", {"w": ("F32", np.array((1.0, 0.0), np.float32))})
    drawn([base, str(tmp_path / "a")], tmp_path / "b")
    save_model(tmp_path / "a", {"w": ("F32", np.array((2.0, 0.0), np.float32))})
    with pytest.raises(OutputError, match="the points are of models with other contents"):
        drawn([base, str(tmp_path / "a")], tmp_path / "b")
    found = drawn([base, str(tmp_path / "a")], tmp_path / "b", restart=True)
    assert found.lines[1].scores["total"].value == 2.0


@no_pictures
def test_models_in_memory_are_known_by_their_contents(tmp_path: Path) -> None:
    def draw(value: float) -> Any:
        return alnico.curve(vector(0), [vector(value)], square, scale=[1, 2], out=tmp_path / "out")

    assert draw(1.0) == draw(1.0)
    assert not (tmp_path / "out" / "best.yml").exists()
    with pytest.raises(OutputError, match="of models with other contents"):
        draw(2.0)


@pytest.mark.parametrize(
    "text",
    [b"", b"{}\n", b"\xff\xfe", b'{"kind": "alnico curve"}\n', b'{"kind": "alnico curve", "identity": 3}\n'],
)
def test_a_file_that_holds_no_points_is_not_taken_for_them(
    on_disk: list[str], tmp_path: Path, text: bytes
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "points.jsonl").write_bytes(text)
    with pytest.raises(OutputError):
        drawn(on_disk, tmp_path / "out")


BROKEN = [
    b"[" * 100_000,
    b'{"point": [["line"], 0.5], "scores": {}}',
    b'{"point": {}, "scores": []}',
    b'{"point": ["line", 0.5], "scores": {"near": {"value": "high", "examples": null, "link": "mean"}}}',
    b'{"point": ["line", 0.5], "scores": {"near": {"value": 1, "examples": [[1]], "link": "mean"}, "total": {"value": 1, "examples": null, "link": "mean"}}}',
    b'{"point": ["line", 0.5], "scores": {"near": {"value": NaN, "examples": null, "link": "mean"}, "total": {"value": 1, "examples": null, "link": "mean"}}}',
]  # fmt: skip


@no_pictures
def test_points_that_cannot_be_read_are_scored_again(on_disk: list[str], tmp_path: Path) -> None:
    whole = drawn(on_disk, tmp_path / "out")
    points = tmp_path / "out" / "points.jsonl"
    lines = points.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'["line", 0.5]' not in line]
    points.write_bytes(b"\n".join([b"".join(kept), *BROKEN]) + b"\n")
    assert drawn(on_disk, tmp_path / "out") == whole


def test_a_folder_with_other_files_is_refused(on_disk: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError) as error:
        drawn(on_disk, tmp_path)
    assert (
        str(error.value)
        == f"{tmp_path}: contains files that are not from a curve. Choose a new folder, or empty it."
    )


@no_pictures
def test_the_best_recipe_makes_the_merge_that_was_scored(on_disk: list[str], tmp_path: Path) -> None:
    found = drawn(on_disk, tmp_path / "out", objective="near")
    assert found.best.scales == (0.75,)
    alnico.merge(tmp_path / "out" / "best.yml", tmp_path / "merged")
    from safetensors.numpy import load_file

    assert load_file(tmp_path / "merged" / "model.safetensors")["w"].tolist() == [0.75, 0.75]


@no_pictures
def test_the_table_and_the_data_have_every_number(on_disk: list[str], tmp_path: Path) -> None:
    found = drawn(on_disk, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "curve.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == [*on_disk, *["merge"] * 5]
    assert [row["scale"] for row in rows] == ["", "", "", "0.0", "0.25", "0.5", "0.75", "1.0"]
    assert [float(row["near"]) for row in rows[3:]] == [p.scores["near"].value for p in found.points]
    assert [float(row["near low"]) for row in rows[3:]] == [p.scores["near"].low for p in found.points]
    assert rows[0]["total low"] == ""
    assert json.loads((tmp_path / "out" / "curve.json").read_text()) == found.data()


CASES = [
    ({"scale": "0:2"}, RecipeError, "scale: '0:2' has 2 parts; expected LOW:HIGH:STEP, such as 0:2:0.1, or a list, such as 0,0.5,1. Write all three numbers."),
    ({"scale": "0:2:0"}, RecipeError, "scale: '0:2:0' has the step 0; expected a step above 0. Correct it."),
    ({"scale": "2:0:0.1"}, RecipeError, "scale: '2:0:0.1' goes from 2 down to 0; expected LOW below HIGH. Swap them."),
    ({"scale": "0:9:0.001"}, RecipeError, "scale: '0:9:0.001' has more than 1,001 values; expected fewer. Choose a larger step."),
    ({"scale": "0,a"}, RecipeError, "scale: 'a' in '0,a' is not a finite number; expected LOW:HIGH:STEP, such as 0:2:0.1, or a list, such as 0,0.5,1. Correct it."),
    ({"scale": "1,1"}, RecipeError, "scale: has 1 twice; expected different numbers. Remove one."),
    ({"scale": []}, RecipeError, "scale: is an empty list; expected LOW:HIGH:STEP, such as 0:2:0.1, or a list, such as 0,0.5,1. Give at least one number."),
    ({"scale": [True]}, RecipeError, "scale: True is not a number; expected numbers. Give a list of numbers."),
    ({"scale": ["0:1:1", "0:1:1"]}, RecipeError, "scale: is given 2 times for 1 model; expected one range for all models together, or two ranges for two models. Correct one of them."),
    ({"models": [], "path": True}, RecipeError, "path: has 1 model; expected a start and an end. Give two models, or the base and one."),
    ({"base": None, "path": True}, RecipeError, "path: has 1 model; expected a start and an end. Give two models, or the base and one."),
    ({"models": [vector(1), vector(2), vector(3)], "path": True}, RecipeError, "path: has 3 models; expected a start and an end. Give two models, or the base and one."),
    ({"path": True, "weights": 1}, RecipeError, "weights: are given for a path, whose positions are its weights; expected none. Leave them out."),
    ({"path": True, "scale": ["0,1", "0,1"]}, RecipeError, "scale: is given 2 times for a path; expected one range, of positions t. Give it once."),
    ({"path": True, "method": "ties"}, RecipeError, "method is ties, which draws no path; expected linear (the straight line) or slerp (the arc). Leave it out, or leave path out."),
    ({"base": None}, RecipeError, "base: is missing; expected the model that the others were tuned from. Give it."),
    ({"density": 1.4, "method": "ties"}, RecipeError, "density is 1.4; density is the share of each tensor's entries that is kept, in (0, 1]. Did you mean 0.14?"),
    ({"tasks": []}, EvaluationError, "tasks: there are none; expected at least one to score merges by. Give a tasks file, or a function."),
    ({"objective": "squares"}, EvaluationError, "objective is 'squares', which is not a task; expected mean or square. Name one of them."),
    ({"lambda": 1}, RecipeError, "lambda: is given as an option of the method, but the curve sets it; expected scale=, or weights=. Leave it out."),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_mistakes_have_their_message(change: dict[str, Any], kind: type[AlnicoError], message: str) -> None:
    given: dict[str, Any] = {"base": vector(0), "models": [vector(1)], "tasks": square, **change}
    with pytest.raises(kind) as error:
        alnico.curve(given.pop("base"), given.pop("models"), given.pop("tasks"), **given)
    assert str(error.value) == message


def test_methods_without_a_scale_are_refused_with_those_that_have_one() -> None:
    with pytest.raises(
        RecipeError,
        match=r"method is linear, which has no option scale; expected breadcrumbs, .*task_arithmetic, ties",
    ):
        alnico.curve(vector(0), [vector(1)], square, method="linear")
    with pytest.raises(
        RecipeError,
        match="method is emr, which cannot add task vectors with a scale each; expected breadcrumbs",
    ):
        alnico.curve(vector(0), [vector(1), vector(2)], square, method="emr", scale=["0,1", "0,1"])
    with pytest.raises(MethodError, match="unknown merge method"):
        alnico.curve(vector(0), [vector(1)], square, method="tise")


SCORING = """
import numpy as np
from safetensors.numpy import load_file

def near(path):
    return -float(((load_file(path / "model.safetensors")["w"] - 0.7) ** 2).mean())

def total(path):
    return float(load_file(path / "model.safetensors")["w"].sum())
"""

TASKS = """
tasks:
  - {name: near, type: call, function: "scoring:near"}
  - {name: total, type: call, function: "scoring:total", goal: min}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "scoring.py").write_text(SCORING)
    (folder / "tasks.yml").write_text(TASKS)
    return str(folder / "tasks.yml")


def test_the_command_prints_the_best_scales_and_writes_the_page(
    on_disk: list[str], tasks: str, tmp_path: Path
) -> None:
    words = [
        "curve",
        *on_disk,
        "--tasks",
        tasks,
        "--allow-code",
        "--scale",
        "0:1:0.5",
        "-o",
        str(tmp_path / "out"),
    ]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines() == [
        "       best scale   score    base    news    spam",
        "near          0.5  -0.040  -0.490  -0.290  -0.290",
        "total           0   0.000   0.000   1.000   1.000",
        "lower is better: total",
        "",
        "near is best at scale 0.5: -0.040.",
        "These scores also chose the best, so its own is too high. Score it on other examples.",
    ]
    assert shown.stderr.splitlines()[-2:] == [
        "6/6  scale 1: near -0.09  total 2",
        f"written: {tmp_path / 'out' / 'curve.html'}",
    ]
    assert (tmp_path / "out" / "curve.html").is_file()
    data = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert data["best"]["scales"] == [0.5]


def test_the_command_draws_paths_and_surfaces(on_disk: list[str], tasks: str) -> None:
    _, news, spam = on_disk
    words = ["--tasks", tasks, "--allow-code", "--quiet", "--json"]
    path = json.loads(
        CliRunner().invoke(app, ["curve", news, spam, "--path", "--scale", "0.5", *words]).stdout
    )
    assert (path["curve"], path["models"]) == ("path", [news, spam])
    assert path["barriers"]["near"]["value"] == 0.0  # the middle is nearer than both ends
    grid = ["--scale", "0:1:0.5", "--scale", "0,1"]
    surface = json.loads(CliRunner().invoke(app, ["curve", *on_disk, *grid, *words]).stdout)
    assert len(surface["points"]) == 6
    assert surface["best"]["scales"] == [0.5, 1.0]


def test_the_command_names_its_options_in_messages(on_disk: list[str], tasks: str) -> None:
    said = CliRunner().invoke(app, ["curve", *on_disk, "--tasks", tasks, "--set", "scale=2"])
    assert "--set: scale is an option of the command. Give --scale." in said.output
    missing = CliRunner().invoke(app, ["curve", *on_disk])
    assert "Give --tasks: YAML file of the tasks to score on." in " ".join(missing.output.split())


def test_a_curve_draws_itself() -> None:
    found = alnico.curve(vector(0), [vector(1)], {"<b>": square}, scale=[0, 1])
    picture = found.plot()
    assert [axes.get_ylabel() for axes in picture.axes] == ["score"]
    assert found.plot("<b>", dark=True).get_facecolor() != picture.get_facecolor()
    assert repr(found) == "<curve of models[0]: task_arithmetic, 2 points; best <b> 1 at scale 1>"
    shown = found._repr_html_()
    assert "<svg" in shown
    assert ">&lt;b&gt;<" in shown
    with pytest.raises(EvaluationError) as error:
        found.plot("c")
    assert str(error.value) == "task is 'c', which the curve does not have; expected <b>. Name one of them."
