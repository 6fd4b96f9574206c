"""AdaMerging on devices: made GPUs, which are torch's processor, learn the same coefficients; memory that runs out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from made_modules import Small
from transformers import BertModel

import alnico
from alnico.devices import Device, made_gpus
from alnico.errors import EvaluationError, ResourceError
from alnico.events import BatchHalved
from alnico.tune import task_vectors
from made_tasks import Made

GPU = Device("cuda:0", "Made", 8 << 30)
OTHER = Device("cuda:1", "Made", 8 << 30)
Run = Callable[..., tuple[int, str, str]]


def bytes_of(made: Made) -> int:
    """The base in float32."""
    return 4 * sum(p.numel() for p in BertModel.from_pretrained(made.base).parameters())


def equal(one: alnico.AdaMergingResult, other: alnico.AdaMergingResult) -> bool:
    return (
        one.coefficients.tolist() == other.coefficients.tolist()
        and [s.loss for s in one.steps] == [s.loss for s in other.steps]
        and one.recipe == other.recipe
    )


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1", "cuda:all"])
def test_a_gpu_learns_the_coefficients_of_the_processor(made: Made, device: str) -> None:
    options: dict[str, Any] = {"base": made.base, "tasks": made.valid, "steps": 4, "learning_rate": 0.02}
    expected = alnico.adamerge(made.references, device="cpu", **options)
    with made_gpus([GPU, OTHER]):
        found = alnico.adamerge(made.references, device=device, **options)
    assert equal(found, expected)
    name = "cuda:1" if device == "cuda:1" else "cuda:0"
    assert found.data()["device"].startswith(f"{name} (Made, 8.6 GB)")
    assert (found.data()["dtype"], expected.data()["device"], expected.data()["dtype"]) == (
        "float32",
        "cpu",
        "float32",
    )


@pytest.mark.parametrize("options", [{"plus": True}, {"per": "task", "memory": 1}])
def test_other_parts_and_less_memory_learn_the_same(made: Made, options: dict[str, Any]) -> None:
    options = {"base": made.base, "tasks": made.valid, "steps": 2, "learning_rate": 0.02, **options}
    expected = alnico.adamerge(made.references, device="cpu", **options)
    with made_gpus([GPU]):
        assert equal(alnico.adamerge(made.references, device="cuda", **options), expected)


def test_a_gpu_of_the_machine_agrees_with_the_processor(made: Made) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    options: dict[str, Any] = {
        "base": made.base,
        "tasks": made.valid,
        "steps": 10,
        "learning_rate": 0.02,
        "per": "task",
    }
    expected = alnico.adamerge(made.references, device="cpu", **options)
    found = alnico.adamerge(made.references, device="cuda", **options)
    assert [s.loss for s in found.steps] == pytest.approx([s.loss for s in expected.steps], abs=1e-3)
    assert found.coefficients == pytest.approx(expected.coefficients, abs=1e-3)


def test_parts_of_whole_matrices_are_decomposed_on_the_gpu(made: Made) -> None:
    options: dict[str, Any] = {
        "base": made.base,
        "tasks": made.valid,
        "steps": 3,
        "learning_rate": 0.02,
        "method": "tsv",
    }
    expected = alnico.adamerge(made.references, device="cpu", **options)
    with made_gpus([GPU]):
        found = alnico.adamerge(made.references, device="cuda", **options)
    # The singular vectors are torch's, to 1e-12; Adam's first steps take the sign of a gradient.
    assert [s.loss for s in found.steps] == pytest.approx([s.loss for s in expected.steps], abs=1e-5)
    assert found.coefficients == pytest.approx(expected.coefficients, abs=1e-3)


def test_task_vectors_are_held_on_the_gpu_up_to_half_of_its_free_memory(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[task_vectors.TaskVectors] = []
    close = task_vectors.TaskVectors.close

    def closed(self: task_vectors.TaskVectors) -> None:
        seen.append(self)
        close(self)

    monkeypatch.setattr(task_vectors.TaskVectors, "close", closed)
    own = bytes_of(made)
    options: dict[str, Any] = {"base": made.base, "tasks": made.valid, "steps": 1, "memory": 1}
    for total in (20 * own, 4 * own):
        with made_gpus([Device("cuda:0", "Made", total)]):
            alnico.adamerge(made.references, device="cuda", **options)
    alnico.adamerge(made.references, device="cpu", **options)
    held = [
        sum(t.numel() * t.element_size() for pair in vectors._held.values() for t in pair) for vectors in seen
    ]
    assert held[0] > 3 * own  # the base and three task vectors
    assert 0 < held[1] <= (4 * own - own) / 2
    assert held[2] == 0


def test_auto_trains_in_float32_and_dtype_names_another(made: Made) -> None:
    options: dict[str, Any] = {"base": made.base, "tasks": made.valid, "steps": 2, "learning_rate": 0.02}
    expected = alnico.adamerge(made.references, device="cpu", **options)
    with made_gpus([GPU]):
        named = alnico.adamerge(made.references, device="cuda", dtype="float32", **options)
        smaller = alnico.adamerge(made.references, device="cuda", dtype="bfloat16", **options)
    assert equal(named, expected)
    assert [s.loss for s in smaller.steps] != [s.loss for s in expected.steps]
    assert smaller.coefficients == pytest.approx(expected.coefficients, abs=0.05)


class Tight(torch.nn.Module):
    """The module of :class:`Small` on a device that holds so many inputs at once."""

    def __init__(self, small: Small, most: int, error: Exception) -> None:
        super().__init__()
        self.inner = copy.deepcopy(small.base)
        self.most = most
        self.error = error
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> Any:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise self.error
        return self.inner(x)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def learned(
    small: Small, most: int, error: Exception = OUT_OF_MEMORY, **options: Any
) -> alnico.AdaMergingResult:
    models = []
    for inner in (small.base, *small.models):
        models.append(Tight(small, most, error))
        models[-1].inner.load_state_dict(inner.state_dict())
    with made_gpus([GPU]):
        return alnico.adamerge(
            models[1:],
            base=models[0],
            inputs=[x for x, _ in small.data],
            steps=4,
            batch_size=16,
            learning_rate=0.05,
            device="cuda",
            **options,
        )


def test_out_of_memory_halves_the_batch_and_learns_the_same() -> None:
    small = Small(2, seed=6)
    expected = learned(small, 16)
    with pytest.warns(
        UserWarning, match="the memory was too small for batches of 16 inputs; they have 4 now"
    ) as said:
        found = learned(small, 5)
    assert len(said) == 1
    # The entropy is a mean over inputs: gradients of the parts add up, to the rounding of float64.
    assert found.coefficients == pytest.approx(expected.coefficients, abs=2e-6)
    assert [s.loss for s in found.steps] == pytest.approx([s.loss for s in expected.steps], abs=1e-12)


def test_a_watcher_receives_that_a_batch_is_halved() -> None:
    small, events = Small(2, seed=6), list[Any]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned(small, 5, watch=events.append)
    assert [str(e) for e in events if isinstance(e, BatchHalved)] == [
        "adamerge: base: the memory was too small for batches of 16 inputs; they have 4 now."
    ]


def test_one_input_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(EvaluationError) as error:
        learned(Small(2, seed=6), 0)
    assert str(error.value) == (
        "adamerge: base: the memory is too small for a batch of one of its inputs; expected room for it. Choose a smaller "
        "dtype, or another device."
    )


def test_a_gpu_without_room_for_the_gradients_is_refused_before_a_module_is_loaded(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "alnico.evaluation.loaded_model.load_module", lambda *_, **__: pytest.fail("a module was loaded")
    )
    with made_gpus([Device("cuda:0", "Made", 100_000)]), pytest.raises(ResourceError) as error:
        alnico.adamerge(made.references, base=made.base, tasks=made.valid, device="cuda")
    size = f"{bytes_of(made) / 1000:.1f} kB"
    assert size == "87.2 kB"
    assert str(error.value) == (
        "adamerge: needs 174.3 kB of GPU memory besides its inputs (87.2 kB for the module and 87.2 kB for its gradients, in "
        "float32), and cuda:0 (Made, 100.0 kB) has 100.0 kB free; expected room for all of it. Choose device cpu, or dtype "
        "bfloat16."
    )


def test_the_command_takes_a_device_and_names_those_that_exist(made: Made, run: Run) -> None:
    words = ["--base", str(made.base), "--tasks", str(made.valid), "--steps", "2", "-q"]
    code, expected, _ = run("adamerge", *made.references, *words, "--device", "cpu")
    assert code == 0
    with made_gpus([GPU]):
        code, shown, _ = run("adamerge", *made.references, *words, "--device", "cuda", "--dtype", "float32")
        assert (code, shown) == (0, expected)
        code, _, said = run("adamerge", *made.references, *words, "--device", "cuda:3")
    assert code == 7
    assert "device is cuda:3; this machine has cpu, cuda:0 (Made, 8.6 GB). Choose one of these." in said
    assert yaml.safe_load(shown)["merge_method"] == "task_arithmetic"
    assert np.isfinite(yaml.safe_load(shown)["models"][0]["parameters"]["weight"][0]["value"])
