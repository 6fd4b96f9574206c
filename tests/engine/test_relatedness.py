"""Models are looked at before they are merged: were they tuned from one base?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.open_model import open_model
from alnico.engine.relatedness import SAMPLE, Likeness, SampledTensor, compare_models
from alnico.errors import MismatchError
from made import family, llama_config, model_bytes, read_model, save_model

Run = Callable[..., tuple[int, str, str]]
WIDE: dict[str, Any] = {"hidden": 64, "layers": 1, "vocabulary": 128}


MATRICES = 6
"""Matrices of 4,096 elements or more in a model of this shape; keys and values have fewer."""


def save(path: str, tensors: Mapping[str, np.ndarray], dtype: str = "BF16") -> str:
    save_model(Path(path), {n: (dtype, v) for n, v in tensors.items()}, llama_config(**WIDE))
    return path


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base with two fine-tunes, and a model of another start: base, tuned-0, tuned-1, stranger."""
    monkeypatch.chdir(tmp_path)
    family(Path(), 2, **WIDE)
    family(Path("other"), 0, seed=1, **WIDE)
    Path("other/base").rename("stranger")


def recipe(*models: str, method: str = "task_arithmetic", **keys: Any) -> dict[str, Any]:
    based = {"base_model": "base"} if method in ("task_arithmetic", "slerp") else {}
    options = {"task_arithmetic": {"weight": 0.5}, "slerp": {"t": 0.5}}.get(method)
    return {
        "merge_method": method,
        "models": list(models),
        **based,
        **({"parameters": options} if options else {}),
        **keys,
    }


def likenesses(*models: str) -> tuple[Likeness, ...]:
    """How models lie to the first of them, by a look at all its tensors."""
    with ExitStack() as opened:
        sources = [opened.enter_context(open_model(model)) for model in models]
        return compare_models(
            sources, [SampledTensor(name, tuple(range(len(models)))) for name in sources[0].tensors]
        ).likenesses


def notes_of(*models: str, **keys: Any) -> list[str]:
    return list(alnico.merge(recipe(*models, **keys), "out", threads=1).plan.notes)


# ---- what is compared ------------------------------------------------------------------------------------------------


def test_change_cosine_and_what_differs_are_those_of_float64() -> None:
    (found,) = likenesses("base", "tuned-0")
    base, tuned = read_model(Path("base")), read_model(Path("tuned-0"))
    assert max(v.size for v in base.values()) <= SAMPLE, "then the sample is all of it"
    b, m = (np.concatenate([v.ravel() for v in model.values()]).astype(np.float64) for model in (base, tuned))
    assert found.change == pytest.approx(np.linalg.norm(m - b) / np.linalg.norm(b), rel=1e-12)
    assert found.cosine == pytest.approx(m @ b / np.linalg.norm(m) / np.linalg.norm(b), rel=1e-12)
    assert found.length == pytest.approx(np.linalg.norm(m) / np.linalg.norm(b), rel=1e-12)
    assert (found.tensors, found.elements_differ) == (len(base), int(np.count_nonzero(m != b)))
    gate = "model.layers.0.mlp.gate_proj.weight"
    x, y = (model[gate].ravel().astype(np.float64) for model in (base, tuned))
    assert found.cosines[gate] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)


def test_a_fine_tune_is_told_from_a_model_of_another_start() -> None:
    tuned, stranger = likenesses("base", "tuned-0", "stranger")
    assert (tuned.verdict, stranger.verdict) == ("tuned", "unrelated")
    assert min(tuned.cosines.values()) > 0.9
    assert max(map(abs, stranger.cosines.values())) < 0.1


def test_neurons_in_another_order_make_a_model_unrelated() -> None:
    random = np.random.default_rng(0)
    shuffled = {
        n: random.permutation(v.ravel()).reshape(v.shape) if v.ndim > 1 else v
        for n, v in read_model(Path("base")).items()
    }
    save("shuffled", shuffled)
    assert likenesses("base", "shuffled")[0].verdict == "unrelated"


def test_a_scaled_model_is_far_though_parallel() -> None:
    save("scaled", {n: 2 * v for n, v in read_model(Path("base")).items()})
    (found,) = likenesses("base", "scaled")
    assert (found.verdict, found.cosine, found.length) == ("far", 1.0, 2.0)


def test_fewer_than_four_matrices_are_not_judged() -> None:
    random = np.random.default_rng(0)
    for count, verdict in ((3, "tuned"), (4, "unrelated")):
        for name in ("one", "other"):
            save(name, {f"w{i}": random.standard_normal((64, 64)) for i in range(count)}, "F32")
        assert likenesses("one", "other")[0].verdict == verdict


def test_at_most_64_kib_of_float32_are_read_of_a_tensor_whatever_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[tuple[str, int, int]] = []
    genuine = FileModel.read_into

    def watched(self: FileModel, name: str, offset: int, buffer: memoryview) -> None:
        read.append((name, offset, len(buffer)))
        genuine(self, name, offset, buffer)

    monkeypatch.setattr(FileModel, "read_into", watched)
    for name in ("one", "other"):
        save(name, {"w": np.ones((400, 500)), "v": np.ones(3)}, "F32")
    likenesses("one", "other")
    middle = (200_000 - 16_384) // 2 * 4
    assert sorted(set(read)) == [("v", 0, 12), ("w", middle, 65_536)]
    assert len(read) == 4


# ---- what a merge does with it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "slerp"])
def test_models_of_different_origin_are_refused_with_their_cosines(method: str) -> None:
    models = ["stranger"] if method != "linear" else ["base", "stranger"]
    with pytest.raises(MismatchError) as caught:
        alnico.merge(recipe(*models, method=method), "out")
    said = str(caught.value)
    assert said.startswith(
        f"stranger and base were not tuned from one base: {MATRICES} of {MATRICES} sampled matrices are uncorrelated: "
        "model.embed_tokens.weight (cosine "
    )
    assert f" and {MATRICES - 3} more; expected cosines near 1, as between fine-tunes." in said
    assert said.endswith(
        "Use models tuned from one base (`alnico analyze` shows how far each is from it), or say unrelated: allow in the recipe."
    )
    assert caught.value.exit_code == 5
    assert not list(Path().glob("*out*"))


def test_unrelated_allow_merges_them_and_says_so() -> None:
    (note,) = notes_of("stranger", unrelated="allow")
    assert note.startswith("stranger and base were not tuned from one base (cosine ")
    assert "unrelated: allow" in Path("out/mergekit_config.yml").read_text()


def test_mergekits_allow_crimes_is_unrelated_allow(run: Run) -> None:
    Path("r.yml").write_text("merge_method: linear\nmodels: [base, stranger]\n")
    assert run("merge", "r.yml", "out")[0] == 5
    code, _, stderr = run("merge", "r.yml", "out", "--allow-crimes")
    assert code == 0
    assert "note: stranger and base were not tuned from one base" in stderr
    assert (
        Path("out/mergekit_config.yml").read_text()
        == Path("r.yml").read_text() + "# run with --allow-crimes\n"
    )


def test_copies_are_never_judged() -> None:
    assert notes_of("stranger", method="passthrough") == []


def test_other_layers_that_a_recipe_merges_by_intent_are_not_judged() -> None:
    for seed in (0, 1):
        family(Path(f"deep-{seed}"), 0, seed=seed, hidden=64, layers=4, vocabulary=128)
    sources = [{"model": f"deep-{i}/base", "layer_range": part} for i, part in enumerate(([0, 2], [2, 4]))]
    result = alnico.merge({"merge_method": "linear", "slices": [{"sources": sources}]}, "out", threads=1)
    assert not any("tuned from one base" in note for note in result.plan.notes)


def test_layers_of_models_of_different_origin_are_refused_in_slices_too() -> None:
    sources = [{"model": name, "layer_range": [0, 1]} for name in ("base", "stranger")]
    with pytest.raises(
        MismatchError, match=r"^stranger and base were not tuned from one base: 6 of 6 sampled matrices"
    ):
        alnico.merge({"merge_method": "linear", "slices": [{"sources": sources}]}, "out", threads=1)


def test_fine_tunes_of_one_base_give_no_note() -> None:
    assert notes_of("tuned-0", "tuned-1") == []
    assert alnico.merge(recipe("base", "tuned-0", method="linear"), "linear").plan.notes == ()


def test_a_model_that_equals_the_base_is_said_to_bring_nothing() -> None:
    save("same", read_model(Path("base")))
    assert notes_of("same", "tuned-0") == [
        f"same equals base in all {MATRICES} sampled tensors; there is nothing to merge from it."
    ]


def test_models_that_are_nearly_one_are_said_to_count_twice() -> None:
    base, tuned = read_model(Path("base")), read_model(Path("tuned-0"))
    save("later", {n: v + 0.03 * (v - base[n]) for n, v in tuned.items()}, "F32")
    save("as-it-was", tuned)
    notes = notes_of("tuned-0", "as-it-was", "later", "tuned-1", dtype="bfloat16")
    assert notes[0] == "tuned-0 and as-it-was are equal in all sampled tensors; together they count twice."
    assert (
        notes[1]
        == "tuned-0 and later are nearly one model: they differ by 2.9% of their distance from base; together they count twice."
    )
    assert len(notes) == 3


def test_matrices_that_were_made_anew_are_named() -> None:
    values = read_model(Path("tuned-0"))
    values["model.layers.0.mlp.up_proj.weight"] = 0.05 * np.random.default_rng(5).standard_normal(
        (192, 64)
    ).astype(np.float32)
    save("anew", values)
    (note,) = notes_of("anew")
    assert note.startswith(
        f"anew: 1 of {MATRICES} sampled matrices are uncorrelated with those of base: "
        "model.layers.0.mlp.up_proj.weight (cosine "
    )


def test_a_model_with_a_matrix_in_common_is_not_refused() -> None:
    values = read_model(Path("stranger"))
    name = "model.layers.0.mlp.up_proj.weight"
    save("half", {**values, name: read_model(Path("base"))[name]})
    (note,) = notes_of("half")
    assert note.startswith("half is far from base: cosine ")


def test_a_nan_is_left_to_the_merge_which_names_it() -> None:
    values = read_model(Path("stranger"))
    values["model.embed_tokens.weight"][5, 6] = np.nan
    save("stranger-nan", values)
    (found,) = likenesses("base", "stranger-nan")
    assert "model.embed_tokens.weight" not in found.cosines
    assert np.isfinite(found.change)
    assert found.verdict == "unrelated"


def test_looking_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    alnico.merge(recipe("tuned-0", "tuned-1"), "looked", threads=1)
    monkeypatch.setattr("alnico.engine.run.check_relatedness", lambda plan, _: plan)
    alnico.merge(recipe("tuned-0", "tuned-1"), "not-looked", threads=1)
    assert model_bytes(Path("looked")) == model_bytes(Path("not-looked"))


def test_a_merge_that_is_taken_up_is_not_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def watch(event: object) -> None:
        if type(event).__name__ == "TensorDone":
            raise Stop

    with pytest.raises(Stop):
        alnico.merge(recipe("tuned-0"), "out", threads=1, watch=watch)
    monkeypatch.setattr("alnico.engine.run.check_relatedness", None)
    assert alnico.merge(recipe("tuned-0"), "out", threads=1).resumed > 0


def test_no_more_than_32_tensors_are_read_before_a_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "other"):
        save(name, {f"w{i:03}": np.ones((64, 64)) for i in range(100)}, "F32")
    places: list[str] = []
    from alnico.engine import relatedness

    genuine = relatedness.compare_models
    monkeypatch.setattr(
        relatedness,
        "compare_models",
        lambda sources, found, *_, **__: genuine(sources, places.append([p.name for p in found]) or found),
    )
    alnico.merge(recipe("one", "other", method="linear"), "out", threads=1)
    assert len(places[0]) == 32
    assert (places[0][0], places[0][-1]) == ("w000", "w099")


def test_a_task_vector_of_an_unrelated_base_is_refused_unless_it_is_allowed() -> None:
    family(Path("others"), 1, seed=1, **WIDE)
    analogy = alnico.TaskVector("others/tuned-0", "others/base")
    made = "base" + 0.5 * analogy
    with pytest.raises(MismatchError, match=r'or pass unrelated="allow"\.$'):
        made.save("out")
    assert "unrelated" not in made.recipe
    made.save("out", unrelated="allow")
    assert "unrelated: allow" in Path("out/mergekit_config.yml").read_text()
