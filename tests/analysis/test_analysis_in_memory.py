"""Models in memory are analyzed in place: with the numbers of the same models on disk, under their labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import alnico
from alnico.analysis import measure_tensors
from alnico.checkpoint.memory_model import MemoryModel
from alnico.errors import AlnicoError, ModelError, RecipeError
from made import save_model

RANDOM = np.random.default_rng(4)
BASE = {f"layers.{i}.weight": RANDOM.standard_normal((6, 6)).astype(np.float32) for i in range(2)}
TUNED = [
    {n: (v + 0.1 * RANDOM.standard_normal(v.shape)).astype(np.float32) for n, v in BASE.items()}
    for _ in range(2)
]


class Network(nn.Module):
    def __init__(self, values: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        self.load_state_dict({n: torch.tensor(v) for n, v in values.items()})


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [
        str(save_model(root / name, {n: ("F32", v) for n, v in model.items()}))
        for name, model in (("base", BASE), ("a", TUNED[0]), ("b", TUNED[1]))
    ]


def numbers(found: alnico.Analysis) -> Any:
    """Everything that was measured, without names and seconds."""
    return found.whole, found.groups, found.layers, sorted(found.tensors, key=lambda tensor: tensor.name)


def test_an_analysis_in_memory_has_the_numbers_of_the_files(paths: list[str], tmp_path: Path) -> None:
    expected = numbers(alnico.analyze(paths[1:], base=paths[0]))
    modules = [Network(values) for values in TUNED]
    tensors = {n: torch.tensor(v) for n, v in BASE.items()}
    found = alnico.analyze(modules, base=tensors, out=tmp_path / "report")
    assert numbers(found) == expected
    assert [m.name for m in (found.base, *found.models)] == ["base", "models[0]", "models[1]"]
    assert numbers(alnico.analyze([paths[1], TUNED[1]], base=Network(BASE))) == expected
    assert alnico.read_analysis(tmp_path / "report") == found
    page = (tmp_path / "report" / "report.html").read_text()
    assert "models[0]" in page
    assert "<code>alnico.suggest(models, base=base).merge()</code> in Python" in page
    assert "alnico merge recipe.yml" not in page
    assert (tmp_path / "report" / "models[1]" / "summary.json").is_file()


def test_the_models_of_an_analysis_have_the_names_that_are_given(paths: list[str]) -> None:
    found = alnico.analyze(iter([TUNED[0], paths[2]]), base=BASE, names=["math tuned", "code/2"])
    assert [m.name for m in found.models] == ["math tuned", "code-2"]
    assert [m.reference for m in found.models] == ["math tuned", paths[2]]
    with pytest.raises(RecipeError, match=r"^names: 'base' is the name of base, too; expected different"):
        alnico.analyze(TUNED, base=BASE, names=["base", "b"])


def test_a_task_vector_is_analyzed_as_the_model_that_it_gives() -> None:
    vector = 2 * alnico.TaskVector(TUNED[0], BASE)
    found = alnico.analyze([vector, TUNED[1]], base=BASE)
    same = alnico.analyze([vector.on(BASE).state_dict(), TUNED[1]], base=BASE)
    assert numbers(found) == numbers(same)
    assert found.whole.changes[0].l2 == pytest.approx(vector.norm())  # type: ignore[union-attr]


def test_an_interrupted_analysis_of_objects_resumes_by_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, finish, done = tmp_path / "report", measure_tensors.MeasuringRun._finish, []

    def stop(*arguments: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(finish(*arguments))  # type: ignore[func-returns-value]

    monkeypatch.setattr(measure_tensors.MeasuringRun, "_finish", stop)
    with pytest.raises(KeyboardInterrupt):
        alnico.analyze(TUNED, base=BASE, out=out, threads=1)
    measured: list[Any] = []
    monkeypatch.setattr(
        measure_tensors.MeasuringRun, "_finish", lambda *given: (measured.append(given[1]), finish(*given))[1]
    )
    copies = [
        {n: torch.tensor(v) for n, v in model.items()} for model in TUNED
    ]  # other objects, equal values
    with pytest.raises(AlnicoError, match=r"models\[1\]: its values in memory"):
        alnico.analyze([copies[0], BASE], base=BASE, out=out, threads=1)
    found = alnico.analyze(copies, base=BASE, out=out, threads=1)
    assert len(measured) == 1
    assert numbers(found) == numbers(alnico.analyze(TUNED, base=BASE))


def test_an_analysis_copies_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"w": np.ones((300, 300), np.float32)}
    largest = 0
    read = MemoryModel.read_into

    def watched(self: MemoryModel, name: str, offset: int, buffer: memoryview) -> None:
        nonlocal largest
        assert np.shares_memory(self.flat(name), values["w"]) or self.label != "base"  # type: ignore[arg-type]
        largest = max(largest, len(buffer))
        read(self, name, offset, buffer)

    monkeypatch.setattr(MemoryModel, "read_into", watched)
    alnico.analyze([{"w": values["w"] + 1}], base=values)
    assert largest


def test_a_comparison_of_objects_is_that_of_the_files(paths: list[str], tmp_path: Path) -> None:
    merged = alnico.merge_state_dicts(TUNED, weights=[0.7, 0.3])
    path = save_model(tmp_path / "merged", {n: ("F32", v) for n, v in merged.items()})
    expected = alnico.compare(paths[1:], path, base=paths[0])
    scores = {"accuracy": {"merged": 0.8, "first": 0.9, "second": 0.5}}
    found = alnico.compare(
        TUNED, Network(merged), base=BASE, names=["first", "second"], scores=scores, out=tmp_path / "out"
    )
    assert (found.whole, found.groups, found.layers) == (expected.whole, expected.groups, expected.layers)
    assert [m.name for m in (*found.parents, found.merged)] == ["first", "second", "merged"]
    assert found.scores[0].best == "first"
    assert json.loads((tmp_path / "out" / "retention.json").read_text())["merged"]["name"] == "merged"
    assert alnico.compare(TUNED, merged).notes == (
        "only distances are known: merged is in memory, where nothing names its base. Give the base (base=; "
        "--base in the command).",
    )


def test_a_difference_of_objects_is_that_of_the_files(paths: list[str]) -> None:
    expected = alnico.diff(paths[1], paths[2])
    found = alnico.diff(Network(TUNED[0]), TUNED[1])
    assert sorted(found.tensors, key=lambda t: t.name) == sorted(expected.tensors, key=lambda t: t.name)
    assert (found.a, found.b, found.files) == ("a", "b", None)
    assert alnico.diff(TUNED[0], paths[1]).is_equal
    factors = {
        "q.lora_A.weight": np.zeros((1, 2), np.float32),
        "q.lora_B.weight": np.zeros((2, 1), np.float32),
    }
    assert alnico.diff(factors, dict(factors)).is_equal


def test_an_inspection_of_an_object_has_its_tensors(paths: list[str]) -> None:
    on_disk = alnico.inspect(paths[0]).data()
    found = alnico.inspect(Network(BASE)).data()
    assert {key for key in on_disk if on_disk[key] != found[key]} == {"model", "files"}


def test_norm_weights_of_objects_are_those_of_the_files(paths: list[str]) -> None:
    expected = alnico.norm_weights(paths[1:], base=paths[0], per="layer")
    found = alnico.norm_weights([Network(TUNED[0]), TUNED[1]], base=BASE, per="layer")
    assert (found.weights, found.norms, found.places) == (expected.weights, expected.norms, expected.places)
    assert (found.base, found.models) == ("base", ("models[0]", "models[1]"))


def test_a_suggestion_for_objects_is_that_of_the_files_and_merges_them(paths: list[str]) -> None:
    expected = alnico.suggest(paths[1:], base=paths[0])
    found = alnico.suggest([Network(TUNED[0]), TUNED[1]], base=BASE)
    assert (found.rule, found.method, found.reasons) == (expected.rule, expected.method, expected.reasons)
    assert found.recipe is not None
    assert "base_model: base\n" in found.recipe
    assert found.warnings[-1] == (
        "base, models[0], models[1] are in memory: alnico.suggest(models, base=base).merge() merges without "
        "files. For alnico.merge, save the models and put their paths into the recipe."
    )
    module, tensors = found.merge(), expected.merge()
    assert isinstance(module, Network)
    assert {n: v.numpy().tobytes() for n, v in module.state_dict().items()} == {
        n: v.numpy().tobytes() for n, v in tensors.items()
    }
    assert not {"models", "in_memory"} & set(found.data())


def test_a_suggestion_leaves_out_an_object_that_does_not_fit() -> None:
    other = {n: np.ones((2, 2), np.float32) for n in BASE}
    found = alnico.suggest([other, TUNED[0]], base=BASE)
    assert found.findings[-1].startswith("models[0] is left out: ")
    assert set(found.merge()) == set(BASE)
    none = alnico.suggest([other], base=BASE)
    with pytest.raises(AlnicoError, match=r"^this suggestion has no recipe: No model is left to merge\."):
        none.merge()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: alnico.analyze({"a": BASE}, base=BASE), "models is a dict of models; "),
        (lambda: alnico.analyze(TUNED, base=TUNED), "base is a list of 2 values; expected one model: a path, "),
        (lambda: alnico.analyze(TUNED, base=[BASE]), "base is a list of 1 values; "),
        (lambda: alnico.analyze(TUNED, base=None), "base is None; expected a path, "),
        (lambda: alnico.compare([], BASE), "parents is empty; expected at least one model."),
        (lambda: alnico.compare(TUNED, {"m": BASE}), "merged is a dict of models; expected one model. Choose one, such as merged['m']."),
        (lambda: alnico.diff(BASE, None), "b is None; expected a path, "),
        (lambda: alnico.inspect(alnico.TaskVector(BASE, TUNED[0])), "model: is a task vector, "),
        (lambda: alnico.norm_weights(Network(BASE), base=BASE), "models is one module of type Network; "),
        (lambda: alnico.suggest(BASE, base=BASE), "models is one dict of tensors; "),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused_by_the_name_of_the_argument(call: Any, expected: str) -> None:
    with pytest.raises((ModelError, RecipeError)) as caught:
        call()
    assert str(caught.value).startswith(expected)
