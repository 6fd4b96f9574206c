"""What is learned, measured and scored is what transformers loads from the files, where a module has other names and layouts than they have."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from made_families import FAMILIES, GROUPED, Direct, Family, Made

import alnico
from alnico.errors import MismatchError, ModelError
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.loaded_model import ModuleSubject, open_subject
from alnico.tune.statistics.fisher import measure_fisher
from alnico.tune.statistics.gram import measure_gram
from made import read_file, read_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch


@pytest.fixture(scope="module")
def made_all() -> dict[str, Made]:
    return {}


QUICK = ("vit", "qwen3_moe")
SOME = ("vit", "qwen2_vl", "qwen3_moe")
"""Families for what is the same for all of them but the names."""


def each(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.fixture(params=each(FAMILIES))
def family(
    request: pytest.FixtureRequest, made_all: dict[str, Made], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    if request.param not in made_all:
        made_all[request.param] = Made(request.param, tmp_path_factory.mktemp("family"))
    return made_all[request.param]


for_some = pytest.mark.parametrize("family", each(SOME), indirect=True)


WAYS: list[dict[str, Any]] = [
    {"per": "task"},
    {"per": "layer"},
    {"per": "tensor"},
    {"plus": True, "density": 0.5},
]


def test_the_entropy_told_is_that_of_the_model_that_the_recipe_makes(family: Made, tmp_path: Path) -> None:
    in_all_ways = family.family.saved.__name__.startswith(("ViT", "Qwen3Moe"))
    for options in WAYS if in_all_ways else WAYS[2:3]:
        learned = alnico.adamerge(
            family.models,
            base=family.base,
            tasks=family.tasks,
            steps=2,
            batch_size=6,
            learning_rate=0.05,
            **options,
        )
        assert np.abs(learned.coefficients - 0.3).max() > 0.01
        last = alnico.adamerge(
            family.models,
            base=family.base,
            tasks=family.tasks,
            steps=1,
            batch_size=6,
            learning_rate=1e-12,
            **options,
        )
        out = tmp_path / "-".join(map(str, options.values()))
        alnico.merge(last.recipe, out)
        assert (
            dict(last.steps[0].losses)
            == dict(learned.steps[0].losses)
            == pytest.approx(family.entropies(out), abs=1e-5)
        )
        no_part = ("classifier", "lm_head") if family.family.kind == "encoder" else ()
        names = set(read_model(Path(family.base)))
        assert set(learned.left_out) == {n for n in names if any(word in n for word in no_part)}
        assert set(learned.left_out.values()) <= {"not in the module of the tasks (encoder)"}
        if options.get("per") == "tensor":
            assert set(learned.groups) == names


def test_a_candidate_in_memory_scores_as_the_model_on_disk(family: Made, tmp_path: Path) -> None:
    task = family.tasks[0]
    with Candidates([*family.models, family.base]) as candidates:
        for i, weight in enumerate((0.3, 0.9)):
            recipe = {
                "merge_method": "task_arithmetic",
                "base_model": family.base,
                "models": [
                    {"model": m, "parameters": {"weight": weight + j / 10}}
                    for j, m in enumerate(family.models)
                ],
            }
            score = task.evaluate(candidates.make(alnico.load_recipe(recipe))).value
            alnico.merge(recipe, tmp_path / str(i))
            assert score == pytest.approx(
                float(family.logits(tmp_path / str(i), task).softmax(-1)[:, 0].mean()), abs=1e-5
            )


@for_some
def test_a_soups_score_is_that_of_the_model_that_its_recipe_makes(family: Made, tmp_path: Path) -> None:
    task = family.tasks[0]
    found = alnico.soup(family.models, [task], order="uniform")
    alnico.merge(found.recipe(tmp_path), tmp_path / "out")
    assert found.score == pytest.approx(
        float(family.logits(tmp_path / "out", task).softmax(-1)[:, 0].mean()), abs=1e-5
    )
    for model, score in found.alone.items():
        assert score == pytest.approx(float(family.logits(model, task).softmax(-1)[:, 0].mean()), abs=1e-5)


# ---- statistics -------------------------------------------------------------------------------------------------------


def read_told(folder: Path) -> dict[str, Any]:
    """What a directory of statistics says of them."""
    told: dict[str, Any] = json.loads((folder / "statistics.json").read_text())
    return told


def wide(made: Made) -> Any:
    """The first model in float64, loaded by transformers."""
    module = made.loaded(made.models[0]).double()
    if hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("eager")
    return module


def in_files(made: Made, module: Any, values: dict[str, torch.Tensor], folder: Path) -> dict[str, np.ndarray]:
    """Values for a module's parameters, under the names and in the layout in which transformers saves the whole model."""
    whole = made.family.saved.from_pretrained(made.models[0]).double()
    of = {p.detach().numpy().tobytes(): values[n] for n, p in module.named_parameters()}
    for parameter in whole.parameters():
        parameter.data = of.get(parameter.detach().numpy().tobytes(), torch.zeros_like(parameter))
    whole.save_pretrained(folder)
    return read_model(folder)


def test_fisher_information_is_that_of_autograd_under_the_names_of_the_files(
    family: Made, tmp_path: Path
) -> None:
    task = family.tasks[0]
    alnico.fisher_statistics(family.models[0], tmp_path / "fisher", tasks=[task])
    module = wide(family)
    sums = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
    for i in range(task.size):
        for c in range(3):
            module.zero_grad()
            logs = task.of(module, [i], torch.float64).log_softmax(-1)[0]
            logs[c].backward()
            for n, p in module.named_parameters():
                if p.grad is not None:
                    sums[n] += logs[c].detach().exp() * p.grad**2 / task.size
    expected = in_files(family, module, sums, tmp_path / "expected")
    told = read_told(tmp_path / "fisher")
    found = read_file(tmp_path / "fisher" / "statistics.safetensors")
    files = read_model(Path(family.models[0]))
    assert set(told["tensors"]) | set(told["left_out"]) == set(files)
    assert not set(told["tensors"]) & set(told["left_out"])
    for name, entry in told["tensors"].items():
        values = found[entry["stored"]][1]
        assert values.shape == files[name].shape
        np.testing.assert_allclose(
            values, expected[name], rtol=2e-3, atol=2e-5 * np.abs(expected[name]).max() + 1e-12, err_msg=name
        )
    for name, why in told["left_out"].items():
        assert why in ("not in the module of the tasks (encoder)", "no prediction depends on it")
        assert not expected[name].any(), name


def test_gram_matrices_are_those_of_hooks_under_the_names_of_the_files(family: Made, tmp_path: Path) -> None:
    task = family.tasks[0]
    alnico.gram_statistics(family.models[0], tmp_path / "gram", tasks=[task])
    told = read_told(tmp_path / "gram")
    found = read_file(tmp_path / "gram" / "statistics.safetensors")
    files = read_model(Path(family.models[0]))
    assert set(told["tensors"]) | set(told["left_out"]) == set(files)
    expected = by_difference(family, task)
    for name, entry in told["tensors"].items():
        gram = found[entry["stored"]][1]
        np.testing.assert_allclose(
            gram, expected[name][0], rtol=2e-3, atol=2e-4 * np.abs(expected[name][0]).max(), err_msg=name
        )
        assert entry["rows"] == expected[name][1]
    matrices = {n for n, v in files.items() if v.ndim == 2 and n in expected}
    assert set(told["tensors"]) == matrices


def test_what_scales_and_biases_multiply_is_that_of_hooks_under_the_names_of_the_files(
    family: Made, tmp_path: Path
) -> None:
    task = family.tasks[0]
    alnico.gram_statistics(family.models[0], tmp_path / "gram", tasks=[task], vectors=True)
    alnico.gram_statistics(family.models[0], tmp_path / "plain", tasks=[task])
    module = wide(family)
    sums = {n: torch.zeros_like(p) for n, p in module.named_parameters()}

    def note(path: str) -> Any:
        def hook(layer: Any, _: Any, result: Any) -> None:
            rows = result.detach().reshape(-1, result.shape[-1])
            bias = getattr(layer, "bias", None)
            if bias is not None:
                sums[f"{path}.bias"] += len(rows)
            if "Norm" in type(layer).__name__:
                x = (rows - (0 if bias is None else bias.detach())) / layer.weight.detach()
                sums[f"{path}.weight"] += (x**2).sum(0)

        return hook

    for path, layer in module.named_modules():
        if (
            isinstance(layer, torch.nn.Linear)
            or "Norm" in type(layer).__name__
            or type(layer).__name__ == "Conv1D"
        ):
            layer.register_forward_hook(note(path))
    with torch.no_grad():
        task.of(module, range(task.size), torch.float64)
    expected = in_files(family, module, sums, tmp_path / "expected")
    told, plain = read_told(tmp_path / "gram"), read_told(tmp_path / "plain")
    found = read_file(tmp_path / "gram" / "statistics.safetensors")
    assert set(told["tensors"]) | set(told["left_out"]) == set(read_model(Path(family.models[0])))
    vectors = {n for n, v in expected.items() if v.ndim == 1 and v.any()}
    assert set(told["tensors"]) - set(plain["tensors"]) == vectors
    for name in vectors:
        values = found[told["tensors"][name]["stored"]][1]
        np.testing.assert_allclose(values, expected[name], rtol=2e-3, err_msg=name)
    for name, entry in plain["tensors"].items():
        assert entry == told["tensors"][name]


def by_difference(made: Made, task: Direct) -> dict[str, tuple[np.ndarray, int]]:
    """What goes into each matrix in the files: the module is made anew from files in which the experts are told by their values."""
    module, files = wide(made), read_model(Path(made.models[0]))
    found: dict[str, tuple[np.ndarray, int]] = {}
    linear = torch.nn.functional.linear
    by_values = {values.astype("f8").tobytes(): name for name, values in files.items() if values.ndim == 2}
    fused = {name: values for name, values in files.items() if name.endswith("Wqkv.weight")}
    by_values |= {values[: len(values) // 3].astype("f8").tobytes(): name for name, values in fused.items()}
    tied = {id(p) for p in [module.get_input_embeddings().weight]} if not task.has_pictures else set()

    def note(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        rows = x.detach().reshape(-1, x.shape[-1]).numpy()
        for part in (weight, *weight.chunk(2)):
            name = by_values.get(part.detach().contiguous().numpy().tobytes())
            if name is not None and id(weight) not in tied:
                total, count = found.get(name, (0, 0))
                found[name] = total + rows.T @ rows, count + len(rows)
        return linear(x, weight, bias)

    def note_turned(layer: Any, given: Any) -> None:
        x = given[0].detach().reshape(-1, given[0].shape[-1]).numpy()
        name = by_values[layer.weight.detach().numpy().tobytes()]
        found[name] = x.T @ x, len(x)

    for layer in module.modules():
        if type(layer).__name__ == "Conv1D":
            layer.register_forward_pre_hook(note_turned)
    torch.nn.functional.linear = note  # type: ignore[assignment]
    try:
        with torch.no_grad():
            task.of(module, range(task.size), torch.float64)
    finally:
        torch.nn.functional.linear = linear  # type: ignore[assignment]
    return found


@for_some
@pytest.mark.parametrize(("method", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
def test_a_merge_takes_the_statistics_of_every_tensor_that_has_some(
    family: Made, method: str, kind: str, tmp_path: Path
) -> None:
    entries = []
    for i, model in enumerate(family.models):
        measure = alnico.fisher_statistics if kind == "fisher" else alnico.gram_statistics
        measure(model, tmp_path / f"{kind}{i}", tasks=family.tasks[i : i + 1])
        entries.append({"model": model, "parameters": {kind: str(tmp_path / f"{kind}{i}")}})
    told = [read_told(tmp_path / f"{kind}{i}") for i in range(2)]
    plan = alnico.plan({"merge_method": method, "models": entries})
    without = {job.name for job in plan.jobs if not job.sides and job.kind != "copy"}
    assert without == set(told[0]["left_out"]) | set(told[1]["left_out"])


@for_some
def test_regmean_plus_measures_the_same_tensors(family: Made, tmp_path: Path) -> None:
    alnico.gram_statistics(family.models, tmp_path / "plus", tasks=[[t] for t in family.tasks], plus=True)
    alnico.gram_statistics(family.models[1], tmp_path / "plain", tasks=family.tasks[1:])
    plus, plain = (read_told(tmp_path / p) for p in ("plus/two", "plain"))
    assert {n for n in plain["tensors"] if "experts" not in n} == {
        n for n in plus["tensors"] if "experts" not in n
    }
    assert {n.split(".")[0] for n in plus["tensors"]} <= {
        n.split(".")[0] for n in read_model(Path(family.models[1]))
    }


# ---- adapters ---------------------------------------------------------------------------------------------------------


class Adapted:
    """A language model with a head for classes and two adapters, on disk, and the modules that PEFT makes of them, folded."""

    def __init__(self, folder: Path) -> None:
        import peft
        import transformers as T

        self.family = Family(
            T.LlamaForSequenceClassification, lambda: T.LlamaConfig(**GROUPED, num_labels=3), "classifier"
        )
        torch.manual_seed(3)
        base = self.family.saved(self.family.config()).eval()
        base.save_pretrained(folder / "base")
        self.base = str(folder / "base")
        self.models, self.folded, self.wrapped = [], [], []
        for name in ("one", "two"):
            config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
            model = peft.get_peft_model(self.family.saved.from_pretrained(self.base), config).eval()
            model.save_pretrained(folder / name)
            self.models.append(f"{self.base}+{folder / name}")
            self.wrapped.append(model)
            whole = peft.PeftModel.from_pretrained(
                self.family.saved.from_pretrained(self.base), folder / name
            ).merge_and_unload()
            whole.save_pretrained(folder / f"{name}-folded")
            self.folded.append(str(folder / f"{name}-folded"))
        self.tasks = [Direct(letter, self.family, seed) for seed, letter in enumerate("ab")]

    def logits(self, path: str | Path, task: Direct) -> torch.Tensor:
        with torch.no_grad():
            return task.of(self.family.saved.from_pretrained(path).eval(), range(task.size))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return Adapted(tmp_path_factory.mktemp("adapted"))


def test_task_vectors_of_adapters_are_learned_from_the_model_that_the_recipe_makes(
    adapted: Adapted, tmp_path: Path
) -> None:
    learned = alnico.adamerge(
        adapted.models, base=adapted.base, tasks=adapted.tasks, steps=1, batch_size=6, learning_rate=1e-12
    )
    assert len(learned.groups) == 4
    alnico.merge(learned.recipe, tmp_path / "out")
    for task in adapted.tasks:
        logits = adapted.logits(tmp_path / "out", task)
        right = float(torch.distributions.Categorical(logits=logits).entropy().mean())
        assert learned.steps[0].losses[task.name] == pytest.approx(right, abs=1e-5)


def test_a_soup_of_adapters_scores_as_the_model_on_disk(adapted: Adapted, tmp_path: Path) -> None:
    task = adapted.tasks[0]
    found = alnico.soup(adapted.models, [task], order="uniform")
    alnico.merge(found.recipe(tmp_path), tmp_path / "out")
    for path, score in (
        (tmp_path / "out", found.score),
        *zip(adapted.folded, found.alone.values(), strict=True),
    ):
        assert score == pytest.approx(float(adapted.logits(path, task).softmax(-1)[:, 0].mean()), abs=1e-5)


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_statistics_of_an_adapter_on_its_base_are_those_of_the_folded_model(
    adapted: Adapted, kind: str, tmp_path: Path
) -> None:
    measure = alnico.fisher_statistics if kind == "fisher" else alnico.gram_statistics
    task = adapted.tasks[0]
    measure(adapted.models[0], tmp_path / "adapter", tasks=[task])
    measure(adapted.folded[0], tmp_path / "folded", tasks=[task])
    subject = ModuleSubject("wrapped", adapted.wrapped[0])
    function = measure_fisher if kind == "fisher" else measure_gram
    function(subject, [task]).write(tmp_path / "wrapped", subject)
    expected = read_file(tmp_path / "folded" / "statistics.safetensors")
    for other in ("adapter", "wrapped"):
        found = read_file(tmp_path / other / "statistics.safetensors")
        assert found.keys() == expected.keys()
        for name, (_, values) in expected.items():
            np.testing.assert_allclose(
                found[name][1], values, rtol=1e-3, atol=1e-6 * max(1.0, np.abs(values).max())
            )
    method = "fisher" if kind == "fisher" else "regmean"
    entries = [{"model": adapted.models[0], "parameters": {kind: str(tmp_path / "adapter")}}] * 2
    plan = alnico.plan({"merge_method": method, "models": entries})
    assert {job.name for job in plan.jobs if job.sides} == set(read_told(tmp_path / "adapter")["tensors"])


def test_a_wrapped_module_scores_as_the_folded_model(adapted: Adapted) -> None:
    task = adapted.tasks[0]
    right = float(adapted.logits(adapted.folded[0], task).softmax(-1)[:, 0].mean())
    for module in (adapted.wrapped[0], torch.nn.DataParallel(adapted.wrapped[0])):
        assert task.evaluate(ModuleSubject("wrapped", module)).value == pytest.approx(right, abs=1e-5)
    assert any("lora_A" in n for n, _ in adapted.wrapped[0].named_parameters())
    assert task.evaluate(open_subject(adapted.models[0])).value == pytest.approx(right, abs=1e-5)
    with pytest.raises(ModelError, match=r"one: is an adapter; expected a model\. Give it with its base"):
        open_subject(adapted.models[0].partition("+")[2])


# ---- what is not found ------------------------------------------------------------------------------------------------


def test_a_parameter_that_is_in_no_file_is_an_error(made_all: dict[str, Made], tmp_path: Path) -> None:
    made = made_all.setdefault("bert", Made("bert", tmp_path))
    module = made.loaded(made.base)
    module.encoder.layer[1].extra = torch.nn.Linear(3, 2)
    subject = SimpleNamespace(
        label="mine", directory=Path(made.base), module=lambda _: module, tokenizer=lambda: None
    )
    with pytest.raises(
        MismatchError,
        match=r"^mine: 2 of 41 tensors of the module \(BertModel\) match no file .* encoder\.layer\.1\.extra\.weight \(2, 3\)",
    ):
        measure_gram(subject, made.tasks)
    del module.encoder.layer[1].extra
    with torch.no_grad():
        module.encoder.layer[0].output.dense.weight.neg_()
    with pytest.raises(
        MismatchError, match=r"^mine: 1 of 39 tensors .* encoder\.layer\.0\.output\.dense\.weight \(16, 24\)"
    ):
        measure_fisher(subject, made.tasks)


def test_statistics_under_other_names_than_the_models_are_refused(
    made_all: dict[str, Made], tmp_path: Path
) -> None:
    made = made_all.setdefault("vit", Made("vit", tmp_path / "vit"))
    alnico.gram_statistics(made.models[0], tmp_path / "gram", tasks=made.tasks)
    summary = tmp_path / "gram" / "statistics.json"
    told = read_told(tmp_path / "gram")
    told["tensors"] = {n.replace("encoder.layer.1.", "layers.1."): e for n, e in told["tensors"].items()}
    summary.write_text(json.dumps(told))
    entries = [{"model": made.models[0], "parameters": {"gram": str(tmp_path / "gram")}}] * 2
    with pytest.raises(
        MismatchError,
        match=r"^vit\.encoder\.layer\.1\..*: the gram statistics of .* neither contain it nor say why",
    ):
        alnico.plan({"merge_method": "regmean", "models": entries})
