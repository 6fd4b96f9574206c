"""What finds, scores and checks merges works on a method over whole matrices: results are held against its float64 reference."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import alnico
from alnico.errors import RecipeError
from made import family, llama_config, read_model, save_file, save_model
from made_tokenizers import entry, save_tokenizer
from references import tsv

DEPTH = 3


class Net(torch.nn.Module):
    """Layers with numbers, so that weights by depth have a meaning, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(DEPTH))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


torch.manual_seed(7)
BASE = Net()
MODELS = [copy.deepcopy(BASE) for _ in range(3)]
with torch.no_grad():
    for model in MODELS:
        for value in model.parameters():
            value += 0.2 * torch.randn_like(value)
X = torch.randn(30, 6).double()
AIMS = [model(X).detach() for model in MODELS]


def loss(module: Any) -> float:
    """The distance of the outputs from those of the models."""
    with torch.no_grad():
        return float(sum(((module(X) - aim) ** 2).mean() for aim in AIMS))


def also_loss(module: Any) -> float:
    return loss(module)


def expected(weights: Sequence[Any] = (1.0, 1.0, 1.0), models: Sequence[Any] = MODELS, **options: Any) -> Net:
    """The reference's merge. A weight may be a list with one number for each layer."""
    made = copy.deepcopy(BASE)
    state = {}
    for name, value in BASE.state_dict().items():
        layer = int(name.split(".")[1])
        of_layer = [w[layer] if isinstance(w, list) else w for w in weights]
        arrays = [m.state_dict()[name].numpy() for m in models]
        state[name] = torch.from_numpy(
            tsv.merge(arrays, value.numpy(), {**options, "weight": of_layer}, None)
        )
    made.load_state_dict(state)
    return made


def close(module: Any, other: torch.nn.Module) -> bool:
    state = module.state_dict() if hasattr(module, "state_dict") else module
    return all(torch.allclose(state[n], v, rtol=0, atol=1e-11) for n, v in other.state_dict().items())


def recipe(each: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    entries = [{"model": m, "parameters": dict(p)} for m, p in zip(MODELS, each, strict=True)]
    return {"merge_method": "tsv", "base_model": BASE, "models": entries, **more}


def test_a_search_of_weights_scale_and_rank_scores_the_merges_of_the_reference() -> None:
    pytest.importorskip("optuna")
    found = alnico.search(
        recipe(
            [{"weight": {"search": [0.2, 1.5]}}] * 3,
            parameters={"lambda": {"search": [0.5, 1.5]}, "rank": {"choice": [1.0, 0.5]}},
            search={"sampler": "random", "trials": 6},
        ),
        tasks=loss,
        minimize=True,
        report=also_loss,
    )
    for trial in found.trials:
        point = trial.point
        merged = expected(
            [point[f"models[{i}].weight"] for i in range(3)], scale=point["lambda"], rank=float(point["rank"])
        )
        assert trial.values[0] == pytest.approx(loss(merged), rel=1e-9)
    assert len({t.point["rank"] for t in found.trials}) == 2
    assert found.report is not None
    scores = {m.reference: m.scores["also_loss"].value for m in found.report.models}
    assert scores["default"] == pytest.approx(loss(expected()), rel=1e-9)  # not weights of 1/3


def test_a_search_of_weights_by_depth_scores_the_merges_of_the_reference() -> None:
    pytest.importorskip("optuna")
    gradient = {"weight": {"search": [0.2, 1.5], "layers": DEPTH}}
    found = alnico.search(
        recipe([gradient] * 3, search={"sampler": "random", "trials": 4}), tasks=loss, minimize=True
    )
    assert len(found.dimensions) == 3 * DEPTH
    for trial in found.trials:
        values = [trial.point[name] for name in found.dimensions]
        weights = [values[i * DEPTH : (i + 1) * DEPTH] for i in range(3)]
        assert trial.values[0] == pytest.approx(loss(expected(weights)), rel=1e-9)


def test_random_weights_a_curve_and_scales_score_the_merges_of_the_reference() -> None:
    found = alnico.search_weights(
        MODELS, loss, base=BASE, method="tsv", simplex=False, trials=4, minimize=True
    )
    for trial in found.trials:
        assert trial.score == pytest.approx(loss(expected(trial.weights)), rel=1e-9)
    assert close(found.module(), expected(found.weights))
    drawn = alnico.curve(BASE, MODELS, loss, method="tsv", scale="0:1.5:0.5", minimize=True)
    for point in drawn.points:
        assert point.on("loss").value == pytest.approx(loss(expected(scale=point.scales[0])), rel=1e-9)


def test_a_greedy_soup_chooses_the_models_of_a_method() -> None:
    aim = expected([1.0, 1.0], MODELS[1:])(X).detach()

    def off(module: Any) -> float:
        with torch.no_grad():
            return float(((module(X) - aim) ** 2).mean())

    found = alnico.soup(MODELS, off, base=BASE, method="tsv", minimize=True)
    order = sorted(range(3), key=lambda i: off(MODELS[i]))
    chosen, best = order[:1], off(MODELS[order[0]])
    for i in order[1:]:
        tried = sorted([*chosen, i])
        value = off(expected([1.0] * len(tried), [MODELS[j] for j in tried]))
        if value <= best:
            chosen, best = tried, value
    assert list(found.counts) == [f"models[{i}]" for i in chosen] == ["models[1]", "models[2]"]
    assert found.score == pytest.approx(best, abs=1e-20)
    assert found.uniform == pytest.approx(off(expected()), rel=1e-9)
    assert close(found.module(), expected([1.0, 1.0], MODELS[1:]))
    with pytest.raises(
        RecipeError, match=r"^replace is set with the method tsv; expected linear, where a model counts"
    ):
        alnico.soup(MODELS, off, base=BASE, method="tsv", order="all", replace=True)


def test_merges_in_memory_by_layer_and_with_task_vectors_are_those_of_the_reference() -> None:
    made = alnico.merge_models(
        MODELS, "tsv", base=BASE, layers={"layers.1": {"method": "task_arithmetic", "scale": 0.5}}
    )
    assert close(
        {n: v for n, v in made.state_dict().items() if "layers.1" not in n}
        | {n: v for n, v in expected().state_dict().items() if "layers.1" in n},
        expected(),
    )
    start = BASE.state_dict()
    summed = start["layers.1.weight"] + 0.5 * sum(
        m.state_dict()["layers.1.weight"] - start["layers.1.weight"] for m in MODELS
    )
    assert torch.allclose(made.state_dict()["layers.1.weight"], summed)
    tau = [0.5 * alnico.TaskVector(m.state_dict(), start) for m in MODELS]
    halves = alnico.merge_state_dicts([t.on(start) for t in tau], "tsv", base=start)
    assert close(halves, expected([0.5] * 3))  # c does not change with the length


@pytest.fixture
def models(tmp_path: Path) -> Path:
    family(tmp_path, 3, "F32", size=0.02)
    return tmp_path


def of_files(folder: Path, name: str, weight: Sequence[float] = (1, 1, 1), **options: Any) -> np.ndarray:
    base, *tuned = (
        read_model(folder / m)[name].astype(float) for m in ("base", "tuned-0", "tuned-1", "tuned-2")
    )
    if "embed" in name or "lm_head" in name or base.ndim == 1:
        mean: np.ndarray = base + options.get("scale", 1.0) / 3 * sum(
            w * (t - base) for w, t in zip(weight, tuned, strict=True)
        )
        return mean
    merged: np.ndarray = tsv.merge(tuned, base, {**options, "weight": list(weight)}, None)
    return merged


def written(folder: Path, **more: Any) -> str:
    names = [f"tuned-{i}" for i in range(3)]
    whole = {"merge_method": "tsv", "base_model": "base", "models": [{"model": n} for n in names], **more}
    (folder / "recipe.yml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return str(folder / "recipe.yml")


def test_shards_verify_and_reproduce(models: Path) -> None:
    alnico.merge(written(models), models / "out", max_shard_size=8000)
    assert len(list((models / "out").glob("*.safetensors"))) > 1
    for name, values in read_model(models / "out").items():
        np.testing.assert_allclose(values, of_files(models, name), rtol=0, atol=1e-6)
    checked = alnico.verify(models / "out", against_inputs=True)
    assert (checked.tensors, checked.unchecked) == (len(read_model(models / "out")), ())
    assert alnico.reproduce(models / "out").tensors == checked.tensors
    card = alnico.compare([models / f"tuned-{i}" for i in range(3)], models / "out", base=models / "base")
    assert card is not None


def test_lines_norms_rules_and_stages(models: Path) -> None:
    alnico.merge(written(models, lines={"alpha": 0.4, "beta": 0.6}), models / "lines")
    for name, values in read_model(models / "lines").items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        if layer is None:
            continue
        last = max(int(n.split(".")[2]) for n in read_model(models / "base") if n.startswith("model.layers."))
        np.testing.assert_allclose(
            values, of_files(models, name, scale=0.4 + 0.6 * layer / max(last, 1)), rtol=0, atol=1e-6
        )
    alnico.merge(
        written(models, parameters={"weight": {"from": "l2_norm", "mode": "linear", "scale": 3}}),
        models / "norms",
    )
    (weights,) = alnico.norm_weights(
        [models / f"tuned-{i}" for i in range(3)], base=models / "base", mode="linear", scale=3
    ).weights
    for name, values in read_model(models / "norms").items():
        np.testing.assert_allclose(values, of_files(models, name, weights), rtol=0, atol=1e-6)
    rules = [{"filter": "mlp", "merge_method": "task_arithmetic", "parameters": {"lambda": 0.25}}]
    alnico.merge(written(models, methods=rules), models / "rules")
    base = read_model(models / "base")
    for name, values in read_model(models / "rules").items():
        is_ruled = "mlp" in name
        summed = base[name] + 0.25 * sum(
            read_model(models / f"tuned-{i}")[name].astype(float) - base[name] for i in range(3)
        )
        np.testing.assert_allclose(values, summed if is_ruled else of_files(models, name), rtol=0, atol=1e-6)
    (models / "stages.yml").write_text(
        yaml.safe_dump_all(
            [
                {
                    "name": "pair",
                    "merge_method": "tsv",
                    "base_model": "base",
                    "models": ["tuned-0", "tuned-1"],
                },
                {"merge_method": "tsv", "base_model": "base", "models": ["pair", "tuned-2"]},
            ]
        )
    )
    alnico.merge_documents(models / "stages.yml", models / "stages")
    name = "model.layers.0.mlp.up_proj.weight"
    one, two, three = (read_model(models / f"tuned-{i}")[name].astype(float) for i in range(3))
    pair = tsv.merge([one, two], base[name].astype(float), {}, None).astype(np.float32).astype(float)
    np.testing.assert_allclose(
        read_model(models / "stages")[name],
        tsv.merge([pair, three], base[name].astype(float), {}, None),
        atol=1e-6,
    )


def test_adapters_and_other_vocabularies_are_merged(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 2, "F32", size=0.02)
    words = {f"w{i}": i for i in range(32)}
    for place, extra in ((base, 0), (tuned[0], 2), (tuned[1], 1)):
        tensors = {n: ("F32", v) for n, v in read_model(place).items()}
        for table in ("model.embed_tokens.weight", "lm_head.weight"):
            if table in tensors:
                rows = np.ones((extra, 16), np.float32)
                tensors[table] = ("F32", np.concatenate([tensors[table][1], rows]))
        save_model(place, tensors, llama_config(vocabulary=32 + extra, dtype="float32"))
        save_tokenizer(place, words, [entry(f"<t{i}>", 32 + i) for i in range(extra)])
    recipe = {
        "merge_method": "tsv",
        "base_model": str(base),
        "models": [str(t) for t in tuned],
        "tokenizer_source": "union",
    }
    alnico.merge(recipe, tmp_path / "union")
    made = read_model(tmp_path / "union")
    assert made["model.embed_tokens.weight"].shape[0] == 34
    name = "model.layers.0.mlp.up_proj.weight"
    reference = tsv.merge(
        [read_model(t)[name].astype(float) for t in tuned], read_model(base)[name].astype(float), {}, None
    )
    np.testing.assert_allclose(made[name], reference, atol=1e-6)
    random = np.random.default_rng(3)
    references, deltas = [], []
    for one in ("sql", "chat"):
        a, b = random.standard_normal((2, 16)), 0.1 * random.standard_normal((48, 2))
        at = "base_model.model.model.layers.0.mlp.up_proj.lora_"
        (tmp_path / one).mkdir()
        save_file(
            tmp_path / one / "adapter_model.safetensors",
            {at + "A.weight": ("F32", a.astype(np.float32)), at + "B.weight": ("F32", b.astype(np.float32))},
        )
        (tmp_path / one / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
        )
        references.append(f"{base}+{tmp_path / one}")
        deltas.append(b.astype(np.float32).astype(float) @ a.astype(np.float32).astype(float))
    alnico.merge(
        {"merge_method": "tsv", "base_model": str(base), "models": references}, tmp_path / "adapters"
    )
    start = read_model(base)[name].astype(float)
    np.testing.assert_allclose(
        read_model(tmp_path / "adapters")[name],
        tsv.merge([start + d for d in deltas], start, {}, None),
        atol=1e-5,
    )
