"""What is suggested, and why: made families with known answers. The analyses are the referee's, so no kernel is needed here."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml
from reference import reference_analysis

import alnico
import alnico.analysis.suggest_rules as rules
from alnico.analysis.results import AnalysedModel, Analysis
from alnico.analysis.suggest_rules import RULES, Fit, Suggestion, suggest_recipe
from alnico.engine import relatedness
from alnico.plan.compatibility import FEW

Tensors = dict[str, np.ndarray]
SHAPES = {f"model.layers.{i}.mlp.{m}_proj.weight": (64, 64) for i in range(2) for m in ("up", "down")} | {
    "model.norm.weight": (64,)
}
SIZE = 0.001
"""Standard deviation of the entries of the task vectors, where a test does not say otherwise."""


def drawn(seed: int, size: float = SIZE) -> Tensors:
    random = np.random.default_rng(seed)
    return {n: (size * random.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


def plus(one: Tensors, other: Tensors, by: float = 1.0) -> Tensors:
    return {n: v + np.float32(by) * other[n] for n, v in one.items()}


def heavy(seed: int) -> Tensors:
    """Of an effective sparsity of 0.83: cubes of normal numbers, l1^2 / (n l2^2) = (E |x|^3)^2 / E x^6 = 8 / (15 pi)."""
    return {n: v**3 for n, v in drawn(seed, 0.1).items()}


BASE = {n: v + np.float32("norm" in n) for n, v in drawn(0, 0.05).items()}


def analysis(deltas: Mapping[str, Tensors]) -> Analysis:
    return reference_analysis(BASE, {name: plus(BASE, delta) for name, delta in deltas.items()})


def suggested(deltas: Mapping[str, Tensors]) -> Suggestion:
    return suggest_recipe(analysis(deltas))


def outside_matrices(deltas: Mapping[str, Tensors]) -> Suggestion:
    """The suggestion for models with the same numbers in vectors."""
    models = {"": BASE, **{name: plus(BASE, delta) for name, delta in deltas.items()}}
    base, *others = ({n: v.reshape(-1) for n, v in model.items()} for model in models.values())
    return suggest_recipe(reference_analysis(base, dict(zip(deltas, others, strict=True))))


def recipe(suggestion: Suggestion) -> alnico.Recipe:
    assert suggestion.recipe is not None
    return alnico.load_recipe(suggestion.recipe)


def parameters(suggestion: Suggestion) -> Mapping[str, object]:
    assert suggestion.recipe is not None
    return yaml.safe_load(suggestion.recipe).get("parameters", {})


def of_each(suggestion: Suggestion) -> list[Mapping[str, object]]:
    assert suggestion.recipe is not None
    return [m.get("parameters", {}) for m in yaml.safe_load(suggestion.recipe)["models"]]


def references(suggestion: Suggestion) -> list[str]:
    assert suggestion.recipe is not None
    return [m["model"] for m in yaml.safe_load(suggestion.recipe)["models"]]


def test_runs_of_one_task_are_stocked() -> None:
    shared = drawn(1)
    runs = {f"run-{s}": plus(shared, drawn(s), 0.7) for s in (2, 3)}
    found = suggested(runs)
    assert (found.rule, found.method) == ("same task", "model_stock")
    cosine, way = (float(re.findall(r"[\d.]+", reason)[0]) for reason in found.reasons)
    assert cosine == pytest.approx(1 / 1.49, abs=0.03)  # of s + 0.7 n1 and s + 0.7 n2
    assert way == pytest.approx(2 / 2.49 * 100, abs=3)  # 2 c / (1 + c)


def test_runs_in_one_direction_are_averaged() -> None:
    shared = drawn(1)
    found = suggested({f"run-{s}": plus(shared, drawn(s), 0.4) for s in (2, 3)})
    assert (found.rule, found.method) == (
        "same task, one direction",
        "linear",
    )  # c = 1/1.16, 2 c / (1 + c) = 0.93


@pytest.mark.parametrize(
    ("count", "scale"),
    [(2, 0.71), (3, 0.58), (4, 0.5), (8, 0.21)],  # 1/sqrt(k); of 8 the geometric mean of 1/sqrt(8) and 1/8
)
def test_tasks_outside_matrices_are_summed_to_the_distance_of_one(count: int, scale: float) -> None:
    found = outside_matrices({f"task-{s}": drawn(s) for s in range(1, count + 1)})
    assert (found.rule, found.method) == ("few matrices", "task_arithmetic")
    assert (
        "Matrices hold only 0% of what a model changed, so methods over whole matrices are not suggested."
        in found.reasons
    )
    assert parameters(found)["scale"] == pytest.approx(scale, abs=0.011)
    assert f"Search {1 / count:.2f} to {count**-0.5:.2f} on held-out data." in found.reasons[-1]


def test_tasks_that_agree_a_little_are_summed_to_the_distance_of_one() -> None:
    shared = drawn(1)
    one, other = (plus(drawn(s), shared, 0.5) for s in (2, 3))  # cosine 0.2
    found = outside_matrices({"one": one, "other": other})
    assert found.rule == "few matrices"
    assert parameters(found)["scale"] == pytest.approx((2 * 1.2) ** -0.5, abs=0.011)


def test_opposed_models_whose_few_entries_hold_it_all_go_to_ties() -> None:
    first = heavy(1)
    found = outside_matrices({"one": first, "other": plus(heavy(2), first, -0.5)})
    assert (found.rule, found.method) == ("conflict, few entries hold it", "ties")
    densities = [one["density"] for one in of_each(found)]
    assert densities[0] == 0.2  # 0.17 is less than the least
    assert densities[1] == pytest.approx(0.2, abs=0.04)
    assert "one, other oppose each other: cosine -0.4" in found.reasons[2]


def test_the_density_of_ties_is_what_the_sparsity_leaves() -> None:
    first = {n: np.sign(v) * v**2 / 10 for n, v in drawn(1, 0.1).items()}
    found = outside_matrices({"one": first, "other": plus(heavy(2), first, -0.5)})
    # l1^2 / (n l2^2) of squares of normal numbers is (E x^2)^2 / E x^4 = 1/3
    assert of_each(found)[0]["density"] == pytest.approx(1 / 3, abs=0.02)


def test_opposed_models_of_which_no_entry_stands_out_drop_at_random() -> None:
    first = drawn(1)
    found = outside_matrices({"one": first, "other": plus(drawn(2), first, -0.5)})
    assert (found.rule, found.method) == ("conflict, no entry stands out", "dare_ties")
    assert parameters(found) == {"density": 0.5}
    third = plus(drawn(3), first, -0.5)
    assert parameters(
        outside_matrices({"one": first, "other": plus(drawn(2), first, -0.5), "third": third})
    ) == {"density": 0.33}


def test_large_changes_are_not_dropped_at_random() -> None:
    first = drawn(1, 0.01)
    found = outside_matrices({"one": first, "other": plus(drawn(2, 0.01), first, -0.5)})
    assert (found.rule, found.method) == ("conflict, few entries hold it", "ties")
    assert parameters(found) == {"density": 0.5}
    assert "their standard deviation is 0.011, too large for a random drop" in found.reasons[3]


def test_models_that_contest_the_same_top_parameters_conflict() -> None:
    where = {n: np.abs(v) > 1.3 * SIZE for n, v in drawn(9).items()}
    one, other = ({n: np.where(where[n], 10, 1) * v for n, v in drawn(s).items()} for s in (1, 2))
    found = outside_matrices({"one": one, "other": other})
    assert found.method == "ties"
    assert "of their top parameters (by chance 20%)" in found.reasons[2]


def test_models_that_changed_different_parameters_stay_as_they_are() -> None:
    one, other = (
        {n: np.where((np.arange(v.size) % 2 == i).reshape(v.shape), v, 0) for n, v in drawn(i).items()}
        for i in (0, 1)
    )
    found = suggested({"one": one, "other": other})
    assert (found.rule, found.method, parameters(found)) == ("apart", "task_arithmetic", {"scale": 1.0})


@pytest.mark.parametrize("count", [2, 3, 8])
def test_different_tasks_are_merged_as_whole_matrices(count: int) -> None:
    found = suggested({f"task-{s}": drawn(s) for s in range(1, count + 1)})
    assert (found.rule, found.method, parameters(found)) == ("different tasks", "tsv", {})
    assert recipe(found).merge_method == "tsv"
    assert any("score both" in said for said in found.warnings)
    assert any("try task_arithmetic" in said for said in found.reasons) == (count == 2)
    assert not any("take time" in said for said in found.warnings)


def test_a_conflict_in_matrices_is_named_and_changes_no_method() -> None:
    first = drawn(1)
    found = suggested({"one": first, "other": plus(drawn(2), first, -0.5)})
    assert (found.rule, found.method) == ("different tasks", "tsv")
    assert found.reasons[1] == "one, other oppose each other: cosine -0.45."


def test_adapters_are_merged_as_whole_matrices_too() -> None:
    both = analysis({"one": drawn(1), "other": drawn(2)})
    found = suggest_recipe(both, [Fit(is_adapter=True), Fit(is_adapter=True)])
    assert (found.rule, found.method) == ("different tasks", "tsv")
    assert any("`alnico lora combine --method tsv` makes an adapter" in said for said in found.reasons)
    mixed = suggest_recipe(both, [Fit(is_adapter=True), Fit()])
    assert not any("adapter" in said for said in mixed.reasons)


@pytest.mark.parametrize(
    ("tensor", "shape", "factor", "expected"),
    [
        ("model.embed_tokens.weight", (4, 64), 0.5, ("different tasks", {})),
        ("model.embed_tokens.weight", (4, 64), 30, ("different tasks", {})),
        ("model.bias", (256,), 0.5, ("different tasks", {})),
        ("model.bias", (256,), 30, ("few matrices", None)),
    ],
)
def test_where_the_models_changed_decides_on_matrices_and_tables(
    tensor: str, shape: tuple[int, ...], factor: float, expected: tuple[str, object]
) -> None:
    base = {**BASE, tensor: np.ones(shape, np.float32)}
    models = {
        f"task-{s}": {
            **plus(BASE, drawn(s)),
            tensor: base[tensor]
            + np.float32(factor * SIZE * np.random.default_rng(s).standard_normal(shape)),
        }
        for s in (1, 2)
    }
    found = suggest_recipe(reference_analysis(base, models))
    assert found.rule == expected[0]
    assert expected[1] is None or parameters(found) == expected[1]
    assert any("Score embeddings: matrix" in said for said in found.reasons) == (
        "embed" in tensor and factor == 30
    )


def test_large_matrices_are_warned_of_with_their_time_and_memory() -> None:
    found = analysis({"one": drawn(1), "other": drawn(2), "third": drawn(3)})
    large = [
        dataclasses.replace(t, shape=(14336, 4096) if len(t.shape) == 2 else t.shape) for t in found.tensors
    ]
    said = suggest_recipe(dataclasses.replace(found, tensors=tuple(large))).warnings[1]
    time, memory = re.findall(r"about (\d+) minutes of one processor, and ([\d.]+) GB of memory", said)[0]
    # three decompositions of 9 n^3 and two polar factors, at 5e10 operations a second, of 4 matrices
    assert 2 <= int(time) <= 15
    one_matrix = 8e-9 * 14336 * 4096
    assert 2 * one_matrix <= float(memory) <= 8 * one_matrix


def test_runs_of_one_task_among_others_share_a_weight_but_for_whole_matrices() -> None:
    shared = drawn(1)
    models = {"code": drawn(2), "chat-1": plus(shared, drawn(3), 0.6), "chat-2": plus(shared, drawn(4), 0.6)}
    found = outside_matrices(models)
    assert found.method == "task_arithmetic"
    assert of_each(found) == [{"weight": 1.0}, {"weight": 0.5}, {"weight": 0.5}]
    assert "chat-1, chat-2 learned almost the same and share a weight of 1." in found.reasons
    found = suggested(models)
    assert (found.method, of_each(found)) == ("tsv", [{}, {}, {}])
    said = "chat-1, chat-2 learned almost the same and keep their weights, as tsv makes models orthogonal."
    assert said in found.reasons


def test_a_model_that_went_much_farther_is_weighted_down_to_the_middle_one() -> None:
    found = suggested({"one": drawn(1), "other": drawn(2), "far": drawn(3, 8 * SIZE)})
    *near, far = (e["weight"] for e in of_each(found))
    assert near == [1.0, 1.0] or min(near) > 0.97  # type: ignore[type-var]
    assert far == pytest.approx(1 / 8, rel=0.03)


def test_a_model_equal_to_the_base_is_named_and_left_out() -> None:
    found = suggested({"one": drawn(1), "same": {n: 0 * v for n, v in BASE.items()}, "other": drawn(2)})
    assert found.findings == (
        "same is left out: it equals the base in all 16,448 parameters that were compared.",
    )
    assert references(found) == ["one", "other"]


def test_of_near_duplicates_the_first_is_taken() -> None:
    one = drawn(1)
    found = suggested({"one": one, "twin": plus(one, drawn(3), 0.05), "copy": one, "other": drawn(2)})
    assert references(found) == ["one", "other"]
    assert (
        found.findings[0]
        == "twin is left out: it differs from one by 5.0% of their distance to the base, so one model would count twice."
    )
    assert found.findings[1] == "copy is left out: it equals one, so one model would count twice."


@pytest.mark.parametrize("length", [0.5, 1.0, 2.0])
def test_a_model_trained_from_another_start_is_refused_whatever_its_length(length: float) -> None:
    strange = plus({n: length * v for n, v in drawn(7, 0.05).items()}, BASE, -1.0)
    found = suggested({"one": drawn(1), "other": drawn(2), "strange": strange})
    assert references(found) == ["one", "other"]
    assert found.findings[0].startswith(
        "strange is left out: 4 of its 4 matrices are as far from the base's as independent ones"
    )


def test_a_model_far_from_the_base_is_named_and_kept() -> None:
    found = suggested({"one": drawn(1, 0.045), "other": drawn(2, 0.045)})
    assert len(references(found)) == 2
    assert found.findings[0].startswith("one is far from the base: its task vector is ")


def test_a_model_of_another_size_is_named_and_left_out() -> None:
    other = {n: np.zeros([2 * d for d in s], np.float32) for n, s in SHAPES.items()}
    found = suggest_recipe(
        reference_analysis(BASE, {"one": plus(BASE, drawn(1)), "two": plus(BASE, drawn(2)), "large": other})
    )
    assert references(found) == ["one", "two"]
    assert found.findings[0].startswith(
        "large is left out: it shares no tensor (name and shape) with the base"
    )


def test_what_could_not_be_compared_is_named() -> None:
    extra = plus(BASE, drawn(1)) | {"score.weight": np.zeros((2, 64), np.float32)}
    found = suggest_recipe(reference_analysis(BASE, {"one": extra, "other": plus(BASE, drawn(2))}))
    assert "one: 1 tensor could not be compared with the base's: score.weight." in found.findings


def test_a_model_alone_is_taken_half_way() -> None:
    found = suggested({"one": drawn(1)})
    assert (found.rule, found.method) == ("alone", "linear")
    loaded = recipe(found)
    assert [e.reference for e in loaded.entries] == ["base", "one"]


def test_without_a_model_there_is_no_recipe() -> None:
    found = suggested({"same": {n: 0 * v for n, v in BASE.items()}})
    assert (found.rule, found.method, found.recipe) == (None, None, None)
    assert found.reasons == ("No model is left to merge.",)


def test_a_model_that_the_plan_refuses_is_left_out_with_its_reason() -> None:
    found = suggest_recipe(
        analysis({"one": drawn(1), "other": drawn(2), "third": drawn(3)}),
        [Fit(), Fit(refused="it is too wide."), Fit()],
    )
    assert references(found) == ["one", "third"]
    assert found.findings == ("other is left out: it is too wide.",)


def test_the_keys_that_models_need_stand_in_one_recipe() -> None:
    rule = {"filter": "=score", "merge_method": "passthrough", "model": "base"}
    fits = [
        Fit(keys={"tokenizer": {"source": "base"}, "methods": [rule]}),
        Fit(keys={"tokenizer_source": "union", "methods": [rule]}),
    ]
    text = suggest_recipe(analysis({"one": drawn(1), "other": drawn(2)}), fits).recipe
    assert text is not None
    assert "\ntokenizer_source: union\n" in text
    assert text.count("=score") == 1
    assert "tokenizer:" not in text


def test_the_recipe_names_commits_and_quotes_what_yaml_would_misread() -> None:
    found = analysis({"one": drawn(1), "other": drawn(2)})
    models = (AnalysedModel("one", "owner/one", "0123abc"), AnalysedModel("other", "my models/#2: other's"))
    loaded = recipe(suggest_recipe(dataclasses.replace(found, models=models)))
    assert [e.reference for e in loaded.entries] == ["owner/one@0123abc", "my models/#2: other's"]


def test_the_recipe_carries_its_reasons_as_comments() -> None:
    found = suggested({"one": drawn(1), "other": drawn(2)})
    assert found.recipe is not None
    comments = " ".join(line.lstrip("# ") for line in found.recipe.splitlines() if line.startswith("#"))
    for said in (*found.findings, *found.reasons, *found.warnings):
        assert said in comments


def test_every_rule_is_that_of_a_test_above() -> None:
    text = Path(__file__).read_text("utf-8")
    assert [r.name for r in RULES if f'"{r.name}"' not in text] == []


def test_the_page_has_the_rules_of_the_code() -> None:
    docs = Path(__file__).parents[2] / "docs"
    spec = importlib.util.spec_from_file_location("make_choosing", docs / "make_choosing.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    written = (docs / "choosing.md").read_text("utf-8")
    assert generator.page(written) == written, (
        "docs/choosing.md is out of date: run `python docs/make_choosing.py`"
    )


def test_the_pages_other_numbers_are_those_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text("utf-8")
    shares = {0.1: "a tenth", 0.5: "one half", 0.9: "nine tenths"}
    for said in (
        f"differ by {shares[relatedness.NEAR_DUPLICATE]} of the longer one",
        f"{shares[relatedness.NEARLY_ALL]} of the matrices are as far",
        f"a relative change of {rules.ANOTHER_START:g},",
        f"a relative change of {shares[rules.FAR]} in all",
        f"in one model alone ({shares[FEW]} at most)",
        f"linked by a cosine of {rules.SAME_TASK:g} or more",
        f"**Why a cosine of {rules.SAME_TASK:g}.**",
        f"is {rules.UNEQUAL:g} times the shortest, or more",
        f"Above {rules.MANY} tasks it is the geometric mean",
    ):
        assert said in page
