"""Claims about merges on GPUs, each checked in numba-cuda's simulator: ``python -m engine.simulated_merges CLAIM [METHOD...]``.

The simulator is chosen before numba is imported, so claims run in a process of their own (test_gpu_laws.py). It prints one
line of JSON for each method: its name, and what is wrong, empty if nothing is.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.devices import Device, made_gpus
from alnico.engine import measure
from alnico.engine.merge_session import Resident
from alnico.engine.run import run_plan
from alnico.engine.stages import close
from alnico.errors import NonFiniteError, ResourceError, RunError
from alnico.events import Event, Started, TensorDone
from alnico.kernels.cuda.memory import GpuMemory
from alnico.methods import registry
from alnico.methods.base import MatrixMethod
from alnico.run_options import RunOptions
from alnico.testing import MethodCase
from alnico.testing.small_models import random_models, write_model
from alnico.verification.devices import units_apart
from methods import sides
from methods.cases import MODELS, OVER_MODEL, SETTINGS, options

GPUS = (Device("cuda:0", "Made", 8 << 30), Device("cuda:1", "Made", 8 << 30))
SHAPES = {"rows": (9, 13), "vector": (37,), "stack": (2, 3, 5), "one": (1,)}
SMALL = 64
"""Larger tensors are searched for a kth largest value by their bits on a GPU, and by a sample on the processor."""

Bytes = Mapping[str, tuple[str, bytes]]


def cases(name: str) -> Iterator[tuple[str, MethodCase, str]]:
    """Every setting of a method, each in one dtype, in turn, with a name."""
    settings = [*SETTINGS.get(name, [{}]), *OVER_MODEL.get(name, [])]
    count = MODELS.get(name, (3,))[0]
    for i in range(max(len(settings), 3)):  # every dtype at least once
        setting = settings[i % len(settings)]
        dtype = ("BF16", "F32", "F64")[i % 3]
        yield (
            f"{setting} {dtype}",
            MethodCase(registry()[name], options(setting, count), count, sides.made),
            dtype,
        )


class Merges:
    """Merges of one case, on any device."""

    def __init__(self, case: MethodCase, dtype: str, folder: Path) -> None:
        base, models = random_models(SHAPES, case.models, growth=0.05)
        models[-1]["vector"][:9] = base["vector"][:9]
        self.folder = folder
        self.paths = [write_model(folder / f"m{i}", model, dtype) for i, model in enumerate(models)]
        self.base = write_model(folder / "base", base, dtype)
        self.case = case

    @property
    def recipe(self) -> dict[str, Any]:
        return self.case.recipe(self.paths, self.base, unrelated="allow")

    def on(self, device: str, watch: Callable[[Event], None] | None = None, threads: int = 2) -> Bytes:
        """Merge files into files."""
        plan = alnico.plan(self.recipe, device=device, threads=threads)
        try:
            run_plan(plan, self.folder / "out", overwrite=True, watch=watch)
        finally:
            close([plan])
        return tensors(self.folder / "out")


def tensors(folder: Path) -> Bytes:
    with alnico.open_model(folder) as model:
        found = {}
        for name, tensor in model.tensors.items():
            raw = bytearray(tensor.byte_size)
            model.read_into(name, 0, memoryview(raw))
            found[name] = tensor.dtype, bytes(raw)
        return found


def differences(expected: Bytes, found: Bytes, *, of_matrices: bool) -> list[str]:
    """What differs from the processor's merge: nothing, except in tensors that are made from whole matrices."""
    problems = [] if expected.keys() == found.keys() else [f"{sorted(found)}, not {sorted(expected)}"]
    for tensor in expected.keys() & found.keys():
        (dtype, first), (other, second) = expected[tensor], found[tensor]
        if dtype == other and (first == second or (of_matrices and are_near(first, second, dtype))):
            continue
        problems.append(f"{tensor}: {dtype} {first[:16].hex()}, {other} {second[:16].hex()}")
    return problems


def are_near(first: bytes, second: bytes, dtype: str) -> bool:
    """Do the numbers of whole matrices agree: in float64 to the tolerance of decision 17, else to a unit in the last place?"""
    a, b = (np.frombuffer(raw, np.uint8) for raw in (first, second))
    if dtype == "F64":
        x, y = a.view("f8"), b.view("f8")
        return bool(np.abs(x - y).max() <= 1e-9 * np.abs(x).max())
    return bool(units_apart(a, b, dtype).max() <= 1)


def files_on_one_gpu(merges: Merges) -> Iterator[Bytes]:
    yield merges.on("cuda")


def files_on_two_gpus(merges: Merges) -> Iterator[Bytes]:
    yield merges.on("cuda:all", threads=3)


def resumed(merges: Merges) -> Iterator[Bytes]:
    def interrupt(event: Event) -> None:
        if isinstance(event, TensorDone):
            raise KeyboardInterrupt

    try:
        merges.on("cuda", watch=interrupt, threads=1)
    except KeyboardInterrupt:
        yield merges.on("cuda")
    else:
        raise AssertionError("the merge was not interrupted")


def in_memory(merges: Merges) -> Iterator[Bytes]:
    """Tensors on the GPU are merged where they are, and stay there."""
    import torch

    from alnico.checkpoint.memory_model import to_torch
    from alnico.models.open_models import merge_open_models, open_models

    def state(folder: Path) -> dict[str, Any]:
        return {
            name: to_torch(np.frombuffer(bytearray(raw), np.uint8), dtype, SHAPES[name])
            for name, (dtype, raw) in tensors(folder).items()
        }

    places = dict.fromkeys([*merges.paths, merges.base])
    opened = open_models({str(path): state(path) for path in places})
    recipe = merges.recipe
    used = {entry["model"] for entry in recipe["models"]} | {recipe.get("base_model")}
    for label in opened.sources.keys() - used:
        opened.sources.pop(label)  # type: ignore[attr-defined]
    made = merge_open_models(opened, recipe, RunOptions.of(device="cuda", threads=2))
    assert all(isinstance(value, torch.Tensor) for value in made.values())
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
    yield {
        n: (names[v.dtype], v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for n, v in made.items()
    }


def resident(merges: Merges) -> Iterator[Bytes]:
    """Models that stay open are kept on the GPU, and each merge of them is made there."""
    import torch

    from alnico.checkpoint.open_model import open_model
    from alnico.recipe.load import load_recipe

    with Resident(open_model, run=RunOptions.of(device="cuda", threads=2)) as models:
        for _ in range(2):
            plan = models.plan(load_recipe(merges.recipe))
            made = models.merge(plan)
            assert all(isinstance(raw, torch.Tensor) for raw in made.values())
            yield {job.name: (job.dtype, made[job.name].numpy().tobytes()) for job in plan.jobs}


CLAIMS: Mapping[str, Callable[[Merges], Iterator[Bytes]]] = {
    claim.__name__: claim for claim in (files_on_one_gpu, files_on_two_gpus, resumed, in_memory, resident)
}


def problems_of(name: str, claim: Callable[[Merges], Iterator[Bytes]]) -> list[str]:
    problems = []
    for label, case, dtype in cases(name):
        with tempfile.TemporaryDirectory() as folder:
            try:
                of_matrices = isinstance(case.bind(), MatrixMethod)
                merges = Merges(case, dtype, Path(folder))
                expected = merges.on("cpu")
                for found in claim(merges):
                    problems += [
                        f"{label}: {text}" for text in differences(expected, found, of_matrices=of_matrices)
                    ]
            except Exception:
                problems.append(f"{label}: {traceback.format_exc()[-1500:]}")
    return problems


def kernel_fails(folder: Path) -> None:
    """An error of the driver in the middle of a merge keeps the unfinished output, which the same command resumes."""
    merges = Merges(MethodCase(registry()["linear"], {}, 2), "F32", folder)
    real, finished = GpuMemory.launch, []

    def launch(self: GpuMemory, *arguments: Any, **more: Any) -> None:
        if finished:
            raise ResourceError(f"{self.device.name}: [719] CUDA_ERROR_LAUNCH_FAILED")
        real(self, *arguments, **more)

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            finished.append(event)

    GpuMemory.launch = launch  # type: ignore[method-assign]
    try:
        with pytest.raises(RunError) as caught:
            merges.on("cuda", watch=watch, threads=1)
        assert str(caught.value) == (
            f"{list(SHAPES)[1]} of {folder}/m0, {folder}/m1: cuda:0 (Made, 8.6 GB) failed (cuda:0: [719] CUDA_ERROR_LAUNCH_FAILED). The same command "
            "resumes the merge; if it fails again, end other programs that use the GPU, or merge with --device cpu --restart."
        )
    finally:
        GpuMemory.launch = real  # type: ignore[method-assign]
    assert not (folder / "out").exists()
    resumed = []
    found = merges.on(
        "cuda", watch=lambda event: resumed.append(event) if isinstance(event, Started) else None
    )
    assert [event.resumed for event in resumed] == [1]
    assert found == merges.on("cpu")


def not_finite(folder: Path) -> None:
    """A NaN in a model is named as on the processor, and nothing is left behind."""
    merges = Merges(MethodCase(registry()["linear"], {}, 2), "F32", folder)
    write_model(folder / "m1", {**random_models(SHAPES, 1)[0], "rows": np.full((9, 13), np.nan, np.float32)})
    for device in ("cpu", "cuda"):
        with pytest.raises(NonFiniteError) as caught:
            merges.on(device)
        assert str(caught.value) == (
            f"rows[0, 0]: {folder}/m1 has NaN; expected finite numbers. Repair or exclude this model."
        )
        assert [path for path in folder.iterdir() if "out" in path.name] == []


def too_large(folder: Path) -> None:
    """A number that the output dtype cannot hold is named as on the processor."""
    merges = Merges(
        MethodCase(registry()["linear"], {"weight": [1e30, 1e30], "normalize": False}, 2), "F16", folder
    )
    messages = []
    for device in ("cpu", "cuda"):
        with pytest.raises(NonFiniteError) as caught:
            merges.on(device, threads=1)
        messages.append(str(caught.value))
    assert len(set(messages)) == 1, messages
    assert "the merge gives an infinity in F16" in messages[0], messages


def weights_from_norms(folder: Path) -> None:
    """Norms are measured on the GPU, to the bits of the processor, for weights of models and of tensors."""
    for per in ("model", "tensor"):
        weight = {"from": "l2_norm", "per": per}
        merges = Merges(
            MethodCase(registry()["task_arithmetic"], {"weight": weight}, 3), "BF16", folder / per
        )
        assert merges.on("cpu") == merges.on("cuda:all")


def stored_task_vectors(folder: Path) -> None:
    """Task vectors are read as differences, and added to the base on the GPU."""
    merges = Merges(MethodCase(registry()["task_arithmetic"], {"weight": [0.5, 0.25]}, 2), "F32", folder)
    references = []
    for path in merges.paths:
        vector = folder / f"{path.name}-vector"
        alnico.TaskVector(path, merges.base).save(vector)
        references.append(f"{merges.base}+{vector}")
    recipe = {**merges.recipe, "models": [{"model": r} for r in references]}
    found = []
    for device in ("cpu", "cuda"):
        alnico.merge(recipe, folder / device, device=device)
        found.append(tensors(folder / device))
    assert found[0] == found[1]


OTHERS: Mapping[str, Callable[[Path], None]] = {
    check.__name__: check
    for check in (kernel_fails, not_finite, too_large, weights_from_norms, stored_task_vectors)
}


def main(claim: str, *names: str) -> None:
    measure.SMALL = SMALL
    with made_gpus(GPUS):
        if claim in OTHERS:
            with tempfile.TemporaryDirectory() as folder:
                OTHERS[claim](Path(folder))
            return
        for name in names or registry():
            print(json.dumps([name, problems_of(name, CLAIMS[claim])]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
