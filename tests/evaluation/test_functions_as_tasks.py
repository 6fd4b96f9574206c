"""Functions as tasks: their names, what they receive, and what happens to values that are no scores."""

from __future__ import annotations

import copy
import functools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from alnico.engine.relatedness import IN_PYTHON
from alnico.errors import EvaluationError, MismatchError, ModelError
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.task_file import as_tasks
from alnico.evaluation.user_function import UserFunction
from alnico.recipe.load import load_recipe


def accuracy(_: Any) -> float:
    return 0.5


def models(count: int) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)).double()
    made = [base]
    for _ in range(count - 1):
        made.append(copy.deepcopy(base))
        with torch.no_grad():
            for value in made[-1].parameters():
                value += 0.1 * torch.randn_like(value)
    return made


def test_tasks_have_the_names_of_their_functions(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("some words\n")
    (tmp_path / "tasks.yml").write_text("tasks: [{name: words, type: perplexity, data: words.txt}]\n")
    listed = [accuracy, lambda _: 1.0, tmp_path / "tasks.yml", UserFunction("mine", accuracy)]
    assert [task.name for task in as_tasks(listed)] == ["accuracy", "score", "words", "mine"]
    assert [task.name for task in as_tasks({"A": accuracy, "B": UserFunction("mine", accuracy)})] == [
        "A",
        "B",
    ]
    assert [task.name for task in as_tasks(functools.partial(accuracy))] == ["accuracy"]
    assert [task.name for task in as_tasks(tmp_path / "tasks.yml")] == ["words"]
    assert [task.goal for task in as_tasks({"A": accuracy, "B": accuracy}, minimize="B")] == ["max", "min"]
    assert as_tasks(accuracy, minimize=True)[0].goal == "min"
    assert as_tasks(()) == ()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (3, "tasks is of type int; expected a function that takes a model and returns a number, a task, or the path of a tasks file."),
        (None, "tasks is None; expected a function that takes a model and returns a number, a task, or the path of a tasks file."),
        ([accuracy, 3], "tasks[1] is of type int; expected a function that takes a model and returns a number, a task, or the path of a tasks file."),
        ({"A": accuracy, "B": 3}, "tasks['B'] is of type int; expected a function that takes a model and returns a number, a task, or the path of a tasks file."),
        (torch.nn.Linear(1, 1), "tasks is of type Linear; expected a function that takes a model and returns a number, a task, or the path of a tasks file. Pass the function that scores it."),
        ([lambda _: 1.0, lambda _: 2.0], "tasks: two are named 'score'; expected different names. Give names to functions with a dict: {\"A\": f, \"B\": g}."),
        (lambda _, __: 1.0, "score: the function takes (_, __); expected a model: one of model_dir, path or the module's name, and tokenizer. Give the others a default."),
    ],
)  # fmt: skip
def test_what_is_no_task_is_reported(tasks: Any, message: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        as_tasks(tasks)
    assert str(caught.value) == message


def test_a_name_to_minimize_is_a_score() -> None:
    with pytest.raises(EvaluationError, match=re.escape("minimize names 'C'; expected one of A, B.")):
        as_tasks({"A": accuracy, "B": accuracy}, minimize=["C"])


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("0.5", "returned a str"), (None, "returned a NoneType"), (True, "returned a bool"), (np.True_, "returned a bool"),
        (torch.tensor(True), "returned a Tensor"), (math.nan, "returned nan"), (torch.tensor(math.inf), "returned inf"),
        (KeyError("data"), "raised KeyError: 'data'"),
    ],
)  # fmt: skip
def test_what_is_no_score_names_the_model_and_the_score(value: Any, what: str) -> None:
    def score(_: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    (one,) = models(1)
    with Candidates({"models[1]": one}) as candidates:
        candidate = candidates.make(
            load_recipe({"merge_method": "passthrough", "models": ["models[1]"]}), label="models[1]"
        )
        with pytest.raises(EvaluationError, match=re.escape(f"score of models[1]: the evaluation {what}")):
            as_tasks(lambda model: score(model))[0].evaluate(candidate)


def merge_of(labels: list[str], weight: float) -> Any:
    base, *tuned = labels
    return load_recipe(
        {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": tuned,
            "parameters": {"weight": weight},
        }
    )


def test_a_function_receives_a_copy_of_the_first_module() -> None:
    base, one, other = models(3)
    before = {n: v.clone() for n, v in base.state_dict().items()}
    labels = ["base", "models[0]", "models[1]"]
    seen: list[torch.nn.Module] = []

    def score(module: torch.nn.Module) -> float:
        assert not module.training
        seen.append(module)
        with torch.no_grad():  # what a function changes, the next one does not see
            for value in module.state_dict().values():
                value.zero_()
        module.train()
        return 1.0

    with Candidates(
        dict(zip(labels, [base, one.state_dict(), other], strict=True)), caller=IN_PYTHON
    ) as candidates:
        for weight in (0.5, 1.0):
            expected = {
                n: v + weight * ((one.state_dict()[n] - v) + (other.state_dict()[n] - v))
                for n, v in base.state_dict().items()
                if v.is_floating_point()
            }

            def farthest(module: torch.nn.Module, expected: dict[str, torch.Tensor] = expected) -> float:
                state = module.state_dict()
                return max(float((state[n] - v).abs().max()) for n, v in expected.items())

            candidate = candidates.make(merge_of(labels, weight), label="merge")
            values = {t.name: t.evaluate(candidate).value for t in as_tasks([score, farthest])}
            assert values["score"] == 1.0
            assert values["farthest"] < 1e-14
        assert len({id(module) for module in seen}) == 1
        assert seen[0] is not base
    assert base.training
    assert all(torch.equal(v, before[n]) for n, v in base.state_dict().items())


def test_a_function_receives_a_dict_where_no_module_is_known(tmp_path: Path) -> None:
    base, one = (m.state_dict() for m in models(2))
    save_file(one, tmp_path / "one.safetensors")
    arrays = [{n: v.numpy() for n, v in state.items()} for state in (base, one)]
    kept: list[Any] = []
    for pair, kind in (([base, str(tmp_path / "one.safetensors")], torch.Tensor), (arrays, np.ndarray)):
        with Candidates({"base": pair[0], "models[0]": pair[1]}, caller=IN_PYTHON) as candidates:
            for weight in (0.0, 1.0):
                candidate = candidates.make(merge_of(["base", "models[0]"], weight))
                as_tasks(lambda state: kept.append(state) or 1.0)[0].evaluate(candidate)
            assert all(isinstance(v, kind) for state in kept[-2:] for v in state.values())
    for first, last in ((kept[0], kept[1]), (kept[2], kept[3])):  # a function may keep what it gets
        assert np.array_equal(np.asarray(first["0.weight"]), arrays[0]["0.weight"])
        assert np.array_equal(np.asarray(last["0.weight"]), arrays[1]["0.weight"])


def test_a_file_fills_a_copy_of_the_module_next_to_it(tmp_path: Path) -> None:
    base, one = models(2)
    save_file(one.state_dict(), tmp_path / "one.safetensors")
    path = str(tmp_path / "one.safetensors")
    with Candidates({"base": base, path: path}) as candidates:
        candidate = candidates.make(load_recipe({"merge_method": "passthrough", "models": [path]}))
        made = candidate.model().state_dict()
        assert type(candidate.module("encoder")) is torch.nn.Sequential
    assert all(torch.equal(made[n], v) for n, v in one.state_dict().items())
    with Candidates([path], template=torch.nn.Linear(4, 6).double()) as candidates:
        candidate = candidates.make(load_recipe({"merge_method": "passthrough", "models": [path]}))
        with pytest.raises(MismatchError) as caught:
            candidate.model()
    assert str(caught.value) == (
        "passthrough: 1.num_batches_tracked: is not in the module (Linear); expected the names of the merged models. Functions "
        "receive a copy of the first module among the models: pass models of its architecture."
    )


def test_a_function_that_fails_on_a_dict_is_told_why() -> None:
    with Candidates({"a": models(1)[0].state_dict()}) as candidates:
        candidate = candidates.make(load_recipe({"merge_method": "passthrough", "models": ["a"]}), label="a")
        with pytest.raises(
            EvaluationError, match="The function received a dict of tensors, because no model is"
        ):
            as_tasks(lambda module: module(1))[0].evaluate(candidate)


def test_functions_with_other_data_share_no_examples() -> None:
    def score_on(data: Any) -> Any:
        return lambda _: float(np.sum(data))

    first, same, other = (as_tasks(score_on(np.full(3, v)))[0].digests() for v in (1.0, 1.0, 2.0))
    assert first == same
    assert not first & other

    class Accuracy:
        def __init__(self, data: Any) -> None:
            self.data = data

        def __call__(self, _: Any) -> float:
            return float(np.sum(self.data))

    first, same, other = (as_tasks(Accuracy(torch.full((3,), v)))[0].digests() for v in (1.0, 1.0, 2.0))
    assert first == same
    assert not first & other
    by_default = [as_tasks(lambda _, data=d: data)[0].digests() for d in (1.0, 1.0, 2.0)]
    assert by_default[0] == by_default[1]
    assert not by_default[0] & by_default[2]
    assert as_tasks(lambda _: 1.0)[0].digests() != as_tasks(lambda _: 2.0)[0].digests()
    assert as_tasks(functools.partial(accuracy))[0].digests() == as_tasks(accuracy)[0].digests()


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_a_transformers_module_in_memory_is_written_with_its_config() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(0)
    one = transformers.BertForSequenceClassification(config)

    def same(path: Path) -> float:
        loaded = transformers.BertForSequenceClassification.from_pretrained(path).state_dict()
        return float(all(torch.equal(loaded[n], v) for n, v in one.state_dict().items()))

    with Candidates({"models[0]": one}) as candidates:
        candidate = candidates.make(load_recipe({"merge_method": "passthrough", "models": ["models[0]"]}))
        assert as_tasks(same)[0].evaluate(candidate).value == 1.0
        assert type(candidate.model()) is transformers.BertForSequenceClassification
        assert type(candidate.module("encoder")) is transformers.BertModel
        with pytest.raises(ModelError, match="passthrough: has no tokenizer, as its models are in memory"):
            candidate.tokenizer()
