"""Whole matrices merged by torch, on its device `cpu` always and on a GPU where there is one, agree with the processor's."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.devices import Device, devices_for, made_gpus
from alnico.engine import matrix, matrix_gpu
from alnico.engine.matrix_gpu import MatrixGpu, MatrixRoom
from alnico.engine.merge_session import Resident
from alnico.engine.planner import Planner
from alnico.errors import MethodError, NonFiniteError, ResourceError, RunError
from alnico.methods import registry
from alnico.methods.base import MatrixMethod, combine, method
from alnico.methods.regmean import solve
from alnico.numerics.arrays import AnyArray, is_numpy, to_numpy, to_torch
from alnico.numerics.decompositions import leading_vectors
from alnico.numerics.dtypes import FLOAT8, MERGEABLE, decode
from alnico.numerics.low_rank import Decomposed
from alnico.plan.memory import BASELINE_BYTES, CUDA_BYTES
from alnico.recipe.load import load_recipe
from alnico.run_options import RunOptions
from engine.test_matrix_store import models, recipe
from made import read_model, save_model
from made_gpus import MADE, gpu
from methods.merging import recipe_for, write_inputs
from methods.test_whole_matrices import KINDS, SETTINGS, MadeMatrices, bound, made, random_deltas

__all__ = ["gpu"]

WITHIN = 1e-9
"""The tolerance that docs/decisions/0017 states: the share of a matrix's largest entry."""


class TensorMatrices(MadeMatrices):
    """Matrices on a device, as :class:`alnico.engine.matrix.JobMatrices` gives them to methods there."""

    def __init__(self, values: Sequence[np.ndarray], device: str, *, is_transposed: bool = False) -> None:
        super().__init__(values, is_transposed=is_transposed)
        self._device = device

    def value(self, model: int) -> AnyArray:
        return to_torch(super().value(model), self._device)

    def leading(self, model: int, count: int) -> Decomposed:
        return leading_vectors(self.value(model), count)

    def kept(self, _name: Hashable, _models: Sequence[int], make: Callable[[], Any]) -> Any:
        return tuple(a if a.ndim == 2 else to_numpy(a) for a in make())


def assert_near(found: np.ndarray, wanted: np.ndarray, within: float = WITHIN) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=within * np.abs(wanted).max(initial=1e-300))


def within(options: dict[str, Any]) -> float:
    """WUDI divides by eigenvalues down to 1e-12 of the largest."""
    return 1e-8 if options.get("filter") == "all" else WITHIN


@pytest.mark.parametrize("kind", [*KINDS, "one row", "one column"])
def test_every_method_agrees_with_the_processor(kind: str, gpu: str) -> None:
    shape = {"one row": (3, 1, 80, None), "one column": (3, 80, 1, None)}
    deltas = random_deltas(*(KINDS | shape)[kind])
    weights = [1.0, -0.5, 0.7, 1.3, 0.2, 1.1, 0.9, 1.0, 0.4, 0.8, 1.2, 0.6][: len(deltas)]
    for name, options in SETTINGS:
        given = {**options, "weight": weights, "scale": 1.1}
        if not isinstance(registry()[name].bind(given, len(deltas)), MatrixMethod):
            continue
        for turned in (False, True):
            values = [d.T.copy() for d in deltas] if turned else deltas
            found = made(name, given, TensorMatrices(values, gpu, is_transposed=turned))
            expected = made(name, given, MadeMatrices(values, is_transposed=turned))
            assert_near(to_numpy(found), expected, within(options))


def test_every_whole_matrix_method_of_the_registry_runs_on_a_gpu() -> None:
    names = set()
    for name, found in registry().items():
        least, most = found.models
        count = min(max(2, least), most or max(2, least))
        required = (o for o in found.options.values() if o.required)
        given = {o.name: ("made",) * count if o.kind == "statistics" else 0.5 for o in required}
        one = found.bind(given, count) if found.is_own else None
        if isinstance(one, MatrixMethod):
            assert one.runs_on_gpu, name
            names.add(name)
    assert names == {name for name, _ in SETTINGS} | {"regmean"}


def test_zeros_copies_and_weights_of_0_are_treated_as_on_the_processor(gpu: str) -> None:
    one, two = random_deltas(2, 70, 66)
    nothing = np.zeros_like(one)
    for name, options in SETTINGS:
        for values, weight in (
            ([one, nothing, two], [1.0, 1.0, 1.0]),
            ([one, two, one.copy()], [1.0, 1.0, 0.5]),
            ([one, two, one + 1e-3 * two], [1.0, 1.0, 1.0]),
            ([one, -one, two], [1.0, 1.0, 0.0]),
            ([one, one.copy(), two], [1.0, -1.0, 0.0]),
        ):
            given = {**options, "weight": weight}
            here, there = MadeMatrices(values), TensorMatrices(values, gpu)
            found, expected = to_numpy(made(name, given, there)), made(name, given, here)
            assert np.abs(found - expected).max() <= within(options) * max(np.abs(v).max() for v in values)
            assert there.notes == here.notes
        assert not made(name, options, TensorMatrices([nothing, nothing], gpu)).any()


def test_extreme_magnitudes_agree_with_the_processor(gpu: str) -> None:
    for unit in (1e-150, 1e150):
        deltas = [unit * d for d in random_deltas(3, 90, 70)]
        for name, options in SETTINGS:
            found = made(name, options, TensorMatrices(deltas, gpu))
            assert_near(to_numpy(found), made(name, options, MadeMatrices(deltas)), within(options))


def test_the_parts_of_the_models_agree_with_the_processor(gpu: str) -> None:
    deltas = random_deltas(3, 70, 66)
    values = [*deltas, deltas[0].copy(), deltas[1]]
    for name in ("tsv", "dc_merge", "swudi", "svd"):
        found = bound(name, {"weight": [1.0, 0.3, -2.0, 1.5, 0.0]}, 5)
        assert found.parts is not None
        here, there = MadeMatrices(values), TensorMatrices(values, gpu)
        for a, b in zip(
            found.parts(there, *found.arguments), found.parts(here, *found.arguments), strict=True
        ):
            assert_near(to_numpy(a), b)


class GramMatrices(MadeMatrices):
    """Matrices with a Gram matrix each, on the processor or a device."""

    def __init__(self, values: Sequence[np.ndarray], grams: Sequence[np.ndarray], device: str = "") -> None:
        super().__init__(values)
        self._grams = grams
        self._place = (lambda a: to_torch(a.copy(), device)) if device else np.copy

    def value(self, model: int) -> AnyArray:
        return self._place(self.values[model])

    def side(self, _kind: str, model: int) -> AnyArray:
        return self._place(self._grams[model])


@pytest.mark.parametrize("inputs", ["full", "few", "zeros"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_regmean_agrees_with_the_processor(inputs: str, is_transposed: bool, gpu: str) -> None:
    random = np.random.default_rng(1)
    values = [random.standard_normal((40, 60) if is_transposed else (60, 40)) for _ in range(3)]
    rows = {"full": 200, "few": 10, "zeros": 0}[inputs]
    seen = [random.standard_normal((rows, 40)) + 1 for _ in range(3)]
    grams = [x.T @ x for x in seen]
    arguments = ((1.0, 0.5, 2.0), (1.0, 1.0, 1.0), (float(is_transposed),) * 3, 0.9, 1e-6)
    found = solve(GramMatrices(values, grams, gpu), *arguments)
    # The solution is as exact as the matrix is well-conditioned: its ridge is 1e-6.
    assert_near(to_numpy(found), solve(GramMatrices(values, grams), *arguments), 1e-8)


def test_regmean_refuses_what_has_no_inverse_in_the_same_words(gpu: str) -> None:
    values, seen = [np.ones((3, 2))] * 2, np.diag([1.0, 0.0])
    arguments = ((1.0, 1.0), (1.0, 1.0), (0.0, 0.0), 1.0, 0.0)
    said = []
    for device in ("", gpu):
        with pytest.raises(MethodError) as refused:
            solve(GramMatrices(values, [seen, seen], device), *arguments)
        said.append(str(refused.value))
    assert said[0] == said[1]


def merge(given: dict[str, Any], out: Path, device: str, **options: Any) -> dict[str, np.ndarray]:
    run = RunOptions.of(device=device, **{"threads": 2, **options})
    planner = Planner.of(run, DEFAULT_MAX_SHARD_BYTES)
    planner.merge(load_recipe(given), out, overwrite=True, restart=True)
    return read_model(out)


SHAPES = {
    "square": (72, 72), "tall": (150, 70), "wide": (30, 200), "row": (1, 90),
    "experts.weight": (3, 20, 40), "conv.weight": (10, 3, 2, 2),
}  # fmt: skip
UNITS = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Half of the last place, as a share of the number."""


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.usefixtures("gpu")
def test_a_merge_of_files_differs_in_the_last_place_at_most(dtype: str, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    base = {n: random.standard_normal(s) for n, s in SHAPES.items()}
    tuned = [{n: v + 0.1 * random.standard_normal(v.shape) for n, v in base.items()} for _ in range(3)]
    base_path, paths = write_inputs(tmp_path, base, tuned, dtype)
    for name, options in SETTINGS:
        given = recipe_for(name, paths, base_path, options)
        here, there = (merge(given, tmp_path / f"out-{d}", d) for d in ("cpu", "cuda"))
        assert here.keys() == there.keys()
        for tensor, expected in here.items():
            wide, found = expected.astype(np.float64), there[tensor].astype(np.float64)
            allowed = np.maximum(within(options) * np.abs(wide).max(), 2 * UNITS[dtype] * np.abs(wide))
            assert (np.abs(found - wide) <= allowed).all(), (name, tensor)


@pytest.mark.parametrize("dtype", MERGEABLE)
@pytest.mark.usefixtures("gpu")
def test_every_dtype_is_decoded_exactly(dtype: str) -> None:
    raw = (
        np.arange(256, dtype=np.uint8).repeat(8) if dtype in FLOAT8 else np.random.default_rng(0).bytes(4096)
    )
    raw = np.frombuffer(bytes(raw), np.uint8).copy()
    with np.errstate(invalid="ignore"):  # a signalling NaN
        expected = decode(raw, dtype).astype(np.float64)
    found = MatrixGpu(devices_for("merging", "cuda")[0]).decoded(raw, dtype).double()
    np.testing.assert_array_equal(to_numpy(found), expected)


@pytest.mark.usefixtures("gpu")
def test_models_are_read_once_and_hashed_as_on_the_processor(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    for device in ("cpu", "cuda"):
        merge(recipe(base, tuned, least=0.5), tmp_path / device, device)
    here, there = (json.loads((tmp_path / d / "alnico.lock.json").read_text()) for d in ("cpu", "cuda"))
    assert here["inputs"] == there["inputs"]


@pytest.mark.usefixtures("gpu")
def test_what_is_kept_of_a_gpu_is_not_used_on_the_processor_and_changes_no_bit_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = models(tmp_path)
    given, found = recipe(base, tuned), []
    real = matrix.leading_vectors
    monkeypatch.setattr(matrix, "leading_vectors", lambda value, count: found.append(is_numpy(value)) or real(value, count))  # fmt: skip
    expected = {d: merge(given, tmp_path / "out", d) for d in ("cpu", "cuda")}
    for device in ("cuda", "cpu", "cuda", "cpu"):
        out = merge(given, tmp_path / "out", device, factor_cache=tmp_path / "cache")
        assert all(out[n].tobytes() == v.tobytes() for n, v in expected[device].items())
    assert found == [True] * 9 + [False] * 9 + [False] * 9 + [True] * 9


@pytest.mark.usefixtures("gpu")
def test_what_a_search_keeps_in_memory_is_for_one_kind_of_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = models(tmp_path)
    found: list[bool] = []
    real = matrix.leading_vectors
    monkeypatch.setattr(matrix, "leading_vectors", lambda value, count: found.append(is_numpy(value)) or real(value, count))  # fmt: skip
    devices = {d: devices_for("merging", d) for d in ("cpu", "cuda")}
    expected = {d: merge(recipe(base, tuned), tmp_path / "out", d) for d in devices}
    found.clear()
    with Resident(open_model, run=RunOptions(threads=1)) as resident:
        for device in ("cuda", "cpu", "cuda", "cpu"):
            plan = resident.plan(load_recipe(recipe(base, tuned)))
            merged = resident.merge(dataclasses.replace(plan, devices=devices[device]))
            for name, values in expected[device].items():
                assert to_numpy(merged[name]).tobytes() == values.tobytes()
    assert found == [False] * 9 + [True] * 9


@pytest.mark.usefixtures("gpu")
def test_numbers_that_are_not_finite_are_refused_in_the_same_words(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    wrong = {n: v.copy() for n, v in read_model(tuned[1]).items()}
    wrong["wide"][7, 3] = np.inf
    save_model(tuned[1], {n: ("F32", v) for n, v in wrong.items()})
    said = []
    for device in ("cpu", "cuda"):
        with pytest.raises(NonFiniteError) as refused:
            merge({**recipe(base, tuned), "unrelated": "allow"}, tmp_path / "out", device)
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert "wide[7, 3]" in said[0]


def test_a_gpu_that_fills_up_while_merging_is_an_error_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = models(tmp_path)

    def full(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(matrix, "leading_vectors", full)
    with made_gpus([MADE]), pytest.raises(RunError) as refused:
        merge(recipe(base, tuned), tmp_path / "out", "cuda", threads=1)
    assert (tmp_path / ".out.alnico-part").exists()  # the same command resumes it
    assert str(refused.value).partition(": ")[2] == (
        "as a whole matrix it needs about 268.8 MB of cuda:0 (Made, 8.6 GB), whose memory is full (CUDA out of memory). "
        "End other programs that use the GPU, or choose the device cpu."
    )


def test_several_gpus_take_different_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = models(tmp_path)
    used: list[str] = []
    barrier = threading.Barrier(2, timeout=60)
    real = MatrixRoom.taken

    def taken(self: MatrixRoom, device: Device, *rest: Any, **options: Any) -> Any:
        used.append(device.name)
        if len(used) <= 2:
            barrier.wait()
        return real(self, device, *rest, **options)

    monkeypatch.setattr(MatrixRoom, "taken", taken)
    with made_gpus([MADE, Device("cuda:1", "Made", 8 << 30)]):
        merge(recipe(base, tuned), tmp_path / "out", "cuda:all", threads=2)
    assert set(used) == {"cuda:0", "cuda:1"}
    assert len(used) == 3


def test_a_gpu_takes_no_more_matrices_at_once_than_it_holds() -> None:
    room, small = MatrixRoom(), Device("cuda:0", "Small", 700 << 20)
    at_once, most = 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal at_once, most
        with room.taken(small, "fc.weight", 300 << 20):
            with lock:
                at_once += 1
                most = max(most, at_once)
            pause.wait(0.2)
            with lock:
                at_once -= 1

    pause = threading.Event()
    with made_gpus([small]):
        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 2


def test_a_stream_begins_when_the_tensors_of_the_caller_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    own = SimpleNamespace(wait_stream=lambda other: calls.append(("waits for", other)))
    cuda = SimpleNamespace(
        device=nullcontext,
        Stream=lambda: own,
        current_stream=lambda: "the caller's",
        stream=lambda stream: nullcontext(calls.append(stream)),
    )
    monkeypatch.setattr(matrix_gpu, "_streams", threading.local())
    for _ in range(2):
        with matrix_gpu._stream(SimpleNamespace(cuda=cuda), Device("cuda:0", torch_name="cuda:0")):
            calls.append("computes")
    assert calls == 2 * [("waits for", "the caller's"), own, "computes"]


def test_a_method_of_numpy_alone_stays_on_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[type] = []

    def numpy_only() -> MatrixMethod:
        """Take the first task vector."""

        def make(matrices: Any) -> np.ndarray:
            seen.append(type(matrices.value(0)))
            return np.array(matrices.value(0))

        return MatrixMethod(make, lambda rows, columns, *_: 3 * rows * columns, combine((0.0, 0.0)))

    made_here = method(space="delta", source="an example")(numpy_only)
    monkeypatch.setitem(registry().others, "numpy_only", made_here)
    base, tuned = models(tmp_path)
    given = {
        "merge_method": "numpy_only",
        "base_model": str(base),
        "models": [{"model": str(t)} for t in tuned[:2]],
    }
    with made_gpus([MADE]):
        merge(given, tmp_path / "out", "cuda")
    assert set(seen) == {np.ndarray}


def test_the_processor_imports_no_torch(tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    program = (
        "import sys, alnico\n"
        f"alnico.merge({recipe(base, tuned)!r}, {str(tmp_path / 'out')!r})\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_matrices_on_a_gpu_need_no_memory_of_the_processor_but_for_what_is_kept(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    base = {"large": random.standard_normal((2100, 2000)).astype(np.float32)}
    base_path, paths = write_inputs(tmp_path, base, [base, base])
    given = {**recipe_for("tsv", paths, base_path, {})}
    needs = {}
    with made_gpus([MADE]):
        for name, options in (
            ("cpu", {"device": "cpu"}),
            ("gpu", {"device": "cuda"}),
            ("kept", {"device": "cuda", "factor_cache": tmp_path / "cache"}),
        ):
            run = RunOptions.of(threads=1, memory="8GiB", **options)
            plan = Planner.of(run, DEFAULT_MAX_SHARD_BYTES).plan(load_recipe(given))
            needs[name] = plan.memory.peak_bytes
            assert (plan.memory.gpu_bytes > 900 << 20) == (name != "cpu")
    factors = 8 * (2100 + 2000) * 2000
    assert needs["kept"] - needs["gpu"] == 2 * factors
    assert needs["gpu"] < (BASELINE_BYTES + CUDA_BYTES) + (100 << 20)
    with made_gpus([Device("cuda:0", "Tiny", 900 << 20)]), pytest.raises(ResourceError) as refused:
        Planner.of(RunOptions.of(device="cuda"), DEFAULT_MAX_SHARD_BYTES).plan(load_recipe(given))
    assert str(refused.value).startswith("plan: the merge merges large as a whole matrix, which takes ")
