"""Candidates are what `alnico merge` of their recipes writes and transformers loads, in modules that stay the same objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import alnico
from alnico.errors import EvaluationError, ModelError
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.loaded_model import load_module, open_subject
from alnico.evaluation.task_file import read_tasks
from alnico.recipe.load import load_recipe
from made import family
from made_tasks import Made

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch


def recipes(made: Made) -> list[dict[str, Any]]:
    base, names = str(made.base), made.references
    return [
        {"merge_method": "linear", "models": names},
        {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": names,
            "parameters": {"weight": 0.4},
        },
        {"merge_method": "ties", "base_model": base, "models": names, "parameters": {"density": 0.4}},
    ]


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a if not n.startswith("pooler."))


def test_a_candidate_is_what_merge_writes(made: Made, tmp_path: Path) -> None:
    tasks = read_tasks(made.valid)
    with Candidates([*made.references, str(made.base)]) as candidates:
        modules = []
        for i, recipe in enumerate(recipes(made)):
            candidate = candidates.make(load_recipe(recipe))
            alnico.merge(recipe, tmp_path / str(i))
            modules.append(candidate.module("encoder"))
            assert same(modules[-1], load_module(tmp_path / str(i), "encoder", "merged"))
            assert not modules[-1].training
            saved = load_file(tmp_path / str(i) / "model.safetensors")
            state = candidate.state()
            assert state.keys() == saved.keys()
            assert all(torch.equal(state[n], v) for n, v in saved.items())
            on_disk = open_subject(tmp_path / str(i))
            for task in tasks:
                assert task.evaluate(candidate).value == task.evaluate(on_disk).value
        assert all(module is modules[0] for module in modules)


def test_parameters_are_the_merge_itself(made: Made) -> None:
    with Candidates(made.references) as candidates:
        candidate = candidates.make(load_recipe(recipes(made)[0]))
        state, module = candidate.state(), candidate.module("encoder")
        places = {value.data_ptr() for value in state.values()}
        assert all(
            p.data_ptr() in places for n, p in module.named_parameters() if not n.startswith("pooler.")
        )


@pytest.mark.parametrize("tied", [True, False])
def test_a_causal_model_in_bfloat16_follows_in_float32(tied: bool, tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 2, dtype="BF16", vocabulary=64, tied=tied)
    names = [str(t) for t in tuned]
    with Candidates([*names, str(base)]) as candidates:
        for i, weight in enumerate((0.3, 0.9)):
            recipe = {
                "merge_method": "task_arithmetic",
                "base_model": str(base),
                "models": names,
                "parameters": {"weight": weight},
            }
            candidate = candidates.make(load_recipe(recipe))
            alnico.merge(recipe, tmp_path / f"out-{i}")
            causal, encoder = candidate.module("causal"), candidate.module("encoder")
            assert same(causal, load_module(tmp_path / f"out-{i}", "causal", "merged"))
            assert same(encoder, load_module(tmp_path / f"out-{i}", "encoder", "merged"))
            assert (causal.lm_head.weight is causal.model.embed_tokens.weight) == tied
            assert {p.dtype for p in causal.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_narrow_merges_are_rounded_in_the_memory_of_their_module(dtype: str, tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 2, dtype=dtype, vocabulary=64)
    names = [str(t) for t in tuned]
    tasks: list[dict[str, Any]] = [
        {"merge_method": "linear", "models": names},
        {"merge_method": "ties", "base_model": str(base), "models": names, "parameters": {"density": 0.4}},
        {"merge_method": "passthrough", "models": names[:1]},
        {
            "merge_method": "linear",
            "models": names,
            "methods": [{"filter": "mlp", "merge_method": "passthrough", "model": names[1]}],
        },
        {
            "merge_method": "dare_ties",
            "base_model": str(base),
            "models": names,
            "parameters": {"density": 0.5},
        },
        {"merge_method": "linear", "models": names, "dtype": "float32"},
        {"merge_method": "slerp", "base_model": str(base), "models": names[:1], "parameters": {"t": 0.3}},
    ]
    with Candidates([*names, str(base)]) as candidates:
        for i, recipe in enumerate([*tasks, *reversed(tasks)]):
            candidate = candidates.make(load_recipe(recipe))
            out = tmp_path / str(min(i, 2 * len(tasks) - 1 - i))
            if i < len(tasks):
                alnico.merge(recipe, out)
            kinds: list[Any] = ["causal"] if i % 3 == 0 else ["causal", "encoder"]
            for kind in kinds:
                assert same(candidate.module(kind), load_module(out, kind, "merged")), (i, kind)
            saved, state = load_file(out / "model.safetensors"), candidate.state()
            assert state.keys() == saved.keys()
            assert all(torch.equal(state[n], v) and state[n].dtype == v.dtype for n, v in saved.items())


def test_a_scored_merge_has_no_memory_of_its_own(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 2, dtype="BF16", vocabulary=64)
    recipe = {"merge_method": "linear", "models": [str(t) for t in tuned]}
    with Candidates([str(t) for t in (*tuned, base)]) as candidates:
        candidates.make(load_recipe(recipe)).module("causal")
        candidate = candidates.make(load_recipe({**recipe, "models": [str(base), str(tuned[1])]}))
        candidate.module("causal")
        assert not candidates._resident.arrays
        state = candidate.state()
        assert sum(array.nbytes for array in candidates._resident.arrays.values()) == sum(
            value.nbytes for value in state.values()
        )


def test_a_stack_of_other_depth_has_a_module_of_its_own(tmp_path: Path) -> None:
    _, tuned = family(tmp_path, 2, dtype="F32", layers=3, vocabulary=64)

    def stack(*parts: tuple[Path, int, int]) -> dict[str, Any]:
        slices = [{"sources": [{"model": str(m), "layer_range": [a, b]}]} for m, a, b in parts]
        return {"merge_method": "passthrough", "slices": slices}

    with Candidates([str(t) for t in tuned]) as candidates:
        found = []
        asked = [
            stack((tuned[0], 0, 2), (tuned[1], 1, 3)),
            stack((tuned[0], 0, 1), (tuned[1], 0, 3)),
            stack((tuned[0], 0, 3), (tuned[1], 1, 3)),
        ]
        for i, recipe in enumerate(asked):
            module = candidates.make(load_recipe(recipe)).module("causal")
            alnico.merge(recipe, tmp_path / f"out-{i}")
            assert same(module, load_module(tmp_path / f"out-{i}", "causal", "merged"))
            found.append((module, module.config.num_hidden_layers))
        assert [layers for _, layers in found] == [4, 4, 5]
        assert found[0][0] is found[1][0] is not found[2][0]


def test_a_directory_is_written_when_asked_and_removed_after(made: Made, tmp_path: Path) -> None:
    recipe = recipes(made)[1]
    with Candidates([*made.references, str(made.base)]) as candidates:
        candidate = candidates.make(load_recipe(recipe))
        folder = candidate.directory
        assert folder == candidate.directory
        alnico.merge(recipe, tmp_path / "out")
        assert (folder / "model.safetensors").read_bytes() == (
            tmp_path / "out" / "model.safetensors"
        ).read_bytes()
        assert {"config.json", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
        following = candidates.make(load_recipe(recipe))
        assert not folder.exists()
        last = following.directory
    assert not last.exists()


def test_tokenizers_of_equal_files_are_one_object(made: Made) -> None:
    with Candidates([*made.references, str(made.base)]) as candidates:
        one = candidates.make(
            load_recipe({"merge_method": "linear", "models": made.references[:2]})
        ).tokenizer()
        other = candidates.make(
            load_recipe({"merge_method": "linear", "models": made.references[1:]})
        ).tokenizer()
        assert one is other
        union = {"merge_method": "linear", "models": made.references, "tokenizer": {"source": "union"}}
        assert candidates.make(load_recipe(union)).tokenizer().get_vocab() == one.get_vocab()


def test_a_candidate_that_was_replaced_says_so(made: Made) -> None:
    with Candidates(made.references) as candidates:
        first = candidates.make(load_recipe(recipes(made)[0]))
        candidates.make(load_recipe(recipes(made)[0]))
        for asked in (first.state, first.tokenizer, lambda: first.module("encoder"), lambda: first.directory):
            with pytest.raises(EvaluationError) as caught:
                asked()
            assert str(caught.value) == (
                "linear: was replaced by the next candidate, which uses the same memory. Score each candidate before making another."
            )


def test_files_take_config_and_tokenizer_from_the_donor(made: Made) -> None:
    files = [f"{name}/model.safetensors" for name in made.references]
    recipe = load_recipe({"merge_method": "linear", "models": files})
    refusal = pytest.raises(
        ModelError, match=r"linear: has no config\.json; expected a transformers checkpoint\."
    )
    with Candidates(files) as candidates, refusal:
        candidates.make(recipe).module("encoder")
    with Candidates(files, donor=made.base) as candidates, Candidates(made.references) as whole:
        candidate = candidates.make(recipe)
        other = whole.make(load_recipe(recipes(made)[0]))
        assert same(candidate.module("encoder"), other.module("encoder"))
        assert candidate.tokenizer().get_vocab() == other.tokenizer().get_vocab()
