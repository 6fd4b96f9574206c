"""What a merged model kept of its parents."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.analysis.results import AnalysedModel
from alnico.analysis.retention import Retention, measure_distances, measure_retention, recorded_base
from alnico.analysis.scores import accuracies, read_scores
from alnico.checkpoint.open_model import open_model
from alnico.errors import ModelError, OutputError
from analysis.reference import reference_analysis
from hub.stub import serving
from made import family, read_model
from real import BASE as BASE_MODEL
from real import TUNED
from test_real_models import installed

Run = Callable[..., tuple[int, str, str]]

RANDOM = np.random.default_rng(7)
SHAPES = {
    "model.embed_tokens.weight": (40, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.up_proj.weight": (24, 8),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.mlp.up_proj.weight": (24, 8),
    "model.norm.weight": (8,),
}
BASE = {name: RANDOM.standard_normal(shape) for name, shape in SHAPES.items()}
DELTAS = [{name: 0.1 * RANDOM.standard_normal(shape) for name, shape in SHAPES.items()} for _ in range(2)]
PARENTS = [{name: BASE[name] + delta[name] for name in SHAPES} for delta in DELTAS]
UP = "model.layers.0.mlp.up_proj.weight"


def kept_of(merged: dict[str, np.ndarray], parents: list[dict[str, np.ndarray]] = PARENTS) -> Retention:
    models = {f"p{i}": parent for i, parent in enumerate(parents)} | {"m": merged}
    return measure_retention(reference_analysis(BASE, models), len(parents))


def flat(model: dict[str, np.ndarray], names: list[str] | None = None) -> np.ndarray:
    return np.concatenate([model[name].ravel() for name in names or SHAPES])


def test_distances_projections_and_signs_are_those_of_numpy_in_every_scope() -> None:
    merged = {
        n: BASE[n] + 0.6 * DELTAS[0][n] + 0.2 * DELTAS[1][n] + 0.05 * RANDOM.standard_normal(SHAPES[n])
        for n in SHAPES
    }
    found = kept_of(merged)
    scopes = {None: found.whole, "mlp": found.groups["mlp"], "layers.1": found.layers[1]}
    for part, scope in scopes.items():
        names = [n for n in SHAPES if part is None or part in n]
        base, m = flat(BASE, names), flat(merged, names)
        assert scope.distance == pytest.approx(np.linalg.norm(m - base))
        assert scope.relative_distance == pytest.approx(np.linalg.norm(m - base) / np.linalg.norm(base))
        parents = np.stack([flat(p, names) - base for p in PARENTS])
        weights, residual, *_ = np.linalg.lstsq(parents.T, m - base, rcond=None)
        assert scope.outside == pytest.approx(np.sqrt(residual[0]) / np.linalg.norm(m - base))
        for share, parent, weight in zip(scope.parents, parents, weights, strict=True):
            assert share is not None
            assert share.distance == pytest.approx(np.linalg.norm(m - base - parent))
            assert share.relative_distance == pytest.approx(
                np.linalg.norm(m - base - parent) / np.linalg.norm(base)
            )
            assert share.projection == pytest.approx((m - base) @ parent / (parent @ parent))
            assert share.weight == pytest.approx(weight)
            assert share.sign_agreement == pytest.approx(np.mean(np.sign(m - base) == np.sign(parent)))


def test_the_weights_of_task_arithmetic_come_back_from_parents_that_have_much_in_common() -> None:
    common = {n: 0.2 * RANDOM.standard_normal(s) for n, s in SHAPES.items()}
    parents = [{n: PARENTS[i][n] + common[n] for n in SHAPES} for i in range(2)]
    merged = {n: BASE[n] + 0.7 * (parents[0][n] - BASE[n]) - 0.2 * (parents[1][n] - BASE[n]) for n in SHAPES}
    whole = kept_of(merged, parents).whole
    one, other = whole.parents
    assert one is not None
    assert other is not None
    assert (one.weight, other.weight) == (pytest.approx(0.7), pytest.approx(-0.2))
    assert whole.outside == pytest.approx(0, abs=1e-6)
    assert other.projection is not None
    assert other.projection > 0.2, "what the parents have in common counts in a projection"


def test_parents_that_are_one_share_a_weight() -> None:
    merged = {n: BASE[n] + 0.8 * DELTAS[0][n] for n in SHAPES}
    one, other = kept_of(merged, [PARENTS[0], PARENTS[0]]).whole.parents
    assert one is not None
    assert other is not None
    assert (one.weight, other.weight) == (pytest.approx(0.4), pytest.approx(0.4))


def test_the_top_parameters_kept_are_a_share_of_the_parents_where_the_merged_model_has_fewer() -> None:
    # p0 changed entries 0 to 99 with growing size, so that with a fifth its top are 80 to 99; merged has 95 to 99 of them, and 3 others.
    ramp = np.zeros(100)
    ramp[:] = np.arange(1, 101)
    few = np.zeros(100)
    few[95:] = ramp[95:]
    few[:3] = 1000.0
    base, models = {"w": np.ones(100)}, {"p0": {"w": 1.0 + ramp}, "m": {"w": 1.0 + few}}
    (share,) = measure_retention(reference_analysis(base, models), 1).whole.parents
    assert share is not None
    assert share.top_kept == 5 / 20
    (back,) = measure_retention(reference_analysis(base, models), 0).whole.parents
    assert back is not None
    assert back.top_kept == 5 / 8, "the other way it is of the eight that there are"


def test_a_merged_model_that_is_its_parent_keeps_all_of_it_and_the_base_none() -> None:
    one, other = kept_of(PARENTS[0]).whole.parents
    assert one is not None
    assert other is not None
    assert (one.distance, one.relative_distance, one.sign_agreement, one.top_kept) == (0.0, 0.0, 1.0, 1.0)
    assert (one.projection, one.weight, other.weight) == (
        pytest.approx(1),
        pytest.approx(1),
        pytest.approx(0, abs=1e-12),
    )
    whole = kept_of(BASE).whole
    assert (whole.distance, whole.relative_distance, whole.outside) == (0.0, 0.0, None)
    assert [(p.projection, p.weight, p.sign_agreement, p.top_kept) for p in whole.parents if p] == [
        (0.0, 0.0, None, 0.0)
    ] * 2
    expected = [np.linalg.norm(flat(delta)) / np.linalg.norm(flat(BASE)) for delta in DELTAS]
    assert [p.relative_distance for p in whole.parents if p] == pytest.approx(expected)


def test_where_nothing_moved_nothing_is_lost_or_kept() -> None:
    frozen = "model.norm.weight"
    merged, parent = ({**model, frozen: BASE[frozen]} for model in (PARENTS[1], PARENTS[0]))
    scope = kept_of(merged, [parent]).groups["norm"]
    (share,) = scope.parents
    assert share is not None
    assert (scope.relative_distance, share.distance, share.relative_distance) == (0.0, 0.0, 0.0)
    assert (share.projection, share.weight, share.top_kept) == (None, None, None)


def test_tensors_that_a_parent_has_not_do_not_count_against_it() -> None:
    part = {name: values for name, values in PARENTS[1].items() if name != UP}
    merged = {n: BASE[n] + 0.5 * DELTAS[0][n] + 0.5 * DELTAS[1][n] for n in SHAPES}
    share = kept_of(merged, [PARENTS[0], part]).whole.parents[1]
    names = [n for n in SHAPES if n != UP]
    delta = flat(DELTAS[1], names)
    assert share is not None
    assert share.projection == pytest.approx(
        (flat(merged, names) - flat(BASE, names)) @ delta / (delta @ delta)
    )
    only = {name: values for name, values in PARENTS[1].items() if name == UP}
    first, second = kept_of(merged, [PARENTS[0], only]).layers[1].parents
    assert first is not None
    assert first.weight is not None
    assert second is None


def test_tensors_that_the_merged_model_has_not_do_not_count_against_it() -> None:
    merged = {n: values for n, values in PARENTS[0].items() if n != UP}
    (share,) = kept_of(merged, [PARENTS[0]]).whole.parents
    assert share is not None
    assert (share.distance, share.projection, share.top_kept) == (0.0, pytest.approx(1), 1.0)


def test_without_a_base_the_distances_are_the_same_and_nothing_else_is_known() -> None:
    merged = {n: BASE[n] + 0.6 * DELTAS[0][n] for n in SHAPES}
    found = measure_distances(reference_analysis(merged, {"p0": PARENTS[0], "p1": PARENTS[1]}))
    expected = kept_of(merged)
    assert found.base is None
    for scope, other in ((found.whole, expected.whole), (found.groups["mlp"], expected.groups["mlp"])):
        assert (scope.distance, scope.outside) == (None, None)
        for share, known in zip(scope.parents, other.parents, strict=True):
            assert share is not None
            assert known is not None
            assert share.distance == pytest.approx(known.distance)
            assert (share.projection, share.weight, share.sign_agreement, share.top_kept) == (None,) * 4


def test_kept_is_plain_data() -> None:
    data = kept_of(PARENTS[0]).data()
    assert json.loads(json.dumps(data)) == json.loads(json.dumps(data, allow_nan=False))
    assert list(data) == [
        "schema", "version", "base", "parents", "merged", "top_share", "whole", "groups", "layers", "scores", "notes", "map"
    ]  # fmt: skip
    assert list(data["layers"]) == ["0", "1"]


# ---- the base that a merge records ------------------------------------------------------------------------------------


def test_the_base_is_the_one_that_the_merged_models_recipe_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base, (tuned,) = family(Path(), 1)
    for text, expected in (
        (f"merge_method: ties\nbase_model: {base}\nmodels: [{tuned}]\n", ("base", "")),
        (f"merge_method: linear\nmodels: [{tuned}]\n", (None, "tuned-0/mergekit_config.yml names no base")),
        ("merge_method: [", (None, "tuned-0/mergekit_config.yml cannot be read: ")),
        (None, (None, "tuned-0 has no mergekit_config.yml that names its base")),
    ):
        (tuned / "mergekit_config.yml").unlink(missing_ok=True)
        if text is not None:
            (tuned / "mergekit_config.yml").write_text(text)
        with open_model(tuned) as merged:
            reference, why = recorded_base(merged)
        assert (reference, why[: len(expected[1])] if expected[1] else why) == expected


# ---- scores -----------------------------------------------------------------------------------------------------------

MODELS = (AnalysedModel("code", "path/to/code"), AnalysedModel("math", "org/math"))
MERGED, ORIGIN = AnalysedModel("out", "path/to/out"), AnalysedModel("llama", "org/llama")


def told(scores: list[str]) -> str:
    with pytest.raises(ModelError) as caught:
        accuracies(read_scores(scores), MODELS, MERGED, ORIGIN)
    return str(caught.value)


def test_accuracy_kept_is_of_the_best_parent_of_the_task(tmp_path: Path) -> None:
    table, data = tmp_path / "scores.csv", tmp_path / "scores.json"
    table.write_text(
        "task,model,score\nhumaneval,code,0.5\nhumaneval,org/math,0.1\nhumaneval,merged,0.4\nhumaneval,base,0.25\n",
        "utf-8-sig",
    )
    data.write_text(json.dumps({"gsm8k": {"math": 0.6, "path/to/out": 0.66}}))
    scores = read_scores([table, data, "mmlu:code=0", "mmlu:merged=0.5"])
    code, math, mmlu = accuracies(scores, MODELS, MERGED, ORIGIN)
    assert (code.task, code.best, code.of_best, code.merged, code.of_base) == (
        "humaneval",
        "code",
        0.5,
        0.4,
        0.25,
    )
    assert (code.kept, code.gain_kept) == (pytest.approx(0.8), pytest.approx(0.6))
    assert (math.best, math.kept, math.of_base, math.gain_kept) == ("math", pytest.approx(1.1), None, None)
    assert (mmlu.kept, mmlu.gain_kept) == (None, None)
    worse, equal = (
        accuracies(read_scores([f"t:code={own}", "t:merged=0.2", "t:base=0.4"]), MODELS, MERGED, ORIGIN)[0]
        for own in (0.3, 0.4)
    )
    assert (worse.gain, worse.gain_kept, worse.has_no_gain) == (pytest.approx(-0.1), None, True)
    assert (equal.gain, equal.gain_kept, equal.has_no_gain) == (0.0, None, True)
    (below,) = accuracies(read_scores(["t:code=-2", "t:merged=-1"]), MODELS, MERGED, ORIGIN)
    assert (below.kept, below.gain, below.has_no_gain) == (None, None, False)


def test_scores_that_cannot_be_read_are_refused_with_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("task,score\nx,1\n")
    Path("b.csv").write_text("task,model,score\nx,code\n")
    Path("c.json").write_text('{"x": 0.5}')
    form = "expected the header task,model,score and three values in each row. Convert it to this form."
    assert told(["a.csv"]) == f"a.csv: begins with 'task,score'; {form}"
    assert told(["b.csv"]) == f"b.csv: has 2 values in row 2; {form}"
    assert (
        told(["c.json"])
        == 'c.json: is not a file of scores; expected {"task": {"model": 0.5}}. Convert it to this form.'
    )
    assert (
        told(["d.csv"])
        == "d.csv: cannot be read (No such file or directory). Check the path and its permissions."
    )
    assert told(["x=0.5"]) == (
        "'x=0.5': is not a score; expected a .json file, a .csv file or TASK:MODEL=SCORE. Write for example `gsm8k:merged=0.52`."
    )
    assert (
        told(["x:code=nan"])
        == "x:code=nan: x: code: the score is 'nan'; expected a number. Correct it, or remove it."
    )
    assert (
        told(["x:code=1", "x:code=2"])
        == "x:code=2: the score of code on x is given twice; expected one. Remove one."
    )
    assert (
        told(["x:cod=1"])
        == "scores: x: cod is not one of the models; expected out, llama, code, math. Did you mean code?"
    )
    lacking = "expected one of each. Add it, or remove the task."
    assert told(["x:code=1"]) == f"scores: x: has no score of the merged model; {lacking}"
    assert told(["x:merged=1", "x:base=1"]) == f"scores: x: has no score of any parent; {lacking}"


def test_a_model_is_not_scored_twice_under_two_names() -> None:
    assert told(["x:code=1", "x:path/to/code=2", "x:merged=1"]) == (
        "scores: x: code has two scores, the second as path/to/code; expected one. Remove one."
    )


def test_a_saved_parent_with_the_name_merged_is_still_told_by_its_path() -> None:
    parents = (AnalysedModel("merged", "stage/merged"),)
    (found,) = accuracies({"x": {"stage/merged": 0.5, "merged": 0.25}}, parents, MERGED, None)
    assert (found.best, found.of_best, found.merged) == ("merged", 0.5, 0.25)


# ---- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A base, two fine-tunes of it and a merge of them, all float32 files in the working directory: base, tuned-0, tuned-1, out."""
    monkeypatch.chdir(tmp_path)
    family(Path(), 2, "F32")
    recipe = {"merge_method": "task_arithmetic", "base_model": "base"}
    entries = [{"model": f"tuned-{i}", "parameters": {"weight": w}} for i, w in enumerate((0.75, 0.25))]
    alnico.merge({**recipe, "models": entries}, "out")
    return read_model(Path("out"))


def test_compare_takes_the_base_that_the_merge_records_and_finds_its_weights(
    merged: dict[str, np.ndarray],
) -> None:
    found = alnico.compare(["tuned-0", "tuned-1"], "out", scores={"x": {"tuned-1": 0.5, "out": 0.25}})
    assert (found.base and found.base.reference, found.merged.name, [p.name for p in found.parents]) == (
        "base", "out", ["tuned-0", "tuned-1"]
    )  # fmt: skip
    assert [p.weight for p in found.whole.parents if p] == pytest.approx([0.75, 0.25], abs=1e-4)
    models = [read_model(Path(name)) for name in ("tuned-0", "tuned-1")]
    expected = measure_retention(
        reference_analysis(read_model(Path("base")), {"a": models[0], "b": models[1], "m": merged}), 2
    )
    for scope, other in ((found.whole, expected.whole), (found.groups["mlp"], expected.groups["mlp"])):
        for share, known in zip(scope.parents, other.parents, strict=True):
            assert asdict(share or other) == pytest.approx(asdict(known or scope), rel=1e-6)
    assert (found.scores[0].best, found.scores[0].kept, found.notes) == ("tuned-1", 0.5, ())


@pytest.mark.usefixtures("merged")
def test_without_a_base_compare_says_so_and_why() -> None:
    Path("base").rename("elsewhere")
    found = alnico.compare(["tuned-0"], "out")
    (note,) = found.notes
    assert note.startswith(
        "only distances are known: the base that mergekit_config.yml of out names cannot be opened (model 'base': no such"
    )
    assert note.endswith(". Give the base (base=; --base in the command).")
    (share,) = found.whole.parents
    assert share is not None
    assert (found.base, share.projection) == (None, None)
    other = alnico.compare(["tuned-0"], "out", base="elsewhere")
    assert other.notes == ()
    assert other.whole.parents[0] is not None
    assert share.distance == pytest.approx(other.whole.parents[0].distance, rel=1e-6)
    with pytest.raises(ModelError):
        alnico.compare(["tuned-0"], "out", base="nowhere")


@pytest.mark.usefixtures("merged")
def test_the_recipe_of_a_merge_on_the_hub_is_fetched_for_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path / "home", monkeypatch) as hub:
        hub.add("org/merged", Path("out"))
        found = alnico.compare(["tuned-0"], "org/merged")
    assert (found.base and found.base.reference, found.merged.reference) == ("base", "org/merged")


@pytest.mark.usefixtures("merged")
def test_a_score_of_an_unknown_model_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("alnico.analysis.retention.analyze_sources", None)
    with pytest.raises(ModelError, match=r"^scores: x: tuned-2 is not one of the models; "):
        alnico.compare(["tuned-0"], "out", scores={"x": {"tuned-2": 1.0, "merged": 1.0}})


@pytest.mark.usefixtures("merged")
def test_compare_prints_a_line_a_parent_and_writes_its_files(run: Run) -> None:
    words = (
        "compare",
        "tuned-0",
        "tuned-1",
        "out",
        "--scores",
        "gsm8k:tuned-0=0.5",
        "--scores",
        "gsm8k:merged=0.4",
    )
    code, stdout, stderr = run(*words, "--out", "report/kept")
    assert (code, stderr) == (0, "written: report/kept/report.html\n")
    lines = stdout.splitlines()
    assert lines[:4] == ["merged    out", "parent    tuned-0", "parent    tuned-1", "base      base"]
    whole = next(i for i, line in enumerate(lines) if line.startswith("whole"))
    assert lines[whole].split()[1:3] == ["(the", "base)"]
    assert lines[whole + 1].split()[0] == "tuned-0"
    assert lines[whole + 1].split()[4] == "0.750"
    assert lines[whole + 2].split()[4] == "0.250"
    assert {lines[whole + i].split()[0] for i in (3, 6, 9, 12)} == {"norm", "embedding", "attention", "mlp"}
    assert "gsm8k                  0.4          0.5    80.0%            -  tuned-0" in lines
    assert not any(line.startswith("layer") for line in lines)
    assert any(line.startswith("layer 1") for line in run(*words, "-v")[1].splitlines())
    written = json.loads(Path("report/kept/retention.json").read_text())
    printed = json.loads(run(*words, "--json")[1])
    assert printed.pop("compile_seconds") >= 0.0
    assert printed == written
    rows = list(csv.DictReader(Path("report/kept/retention.csv").read_text().splitlines()))
    assert [(r["scope"], r["name"], r["parent"]) for r in rows[:2]] == [
        ("whole", "whole", f"tuned-{i}") for i in (0, 1)
    ]
    assert [r["scope"] for r in rows[2:]] == ["group"] * 8 + ["layer"] * 4
    assert float(rows[0]["weight"]) == written["whole"]["parents"][0]["weight"]
    assert float(rows[0]["outside"]) == written["whole"]["outside"]
    assert [m.name for m in alnico.read_analysis("report/kept").models] == ["tuned-0", "tuned-1", "out"]
    assert "What the merge kept" in Path("report/kept/report.html").read_text()
    assert run("compare", "out")[0] == 2


def test_a_merge_that_is_named_as_a_parent_is_noted(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base_path, paths = family(Path("m"), count=2)
    base, *tuned = map(str, (base_path, *paths))
    alnico.merge({"merge_method": "linear", "models": tuned}, "out")
    note = (
        f"note: out is a merge by its lock, and {tuned[1]}, which was named as the merged model, has no lock: "
        "the merged model is named last.\n"
    )
    assert note in run("compare", "out", *tuned, "--base", base)[2]
    assert "is a merge by its lock" not in run("compare", *tuned, "out", "--base", base)[2]


@pytest.mark.usefixtures("merged")
def test_a_report_that_cannot_be_written_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("alnico.analysis.retention.analyze_sources", None)
    Path("file").write_text("")
    with pytest.raises(
        OutputError, match=r"^file/x: cannot be created \(Not a directory\)\. Choose another folder\.$"
    ):
        alnico.compare(["tuned-0"], "out", out="file/x")


@pytest.mark.slow
def test_the_merges_of_the_real_pair_kept_what_their_recipes_say(tmp_path: Path) -> None:
    base, tuned = installed(*BASE_MODEL), installed(*TUNED)
    for method, options, weight in (
        ("task_arithmetic", {"weight": 0.7}, 0.7),
        ("dare_linear", {"density": 0.5}, 1.0),
    ):
        recipe = {
            "merge_method": method,
            "base_model": str(base),
            "models": [str(tuned)],
            "parameters": options,
        }
        alnico.merge(recipe, tmp_path / method)
        found = alnico.compare([tuned], tmp_path / method)
        (share,) = found.whole.parents
        assert share is not None
        assert share.weight == pytest.approx(weight, abs=2e-3)
        assert share.sign_agreement == pytest.approx(1, abs=1e-4)
        # Half of the entries dropped at random and the others doubled: as much noise as there is task vector.
        assert found.whole.outside == pytest.approx(
            0.0 if method == "task_arithmetic" else 0.5**0.5, abs=5e-3
        )
        assert share.relative_distance == pytest.approx(
            0.0101 * (0.3 if method == "task_arithmetic" else 1.0), rel=0.02
        )
