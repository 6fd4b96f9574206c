"""Scores on a device: those of transformers in the checkpoint's dtype, recorded, with the device; made GPUs are torch's processor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertModel

import alnico
import real
from alnico.devices import CPU, Device, made_gpus
from alnico.errors import AlnicoError, OutputError, ResourceError
from alnico.evaluation.classification import Classification
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.module_places import moved
from alnico.evaluation.perplexity import Perplexity
from alnico.evaluation.placement import ModulePlacement
from alnico.evaluation.task_file import read_tasks
from alnico.evaluation.user_function import UserFunction
from made_tasks import TASKS, Made, embedded, head_of, texts

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch

Run = Callable[..., tuple[int, str, str]]

GPUS = [Device("cuda:0", "Made", 8 << 30), Device("cuda:1", "Other", 4 << 30)]


@pytest.fixture(scope="module")
def halves(made: Made, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The specialists as checkpoints in bfloat16."""
    folders = []
    for name, path in made.tuned.items():
        folder = tmp_path_factory.mktemp("halves") / f"tuned-{name}"
        BertModel.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(path).save_pretrained(folder)
        folders.append(str(folder))
    return folders


def accuracy(made: Made, folder: str | Path, task: str, dtype: torch.dtype) -> float:
    """The accuracy by torch and transformers alone: the model in a dtype, the mean over its tokens in float32."""
    rows = texts(task, 60, 1)
    model = BertModel.from_pretrained(folder, dtype=dtype).eval()
    tokenizer, head = AutoTokenizer.from_pretrained(folder), head_of(made.base, task)
    with torch.no_grad():
        states = [model(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state[0] for row in rows]
        logits = [head @ state.float().mean(0) for state in states]
    right = [
        int(of_row.argmax()) == TASKS[task].index(row["label"])
        for of_row, row in zip(logits, rows, strict=True)
    ]
    return sum(right) / len(right)


def test_the_processor_scores_the_testbed_as_before(made: Made) -> None:
    references = [made.base, *made.references]
    default, named = (
        alnico.evaluate(references, made.valid, **options) for options in ({}, {"device": "cpu"})
    )
    assert (named.device, named.dtype) == ("cpu", "float32")
    for i, reference in enumerate(references):
        for task in TASKS:
            expected = accuracy(made, reference, task, torch.float32)
            assert named.models[i].scores[task].value == pytest.approx(expected, abs=1e-4)
            assert default.models[i].scores[task].value == pytest.approx(expected, abs=1e-4)
    with made_gpus(GPUS):  # the same arithmetic on another device
        on_a_gpu = alnico.evaluate(references, made.valid, device="cuda", dtype="float32")
    for mine, other in zip(on_a_gpu.models, named.models, strict=True):
        assert {n: s.value for n, s in mine.scores.items()} == pytest.approx(
            {n: s.value for n, s in other.scores.items()}, abs=1e-4
        )


def test_auto_scores_on_a_gpu_in_the_dtype_of_the_checkpoint(
    made: Made, halves: list[str], tmp_path: Path
) -> None:
    # One example at a time, as in the reference: products in bfloat16 round by the shape of a batch.
    data = yaml.safe_load(made.valid.read_text())
    for task in data["tasks"]:
        task["batch_size"] = 1
    one_by_one = made.valid.with_name("valid-one-by-one.yml")
    one_by_one.write_text(yaml.safe_dump(data))
    with made_gpus(GPUS):
        card = alnico.evaluate(halves, one_by_one, out=tmp_path / "out")
        processor = alnico.evaluate(halves, made.valid, device="cpu")
    assert (card.device, card.dtype) == ("cuda:0 (Made, 8.6 GB)", "own")
    data = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (data["device"], data["dtype"]) == ("cuda:0 (Made, 8.6 GB)", "own")
    assert (processor.device, processor.dtype) == ("cpu", "float32")
    for i, folder in enumerate(halves):
        for task in TASKS:
            assert card.models[i].scores[task].value == accuracy(made, folder, task, torch.bfloat16)
            assert processor.models[i].scores[task].value == accuracy(made, folder, task, torch.float32)


def test_the_command_scores_on_the_device_that_it_names(run: Run, made: Made, halves: list[str]) -> None:
    words = ("evaluate", *halves[:1], "--tasks", str(made.valid), "--json", "--device")
    with made_gpus(GPUS):
        code, out, err = run(*words, "cuda:1", "--dtype", "float16")
        data = json.loads(out)
        assert (code, data["device"], data["dtype"]) == (0, "cuda:1 (Other, 4.3 GB)", "float16")
        code, _, err = run(*words, "cuda:2")
    assert code == 7
    assert err == (
        "alnico: device is cuda:2; this machine has cpu, cuda:0 (Made, 8.6 GB), cuda:1 (Other, 4.3 GB). Choose one of these.\n"
    )


def test_what_cannot_be_used_is_reported_first_and_leaves_nothing(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = [Device("cuda:0", "Small", 50_000), Device("cuda:1", "Small", 50_000)]
    with made_gpus([]):
        with pytest.raises(ResourceError) as caught:
            alnico.evaluate([made.base], made.valid, out=out, device="cuda")
        assert str(caught.value) == (
            "device is cuda; no GPU can be used here (the machine has no GPU). Choose cpu, or fix that."
        )
        with pytest.raises(AlnicoError) as refused:
            alnico.curve(made.base, made.references, made.valid, out=out, dtype="int8")
        assert str(refused.value) == "dtype is 'int8'; expected one of auto, float32, bfloat16, float16."
    assert not out.exists()
    with made_gpus(small), pytest.raises(ResourceError) as caught:
        alnico.evaluate([made.base], made.valid, device="cuda:all")
    size = sum(p.numel() * 4 for p in AutoModel.from_pretrained(made.base).parameters())
    assert str(caught.value) == (
        f"{made.base}: needs {size / 1000:.1f} kB of GPU memory in float32, and cuda:0 (Small, 50.0 kB) has room for 45.0 kB and "
        "cuda:1 (Small, 50.0 kB) has room for 45.0 kB; expected room for the whole model. Choose device cpu, or dtype "
        "bfloat16."
    )


def test_a_soup_is_scored_on_a_gpu_with_the_bits_of_the_merge(
    made: Made, halves: list[str], tmp_path: Path
) -> None:
    with made_gpus(GPUS):
        found = alnico.soup(halves, made.valid, device="cuda:all", report=made.test)
    assert (found.device, found.dtype) == ("cuda:0 (Made, 8.6 GB), cuda:1 (Other, 4.3 GB)", "own")
    assert found.data()["device"] == found.device
    assert found.report is not None
    assert found.report.dtype == "own"
    alnico.merge({"merge_method": "linear", "models": halves}, tmp_path / "uniform")
    by_hand = [accuracy(made, tmp_path / "uniform", task, torch.bfloat16) for task in TASKS]
    assert found.uniform == pytest.approx(np.mean(by_hand))


def test_functions_get_the_module_on_the_device(halves: list[str]) -> None:
    seen = []

    def score(model: Any) -> float:
        seen.append((next(model.parameters()).dtype, model.training))
        return 0.5

    module = torch.nn.Linear(2, 2)
    with made_gpus(GPUS):
        alnico.evaluate(halves[:1], score, device="cuda")
        alnico.evaluate([module], score, device="cuda", dtype=torch.bfloat16)
        alnico.soup([module, torch.nn.Linear(2, 2)], score, device="cuda", dtype="float16")
        alnico.evaluate([module], score, device="cuda")
    assert [dtype for dtype, _ in seen] == [torch.bfloat16] * 2 + [torch.float16] * 3 + [torch.float32]
    assert not any(training for _, training in seen)
    assert module.weight.dtype == torch.float32


def constant(_model: Any) -> float:
    return 0.5


def test_auto_leaves_modules_where_they_are_for_functions_of_the_caller() -> None:
    """Their inputs may be on the processor. Only a device that is named moves a module to them."""
    modules = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    with made_gpus(GPUS):
        assert alnico.evaluate(modules, constant).device == "cpu"
        assert alnico.evaluate(modules, constant, device="cuda").device == str(GPUS[0])
        assert alnico.soup(modules, constant).device == "cpu"
        recipe = {
            "merge_method": "linear",
            "models": modules,
            "parameters": {"weight": {"search": [0.1, 1.0]}},
        }
        assert alnico.search(recipe, tasks=constant, trials=1).device == "cpu"
        named = alnico.search(recipe, tasks=constant, trials=1, device="cuda").device
        assert named.startswith("cuda")


def test_a_module_on_a_gpu_stays_there_for_functions_of_the_caller() -> None:
    class OnGpu(torch.nn.Linear):
        is_moved = False

        def to(self, *words: Any, **options: Any) -> Any:
            type(self).is_moved = True
            return super().to(*words, **options)

    function = UserFunction("f", constant, kind=None)
    with made_gpus(GPUS):
        chosen = ModulePlacement.of("auto").for_tasks([function])
        assert (chosen.devices, chosen.is_chosen) == ((CPU,), True)
        assert ModulePlacement.of("cuda").for_tasks([function]).devices == (GPUS[0],)
    module = OnGpu(2, 2)
    module.weight = torch.nn.Parameter(OnCuda(module.weight.detach()))
    assert moved(module, chosen, "m") is module
    assert not OnGpu.is_moved
    moved(module, ModulePlacement.of("cpu"), "m")
    assert OnGpu.is_moved


class OnCuda(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def test_points_of_another_device_are_not_resumed(made: Made, halves: list[str], tmp_path: Path) -> None:
    base = halves[0]
    call: dict[str, Any] = {"scale": [0.0, 1.0], "out": tmp_path / "out"}
    with made_gpus(GPUS):
        found = alnico.curve(base, halves[1:], made.valid, device="cuda", **call)
        assert (found.device, found.dtype) == ("cuda:0 (Made, 8.6 GB)", "own")
        again = alnico.curve(base, halves[1:], made.valid, device="cuda:1", **call)
        assert again.points == found.points
        for other in ({"device": "cpu"}, {"device": "cuda", "dtype": "float32"}):
            with pytest.raises(OutputError) as caught:
                alnico.curve(base, halves[1:], made.valid, **other, **call)
            assert str(caught.value) == (
                f"{tmp_path / 'out' / 'points.jsonl'}: the points were scored on another kind of device, or in another dtype; "
                "expected those of this curve. Choose another folder, or discard the points with restart."
            )


def test_images_become_the_dtype_of_the_module(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)).eval()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "vit")
    images = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
    with made_gpus(GPUS), torch.no_grad():
        subject = open_subject(tmp_path / "vit", placement=ModulePlacement.of("cuda"))
        found = Classification("vit", images, None).logits(subject, range(5))
        expected = model(pixel_values=torch.from_numpy(images).to(torch.bfloat16)).logits
    assert torch.equal(found, expected.float())


def test_the_real_minilm_scores_in_bfloat16_as_transformers_does() -> None:
    base, tuned = real.installed(*real.BASE), real.installed(*real.TUNED)
    lines = ["a cat sleeps", "the bank lends money", "rain and snow", "a very long text about nothing at all"]
    classes = {"animals": "animals", "money": "money", "weather": "weather"}
    task = Classification("topics", lines, None, classes=classes, head="names", encoder=open_subject(base))
    placement = ModulePlacement(tuple(GPUS[:1]), "bfloat16")
    with made_gpus(GPUS), torch.no_grad():
        found = task.logits(open_subject(tuned, placement=placement), range(4))
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModel.from_pretrained(tuned, dtype=torch.bfloat16).eval()
        names = embedded(
            AutoModel.from_pretrained(base, dtype=torch.float32).eval(), tokenizer, list(classes)
        )
        head = torch.nn.functional.normalize(names - names.mean(0), dim=-1)
        batch = tokenizer(
            sorted(lines, key=len), padding=True, return_tensors="pt", return_token_type_ids=False
        )
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][:, :, None]
        unit = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    expected = dict(zip(sorted(lines, key=len), 20 * unit @ head.T, strict=True))
    torch.testing.assert_close(found, torch.stack([expected[line] for line in lines]), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_the_real_smollm2_has_the_perplexity_of_transformers_in_its_dtype(tmp_path: Path) -> None:
    model, tokenizer = real.smollm2()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "smollm2")
    tokenizer.save_pretrained(tmp_path / "smollm2")
    text = "The weights of two models that were tuned from one base can be averaged. " * 12
    task = Perplexity("text", text, window=64, batch_size=2)
    with made_gpus(GPUS):
        found = task.evaluate(open_subject(tmp_path / "smollm2", placement=ModulePlacement.of("auto")))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2", dtype=torch.bfloat16).eval()
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    losses = []
    with torch.no_grad():
        for end in range(64, len(tokens) - 1 + 1, 64):
            chances = reference(tokens[None, end - 64 : end]).logits[0].float().log_softmax(1)
            losses.append(-float(chances[torch.arange(64), tokens[end - 63 : end + 1]].double().mean()))
    assert found.examples == pytest.approx(losses, rel=2e-3)  # other batches round bfloat16 otherwise
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=2e-3)


def test_a_tasks_file_keeps_its_head_on_the_processor(made: Made) -> None:
    tasks = read_tasks(made.valid)
    with made_gpus(GPUS):
        subject = open_subject(made.base, placement=ModulePlacement.of("cuda", "bfloat16"))
        assert isinstance(tasks[0], Classification)
        tasks[0].evaluate(subject)
    assert tasks[0]._head is not None
    assert torch.equal(tasks[0]._head, head_of(made.base, "pets"))
