"""Every public function that takes models answers every mistake with alnico's own error, in Python's words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import alnico
from alnico.errors import AlnicoError, MismatchError, RecipeError

torch.set_num_threads(1)
RANDOM = np.random.default_rng(2)
BASE = {"weight": RANDOM.standard_normal((2, 3)).astype(np.float32), "bias": np.ones(2, np.float32)}
TUNED = [{n: v + np.float32(0.1) * (i + 1) for n, v in BASE.items()} for i in range(2)]
OTHER = {"weight": np.ones((4, 3), np.float32), "bias": np.ones(4, np.float32)}


def module(values: dict[str, np.ndarray]) -> nn.Linear:
    made = nn.Linear(3, len(values["bias"]))
    made.load_state_dict({n: torch.tensor(v) for n, v in values.items()})
    return made


FACTORS = {"weight": (np.ones((1, 3), np.float32), np.ones((2, 1), np.float32), 0.5)}
MODULES = [module(values) for values in TUNED]


def score(_: Any) -> float:
    return 1.0


def of_list(name: str, argument: str = "models", **more: Any) -> tuple[str, Callable[..., Any]]:
    """A function that takes a list of models first, under the name of that argument."""
    return argument, lambda models: getattr(alnico, name)(models, **more)


LISTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "analyze": of_list("analyze", base=BASE),
    "compare": of_list("compare", "parents", merged=TUNED[0], base=BASE),
    "suggest": of_list("suggest", base=BASE),
    "norm_weights": of_list("norm_weights", base=BASE),
    "merge_models": of_list("merge_models", method="ties", base=BASE),
    "merge_state_dicts": of_list("merge_state_dicts", "state_dicts", method="ties", base=BASE),
    "adamerge": of_list("adamerge", base=module(BASE), inputs=torch.ones(2, 3)),
    "curve": ("models", lambda models: alnico.curve(BASE, models, score, scale=[0, 1])),
    "lora.combine": ("adapters", alnico.lora.combine),
    "lora.fold": ("adapters", lambda adapters: alnico.lora.fold(BASE, adapters)),
    "make_recipe": of_list("make_recipe", base="base"),
    "gram_statistics": of_list("gram_statistics", out="statistics", inputs=torch.ones(2, 3)),
    "router_statistics": of_list("router_statistics", out="statistics", inputs=torch.ones(2, 3)),
    "evaluate": of_list("evaluate", tasks=score),
    "soup": of_list("soup", tasks=score),
    "search_weights": of_list("search_weights", score=score, trials=1),
    "search_scales": ("models", lambda models: alnico.search_scales(BASE, models, score, trials=1)),
}
"""Functions of a list of models, with the name of the list."""

RECIPES: dict[str, Callable[..., Any]] = {
    "merge": lambda recipe: alnico.merge(recipe, "out"),
    "merge_documents": lambda recipe: alnico.merge_documents(recipe, "out"),
    "plan": alnico.plan,
    "plan_documents": alnico.plan_documents,
    "load_recipe": alnico.load_recipe,
}
"""Functions of a recipe, which names models by their paths."""

ONES: dict[str, tuple[str, Callable[..., Any]]] = {
    "diff": ("a", lambda model: alnico.diff(model, BASE)),
    "inspect": ("model", alnico.inspect),
    "analyze": ("base", lambda base: alnico.analyze(TUNED, base=base)),
    "compare": ("merged", lambda merged: alnico.compare(TUNED, merged, base=BASE)),
    "norm_weights": ("base", lambda base: alnico.norm_weights(TUNED, base=base)),
    "merge_models": ("base", lambda base: alnico.merge_models(MODULES, "ties", base=base)),
    "merge_state_dicts": ("base", lambda base: alnico.merge_state_dicts(TUNED, "ties", base=base)),
    "TaskVector": ("finetuned", lambda tuned: alnico.TaskVector(tuned, BASE).norm()),
    "TaskVector of a base": ("base", lambda base: alnico.TaskVector(BASE, base).norm()),
    "evaluate": ("base", lambda base: alnico.evaluate(MODULES, score, base=base)),
    "soup": ("base", lambda base: alnico.soup(MODULES, score, base=base)),
    "search_weights": ("base", lambda base: alnico.search_weights(MODULES, score, base=base, trials=1)),
    "search_scales": ("base", lambda base: alnico.search_scales(base, MODULES, score, trials=1)),
    "adamerge": ("base", lambda base: alnico.adamerge(MODULES, base=base, inputs=torch.ones(2, 3))),
    "curve": ("base", lambda base: alnico.curve(base, MODULES, score, scale=[0, 1])),
    "lora.fold": ("base", lambda base: alnico.lora.fold(base, FACTORS)),
    "open_model": ("model", alnico.open_model),
    "make_recipe": ("base", lambda base: alnico.make_recipe(["a", "b"], "ties", base=base)),
    "fisher_statistics": (
        "model",
        lambda model: alnico.fisher_statistics(model, "out", inputs=torch.ones(2, 3)),
    ),
    "lora.extract": ("tuned", lambda tuned: alnico.lora.extract(tuned, BASE)),
    "lora.extract of a base": ("base", lambda base: alnico.lora.extract(BASE, base)),
}
"""Functions of one model, with the name of its argument."""

FINISHED: dict[str, Callable[..., Any]] = {
    "verify": alnico.verify,
    "reproduce": alnico.reproduce,
    "sign": lambda out: alnico.sign(out, "key.pem"),
    "push": lambda out: alnico.push(out, "owner/name"),
}
"""Functions of a finished merge."""


def message(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(AlnicoError) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert "base_model" not in text
    assert "parameters." not in text
    return text


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


WRONG_LISTS: dict[str, Any] = {
    "a dict of models": {"a": MODULES[0], "b": MODULES[1]},
    "an empty list": [],
    "an empty dict": {},
    "None": None,
    "a number": 3,
    "a module": MODULES[0],
    "a dict of tensors": BASE,
    "an array": np.zeros(3),
    "a number in a list": [MODULES[0], 3],
    "None in a list": [MODULES[0], None],
    "factors as a tuple": [(np.ones((2, 1)), np.ones((1, 3)), 1.0)],
    "a class": [nn.Linear],
    "a path that is not there": ["no/such/model"],
}


@pytest.mark.parametrize("wrong", WRONG_LISTS)
def test_what_is_no_list_of_models_is_named_by_its_argument(wrong: str) -> None:
    for name, (argument, function) in LISTS.items():
        if (name, wrong) in {("make_recipe", "a path that is not there")}:
            continue  # a recipe for models that come later
        text = message(function, WRONG_LISTS[wrong])
        assert argument.removesuffix("s") in text or "no/such/model" in text, (name, text)


WRONG_ONES: dict[str, Any] = {
    "a list": [BASE],
    "a dict of models": {"a": BASE},
    "a number": 3,
    "a task vector": alnico.TaskVector(TUNED[0], BASE),
    "a path that is not there": "no/such/model",
    "an empty text": "",
}


@pytest.mark.parametrize("wrong", WRONG_ONES)
def test_what_is_not_one_model_is_named_by_its_argument(wrong: str) -> None:
    for name, (argument, function) in ONES.items():
        if (name, wrong) in {
            ("make_recipe", "a path that is not there"),
            ("make_recipe", "an empty text"),
            ("compare", "a task vector"),  # counts as the model that it gives on base=
            ("TaskVector", "a task vector"),
            ("lora.extract", "a task vector"),
        }:
            continue
        text = message(function, WRONG_ONES[wrong])
        assert re.match(rf"\W*{argument}\b", text) or wrong in (
            "an empty text",
            "a path that is not there",
        ), (
            name,
            text,
        )


@pytest.mark.parametrize(
    "recipe",
    [MODULES, {"merge_method": "linear", "models": MODULES}, MODULES[0], TUNED[0], {"a": MODULES[0]}],
    ids=["list", "in a recipe", "module", "dict", "dict of models"],
)
def test_models_in_place_of_a_recipe_name_the_functions_that_merge_in_memory(recipe: Any) -> None:
    for name, function in RECIPES.items():
        text = message(function, recipe)
        assert text.startswith("recipe"), (name, text)
        assert "alnico.merge_models" in text, (name, text)
    assert message(alnico.search, recipe, tasks=score).startswith("recipe")


@pytest.mark.parametrize(
    "out",
    [MODULES[0], TUNED[0], alnico.TaskVector(TUNED[0], BASE), alnico.TaskVector(TUNED[0], BASE).on(BASE), None, 3],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_needs_files_says_how_to_write_them(out: Any) -> None:
    for name, function in FINISHED.items():
        what = "None" if out is None else f"of type {type(out).__name__}"
        assert message(function, out) == (
            f"out is {what}; expected the directory of a finished merge, because {name} works on its files. "
            "alnico.merge(recipe, path) writes one, and so does tau.on(base).save(path)."
        )


def test_a_function_of_files_says_how_to_write_each_kind() -> None:
    opening = "model is of type {}; expected the path or hub id of a model, as this function reads files. {}"
    tau = alnico.TaskVector(TUNED[0], BASE)
    tensors = {n: torch.tensor(v) for n, v in BASE.items()}
    for model, how in (
        (MODULES[0], "Write it first: safetensors.torch.save_model(model, path)."),
        (BASE, "Write it first: safetensors.numpy.save_file(model, path)."),
        (tensors, "Write it first: safetensors.torch.save_file(model, path)."),
        (tau, "Write the model that it gives on a base: model.on(base).save(path)."),
        (tau.on(BASE), "Write it first: model.save(path)."),
        ([BASE], "Pass model[0]."),
    ):
        assert message(alnico.open_model, model) == opening.format(type(model).__name__, how)


# ---- each its own sentence --------------------------------------------------------------------------------------------


def test_merges_say_which_function_takes_the_models() -> None:
    merge = alnico.merge_models
    assert message(merge, ["a", Path("b")]) == (
        "models: holds no object in memory, only paths; expected at least one nn.Module, which the result is a "
        "copy of. To merge files: alnico.merge(alnico.make_recipe(models, method), out). To merge them in "
        "memory: merge_state_dicts, which returns a dict of tensors."
    )
    assert message(merge, TUNED) == (
        "models: holds no nn.Module, only dicts of tensors; expected at least one nn.Module, which the result "
        "is a copy of. merge_state_dicts merges dicts of tensors into one."
    )
    assert message(merge, [alnico.TaskVector(*TUNED), "a"], base=BASE).startswith(
        "models: holds no module; expected at least one nn.Module"
    )


def test_models_of_two_shapes_and_unrelated_ones_are_named() -> None:
    with pytest.raises(MismatchError, match=r"^weight: models\[0\] is \(2, 3\), models\[1\] is \(4, 3\)"):
        alnico.merge_models([MODULES[0], module(OTHER)])
    wide = [{f"{i}.weight": RANDOM.standard_normal((64, 64)) for i in range(2)} for _ in range(2)]
    with pytest.raises(
        MismatchError, match=r"^state_dicts\[1\] and state_dicts\[0\] were not tuned from one"
    ):
        alnico.merge_state_dicts(wide)


def test_a_method_that_needs_a_base_names_the_argument() -> None:
    for method in ("ties", "task_arithmetic", "dare_ties", "model_stock"):
        for call in (alnico.merge_models, alnico.merge_state_dicts):
            text = message(call, MODULES, method)
            assert text.startswith(f"{method} needs base, "), text
            assert " Pass base." in text, text
    for call in (alnico.analyze, alnico.norm_weights):
        assert message(call, MODULES, base=None).startswith("base is None; expected a path, a hub id,")  # type: ignore[operator]


class SomeMerge:
    """A method object of another package."""


def test_a_method_of_another_package_is_named_with_what_makes_one() -> None:
    for method in (SomeMerge(), SomeMerge, score, None, 3, ["ties"]):
        for call in (alnico.merge_models, alnico.merge_state_dicts):
            text = message(call, MODULES, method)
            assert "method" in text, text
            assert "expected" in text, text


def test_options_are_named_as_arguments() -> None:
    call = alnico.merge_state_dicts
    assert message(call, TUNED, "ties", base=BASE, density=1.4).startswith("density is 1.4; ")
    assert message(call, TUNED, "ties", base=BASE, density=[0.5, 1.4]).startswith(
        "density of state_dicts[1] is 1.4; "
    )
    assert message(call, TUNED, weights=[1, float("nan")]).startswith("weights of state_dicts[1] is nan; ")
    assert message(call, TUNED, wieght=1) == "wieght is not an option of linear. Did you mean weights?"


def test_factors_of_an_adapter_are_refused_and_named() -> None:
    factors = {
        "base_model.model.q.lora_A.weight": np.ones((1, 3), np.float32),
        "base_model.model.q.lora_B.weight": np.ones((3, 1), np.float32),
    }
    for name in ("analyze", "norm_weights", "merge_state_dicts"):
        argument, function = LISTS[name]
        with pytest.raises(AlnicoError) as caught:
            function([TUNED[0], factors])
        assert str(caught.value).startswith(f"{argument}[1]: has the factors of an adapter, such as")


@pytest.mark.parametrize(
    "make", [tuple, iter, lambda models: np.array(models, object), lambda models: dict(enumerate(models)).values()]
)  # fmt: skip
def test_every_ordered_collection_of_models_is_taken(make: Callable[[list[Any]], Any]) -> None:
    expected = alnico.merge_models(MODULES).weight
    assert torch.equal(alnico.merge_models(make(MODULES)).weight, expected)
    merged = alnico.merge_state_dicts(make(TUNED))
    assert np.array_equal(merged["weight"], expected.detach().numpy())
    assert len(alnico.analyze(make(TUNED), base=BASE).models) == 2
    assert len(alnico.norm_weights(make(TUNED), base=BASE).models) == 2


def test_the_default_method_is_that_of_the_command() -> None:
    assert torch.equal(alnico.merge_models(MODULES).bias, alnico.merge_models(MODULES, "linear").bias)
    assert alnico.make_recipe(["a", "b"]).merge_method == "linear"


def test_a_list_of_names_of_another_length_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^names has 1 name and models has 2 models; "):
        alnico.analyze(TUNED, base=BASE, names=["a"])
