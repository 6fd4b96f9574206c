"""What `alnico plan` says of layers that are put together, of rules and of stages; and of an adapter of another base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.cli.commands.plan import plan_text
from alnico.errors import RecipeError
from made import family, save_file


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 2, layers=6, tied=False)


def text(recipe: dict[str, Any]) -> list[str]:
    plan = alnico.plan(recipe)
    for source in plan.sources:
        source.close()
    return plan_text(plan, 0, None).splitlines()


def piece(*ranges: tuple[int, int, int], **keys: Any) -> dict[str, Any]:
    return {
        "sources": [{"model": f"tuned-{m}", "layer_range": [low, high]} for m, low, high in ranges],
        **keys,
    }


def test_a_stack_is_told_in_a_line_for_neighbours_from_neighbours() -> None:
    lines = text(
        {"merge_method": "passthrough", "slices": [piece((0, 0, 4)), piece((0, 4, 5)), piece((1, 2, 6))]}
    )
    assert [line for line in lines if line.startswith("layers")] == [
        "layers    model.layers.0-4 from 0-4 of tuned-0",
        "layers    model.layers.5-8 from 2-5 of tuned-1",
    ]
    assert len(lines) < 20
    assert not any(
        line.startswith("layers")
        for line in text({"merge_method": "linear", "models": ["tuned-0", "tuned-1"]})
    )


def test_slices_of_several_models_and_methods_are_told() -> None:
    slices = [piece((0, 0, 2), (1, 1, 3)), piece((1, 3, 4), merge_method="passthrough")]
    lines = text({"merge_method": "linear", "slices": slices})
    assert "method    linear, passthrough, seed 0" in lines
    assert [line for line in lines if line.startswith("layers")] == [
        "layers    model.layers.0-1 from 0-1 of tuned-0 and 1-2 of tuned-1",
        "layers    model.layers.2 from 3 of tuned-1",
    ]


def test_a_layer_of_a_slice_that_is_not_needed_is_not_called_one_of_no_slice() -> None:
    slices = [piece((0, 0, 3), (1, 0, 3))]
    plan = alnico.plan(
        {"merge_method": "slerp", "base_model": "tuned-0", "slices": slices, "parameters": {"t": [0, 1]}}
    )
    told = {(plan.sources[d.model].label, d.name): d.why for d in plan.dropped}
    assert told["tuned-1", "model.layers.0.mlp.up_proj.weight"] == "the recipe copies another model there"
    assert told["tuned-1", "model.layers.3.mlp.up_proj.weight"] == "its layer is not in a slice"


def test_plans_of_several_documents_have_the_names_of_the_stages(run: Any) -> None:
    Path("r.yml").write_text(
        "name: mean\nmerge_method: linear\nmodels: [tuned-0, tuned-1]\n---\n"
        "merge_method: slerp\nbase_model: mean\nmodels: [mean, tuned-0]\nparameters: {t: 0.3}\n"
    )
    code, out, _ = run("plan", "r.yml")
    first, second = out.split("\n\n")
    assert code == 0
    assert first.startswith("stage     mean\nmethod    linear, seed 0\nmodel     tuned-0")
    assert second.startswith("method    slerp, seed 0\nmodel     mean (base; gives config and tokenizer)")
    assert [d.get("stage") for d in json.loads(run("plan", "r.yml", "--json")[1])] == ["mean", None]


@pytest.mark.parametrize(("named", "is_told"), [("org/tuned-0", False), ("", False), ("org/llama", True)])
def test_an_adapter_of_another_base_is_told(named: str, is_told: bool) -> None:
    begin = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        Path("lora/adapter_model.safetensors"),
        {f"{begin}A.weight": ("F32", np.ones((2, 16))), f"{begin}B.weight": ("F32", np.ones((16, 2)))},
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": named}
    Path("lora/adapter_config.json").write_text(json.dumps(config))
    notes = alnico.plan({"merge_method": "linear", "models": ["tuned-0+lora", "tuned-1"]}).notes
    told = "tuned-0+lora: the adapter was trained on org/llama, here it is applied to tuned-0. Check that this is intended."
    assert notes == ((told,) if is_told else ())


def test_a_misspelt_option_that_stands_too_high_is_told_with_its_place() -> None:
    with pytest.raises(RecipeError) as caught:
        alnico.load_recipe(
            {"merge_method": "linear", "models": [{"model": "a", "wieght": 1}, {"modle": "b"}]}
        )
    assert str(caught.value).splitlines()[:2] == [
        "recipe: models[0] has the unknown key 'wieght'. Did you mean weight, under models[0].parameters?",
        "recipe: models[1] has the unknown key 'modle'. Did you mean model?",
    ]
