"""What callers in Python give beside models: task vectors that were copied or sent, paths called like models in memory, arrays as options, wrong types."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import alnico
from alnico import TaskVector
from alnico.errors import AlnicoError, EvaluationError, MethodError, ModelError, OutputError, RecipeError
from made import save_model


def one(*values: float) -> dict[str, np.ndarray]:
    return {"w": np.float32(values)}


BASE, MODELS = one(0, 0), [one(1, 0), one(0, 1)]


def test_a_copied_task_vector_is_of_the_copied_models() -> None:
    tau = TaskVector(one(1, 1), BASE)
    copied = copy.deepcopy(tau)
    next(iter(copied._terms))[0].value["w"][:] = 100
    assert (BASE + (tau + copied)).state_dict()["w"].tolist() == [101, 101]


def test_models_that_came_from_other_processes_are_told_apart_whatever_ids_they_had() -> None:
    sent = pickle.dumps(
        TaskVector(one(50, 50), BASE)
    )  # two processes that were forked give their models the same ids
    mine, theirs = pickle.loads(sent), pickle.loads(sent)
    theirs.terms[0][1].value["w"][:] = 7
    assert mine.terms[0][1] != theirs.terms[0][1]
    assert (BASE + (mine + theirs)).state_dict(unrelated="allow")["w"].tolist() == [57, 57]
    assert len((mine + mine).terms) == 1


def test_a_path_called_like_a_model_in_memory_is_that_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        save_model(Path(f"dict {number}"), {"w": ("F32", np.float32([1000.0 * number] * 2))})
        made = BASE + TaskVector(f"dict {number}", BASE) + TaskVector(one(1, 1), BASE)
        assert made.state_dict(unrelated="allow")["w"].tolist() == [1000 * number + 1] * 2
        made = BASE + TaskVector(one(1, 1), BASE) + TaskVector(f"dict {number}", BASE)
        assert made.state_dict(unrelated="allow")["w"].tolist() == [1000 * number + 1] * 2


def test_a_path_leads_to_where_it_led_when_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = []
    for name, value in (("a", 1.0), ("b", 50.0)):
        save_model(tmp_path / name / "m", {"w": ("F32", np.float32([value] * 2))})
        monkeypatch.chdir(tmp_path / name)
        vectors.append(TaskVector("m", BASE))
    assert (BASE + sum(vectors)).state_dict(unrelated="allow")["w"].tolist() == [51, 51]


@pytest.mark.parametrize("factor", [1e-300, 1e-200, 1e200, 1e300])
def test_lengths_and_angles_of_very_short_and_long_task_vectors(factor: float) -> None:
    tau = TaskVector(one(3, 4), BASE)
    assert (factor * tau).norm() == pytest.approx(5 * factor, rel=1e-15)
    assert (factor * tau).cosine(tau) == pytest.approx(1)
    assert (factor * tau).cosine(-factor * tau) == pytest.approx(-1)


def test_a_task_vector_beyond_float64_is_an_error() -> None:
    tau = TaskVector(one(3, 4), BASE)
    with pytest.raises(AlnicoError, match=r"is longer than float64 can hold; expected a finite length\."):
        (1e308 * tau).norm()
    with pytest.raises(AlnicoError, match="has a coefficient beyond float64; expected finite coefficients"):
        1.7e308 * tau + 1.7e308 * tau
    with pytest.raises(AlnicoError, match="its coefficients add up to more than float64 can hold"):
        (1.7e308 * tau + 1.7e308 * TaskVector(next(iter(tau._terms))[0].value, one(1, 1))).norm()


def test_a_class_of_odd_name_stands_for_a_model() -> None:
    odd = type("\x1b[2J", (dict,), {})
    tau = TaskVector(odd(one(1, 1)), BASE)
    assert "\x1b" not in repr(BASE + tau)
    assert (BASE + tau).state_dict()["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "weights", [np.float32([0.25, 0.75]), torch.tensor([0.25, 0.75]), np.longdouble([0.25, 0.75]), (0.25, 0.75)], ids=["numpy", "torch", "extended", "tuple"]
)  # fmt: skip
def test_numbers_for_each_model_may_be_an_array(weights: Any) -> None:
    want = {"w": [0.25, 0.75]}
    for arguments in (
        {"weights": weights},
        {"weight": weights},
        {"method": "linear", "layers": {"w": {"method": "task_arithmetic", "weights": weights}}},
    ):
        merged = alnico.merge_state_dicts(MODELS, **{"method": "task_arithmetic", "base": BASE, **arguments})
        assert {n: v.tolist() for n, v in merged.items()} == want


@pytest.mark.parametrize("weight", [0.5, np.array(0.5), torch.tensor(0.5)], ids=["float", "numpy", "torch"])
def test_one_number_goes_for_all_models(weight: Any) -> None:
    assert alnico.merge_state_dicts(MODELS, "task_arithmetic", base=BASE, weights=weight)["w"].tolist() == [
        0.5,
        0.5,
    ]


WRONG: dict[str, tuple[Callable[[], Any], type[AlnicoError], str]] = {
    "a set of weights": (
        lambda: alnico.merge_state_dicts(MODELS, weights={1, 2}),
        RecipeError,
        "weights is of type set",
    ),
    "a generator": (
        lambda: alnico.merge_state_dicts(MODELS, weights=(w for w in (1, 2))),
        RecipeError,
        "type generator",
    ),
    "text as weights": (
        lambda: alnico.merge_state_dicts(MODELS, weights="12"),
        RecipeError,
        "weights is of type str",
    ),
    "bytes as weights": (
        lambda: alnico.merge_state_dicts(MODELS, weights=b"12"),
        RecipeError,
        "weights is of type bytes",
    ),
    "no method": (
        lambda: alnico.merge_state_dicts(MODELS, None),
        MethodError,
        "of type NoneType; expected its name",
    ),
    "a list of methods": (
        lambda: alnico.merge_state_dicts(MODELS, ["linear"]),
        MethodError,
        "of type list; expected its name",
    ),
    "a method of layers": (
        lambda: alnico.merge_state_dicts(MODELS, layers={"w": {"method": 3}}),
        MethodError,
        "of type int",
    ),
    "a list of layers": (
        lambda: alnico.merge_state_dicts(MODELS, layers=["w"]),
        RecipeError,
        "layers is of type list",
    ),
    "half a character": (
        lambda: alnico.merge({"merge_method": "linear", "models": ["a"]}, "\ud800"),
        OutputError,
        "half a char",
    ),
    "half a trial": (
        lambda: alnico.search_scales(BASE, MODELS, lambda _: 1.0, 1.5),
        RecipeError,
        "trials is 1.5",
    ),
    "trials as text": (
        lambda: alnico.search_scales(BASE, MODELS, lambda _: 1.0, "3"),
        RecipeError,
        "trials is '3'",
    ),
    "scales as text": (
        lambda: alnico.search_scales(BASE, MODELS, lambda _: 1.0, low="a"),
        RecipeError,
        "scales from 'a' to 1",
    ),
    "a seed below 0": (
        lambda: alnico.search_scales(BASE, MODELS, lambda _: 1.0, seed=-1),
        RecipeError,
        "seed is -1",
    ),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_an_argument_of_a_wrong_type_is_an_error_that_names_it(what: str) -> None:
    call, kind, said = WRONG[what]
    with pytest.raises(kind, match=said):
        call()


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def speechless(_: Any) -> float:
    raise Speechless


@pytest.mark.parametrize(
    "score", [lambda _: 10**400, speechless], ids=["beyond float64", "an error without text"]
)
def test_a_score_that_cannot_be_is_a_failed_trial(score: Callable[[Any], Any]) -> None:
    with pytest.raises(EvaluationError, match=r"all 2 trials failed; \w+ of trial 0: the evaluation"):
        alnico.search_scales(BASE, MODELS, score, 2)


def linear(value: float) -> nn.Module:
    layer = nn.Linear(2, 2)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


def test_arrays_in_the_state_of_a_module_are_refused_and_not_dropped() -> None:
    def with_table(table: Any) -> nn.Module:
        layer = linear(1.0)
        layer.register_state_dict_post_hook(
            lambda _, state, prefix, __: state.update({f"{prefix}table": table})
        )
        return layer

    for table in (np.ones(3, np.float32), {"a": [np.ones(3)]}):
        with pytest.raises(
            ModelError, match=r"^models\[0\]: table: is an? (ndarray|dict) in the state of a module"
        ):
            alnico.merge_models([with_table(table), with_table(table)], "linear")
    merged = alnico.merge_models(
        [with_table(3), with_table(4)], "linear"
    )  # what is no tensor is the copy's own
    assert merged.weight.tolist() == [[1, 1], [1, 1]]


def test_a_module_that_cannot_be_copied_is_named() -> None:
    models = [linear(1.0), linear(3.0)]
    models[0].lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(
        ModelError, match=r"^the module \(Linear\) cannot be copied \(TypeError: cannot pickle"
    ):
        alnico.merge_models(models, "linear")
    del models[0].lock
    models[0].seen = {"last": models[0].weight * 2}  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"^the module \(Linear\) cannot be copied \(RuntimeError"):
        alnico.merge_models(models, "linear")


def test_tensors_inside_of_transforms_and_modes_of_torch_are_named() -> None:
    def inside(value: torch.Tensor) -> torch.Tensor:
        with pytest.raises(ModelError, match=r"^state_dicts\[0\]: w: is a tensor inside torch\.func"):
            alnico.merge_state_dicts([{"w": value}, {"w": value * 2}])
        return value.sum()

    torch.func.vmap(inside)(torch.ones(2, 3))
    torch.func.grad(inside)(torch.ones(3))
    plain = [{"w": torch.ones(2, 3).t()}] * 2
    with FakeTensorMode(), pytest.raises(ModelError, match="cannot be read here"):
        alnico.merge_state_dicts(plain)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ModelError, match="cannot be read here"):
        alnico.merge_state_dicts(plain)


class Odd(torch.Tensor):
    """Says other things of itself than it holds."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size([1])

    def detach(self) -> torch.Tensor:
        return torch.zeros(3)


def test_a_kind_of_tensor_is_read_as_what_it_holds() -> None:
    odd = torch.tensor([1.0, 2.0, 3.0]).as_subclass(Odd)
    assert alnico.merge_state_dicts([{"w": odd}, {"w": odd * 3}])["w"].tolist() == [2, 4, 6]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.slow
def test_a_process_that_is_forked_while_kernels_are_compiled_can_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALNICO_CACHE_DIR", str(tmp_path))
    script = """
import multiprocessing, threading, time, numpy, alnico
models = [{"w": numpy.full((3, 3), i, "f4")} for i in (1, 2, 3)]
def child(queue):
    queue.put(alnico.merge_state_dicts(models[:2], "ties", base=models[2], unrelated="allow")["w"].shape)
if __name__ == "__main__":
    thread = threading.Thread(target=alnico.merge_state_dicts, args=(models, "karcher"), kwargs={"unrelated": "allow"})
    thread.start()
    time.sleep(0.6)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,), daemon=True)
    process.start()
    print(queue.get(timeout=90))
    thread.join()
"""
    (tmp_path / "forks.py").write_text(script)
    made = subprocess.run(
        [sys.executable, str(tmp_path / "forks.py")], capture_output=True, text=True, timeout=150, check=False
    )
    assert made.stdout == "(3, 3)\n", made.stderr
