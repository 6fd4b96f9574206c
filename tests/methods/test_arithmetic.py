"""What the caller has set in the process changes no bit (law 2), and is as it was afterwards."""

from __future__ import annotations

import ctypes
import ctypes.util
import dataclasses
import pickle
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import alnico
from alnico.errors import AlnicoError, NonFiniteError
from alnico.methods import registry
from alnico.numerics import arithmetic
from made import model_bytes
from methods.cases import MODELS, SETTINGS, compiles, options
from methods.merging import recipe_for, write_inputs
from methods.sides import with_statistics

pytestmark = pytest.mark.usefixtures("compiled")

if sys.platform != "linux":
    pytest.skip("modes are set with the numbers of Linux", allow_module_level=True)

LIBM = ctypes.CDLL(ctypes.util.find_library("m"))
ROUNDING = {"up": 0x800, "down": 0x400, "to zero": 0xC00}  # fenv.h of x86
MODES = ["flush to zero", *(ROUNDING if platform.machine() == "x86_64" else ())]


@contextmanager
def mode(name: str) -> Iterator[None]:
    """Set the calling thread as a caller might; afterwards it must still be set."""
    if name == "flush to zero":
        torch.set_flush_denormal(True)
    else:
        LIBM.fesetround(ROUNDING[name])
    try:
        yield
        assert is_set(name), "the caller's mode was changed"
    finally:
        torch.set_flush_denormal(False)
        LIBM.fesetround(0)


def is_set(name: str) -> bool:
    tiny = np.float64(5e-324)
    return bool(tiny * 2 == 0) if name == "flush to zero" else LIBM.fegetround() == ROUNDING[name]


def count_of(name: str) -> int:
    return MODELS.get(name, (3,))[0]


def small(
    count: int, scale: float, seed: int = 0
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Models whose values, differences and sums are below the smallest normal number in part."""
    random = np.random.default_rng(seed)
    base = {"l.weight": random.standard_normal((12, 40)) * scale, "n": random.standard_normal(9)}
    return base, [
        {n: v * (1 + 0.2 * random.standard_normal(v.shape)) for n, v in base.items()} for _ in range(count)
    ]


def in_memory(name: str, dtype: Any, statistics: dict[str, Any]) -> Callable[[], dict[str, bytes]]:
    scale = {torch.float16: 1e-6, torch.float64: 1e-308}.get(dtype, 1e-38)
    base, models = small(count_of(name), scale)
    bits = [{n: torch.tensor(v).to(dtype) for n, v in m.items()} for m in (base, *models)]
    start = {"first": bits[1], "unused": None}.get(registry()[name].base, bits[0])

    def merge() -> dict[str, bytes]:
        made = alnico.merge_state_dicts(
            bits[1:], name, base=start, unrelated="allow", threads=2, **statistics
        )
        return {n: v.reshape(-1).view(torch.uint8).numpy().tobytes() for n, v in made.items()}

    return merge


@pytest.mark.parametrize("name", [pytest.param(n, marks=compiles(n)) for n in registry()])
def test_no_mode_of_floating_point_changes_a_bit(name: str, tmp_path: Path) -> None:
    count = count_of(name)
    given = options(SETTINGS[name][-1], count)
    base, models = small(count, 1e-38)
    base_path, paths = write_inputs(tmp_path, base, models, "F32")
    recipe = recipe_for(
        name, paths, paths[0] if registry()[name].base == "first" else base_path, given, unrelated="allow"
    )
    has_statistics = bool({"fisher", "gram"} & given.keys())  # these are of the models on disk
    kinds = () if has_statistics else (torch.float16, torch.bfloat16, torch.float64)
    merges = {str(dtype): in_memory(name, dtype, with_statistics(given, paths)) for dtype in kinds}
    expected = {kind: merge() for kind, merge in merges.items()}
    alnico.merge(recipe, tmp_path / "plain")
    for one in MODES:
        with mode(one):
            found = {kind: merge() for kind, merge in merges.items()}
            alnico.merge(recipe, tmp_path / one, threads=2)
        assert found == expected, one
        assert model_bytes(tmp_path / one) == model_bytes(tmp_path / "plain"), one
    if not has_statistics:
        values = np.frombuffer(expected["torch.float64"]["l.weight"])
        assert (np.abs(values[values != 0]) < np.finfo(np.float64).tiny).any(), "nothing here is subnormal"


def two(scale: float = 1e-38) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    base, (tuned,) = small(1, scale)
    return {n: v.astype(np.float32) for n, v in base.items()}, {
        n: v.astype(np.float32) for n, v in tuned.items()
    }


TWO = two()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    base, tuned = two()
    base_path, (path,) = write_inputs(tmp_path_factory.mktemp("two"), base, [tuned])
    return str(base_path), str(path)


def task_vectors(base: Any, tuned: Any) -> Any:
    tau = alnico.TaskVector(tuned, base)
    made = (base + 0.3 * tau / 3).state_dict()
    return tau.norm(), tau.cosine(0.5 * tau + tau), {n: v.tobytes() for n, v in made.items()}


def searched(base: Any, tuned: Any) -> Any:
    seen = []
    alnico.search_scales(
        base, [tuned], lambda made: seen.append(made["l.weight"].tobytes()) or 1.0, 2, unrelated="allow"
    )
    return seen


def extracted(base: str, tuned: str, out: Path) -> bytes:
    alnico.lora.extract(tuned, base, out, rank=3)
    return (out / "adapter_model.safetensors").read_bytes()


def verified(base: str, tuned: str, out: Path) -> bool:
    alnico.merge(
        {"merge_method": "ties", "base_model": base, "models": [tuned], "parameters": {"density": 0.5}}, out
    )
    with mode("flush to zero"):
        return not alnico.verify(out, against_inputs=True).unchecked


def asked(what: str, base: str, tuned: str, out: Path) -> Any:
    if what == "task vectors":
        return task_vectors(*TWO)
    if what == "search_scales":
        return searched(*TWO)
    if what == "analyze":
        return [repr(t) for t in alnico.analyze([tuned], base=base).tensors]
    if what == "diff":
        return repr(dataclasses.replace(alnico.diff(base, tuned), seconds=0.0))
    if what == "weights":
        return repr(alnico.norm_weights([tuned, f"{tuned}/"], base=base).weights)
    if what == "extract":
        return extracted(base, tuned, out)
    models = [{"model": "a", "parameters": {"weight": [0.1, 1e-310]}}]
    return pickle.dumps(alnico.load_recipe({"merge_method": "linear", "models": models}))


WHAT = ["task vectors", "search_scales", "analyze", "diff", "weights", "extract", "a gradient"]


@pytest.mark.parametrize("what", WHAT)
def test_what_is_measured_is_the_same_in_every_mode(
    what: str, files: tuple[str, str], tmp_path: Path
) -> None:
    expected = asked(what, *files, tmp_path / "plain")
    for one in MODES:
        with mode(one):
            found = asked(what, *files, tmp_path / one)
        assert found == expected, one


def test_what_was_merged_verifies_in_a_process_that_flushes_to_zero(
    files: tuple[str, str], tmp_path: Path
) -> None:
    assert verified(*files, tmp_path / "out")


def test_the_mode_of_the_caller_is_the_same_after_an_error() -> None:
    bad = {"w": np.array([1.0, np.nan], np.float32)}
    for one in MODES:
        with mode(one), pytest.raises(NonFiniteError):
            alnico.merge_state_dicts([bad, bad], weights=[0.4, 0.6])


def test_functions_of_the_caller_run_in_the_callers_mode() -> None:
    found = []

    def score(_: Any) -> float:
        found.append((is_set("flush to zero"), np.geterr()["under"]))
        return 1.0

    with mode("flush to zero"), np.errstate(under="raise"):
        alnico.search_scales(TWO[0], [TWO[1]], score, 1, unrelated="allow")
    assert found == [(True, "raise")]


def test_every_public_function_that_computes_sets_its_mode() -> None:
    """Methods (of recipes) and what only moves files are left out."""
    free = {
        "make_recipe",
        "recipe",
        "method",
        "methods",
        "push",
        "sign",
        "recalibrate_batchnorm",
        "warm",
    }  # make_recipe and recipe write text, in recalibrate_batchnorm torch alone computes, and warm compiles what others run
    functions = {
        n: getattr(alnico, n) for n in alnico.__all__ if n[0].islower() and n not in ("lora", "errors")
    } | {n: getattr(alnico.lora, n) for n in alnico.lora.__all__ if n[0].islower()}
    made_by = arithmetic.ieee_arithmetic()(lambda: None).__code__

    def sets_mode(function: Any) -> bool:
        while function is not None and getattr(function, "__code__", None) is not made_by:
            function = getattr(function, "__wrapped__", None)  # counts_compiling wraps it once more
        return function is not None

    bare = {n for n, f in functions.items() if not sets_mode(f)}
    assert bare == free


def test_a_system_that_cannot_set_the_mode_refuses_to_compute_in_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arithmetic, "_library", lambda: None)
    values = {"w": np.ones(3, np.float32)}
    alnico.merge_state_dicts([values, values])
    with (
        mode("flush to zero"),
        pytest.raises(AlnicoError, match="flushes small numbers to zero, or does not round to nearest"),
    ):
        alnico.merge_state_dicts([values, values])


# ---- other things that a process may have set ---------------------------------------------------------------------------


@contextmanager
def numpy_raises() -> Iterator[None]:
    before = np.seterr(all="raise")
    try:
        yield
        assert set(np.geterr().values()) == {"raise"}
    finally:
        np.seterr(**before)


@contextmanager
def warnings_raise() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def defaults_of_torch() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            torch.use_deterministic_algorithms(True)
            yield
        assert torch.get_default_dtype() == torch.float64
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(before)


@contextmanager
def python_is_odd() -> Iterator[None]:
    import decimal
    import random

    digits, depth = sys.get_int_max_str_digits(), sys.getrecursionlimit()
    random.seed(5)
    state = random.getstate()
    with decimal.localcontext() as context:
        context.prec = 1
        sys.set_int_max_str_digits(700)
        try:
            yield
            assert random.getstate() == state
            assert (sys.get_int_max_str_digits(), sys.getrecursionlimit()) == (700, depth)
        finally:
            sys.set_int_max_str_digits(digits)


STATES = [numpy_raises, warnings_raise, defaults_of_torch, python_is_odd]


@pytest.mark.parametrize("name", [pytest.param(n, marks=compiles(n)) for n in registry()])
def test_nothing_else_that_is_set_in_the_process_changes_a_bit_or_stops_a_merge(
    name: str, tmp_path: Path
) -> None:
    count = count_of(name)
    given = options(SETTINGS[name][-1], count)
    base, models = small(count, 1e-38)
    base_path, paths = write_inputs(tmp_path, base, models, "F32")
    recipe = recipe_for(
        name, paths, paths[0] if registry()[name].base == "first" else base_path, given, unrelated="allow"
    )
    merges = (
        []
        if {"fisher", "gram"} & given.keys()
        else [in_memory(name, torch.float16, given), in_memory(name, torch.float64, given)]
    )
    expected = [merge() for merge in merges]
    alnico.merge(recipe, tmp_path / "plain")
    for state in STATES:
        with state():
            found = [merge() for merge in merges]
            alnico.merge(recipe, tmp_path / state.__name__)
        assert found == expected, state.__name__
        assert model_bytes(tmp_path / state.__name__) == model_bytes(tmp_path / "plain"), state.__name__


@pytest.mark.parametrize("what", WHAT)
def test_nothing_else_changes_what_is_measured(what: str, files: tuple[str, str], tmp_path: Path) -> None:
    expected = asked(what, *files, tmp_path / "plain")
    for state in STATES:
        with state():
            found = asked(what, *files, tmp_path / state.__name__)
        assert found == expected, state.__name__


def test_an_overflow_is_an_error_of_ours_where_numpy_raises() -> None:
    large = {"w": np.full(8, 3e38, np.float32)}
    for state in (numpy_raises, warnings_raise):
        with state(), pytest.raises(NonFiniteError, match=r"w\[0\]: the merge gives an infinity in F32"):
            alnico.merge_state_dicts([large, large], weights=[1.0, 1.0], normalize=False)
