"""Models of every kind get labels, are opened as sources in place, and give the module that a merge fills."""

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
from alnico.checkpoint.memory_model import MemoryModel
from alnico.checkpoint.source import read_tensor
from alnico.errors import AlnicoError, ModelError, RecipeError
from alnico.models.open_models import fill, name_models, open_models, open_source, template_of
from made import save_model

VALUES = {"weight": np.float32([[1, 2], [3, 4]]), "bias": np.float32([5, 6])}
ZEROS = {name: np.zeros_like(value) for name, value in VALUES.items()}


def module(values: Any = None) -> nn.Linear:
    made = nn.Linear(2, 2)
    made.load_state_dict({name: torch.tensor(value) for name, value in (values or VALUES).items()})
    return made


def message(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(AlnicoError) as caught:
        function(*arguments, **options)
    assert type(caught.value) in (ModelError, RecipeError)
    return str(caught.value)


def test_a_path_is_called_by_its_text_and_an_object_by_its_position() -> None:
    a, b = module(), dict(VALUES)
    named = name_models(["runs/a", a, Path("runs/b"), b], "parents")
    assert list(named) == ["runs/a", "parents[1]", "runs/b", "parents[3]"]
    assert named["parents[1]"] is a
    assert list(name_models("owner/name")) == ["owner/name"]
    assert list(name_models([a, "x"], names=("first", "second"))) == ["first", "second"]


@pytest.mark.parametrize(
    "models",
    [
        (VALUES, ZEROS),
        iter([VALUES, ZEROS]),
        {"a": VALUES, "b": ZEROS}.values(),
        np.array([VALUES, ZEROS], object),
    ],
    ids=["tuple", "generator", "values", "array"],
)
def test_every_ordered_iterable_is_a_list(models: Any) -> None:
    named = name_models(models)
    assert list(named) == ["models[0]", "models[1]"]
    assert list(named.values()) == [VALUES, ZEROS]


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ({"a": VALUES}, "models is a dict of models; expected a list of models. Pass list(models.values())."),
        ({"a": "path"}, "models is a dict of models; "),
        (VALUES, "models is one dict of tensors; expected a list of models. Pass [models] for one model."),
        ({}, "models is an empty dict; "),
        ([], "models is empty; expected at least one model. "),
        (module(), "models is one module of type Linear; expected a list of models. Pass [models]"),
        (nn.ModuleList([module()]), "models is one module of type ModuleList; expected a list of models. Pass list(models)"),
        (alnico.TaskVector(VALUES, ZEROS), "models is one TaskVector; expected a list of models. Pass [models]"),
        (alnico.TaskVector(VALUES, ZEROS).on(ZEROS), "models is one LazyModel; "),
        (np.zeros((2, 2)), "models is of type ndarray; expected a list of models."),
        (torch.zeros(2), "models is of type Tensor; "),
        ({"a", "b"}, "models is of type set; expected a list of models, in order."),
        (None, "models is None; expected a list of models."),
        (3, "models is of type int; "),
        ([VALUES, 3], "models[1] is of type int; expected a path, "),
        ([VALUES, None], "models[1] is None; expected a path, "),
        ([VALUES, (1, 2, 3)], "models[1] is of type tuple; "),
        ([nn.Linear], "models[0] is of type type; "),
        (["a", "b", "a"], "models[0] and models[2] have the same name, 'a'; expected different names. Pass each model once"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_models_is_refused_with_what_to_pass(models: Any, expected: str) -> None:
    assert message(name_models, models).startswith(expected)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a"], "names has 1 name and models has 2 models; expected one name for each model."),
        ("ab", "names has 1 name and models has 2 models; "),
        (["a", "a"], "models[0] and models[1] have the same name, 'a'; expected different names. Give each"),
        (["a", 3], "names[1] is of type int; expected a text that names the model."),
        (["a", " "], "names[1] is empty; "),
        (3, "names is of type int; expected a list of names, one for each of models."),
        ({"a": 1, "b": 2}, "names is of type dict; "),
    ],
)
def test_names_that_do_not_fit_are_refused(names: Any, expected: str) -> None:
    assert message(name_models, [VALUES, ZEROS], names=names).startswith(expected)


def kinds(tmp_path: Path) -> dict[str, Any]:
    """The model of VALUES in every kind that a base of zeros opens."""
    path = save_model(tmp_path / "m", {name: ("F32", value) for name, value in VALUES.items()})
    tau = alnico.TaskVector(VALUES, ZEROS)
    return {
        "path": str(path),
        "Path": path,
        "Model": alnico.open_model(path),
        "arrays": VALUES,
        "tensors": {name: torch.tensor(value) for name, value in VALUES.items()},
        "module": module(),
        "DataParallel": nn.DataParallel(module()),
        "compiled": torch.compile(module(), backend="eager"),
        "lazy": tau.on(ZEROS),
        "task vector": tau,
    }


def test_every_kind_opens_with_the_same_tensors(tmp_path: Path) -> None:
    for kind, model in kinds(tmp_path).items():
        source = open_source(model, "it", base=ZEROS)
        assert {name: t.shape for name, t in source.tensors.items()} == {"weight": (2, 2), "bias": (2,)}, kind
        for name, value in VALUES.items():
            assert np.array_equal(read_tensor(source, name), value), kind
        source.close()


def test_values_in_memory_are_read_in_place() -> None:
    values = {"w": np.zeros((4, 8), np.float32), "v": torch.zeros(8)}
    source = open_source(values, "it")
    assert isinstance(source, MemoryModel)
    values["w"][:] = 1
    values["v"][:] = 2
    assert read_tensor(source, "w").sum() == 32
    assert read_tensor(source, "v").sum() == 16
    assert np.shares_memory(source.flat("w"), values["w"])  # type: ignore[arg-type]


def test_a_task_vector_without_a_base_is_refused_with_what_gives_a_model() -> None:
    tau = alnico.TaskVector(VALUES, ZEROS)
    assert message(open_source, tau, "merged") == (
        "merged: is a task vector, a difference of models; expected a model. Pass the model that it gives on "
        "a base: tau.on(base)."
    )
    assert message(open_source, tau, "base", base=tau).startswith("base: is a task vector")


def test_an_adapters_factors_are_opened_only_where_they_may_be() -> None:
    factors = {
        "q.lora_A.weight": np.zeros((1, 2), np.float32),
        "q.lora_B.weight": np.zeros((2, 1), np.float32),
    }
    assert "has the factors of an adapter" in message(open_source, factors, "it")
    assert list(open_source(factors, "it", may_be_adapter=True).tensors) == list(factors)


def test_models_that_are_opened_together_agree_on_tied_tensors_and_prefixes() -> None:
    shared = np.ones((2, 2), np.float32)
    tied = {"embed": shared, "head": shared}
    with pytest.warns(UserWarning, match=re.escape("b: `module.` is removed")):
        opened = open_models({"a": tied, "b": {f"module.{name}": value for name, value in tied.items()}})
    assert [list(source.tensors) for source in opened.sources.values()] == [["embed"], ["embed"]]


def test_the_template_is_the_first_module_also_inside_other_kinds() -> None:
    first, second = module(), module(ZEROS)
    tau = alnico.TaskVector(first, second)
    assert template_of(["path", VALUES, first, second]) is first
    assert template_of([VALUES, alnico.TaskVector(VALUES, ZEROS).on(second), first]) is second
    assert template_of([tau]) is second
    assert template_of([tau.on(VALUES)]) is first
    assert template_of([VALUES, "path"]) is None


def test_a_module_is_filled_from_numpy_arrays_of_which_it_shares_none() -> None:
    values = {name: value.copy() for name, value in VALUES.items()}
    filled = alnico.TaskVector(values, ZEROS).on(ZEROS).apply(module(ZEROS))
    assert torch.equal(filled.weight, torch.tensor(VALUES["weight"]))
    fill(filled, values)
    with torch.no_grad():
        filled.weight += 1
    assert np.array_equal(values["weight"], VALUES["weight"])
