"""From recipe and headers to what will be done: which tensors, from which models, with what bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.header import TensorInfo
from alnico.cli.commands.plan import plan_text
from alnico.devices import made_gpus
from alnico.errors import MismatchError, ModelError, ResourceError
from alnico.numerics.dtypes import DTYPES
from alnico.plan.build import build_plan
from alnico.plan.job import Job, Plan
from alnico.recipe.load import load_recipe
from alnico.recipe.reference import resolve_reference
from alnico.run_options import RunOptions
from made import Tensors, save_model

MATRIX = np.arange(8, dtype=np.float32).reshape(4, 2)
OTHER = MATRIX + 1
"""Values of a tensor of its own: equal ones would be a tied copy."""
NOTHING_LEFT = (
    "{0} of {0} tensors are not in all models, so missing: drop would leave almost nothing. Compare the names: one model may have "
    "a prefix that the others lack."
)
OTHERS = "Use models of one architecture, or set missing: copy or missing: drop in the recipe."

ONE_THREAD = RunOptions(threads=1)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are written as a, b, c: messages are then the same on every machine."""
    monkeypatch.chdir(tmp_path)


def model(
    name: str, tensors: Tensors | None = None, config: Mapping[str, Any] | None = None, **files: str
) -> str:
    save_model(Path(name), {"w": ("F32", MATRIX)} if tensors is None else tensors, config)
    for file, text in files.items():
        (Path(name) / file.replace("__", ".")).write_text(text)
    return name


def planned(method: str = "linear", models: tuple[Any, ...] = ("a", "b"), **keys: Any) -> Plan:
    plan = build_plan(load_recipe({"merge_method": method, "models": list(models), **keys}), run=ONE_THREAD)
    for source in plan.sources:
        source.close()
    return plan


def told(method: str = "linear", models: tuple[Any, ...] = ("a", "b"), **keys: Any) -> str:
    with pytest.raises(MismatchError) as caught:
        planned(method, models, **keys)
    assert caught.value.exit_code == 5
    return str(caught.value)


def job(plan: Plan, name: str = "w") -> Job:
    return next(j for j in plan.jobs if j.name == name)


def vocabulary(tokens: Mapping[str, int], added: Mapping[str, int] | None = None) -> str:
    special = [{"content": t, "id": i} for t, i in (added or {}).items()]
    return json.dumps({"model": {"type": "BPE", "vocab": dict(tokens)}, "added_tokens": special})


# ---- what is merged -------------------------------------------------------------------------------------------------


def test_a_float_tensor_of_all_models_is_merged_in_recipe_order() -> None:
    model("a"), model("b"), model("c")
    plan = planned("ties", ("c", "a", "b"), base_model="a")
    made = job(plan)
    assert (made.kind, made.dtype, made.shape, made.elements, made.byte_size) == ("mix", "F32", (4, 2), 8, 32)
    assert [plan.sources[i.model].label for i in made.inputs] == ["c", "b"]
    assert made.base is not None
    assert plan.sources[made.base.model].label == "a"
    assert plan.sources[plan.donor].label == "a"
    assert (plan.bytes_to_read, plan.elements, plan.dtype) == (96, 8, "F32")


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("BF16", "BF16"), "BF16"),
        (("BF16", "F16"), "F32"),
        (("F16", "F32"), "F32"),
        (("F64", "BF16"), "F64"),
        (("F16", "F16"), "F16"),
    ],
)
def test_without_a_dtype_the_output_holds_what_both_inputs_hold(
    dtypes: tuple[str, str], expected: str
) -> None:
    model("a", {"w": (dtypes[0], MATRIX)}), model("b", {"w": (dtypes[1], MATRIX)})
    assert job(planned()).dtype == expected


def test_the_base_counts_for_the_promoted_dtype() -> None:
    (
        model("a", {"w": ("F16", MATRIX)}),
        model("b", {"w": ("F16", MATRIX)}),
        model("base", {"w": ("F32", MATRIX)}),
    )
    assert job(planned("task_arithmetic", base_model="base")).dtype == "F32"


def test_a_recipe_dtype_is_the_output_dtype_of_floats_only() -> None:
    tensors = {"w": ("F32", MATRIX), "ids": ("I64", np.arange(3))}
    model("a", tensors), model("b", tensors)
    plan = planned(dtype="bfloat16")
    assert (job(plan).dtype, job(plan).byte_size) == ("BF16", 16)
    assert (job(plan, "ids").dtype, job(plan, "ids").byte_size) == ("I64", 24)
    assert plan.dtype == "BF16"


def test_outputs_of_several_dtypes_are_mixed() -> None:
    tensors = {"w": ("F32", MATRIX), "v": ("F16", MATRIX)}
    model("a", tensors), model("b", tensors)
    plan = planned()
    assert plan.dtype is None
    assert "dtype mixed" in plan_text(plan, 0, None)


def test_the_output_has_the_donors_order_wherever_the_donor_is_listed() -> None:
    names = {"b": ["y", "z"], "base": ["z", "y"]}
    sources = {n: Made(n, dict.fromkeys(order, ("F32", (2,)))) for n, order in names.items()}
    recipe = load_recipe({"merge_method": "ties", "base_model": "base", "models": ["b", "base"]})
    assert [j.name for j in build_plan(recipe, open_source=sources.__getitem__).jobs] == ["z", "y"]


def test_no_tensors_make_no_plan() -> None:
    model("a", {}), model("b", {})
    assert told() == (
        "the output would have no tensors: no tensor of a, b is part of it; expected at least one. Check the models, and the modules, slices and "
        "filters of the recipe."
    )


def test_a_scalar_and_an_empty_tensor_are_tensors() -> None:
    tensors = {"s": ("F32", np.float32(3).reshape(())), "e": ("F32", np.zeros((0, 4), np.float32))}
    model("a", tensors), model("b", tensors)
    plan = planned()
    assert [(j.name, j.elements) for j in sorted(plan.jobs, key=lambda j: j.name)] == [("e", 0), ("s", 1)]


# ---- what does not fit ----------------------------------------------------------------------------------------------


def test_shapes_that_differ_are_told_with_both_shapes() -> None:
    model("a"), model("b", {"w": ("F32", MATRIX.T)})
    assert (
        told() == "w: a is (4, 2), b is (2, 4); expected one shape. Use models of one architecture and size."
    )


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight"])
def test_embeddings_of_other_lengths_are_told_as_other_vocabularies(name: str) -> None:
    model("a", {name: ("F32", MATRIX)}), model("b", {name: ("F32", MATRIX[:3])})
    assert told() == (
        f"{name}: a has 4 rows, b has 3; the models have different vocabularies, expected one. Write tokenizer_source: base for the "
        "vocabulary of a, tokenizer_source: union for the tokens of all models, or use models with the same tokenizer."
    )


def test_embeddings_of_other_widths_are_told_as_other_shapes() -> None:
    name = "model.embed_tokens.weight"
    model("a", {name: ("F32", MATRIX)}), model("b", {name: ("F32", MATRIX[:, :1])})
    assert told().endswith("expected one shape. Use models of one architecture and size.")


def test_a_float_tensor_that_a_model_lacks_is_told_with_the_name_that_is_near() -> None:
    (
        model("a", {"layers.0.attn.weight": ("F32", MATRIX)}),
        model("b", {"layers.0.attn.wieght": ("F32", MATRIX)}),
    )
    assert told().splitlines() == [
        "layers.0.attn.weight: a has it, b lacks it; expected it in all models. It has 'layers.0.attn.wieght'. Use models of one architecture.",
        "layers.0.attn.wieght: b has it, a lacks it; expected it in all models. It has 'layers.0.attn.weight'. Use models of one architecture.",
        NOTHING_LEFT.format(2),
    ]


def test_a_near_name_of_another_shape_is_no_hint() -> None:
    model("a", {"layers.0.weight": ("F32", MATRIX)}), model("b", {"layers.0.wieght": ("F32", MATRIX[0])})
    assert (
        told().splitlines()[0]
        == "layers.0.weight: a has it, b lacks it; expected it in all models. Use models of one architecture."
    )


def test_a_tensor_that_only_a_later_model_has_is_told_too() -> None:
    model("a"), model("b"), model("c", {"w": ("F32", MATRIX), "extra": ("F32", OTHER)})
    assert (
        told(models=("a", "b", "c"))
        == f"extra: c has it, a and b lack it; expected it in all models. {OTHERS}"
    )


def test_integer_and_float_under_one_name_do_not_fit() -> None:
    model("a"), model("b", {"w": ("I64", MATRIX)})
    assert told() == (
        "w: the dtypes cannot be merged (a: F32, b: I64); expected F64, F32, F16, BF16, F8_E4M3, F8_E5M2 in all models, or one integer dtype. "
        "Convert the model that differs."
    )


def test_integers_of_two_widths_do_not_fit() -> None:
    model("a", {"w": ("I32", MATRIX)}), model("b", {"w": ("I64", MATRIX)})
    assert told().startswith("w: the dtypes cannot be merged (a: I32, b: I64); ")


def test_five_misfits_are_told_and_the_rest_counted() -> None:
    model("a", {f"w{i}": ("F32", MATRIX) for i in range(8)}), model("b", {})
    lines = told().splitlines()
    assert [line.partition(":")[0] for line in lines[:5]] == ["w0", "w1", "w2", "w3", "w4"]
    assert lines[5:] == ["... and 3 more tensors that do not match.", NOTHING_LEFT.format(8)]


# ---- packed dtypes -------------- -----------------------------------------------------------------------------------


def test_packed_tensors_are_copied_when_equal_and_never_merged() -> None:
    sources = {n: Made(n, {"w": ("F8_E8M0", (4, 4)), "v": ("BF16", (4,))}) for n in "ab"}
    plan = build_plan(
        load_recipe({"merge_method": "linear", "models": ["a", "b"]}), open_source=sources.__getitem__
    )
    assert [(j.kind, j.name, j.dtype, j.why) for j in plan.jobs] == [
        ("equal", "w", "F8_E8M0", "F8_E8M0, must be equal in all models"),
        ("mix", "v", "BF16", ""),
    ]


def test_a_packed_tensor_beside_a_float_one_does_not_fit() -> None:
    sources = {"a": Made("a", {"w": ("F8_E8M0", (4,))}), "b": Made("b", {"w": ("BF16", (4,))})}
    with pytest.raises(MismatchError, match=r"^w: the dtypes cannot be merged \(a: F8_E8M0, b: BF16\); "):
        build_plan(
            load_recipe({"merge_method": "linear", "models": ["a", "b"]}), open_source=sources.__getitem__
        )


def test_a_packed_tensor_under_passthrough_keeps_its_dtype_whatever_the_recipe_asks() -> None:
    sources = {"a": Made("a", {"w": ("F4", (4, 4)), "v": ("F32", (4,))})}
    recipe = load_recipe({"merge_method": "passthrough", "models": ["a"], "dtype": "bfloat16"})
    plan = build_plan(recipe, open_source=sources.__getitem__)
    assert [(j.kind, j.name, j.dtype, j.byte_size) for j in plan.jobs] == [
        ("copy", "w", "F4", 8),
        ("mix", "v", "BF16", 8),
    ]


# ---- tensors missing somewhere ----------------------------------------------------------------------------------------

LACKING = {"w": ("F32", MATRIX)}
HAVING = {"w": ("F32", MATRIX), "extra": ("F32", OTHER)}


def test_missing_copy_takes_the_donors_tensor() -> None:
    model("a", LACKING), model("b", HAVING), model("base", HAVING)
    plan = planned("task_arithmetic", base_model="base", missing="copy")
    made = job(plan, "extra")
    assert (made.kind, plan.sources[made.inputs[0].model].label) == ("copy", "base")
    assert made.why == "a lacks it, and the recipe sets missing: copy"
    assert [(plan.sources[d.model].label, d.name, d.byte_size, d.why) for d in plan.dropped] == [
        ("b", "extra", 32, "copied from base: a lacks it, and the recipe sets missing: copy")
    ]


def test_missing_copy_prefers_the_donor_to_a_model_listed_before_it() -> None:
    model("a", LACKING), model("b", HAVING), model("c", HAVING)
    plan = planned(models=("a", "b", "c"), base_model="c", missing="copy")
    assert plan.sources[job(plan, "extra").inputs[0].model].label == "c"


def test_missing_copy_takes_the_first_holders_tensor_where_the_donor_lacks_it() -> None:
    model("a", LACKING), model("b", HAVING), model("c", HAVING)
    plan = planned(models=("a", "b", "c"), missing="copy")
    assert plan.sources[job(plan, "extra").inputs[0].model].label == "b"
    assert [plan.sources[d.model].label for d in plan.dropped] == ["c"]


def test_missing_drop_names_what_is_dropped() -> None:
    model("a", LACKING), model("b", HAVING), model("c", HAVING)
    plan = planned(models=("a", "b", "c"), missing="drop")
    assert [j.name for j in plan.jobs] == ["w"]
    assert [(plan.sources[d.model].label, d.name, d.why) for d in plan.dropped] == [
        ("b", "extra", "a lacks it, and the recipe sets missing: drop"),
        ("c", "extra", "a lacks it, and the recipe sets missing: drop"),
    ]


def test_a_tensor_of_a_donor_that_is_not_merged_is_an_error_copied_or_named_as_dropped() -> None:
    model("a", LACKING), model("b", LACKING), model("base", HAVING)
    assert (
        told(base_model="base") == f"extra: base has it, a and b lack it; expected it in all models. {OTHERS}"
    )
    assert job(planned(base_model="base", missing="copy"), "extra").kind == "copy"
    plan = planned(base_model="base", missing="drop")
    assert [(plan.sources[d.model].label, d.name) for d in plan.dropped] == [("base", "extra")]


def test_a_buffer_that_a_model_lacks_comes_from_the_donor_and_the_others_are_named() -> None:
    ids = {"w": ("F32", MATRIX), "ids": ("I64", np.arange(4))}
    model("a", ids), model("b"), model("c", ids)
    plan = planned(models=("a", "b", "c"))
    made = job(plan, "ids")
    assert (made.kind, made.why) == ("copy", "a buffer that b lacks; copied from a")
    assert plan.sources[made.inputs[0].model].label == "a"
    assert [(plan.sources[d.model].label, d.name, d.why) for d in plan.dropped] == [
        ("c", "ids", "a buffer that b lacks")
    ]


def test_a_buffer_that_the_donor_lacks_is_dropped_by_name() -> None:
    model("a"), model("b", {"w": ("F32", MATRIX), "flag": ("BOOL", np.array([True]))})
    plan = planned()
    assert [j.name for j in plan.jobs] == ["w"]
    assert [(plan.sources[d.model].label, d.name, d.why) for d in plan.dropped] == [
        ("b", "flag", "a buffer that a lacks")
    ]


def test_buffers_of_all_models_must_be_equal_and_are_read_from_all() -> None:
    ids = {"ids": ("I64", np.arange(4))}
    model("a", ids), model("b", ids)
    made = job(planned(), "ids")
    assert (made.kind, made.why, len(made.read)) == ("equal", "I64, must be equal in all models", 2)


# ---- tied heads -------------------------------------------------------------------------------------------------------

TIED = {"model.embed_tokens.weight": ("F32", MATRIX)}
UNTIED = {**TIED, "lm_head.weight": ("F32", OTHER)}


@pytest.mark.parametrize(("first", "second"), [(TIED, UNTIED), (UNTIED, TIED)])
def test_a_tied_head_that_one_model_stores_is_dropped_by_name(first: Tensors, second: Tensors) -> None:
    model("a", first, {"tie_word_embeddings": True}), model("b", second, {"tie_word_embeddings": True})
    plan = planned()
    holder, lacking = ("b", "a") if first is TIED else ("a", "b")
    assert [j.name for j in plan.jobs] == ["model.embed_tokens.weight"]
    assert [(plan.sources[d.model].label, d.name, d.why) for d in plan.dropped] == [
        (holder, "lm_head.weight", f"tied to model.embed_tokens.weight in the config, and {lacking} lacks it")
    ]


def test_a_tied_head_that_all_models_store_is_merged() -> None:
    model("a", UNTIED, {"tie_word_embeddings": True}), model("b", UNTIED, {"tie_word_embeddings": True})
    assert [j.kind for j in planned().jobs] == ["mix", "mix"]


@pytest.mark.parametrize("config", [{"tie_word_embeddings": False}, {}, None])
def test_a_head_that_the_config_does_not_tie_is_a_tensor_like_others(config: dict[str, Any] | None) -> None:
    model("a", UNTIED, config), model("b", TIED, config)
    assert told().startswith("lm_head.weight: a has it, b lacks it; ")


# ---- the module default -----------------------------------------------------------------------------------------------


def test_the_module_default_is_all_of_a_model() -> None:
    """As a merge without modules is: with the head that one model has and the other's config ties to its embedding."""
    model("a", UNTIED, {}), model("b", TIED, {"tie_word_embeddings": True})
    whole = planned(parameters={"weight": 0.5})
    module = {"default": {"models": ["a", "b"], "parameters": {"weight": 0.5}}}
    plan = build_plan(load_recipe({"merge_method": "linear", "modules": module}), run=ONE_THREAD)
    assert [(j.name, j.kind, [i.name for i in j.read]) for j in plan.jobs] == [
        ("lm_head.weight", "mix", ["lm_head.weight", "model.embed_tokens.weight"]),
        ("model.embed_tokens.weight", "mix", ["model.embed_tokens.weight"] * 2),
    ]
    assert plan.jobs == whole.jobs
    assert (
        [j.merge.arguments for j in plan.jobs if j.merge]
        == [j.merge.arguments for j in whole.jobs if j.merge]
        == [((0.5, 0.5),)] * 2
    )


def test_beside_the_module_default_there_is_no_other() -> None:
    model("a", UNTIED), model("b", UNTIED)
    models = {"models": ["a", "b"]}
    with pytest.raises(MismatchError) as caught:
        build_plan(
            load_recipe({"merge_method": "linear", "modules": {"default": models, "text_decoder": models}}),
            run=ONE_THREAD,
        )
    assert str(caught.value) == (
        "module text_decoder: a has no tensors in it (its names begin with lm_head, model). Known modules are multi_modal_projector, "
        "vision_tower, vision_model, text_decoder, encoder, decoder, shared, and default for the whole model; or use the beginning "
        "of the names."
    )


# ---- the donor --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"), [({}, "b"), ({"base_model": "a"}, "a"), ({"base_model": "c"}, "c")]
)
def test_the_donor_is_the_base_else_the_first_model(keys: dict[str, str], expected: str) -> None:
    model("a"), model("b"), model("c")
    plan = planned(models=("b", "a"), **keys)
    assert plan.sources[plan.donor].label == expected


def test_linear_takes_only_the_config_of_a_base_that_is_not_listed() -> None:
    model("a"), model("b"), model("base")
    plan = planned(base_model="base")
    assert [plan.sources[i.model].label for i in job(plan).read] == ["a", "b"]
    assert plan.notes == (
        "base is not merged by linear; the output only has its config, tokenizer and side files.",
    )


# ---- copies -----------------------------------------------------------------------------------------------------------


def weighted(*weights: float) -> tuple[Any, ...]:
    return tuple({"model": "abc"[i], "parameters": {"weight": w}} for i, w in enumerate(weights))


@pytest.mark.parametrize(
    ("method", "models", "keys", "origin"),
    [
        ("linear", weighted(0, 2), {}, "b"),
        ("linear", weighted(1, 0), {"parameters": {"normalize": False}}, "a"),
        ("slerp", ("a", "b"), {"base_model": "a", "parameters": {"t": 0}}, "a"),
        ("slerp", ("a", "b"), {"base_model": "a", "parameters": {"t": 1}}, "b"),
        ("passthrough", ("a",), {}, "a"),
        ("ties", ("b",), {"base_model": "a"}, "b"),
        ("task_arithmetic", ("b",), {"base_model": "a"}, "b"),
        ("task_arithmetic", ("b", "c"), {"base_model": "a", "parameters": {"lambda": 0}}, "a"),
        ("ties", ("b", "c"), {"base_model": "a", "parameters": {"scale": 0, "density": 0.2}}, "a"),
        ("dare_ties", ("b", "c"), {"base_model": "a", "parameters": {"weight": 0}}, "a"),
        ("dare_linear", ("b",), {"base_model": "a", "parameters": {"density": 1}}, "b"),
    ],
)
def test_what_leaves_a_model_as_it_is_copies_its_bytes(
    method: str, models: tuple[Any, ...], keys: dict[str, Any], origin: str
) -> None:
    for name in "abc":
        model(name)
    plan = planned(method, models, **keys)
    made = job(plan)
    assert (made.kind, len(made.read), plan.sources[made.inputs[0].model].label) == ("copy", 1, origin)
    assert made.why == f"the recipe copies {origin}"


@pytest.mark.parametrize(
    ("method", "models", "keys"),
    [
        ("linear", weighted(1, 0.001), {}),
        ("linear", weighted(2, 0), {"parameters": {"normalize": False}}),
        ("passthrough", ("a",), {"parameters": {"scale": 2}}),
        ("ties", ("b",), {"base_model": "a", "parameters": {"density": 0.5}}),
        ("ties", ("b",), {"base_model": "a", "parameters": {"lambda": 2}}),
        ("task_arithmetic", ("b",), {"base_model": "a", "parameters": {"weight": 0.5}}),
        ("dare_linear", ("b",), {"base_model": "a", "parameters": {"density": 0.9}}),
    ],
)
def test_what_changes_a_model_is_no_copy(method: str, models: tuple[Any, ...], keys: dict[str, Any]) -> None:
    for name in "abc":
        model(name)
    assert job(planned(method, models, **keys)).kind == "mix"


def test_a_copy_into_another_dtype_is_a_mix_of_one() -> None:
    model("a"), model("b")
    plan = planned("ties", ("b",), base_model="a", dtype="bfloat16")
    made = job(plan)
    assert (made.kind, made.dtype, made.byte_size, made.base, len(made.inputs)) == (
        "mix",
        "BF16",
        16,
        None,
        1,
    )
    assert made.why == "the recipe copies b, as BF16"
    assert made.merge is not None
    assert made.merge.arguments == ((1.0,),)


# ---- vocabularies -----------------------------------------------------------------------------------------------------


def test_models_with_other_tokens_do_not_fit() -> None:
    (
        model("a", tokenizer__json=vocabulary({"x": 0, "y": 1})),
        model("b", tokenizer__json=vocabulary({"x": 0, "z": 1})),
    )
    assert told() == (
        "a and b have different vocabularies: 1 of 2 tokens differ, such as 'y' at row 1; expected one. "
        "Write tokenizer_source: base for the vocabulary of a, tokenizer_source: union for the tokens of all models, "
        "or use models with the same tokenizer."
    )


def test_the_base_has_to_have_the_same_tokens_too() -> None:
    for name, second in (("a", "y"), ("b", "y"), ("base", "z")):
        model(name, tokenizer__json=vocabulary({"x": 0, second: 1}))
    assert told("ties", base_model="base").startswith("base and a have different vocabularies: ")
    assert len(told("ties", base_model="base").splitlines()) == 2


def test_renamed_added_tokens_are_noted() -> None:
    model("a", tokenizer__json=vocabulary({"x": 0}, {"<pad>": 1, "<s>": 2}))
    model("b", tokenizer__json=vocabulary({"x": 0}, {"<pad>": 1, "<tool>": 2}))
    assert planned().notes == (
        "1 added tokens of a have another row in b; the output has the tokenizer of a.",
    )


def test_a_model_without_a_tokenizer_is_not_compared() -> None:
    model("a", tokenizer__json=vocabulary({"x": 0})), model("b")
    assert planned().notes == ()


def test_a_tokenizer_that_cannot_be_read_is_noted() -> None:
    model("a", tekken__json="one"), model("b", tekken__json="two")
    assert planned().notes == (
        "the vocabularies of a and b were not compared: tekken.json cannot be read by this version. "
        "Make sure that they are equal.",
    )


def test_a_damaged_tokenizer_is_an_error_that_names_the_file() -> None:
    model("a", tokenizer__json="{"), model("b", tokenizer__json=vocabulary({"x": 0}))
    with pytest.raises(ModelError, match=r"^a/tokenizer\.json: is not JSON"):
        planned()


# ---- where models are -------------------------------------------------------------------------------------------------


def test_models_are_looked_for_beside_the_recipe_after_the_working_directory() -> None:
    (
        model("recipes/a", {"w": ("F16", MATRIX)}),
        model("recipes/b", {"w": ("F16", MATRIX)}),
        model("b", {"w": ("F16", MATRIX)}),
    )
    Path("recipes/recipe.yml").write_text("merge_method: linear\nmodels: [a, b]\n")
    plan = build_plan(load_recipe("recipes/recipe.yml"))
    assert [str(s.location) for s in plan.sources] == ["recipes/a", "b"]


@pytest.mark.parametrize(
    ("reference", "absent"),
    [("org/model+adapter", ["adapter"]), ("base+adapter", ["base", "adapter"]), ("a@b+c@d", ["a@b", "c@d"])],
)
def test_a_base_or_an_adapter_that_is_not_there_is_refused(reference: str, absent: list[str]) -> None:
    model("a")
    with pytest.raises(ModelError) as caught:
        planned(models=("a", reference))
    assert str(caught.value) == (
        f"model {reference!r}: no such directory or file, and not base+adapter; expected two paths, or hub ids as owner/name."
        + "".join(f" {part!r} is not there. Check the path." for part in absent)
    )
    assert caught.value.exit_code == 4


def test_a_directory_may_have_such_signs_in_its_name() -> None:
    model("a+b@c"), model("a")
    assert [s.label for s in planned(models=("a", "a+b@c")).sources] == ["a", "a+b@c"]


@pytest.mark.parametrize(
    ("reference", "why"),
    [("x" * 300, "File name too long"), ("~no-such-user/x", "Could not determine home directory")],
)
def test_a_reference_that_no_system_takes_is_refused(reference: str, why: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_reference(reference, ".")
    assert str(caught.value) == f"model {reference!r}: is not a path ({why}). Use the path of a model."


def test_one_model_under_two_names_is_noted() -> None:
    model("a"), model("b")
    assert planned("ties", ("b", "./a"), base_model="a").notes == (
        "./a and a are the same model, merged as two. Use one path for it if this is unintended.",
    )
    assert planned(models=("a", "b", "a")).notes == ()


def test_all_models_are_closed_when_a_plan_is_refused() -> None:
    sources = {"a": Made("a", {"w": ("F32", (2,))}), "b": Made("b", {"w": ("F32", (3,))})}
    with pytest.raises(MismatchError):
        build_plan(
            load_recipe({"merge_method": "linear", "models": ["a", "b"]}), open_source=sources.__getitem__
        )
    assert all(s.is_closed for s in sources.values())


# ---- saying it --------------------------------------------------------------------------------------------------------


@dataclass
class Made:
    """A source of headers only."""

    label: str
    held: Mapping[str, tuple[str, tuple[int, ...]]]
    config: Mapping[str, Any] = field(default_factory=dict)
    directory: Path | None = None
    origin: None = None
    held_bytes: int = 0
    reading_bytes: int = 0
    is_closed: bool = False

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        sizes = {n: int(np.prod(s)) * DTYPES[d].bits // 8 for n, (d, s) in self.held.items()}
        return {n: TensorInfo(n, d, s, 0, sizes[n]) for n, (d, s) in self.held.items()}

    def identity(self) -> list[dict[str, Any]]:
        return []

    def paths(self) -> list[Path]:
        return []

    def absent(self, tensors: Iterable[str], side_files: bool) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self.is_closed = True


def everything() -> Plan:
    ids = {"ids": ("I64", np.arange(4))}
    model("a", {"w": ("F32", MATRIX), "v": ("F32", MATRIX), **ids}, {"x": 1})
    model("b", {"w": ("F32", MATRIX), "v": ("F32", MATRIX), **ids})
    model("base", {"w": ("F32", MATRIX), "v": ("F32", MATRIX), "extra": ("BF16", MATRIX)})
    return planned(
        "ties", base_model="base", missing="copy", parameters={"density": 0.5, "int8_mask": True}, seed=3
    )


def test_the_summary_says_all_of_the_plan_as_plain_data() -> None:
    plan = everything()
    summary = json.loads(json.dumps(plan.summary()))
    memory = (summary.pop("peak_memory_bytes"), summary.pop("threads"))
    assert memory == (plan.memory.peak_bytes, 1)
    size = Path("base/model.safetensors").stat().st_size
    shards = summary.pop("shards")
    assert [s["name"] for s in shards] == ["model.safetensors"]
    assert summary.pop("bytes_to_write") == shards[0]["bytes"]
    assert size > 0
    note = "recipe: int8_mask has no effect: it only changes the dtype of a temporary tensor in mergekit."
    assert summary == {
        "merge_method": "ties",
        "methods": ["ties"],
        "models": ["a", "b", "base"],
        "donor": "base",
        "dtype": None,
        "tensors": {"mix": 2, "copy": 1, "equal": 0},
        "parameters": 24,
        "bytes_to_read": 2 * 3 * 32 + 16,
        "dropped": [
            {"model": "a", "tensor": "ids", "bytes": 32, "why": "a buffer that base lacks"},
            {"model": "b", "tensor": "ids", "bytes": 32, "why": "a buffer that base lacks"},
        ],
        "notes": [note],
        "jobs": sorted(
            [
                {"tensor": "w", "do": "mix", "dtype": "F32", "shape": [4, 2]},
                {"tensor": "v", "do": "mix", "dtype": "F32", "shape": [4, 2]},
                {
                    "tensor": "extra",
                    "do": "copy",
                    "dtype": "BF16",
                    "shape": [4, 2],
                    "why": "a and b lack it, and the recipe sets missing: copy",
                },
            ],
            key=lambda j: [j.name for j in plan.jobs].index(str(j["tensor"])),
        ),
    }


def test_the_text_of_a_plan_says_what_is_done_and_why() -> None:
    plan = everything()
    lines = plan_text(plan, 0, Path("out")).splitlines()
    assert lines[:5] == [
        "method    ties, seed 3",
        "model     a",
        "model     b",
        "model     base (base; gives config and tokenizer)",
        "output    3 tensors, 24 parameters, dtype mixed",
    ]
    assert "  copied  1: extra (a and b lack it, and the recipe sets missing: copy)" in lines
    assert any(line.startswith("  merged  2: ") for line in lines)
    assert "  dropped a: ids (a buffer that base lacks)" in lines
    assert any(
        line.startswith("bytes     read 208 B, write ") and line.endswith(" in model.safetensors")
        for line in lines
    )
    assert any(
        line.startswith("memory    at most ") and line.endswith(" of 2.1 GB, 1 threads") for line in lines
    )
    assert any(line.startswith("disk      ") for line in lines)
    assert (
        lines[-1]
        == "note      recipe: int8_mask has no effect: it only changes the dtype of a temporary tensor in mergekit."
    )


def test_the_text_of_a_plan_names_every_tensor_when_asked() -> None:
    tensors = {f"w{i}": ("F32", MATRIX) for i in range(5)}
    model("a", tensors), model("b", tensors)
    assert "  merged  5: w0 to w4" in plan_text(planned(), 0, None)
    assert "  merged  5: w0, w1, w2, w3, w4" in plan_text(planned(), 1, None)


def test_the_shards_hold_the_planned_tensors_within_their_size() -> None:
    tensors = {f"w{i}": ("F32", MATRIX) for i in range(5)}
    model("a", tensors), model("b", tensors)
    plan = build_plan(load_recipe({"merge_method": "linear", "models": ["a", "b"]}), max_shard_bytes=64)
    assert [[t.name for t in s.header.tensors] for s in plan.shards] == [["w0", "w1"], ["w2", "w3"], ["w4"]]
    assert [s.name for s in plan.shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    alone = build_plan(
        load_recipe({"merge_method": "linear", "models": ["a", "b"]}),
        max_shard_bytes=64,
        single_file="x.safetensors",
    )
    assert [s.name for s in alone.shards] == ["x.safetensors"]


# ---- many tensors -----------------------------------------------------------------------------------------------------


def test_ten_thousand_tensors_are_planned() -> None:
    held = {f"model.layers.{i}.weight": ("BF16", (64, 64)) for i in range(10_000)}
    sources = {n: Made(n, held) for n in ("base", "a", "b")}
    recipe = load_recipe(
        {"merge_method": "ties", "base_model": "base", "models": ["a", "b"], "parameters": {"density": 0.5}}
    )
    plan = build_plan(recipe, open_source=sources.__getitem__)
    assert len(plan.jobs) == 10_000
    assert plan.bytes_to_read == 3 * 10_000 * 64 * 64 * 2
    assert len(json.dumps(plan.summary())) > 10_000
    assert "10000: model.layers.0.weight to model.layers.9999.weight" in plan_text(plan, 0, None)


def test_ten_thousand_tensors_of_other_names_are_refused_without_comparing_all_of_them() -> None:
    sources = {
        "a": Made("a", {f"model.layers.{i}.weight": ("BF16", (64, 64)) for i in range(10_000)}),
        "b": Made("b", {f"model.blocks.{i}.weight": ("BF16", (64, 64)) for i in range(10_000)}),
    }
    with pytest.raises(MismatchError) as caught:
        build_plan(
            load_recipe({"merge_method": "linear", "models": ["a", "b"]}), open_source=sources.__getitem__
        )
    lines = str(caught.value).splitlines()
    assert "It has 'model.blocks.0.weight'." in lines[0]
    assert lines[-2:] == ["... and 19995 more tensors that do not match.", NOTHING_LEFT.format(20_000)]


# ---- float8 ------------------------------------------------------------------------------------------------------------


def test_float8_values_are_merged_to_bf16_and_copied_as_they_are() -> None:
    sources = {
        n: Made(n, {"w": ("F8_E4M3", (4, 4)), "v": ("F8_E5M2" if n == "a" else "F16", (4,))}) for n in "ab"
    }
    plan = build_plan(
        load_recipe({"merge_method": "linear", "models": ["a", "b"]}), open_source=sources.__getitem__
    )
    assert [(j.kind, j.name, j.dtype) for j in plan.jobs] == [("mix", "w", "BF16"), ("mix", "v", "F16")]
    copied = build_plan(
        load_recipe({"merge_method": "passthrough", "models": ["a"]}), open_source=sources.__getitem__
    )
    assert [(j.kind, j.name, j.dtype) for j in copied.jobs] == [
        ("copy", "w", "F8_E4M3"),
        ("copy", "v", "F8_E5M2"),
    ]


# ---- BatchNorm ---------------------------------------------------------------------------------------------------------

NORM = {
    "bn.running_mean": ("F32", (4,)),
    "bn.running_var": ("F32", (4,)),
    "bn.num_batches_tracked": ("I64", ()),
    "w": ("F32", (4,)),
}


def test_batchnorm_statistics_are_merged_and_said_so_and_counts_are_the_donors() -> None:
    sources = {n: Made(n, NORM) for n in "ab"}
    plan = build_plan(
        load_recipe({"merge_method": "linear", "models": ["a", "b"]}), open_source=sources.__getitem__
    )
    assert [(j.kind, j.name) for j in plan.jobs] == [
        ("mix", "bn.running_mean"), ("mix", "bn.running_var"), ("copy", "bn.num_batches_tracked"), ("mix", "w"),
    ]  # fmt: skip
    assert plan.jobs[2].why == "a count of batches; copied from a"
    assert [(d.model, d.name, d.why) for d in plan.dropped] == [
        (1, "bn.num_batches_tracked", "a count of batches; copied from a")
    ]
    assert [n for n in plan.notes if "BatchNorm" in n] == [
        "the running statistics of 1 BatchNorm layers are merged like weights and do not match the merged model's activations. "
        "Recalibrate them on data with alnico.recalibrate_batchnorm."
    ]


def test_statistics_of_a_model_that_is_copied_need_no_recalibration() -> None:
    sources = {"a": Made("a", NORM)}
    plan = build_plan(
        load_recipe({"merge_method": "passthrough", "models": ["a"]}), open_source=sources.__getitem__
    )
    assert not [n for n in plan.notes if "BatchNorm" in n]


def test_a_misspelt_word_for_the_tokenizer_is_told_from_a_model() -> None:
    model("a")
    with pytest.raises(
        ModelError, match=r"no such directory or file.* Or did you mean union as the tokenizer\?$"
    ):
        build_plan(load_recipe({"merge_method": "linear", "models": ["a"], "tokenizer_source": "unoin"}))


EMBEDDING = "model.embed_tokens.weight"


def test_matrices_that_differ_in_padding_alone_are_told_with_what_keeps_it() -> None:
    tokens = {"x": 0, "y": 1}
    model("a", {EMBEDDING: ("F32", MATRIX)}, tokenizer__json=vocabulary(tokens))
    model("b", {EMBEDDING: ("F32", MATRIX[:2])}, tokenizer__json=vocabulary(tokens))
    assert told() == (
        f"{EMBEDDING}: a has 4 rows, b has 2 for the same 2 tokens; the other rows are padding, expected one number of rows. "
        "Write tokenizer: {source: base, pad_to_multiple_of: 4}, which pads to 4 again, or use models of one size."
    )


def test_a_row_more_for_a_token_more_is_no_padding() -> None:
    tokens = {"x": 0, "y": 1}
    model("a", {EMBEDDING: ("F32", MATRIX[:2])}, tokenizer__json=vocabulary(tokens))
    model("b", {EMBEDDING: ("F32", MATRIX[:3])}, tokenizer__json=vocabulary(tokens, {"<tool>": 2}))
    assert told() == (
        f"{EMBEDDING}: a has 2 rows, b has 3; the models have different vocabularies, expected one. Write tokenizer_source: base for "
        "the vocabulary of a, tokenizer_source: union for the tokens of all models, or use models with the same tokenizer."
    )


def test_a_plan_and_a_merge_are_shown_on_one_line(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(tmp_path / name, {"w": ("F32", np.ones((2, 3), np.float32))})
    recipe = {"merge_method": "linear", "models": [str(tmp_path / "a"), str(tmp_path / "b")]}
    shown = repr(alnico.plan(recipe))
    assert shown.startswith("<plan of linear: 1 tensor, 6 parameters, ")
    result = repr(alnico.merge(recipe, tmp_path / "out"))
    assert result.startswith(f"<merge in {tmp_path / 'out'}: linear; 1 tensor; 120 B; ")  # with its header


def test_a_device_that_does_not_exist_is_refused_before_a_model_is_opened() -> None:
    recipe = {"merge_method": "linear", "models": ["nothing", "nowhere"]}
    with made_gpus([]), pytest.raises(ResourceError) as refused:
        alnico.plan(recipe, device="cuda")
    assert str(refused.value) == (
        "device is cuda; no GPU can be used here (the machine has no GPU). Choose cpu, or fix that."
    )
