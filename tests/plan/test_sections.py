"""Which tensors of which models make which tensors of the output: layers, modules, rules, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.errors import AlnicoError, MismatchError, RecipeError
from alnico.plan.job import Job, Plan
from made import read_model, save_model


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stack(name: str, layers: int, prefix: str = "model.", **config: Any) -> None:
    """A model of ``layers`` layers with an embedding before and a norm and a head after them."""
    shape = np.zeros((4, 2), np.float32)
    tensors = {f"{prefix}embed_tokens.weight": shape}
    for i in range(layers):
        tensors |= {f"{prefix}layers.{i}.attn.w": shape, f"{prefix}layers.{i}.mlp.w": shape}
    tensors |= {f"{prefix}norm.weight": shape[0], "lm_head.weight": shape}
    write_model(Path(name), tensors, {"num_hidden_layers": layers, **config})


def write_model(directory: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    save_model(directory, {name: ("F32", values) for name, values in tensors.items()}, config)


def plan(recipe: str) -> Plan:
    return alnico.plan("\n" + recipe)


def origins(made: Plan) -> dict[str, list[str]]:
    return {j.name: [f"{made.sources[i.model].label}:{i.name}" for i in j.read] for j in made.jobs}


def values(made: Plan) -> dict[str, Any]:
    """The arguments of each job's method that a test can read: slerp's place on the arc."""

    def of(job: Job) -> Any:
        if job.merge is None:
            return {"copy": job.inputs[0].model}[job.kind]
        return round(job.merge.arguments[0].function.args[0], 6)  # type: ignore[union-attr]

    return {job.name: of(job) for job in made.jobs}


STACKED = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 3]}]
"""


def test_layers_are_numbered_anew_with_what_is_before_from_the_first_slice_and_what_is_after_from_the_last() -> (
    None
):
    stack("a", 3), stack("b", 3)
    made = plan(STACKED)
    assert origins(made) == {
        "model.embed_tokens.weight": ["a:model.embed_tokens.weight"],
        **{f"model.layers.{i}.{w}.w": [f"a:model.layers.{i}.{w}.w"] for i in (0, 1) for w in ("attn", "mlp")},
        **{
            f"model.layers.{i + 1}.{w}.w": [f"b:model.layers.{i}.{w}.w"]
            for i in (1, 2)
            for w in ("attn", "mlp")
        },
        "model.norm.weight": ["b:model.norm.weight"],
        "lm_head.weight": ["b:lm_head.weight"],
    }
    assert made.config["num_hidden_layers"] == 4


def test_every_tensor_that_no_slice_takes_is_named_with_its_reason() -> None:
    stack("a", 3), stack("b", 3)
    told = {(d.name, d.why) for d in plan(STACKED).dropped if d.model == 0}
    assert told == {
        ("model.layers.2.attn.w", "its layer is not in a slice"),
        ("model.layers.2.mlp.w", "its layer is not in a slice"),
        ("model.norm.weight", "the output has it from b"),
        ("lm_head.weight", "the output has it from b"),
    }


def test_a_gradient_runs_over_the_layers_of_each_slice_and_filters_come_before_it() -> None:
    stack("a", 5), stack("b", 5)
    made = plan("""
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 3]}]
    parameters: {t: [{filter: attn, value: [0.1, 0.5]}, {value: 0.25}]}
  - sources: [{model: a, layer_range: [3, 5]}, {model: b, layer_range: [3, 5]}]
parameters: {t: [0.2, 0.4, 0.9]}
""")
    found = values(made)
    assert [found[f"model.layers.{i}.attn.w"] for i in range(5)] == [0.1, 0.3, 0.5, 0.2, 0.9]
    assert [found[f"model.layers.{i}.mlp.w"] for i in range(5)] == [0.25, 0.25, 0.25, 0.2, 0.9]
    assert (found["model.embed_tokens.weight"], found["model.norm.weight"], found["lm_head.weight"]) == (
        0.25,
        0.2,
        0.2,
    )
    expected = "lm_head.weight, model.norm.weight: outside of the layers, so the first value of each gradient applies, as in mergekit."
    assert expected in made.notes


def test_a_layer_range_under_a_model_that_is_merged_whole_must_be_all_its_layers() -> None:
    stack("a", 3), stack("b", 3)
    recipe = (
        "{merge_method: linear, models: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: RANGE}]}\n"
    )
    assert origins(plan(recipe.replace("RANGE", "[0, 3]"))) == origins(
        plan("{merge_method: linear, models: [a, b]}\n")
    )
    for written in ("[0, 2]", "[1, 3]", "[0, 4]"):
        with pytest.raises(MismatchError) as told:
            plan(recipe.replace("RANGE", written))
        assert str(told.value) == (
            f"models: b has 3 layers; layer_range is {written}, but models are merged with all their layers. "
            "Use slices to select layers, or remove layer_range."
        )


def test_a_slice_of_one_layer_takes_a_gradients_last_value() -> None:
    stack("a", 1), stack("b", 1)
    made = plan("{merge_method: slerp, base_model: a, models: [a, b], parameters: {t: [0.2, 0.4]}}\n")
    assert values(made)["model.layers.0.mlp.w"] == 0.4


def test_the_first_rule_that_fits_has_the_word_over_every_level() -> None:
    stack("a", 2), stack("b", 2), stack("c", 2)
    made = plan("""
merge_method: slerp
base_model: a
models: [a, {model: b, parameters: {t: 0.3}}]
methods:
  - {filter: layers.0.mlp, merge_method: slerp, parameters: {t: 0.9}}
  - {filter: mlp, merge_method: passthrough, model: base}
  - {filter: lm_head, merge_method: passthrough, model: c}
  - {filter: layers.0, merge_method: slerp, parameters: {t: 0.6}}
""")
    found = values(made)
    assert (
        found["model.layers.0.mlp.w"],
        found["model.layers.0.attn.w"],
        found["model.layers.1.attn.w"],
    ) == (0.9, 0.6, 0.3)
    assert origins(made)["model.layers.1.mlp.w"] == ["a:model.layers.1.mlp.w"]
    assert origins(made)["lm_head.weight"] == ["c:lm_head.weight"]
    assert {d.name for d in made.dropped if made.sources[d.model].label == "b"} == {
        "model.layers.1.mlp.w",
        "lm_head.weight",
    }


def test_a_base_that_is_no_source_gives_the_layers_that_the_sources_take() -> None:
    stack("base", 4), stack("a", 4), stack("b", 4)
    sources = "[{model: a, layer_range: [1, 3]}, {model: b, layer_range: [1, 3]}]"
    made = plan(f"{{merge_method: ties, base_model: base, slices: [{{sources: {sources}}}]}}\n")
    assert origins(made)["model.layers.0.mlp.w"] == [f"{m}:model.layers.1.mlp.w" for m in ("a", "b", "base")]


def test_a_base_whose_layers_are_not_known_is_asked_for() -> None:
    stack("base", 4), stack("a", 4), stack("b", 4)
    sources = "[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [2, 4]}]"
    with pytest.raises(RecipeError) as told:
        plan(f"{{merge_method: ties, base_model: base, slices: [{{sources: {sources}}}]}}\n")
    assert str(told.value) == (
        "slices[0]: its sources have different layers, so the layers of the base base are ambiguous. "
        "List the base among the sources, with its layer_range."
    )


def test_two_layers_of_one_model_are_merged_into_one() -> None:
    stack("a", 4)
    sources = "[{model: a, layer_range: [0, 2]}, {model: a, layer_range: [2, 4]}]"
    made = plan(f"{{merge_method: linear, slices: [{{sources: {sources}}}]}}\n")
    assert origins(made)["model.layers.1.mlp.w"] == ["a:model.layers.1.mlp.w", "a:model.layers.3.mlp.w"]


def test_what_the_recipes_modules_do_not_name_is_copied_and_said() -> None:
    for name in "ab":
        part = {
            "vision_tower.blocks.0.w": np.zeros((2, 2), np.float32),
            "model.layers.0.w": np.zeros((2, 2), np.float32),
        }
        write_model(Path(name), part, {})
    made = plan("{merge_method: linear, base_model: a, modules: {vision_tower: {models: [a, b]}}}\n")
    kinds = {j.name: (j.kind, j.why) for j in made.jobs}
    assert kinds["vision_tower.blocks.0.w"][0] == "mix"
    assert kinds["model.layers.0.w"] == ("copy", "in no module that the recipe names")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            STACKED.replace("[1, 3]", "[1, 9]"),
            "slices[1]: b has 3 layers; layer_range is [1, 9]. Layers count from 0, and the end is excluded: "
            "write at most [1, 3].",
        ),
        (
            "{merge_method: linear, modules: {text: {models: [a, b]}}}\n",
            "module text: a has no tensors in it (its names begin with lm_head, model). Known modules are multi_modal_projector, "
            "vision_tower, vision_model, text_decoder, encoder, decoder, shared, and default for the whole model; "
            "or use the beginning of the names.",
        ),
    ],
)
def test_what_is_not_there_is_told_with_what_is(recipe: str, message: str) -> None:
    stack("a", 3), stack("b", 3)
    with pytest.raises(AlnicoError) as told:
        plan(recipe)
    assert str(told.value) == message


def test_several_stacks_of_layers_are_asked_for_by_module() -> None:
    tensors = {
        f"{part}.block.{i}.w": np.zeros((2, 2), np.float32)
        for part in ("encoder", "decoder")
        for i in range(2)
    }
    write_model(Path("a"), tensors, {})
    with pytest.raises(MismatchError) as told:
        plan("{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}\n")
    assert str(told.value) == (
        "slices: a has several stacks of layers (decoder.block., encoder.block.). Write the slices of each stack under modules."
    )


def test_a_model_whose_head_is_tied_gives_its_embedding_where_the_output_has_a_head() -> None:
    stack("a", 1, tie_word_embeddings=False)
    zero = np.zeros((4, 2), np.float32)
    names = ("model.embed_tokens.weight", "model.layers.0.attn.w", "model.layers.0.mlp.w")
    write_model(
        Path("b"), {**dict.fromkeys(names, zero), "model.norm.weight": zero[0]}, {"tie_word_embeddings": True}
    )
    made = plan("{merge_method: linear, models: [a, b]}\n")
    assert origins(made)["lm_head.weight"] == ["a:lm_head.weight", "b:model.embed_tokens.weight"]


def test_every_list_by_layer_follows_the_layers_and_a_pattern_that_would_break_is_refused() -> None:
    kinds = ["full", "slide", "full", "slide"]
    stack("a", 4, layer_types=kinds, mlp_only_layers=[1], sliding_window_pattern=2)
    recipe = "{{merge_method: passthrough, slices: [{{sources: [{{model: a, layer_range: {}}}]}}, {{sources: [{{model: a, layer_range: {}}}]}}]}}\n"
    made = plan(recipe.format("[0, 2]", "[1, 3]"))
    assert made.config["layer_types"] == ["full", "slide", "slide", "full"]
    assert made.config["mlp_only_layers"] == [1, 2]
    stack("b", 4, first_k_dense_replace=1)
    with pytest.raises(MismatchError) as told:
        plan(recipe.format("[0, 2]", "[0, 2]").replace("model: a", "model: b"))
    assert str(told.value) == (
        "config.json: first_k_dense_replace is 1, so layer 2 of the output would be of another kind than layer 0 of b, its origin. "
        "Choose layers so that each keeps its position in the pattern."
    )


def test_lines_scales_the_merged_task_vector_by_depth() -> None:
    stack("base", 3)
    write_model(
        Path("a"),
        {name: np.ones(t.shape, np.float32) for name, t in alnico.open_model("base").tensors.items()},
        {},
    )
    recipe = "{merge_method: task_arithmetic, base_model: base, models: [a], lines: {alpha: 0.5, beta: 0.25}, parameters: {lambda: 2}}\n"
    alnico.merge("\n" + recipe, "out")
    found = {name: values.flat[0] for name, values in read_model(Path("out")).items()}
    assert [found[f"model.layers.{i}.mlp.w"] for i in range(3)] == [1.0, 1.25, 1.5]
    assert (found["model.embed_tokens.weight"], found["model.norm.weight"], found["lm_head.weight"]) == (
        1.0,
        1.5,
        1.5,
    )


def test_lines_leaves_what_a_rule_takes_from_one_model() -> None:
    stack("base", 2), stack("a", 2)
    rule = "{filter: embed, merge_method: passthrough, model: base}"
    made = plan(
        f"{{merge_method: task_arithmetic, base_model: base, models: [a], lines: {{alpha: 0.5, beta: 0.25}}, methods: [{rule}]}}\n"
    )
    assert {j.name: j.kind for j in made.jobs}["model.embed_tokens.weight"] == "copy"


def test_the_scale_of_a_merged_task_vector_is_not_that_of_a_copied_base() -> None:
    stack("base", 4), stack("a", 4)
    alone = "[{model: base, layer_range: [0, 2]}]"
    both = "[{model: base, layer_range: [2, 4]}, {model: a, layer_range: [2, 4]}]"
    for key in ("lambda", "scale"):
        slices = f"[{{sources: {alone}}}, {{sources: {both}}}]"
        made = plan(
            f"{{merge_method: ties, base_model: base, slices: {slices}, parameters: {{{key}: 0.5}}}}\n"
        )
        assert {j.name: j.kind for j in made.jobs}["model.layers.0.mlp.w"] == "copy"
        rule = "{filter: embed, merge_method: passthrough, model: base}"
        own = "{filter: attn, merge_method: passthrough, model: base, parameters: {scale: 0.5}}"
        made = plan(
            f"{{merge_method: ties, base_model: base, models: [a], parameters: {{{key}: 0.5}}, methods: [{rule}, {own}]}}\n"
        )
        kinds = {j.name: j.kind for j in made.jobs}
        assert (kinds["model.embed_tokens.weight"], kinds["model.layers.0.attn.w"]) == ("copy", "mix")
