"""Too little memory halves a batch: the scores are those of small batches, and it is said once."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from alnico.errors import EvaluationError
from alnico.evaluation import batches
from alnico.evaluation.batches import Batches, is_out_of_memory
from alnico.evaluation.classification import Classification
from alnico.evaluation.harness import Harness
from alnico.evaluation.input_batches import InputBatches
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.perplexity import Perplexity
from alnico.events import BatchHalved
from made_tasks import NOISE, TASKS, Made, save_tokenizer, texts

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

ON_A_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ON_THE_PROCESSOR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
)


def limited(module: torch.nn.Module, most: int, error: Exception = ON_A_GPU) -> list[int]:
    """Give a module no memory for more than ``most`` rows; returns the list of the rows it is called with."""
    seen: list[int] = []

    def check(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        rows = len(next(iter([*positional, *named.values()])))
        seen.append(rows)
        if rows > most:
            raise error

    module.register_forward_pre_hook(check, with_kwargs=True)
    return seen


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    tokenizer = save_tokenizer(folder)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.5, **sizes)).save_pretrained(
        folder
    )
    return folder


def perplexity(size: int) -> Perplexity:
    words = " ".join(np.random.default_rng(0).choice(NOISE, 100))
    return Perplexity("noise", words, window=8, stride=4, batch_size=size)


@pytest.mark.parametrize("error", [ON_A_GPU, ON_THE_PROCESSOR])
def test_windows_are_halved_until_they_fit_and_it_is_said_once(causal: Path, error: Exception) -> None:
    expected = perplexity(2).evaluate(open_subject(causal))
    events: list[Any] = []
    subject = open_subject(causal, label="model", watch=events.append)
    seen = limited(subject.module("causal"), 2, error)
    task = perplexity(16)
    score = task.evaluate(subject)
    assert score.examples == pytest.approx(expected.examples, abs=1e-6)
    assert [rows for rows in seen if rows > 2] == [16, 8, 4]  # and then never again
    task.evaluate(subject)
    assert [rows for rows in seen if rows > 2] == [16, 8, 4]
    assert events == [BatchHalved("noise", "model", "windows", 16, 2)]
    assert str(events[0]) == (
        "noise: model: the memory was too small for batches of 16 windows; they have 2 now."
    )


def test_without_a_watch_it_is_a_warning(causal: Path) -> None:
    subject = open_subject(causal, label="model")
    limited(subject.module("causal"), 4)
    task = perplexity(8)
    said = "^noise: model: the memory was too small for batches of 8 windows; they have 4 now\\.$"
    with pytest.warns(UserWarning, match=said):
        task.evaluate(subject)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.evaluate(subject)


def test_one_example_that_does_not_fit_is_an_error(causal: Path) -> None:
    subject = open_subject(causal, label="model")
    limited(subject.module("causal"), 0)
    with pytest.raises(EvaluationError) as caught:
        perplexity(3).evaluate(subject)
    assert str(caught.value) == (
        "noise: model: the memory is too small for a batch of one of its windows; expected room for it. Lower window. "
        "Choose a smaller dtype, or another device."
    )


def test_texts_and_images_are_halved(made: Made, tmp_path: Path) -> None:
    rows = texts("pets", 40, 1)

    def of_texts(size: int) -> Classification:
        return Classification(
            "pets", [r["text"] for r in rows], [r["label"] for r in rows],
            classes={c: f"a {c}" for c in TASKS["pets"]}, head="names", encoder=open_subject(made.base), batch_size=size,
        )  # fmt: skip

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)).save_pretrained(
        tmp_path / "vit"
    )
    images = np.random.default_rng(0).standard_normal((9, 3, 8, 8)).astype(np.float32)

    def of_images(size: int) -> Classification:
        return Classification("vit", images, [str(i % 3) for i in range(9)], batch_size=size)

    kinds: list[tuple[Callable[[int], Classification], Path]] = [
        (of_texts, made.tuned["pets"]),
        (of_images, tmp_path / "vit"),
    ]
    for task, path in kinds:
        events: list[Any] = []
        subject = open_subject(path, watch=events.append)
        limited(subject.module(task(1).kind), 3)
        with torch.no_grad():
            expected = task(3).logits(open_subject(path), range(9))
            found = task(32).logits(subject, range(9))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert [(e.before, e.now, e.rows) for e in events] == [(9, 2, "examples")]


def test_inputs_in_memory_are_halved() -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 3)
    inputs = torch.randn(10, 4)
    seen = limited(module, 4)
    events: list[Any] = []
    subject: Any = SimpleNamespace(label="m", watch=events.append, module=lambda _: module)
    with torch.no_grad():
        found = InputBatches("x", inputs).logits(subject, range(10))
        torch.testing.assert_close(found, inputs @ module.weight.T + module.bias)
    assert seen == [10, 5, 2, 2, 2, 2, 2]
    assert [str(e) for e in events] == [
        "x: m: the memory was too small for batches of 10 inputs; they have 2 now."
    ]


def test_a_batch_with_its_graph_is_the_callers_to_halve() -> None:
    # The graphs of the halves stay until the caller's backward pass, so they would take as much memory together.
    module = torch.nn.Linear(4, 3)
    seen = limited(module, 4)
    task = InputBatches("x", torch.randn(10, 4))
    subject: Any = SimpleNamespace(label="m", module=lambda _: module)
    with pytest.raises(torch.OutOfMemoryError):
        task.logits(subject, range(10))
    task.logits(subject, range(4)).sum().backward()
    assert seen == [10, 4]
    assert module.bias.grad is not None
    assert module.bias.grad.tolist() == [4.0, 4.0, 4.0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_harness_runs_again_with_half(causal: Path, tmp_path: Path) -> None:
    lines = [
        {"question": f"{NOISE[i]} {NOISE[i + 1]}", "choices": [NOISE[i + 2], NOISE[i + 3]], "answer": i % 2}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (tmp_path / "local.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "alnico_batches", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
                "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}], "metadata": {"version": 1},
            }
        )
    )  # fmt: skip

    def task(size: int) -> Harness:
        return Harness("local", ["alnico_batches"], "acc", include_path=tmp_path, limit=8, batch_size=size)

    expected = task(2).evaluate(open_subject(causal))
    events: list[Any] = []
    subject = open_subject(causal, label="model", watch=events.append)
    limited(subject.module("causal"), 2)
    found = task(8).evaluate(subject)
    assert found.value == expected.value
    assert found.examples is not None
    assert expected.examples is not None
    assert found.examples.tolist() == expected.examples.tolist()
    assert events == [BatchHalved("local", "model", "requests", 8, 2)]


def test_other_errors_stay_what_they_are(causal: Path) -> None:
    subject = open_subject(causal, label="model")
    limited(subject.module("causal"), 2, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(EvaluationError) as caught:
        perplexity(4).evaluate(subject)
    assert str(caught.value) == (
        "noise: model: the evaluation raised RuntimeError: mat1 and mat2 shapes cannot be multiplied; expected a score. "
        "Correct the called code, or the data."
    )
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("out of memory"))


class MadeCuda:
    """What torch.cuda says of a GPU with so much memory, when a row of a batch needs ``row_bytes``."""

    def __init__(self, total: int, row_bytes: int) -> None:
        self.total, self.row_bytes, self.peak = total, row_bytes, 0

    def run(self, rows: int) -> None:
        if rows * self.row_bytes > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.peak = rows * self.row_bytes

    def is_available(self) -> bool:
        return True

    def empty_cache(self) -> None:
        pass

    def reset_peak_memory_stats(self, _: Any) -> None:
        self.peak = 0

    def memory_allocated(self, _: Any) -> int:
        return 0

    memory_reserved = memory_allocated

    def max_memory_allocated(self, _: Any) -> int:
        return self.peak

    def mem_get_info(self, _: Any) -> tuple[int, int]:
        return self.total, self.total


def test_batches_grow_on_a_gpu_while_they_need_little(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = MadeCuda(1000, 10)
    monkeypatch.setattr(batches, "_cuda", lambda: gpu)
    events: list[Any] = []
    subject: Any = SimpleNamespace(label="m", watch=events.append)
    sizes = Batches("task", 4)
    device = torch.device("cuda:0")
    run = lambda part: gpu.run(len(part))  # noqa: E731
    assert [len(part) for part, _ in sizes.each(range(100), run, subject, device)] == [4, 8, 16, 32, 32, 8]
    gpu.row_bytes = 50  # longer texts: back to what fits, above the size of the task, and nothing to say
    assert [len(part) for part, _ in sizes.each(range(64), run, subject, device)] == [16] * 4
    assert events == []
    on_the_processor = Batches("task", 4)
    assert [len(p) for p, _ in on_the_processor.each(range(12), run, subject, torch.device("cpu"))] == [
        4,
        4,
        4,
    ]
