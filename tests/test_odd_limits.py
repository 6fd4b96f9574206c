"""Threads and memory of every function: a number that a run can have, or an error of ours before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import alnico
import made
from alnico.errors import AlnicoError
from alnico.lora import combine, extract, fold
from lora.made_adapters import linear

LARGE = 10**400


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[..., Any]]:
    root = tmp_path_factory.mktemp("models")
    values = np.random.default_rng(0).standard_normal((30, 20)).astype(np.float32)
    names = ("m.q.weight", "m.o.weight")
    base, one, other = (
        made.save_model(
            root / f"m{i}",
            dict(zip(names, [("F32", (1 + i / 100) * values), ("F32", values.T.copy())], strict=True)),
        )
        for i in range(3)
    )
    adapter = linear(tmp_path_factory.mktemp("adapter"))
    recipe = {"merge_method": "linear", "models": [str(one), str(other)]}
    done = alnico.merge(recipe, root / "done").path
    out = root / "out"
    return {
        "plan": lambda **given: alnico.plan(recipe, **given),
        "merge": lambda **given: alnico.merge(recipe, out, **given),
        "analyze": lambda **given: alnico.analyze([one, other], base=base, out=out, **given),
        "compare": lambda **given: alnico.compare([one], other, base=base, out=out, **given),
        "diff": lambda **given: alnico.diff(one, other, **given),
        "weights": lambda **given: alnico.norm_weights([one, other], base=base, **given),
        "suggest": lambda **given: alnico.suggest([one, other], base=base, **given),
        "verify": lambda **given: alnico.verify(done, **given),
        "reproduce": lambda **given: alnico.reproduce(done, **given),
        "extract": lambda **given: extract(one, base, out, **given),
        "combine": lambda **given: combine([adapter, adapter], out, **given),
        "fold": lambda **given: fold(base, adapter, out, **given),
    }


NAMES = [
    "plan",
    "merge",
    "analyze",
    "compare",
    "diff",
    "weights",
    "suggest",
    "verify",
    "reproduce",
    "extract",
    "combine",
    "fold",
]


@pytest.mark.parametrize("name", NAMES)
def test_threads_and_memory_that_no_run_can_have_are_errors(
    name: str, calls: dict[str, Callable[..., Any]]
) -> None:
    for threads in (0, -1, -LARGE, 1.5, True, "2", [1]):
        with pytest.raises(AlnicoError, match=r"threads is .*; expected a whole number of 1 or more"):
            calls[name](threads=threads)
    for memory in (
        0,
        -1,
        -LARGE,
        1.5,
        True,
        float("nan"),
        float("inf"),
        None,
        "1e400GiB",
        "-1GiB",
        "GiB",
        "",
        "2 GiB GiB",
        "\ud800",
    ):
        with pytest.raises(AlnicoError, match="is not a size; expected"):
            calls[name](memory=memory)


@pytest.mark.parametrize("name", ["diff", "verify", "extract"])
def test_more_than_any_machine_has_is_no_limit(name: str, calls: dict[str, Callable[..., Any]]) -> None:
    calls[name](threads=LARGE, memory=LARGE)
    calls["plan"](threads=LARGE, memory="9" * 500 + "TiB")


def test_threads_and_workers_of_a_search() -> None:
    for given in ({"threads": 0}, {"threads": "2"}, {"workers": 0}, {"workers": 1.5}, {"workers": True}):
        with pytest.raises(
            AlnicoError, match=r"(threads|workers) is .*; expected a whole number of 1 or more"
        ):
            alnico.search("search.yml", **given)  # type: ignore[arg-type]
