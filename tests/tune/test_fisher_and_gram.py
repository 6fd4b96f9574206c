"""Fisher information and Gram matrices: against plain loops in float64, as files, and through the merges that take them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import alnico
from alnico.errors import EvaluationError, MismatchError, OutputError
from alnico.evaluation.loaded_model import ModuleSubject, open_subject
from alnico.evaluation.perplexity import Perplexity
from alnico.evaluation.task_file import read_tasks
from alnico.tune.statistics.fisher import measure_fisher
from alnico.tune.statistics.gram import linears, measure_gram, measure_gram_plus
from alnico.tune.statistics.measure import MeasuredStatistics
from made import read_file, read_model
from made_tasks import TASKS, Made, embedded, head_of, save_tokenizer, texts

EXAMPLES = 6
CHOSEN = [i * 60 // EXAMPLES for i in range(EXAMPLES)]
"""Places of the examples that are taken of a made task of 60."""


def tasks_of(made: Made, name: str = "pets") -> list[Any]:
    return [task for task in read_tasks(made.valid) if task.name == name]


def lines(name: str) -> list[str]:
    rows = [row["text"] for row in texts(name, 60, 1)]
    return [rows[i] for i in CHOSEN]


class Pictures:
    """A task over a given module of ``inputs``; its labels would be an error."""

    name, goal, kind, weight = "pictures", "max", "classifier", 1.0

    def __init__(self, inputs: torch.Tensor, masks: torch.Tensor | None = None) -> None:
        self.inputs, self.masks, self.size = inputs, masks, len(inputs)

    def evaluate(self, subject: Any, examples: range | None = None) -> Any:
        raise AssertionError("labels were read")

    def pooled(self, scores: Sequence[Any]) -> Any:
        raise AssertionError("labels were read")

    def digests(self) -> frozenset[str]:
        return frozenset()

    def logits(self, subject: Any, examples: Sequence[int]) -> torch.Tensor:
        module = subject.module(self.kind)
        if self.masks is None:
            return module(self.inputs[list(examples)])
        return module(self.inputs[list(examples)], attention_mask=self.masks[list(examples)]).mean(1)


class Small(nn.Module):
    """Two layers with the same input, one of another, a norm, and one that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.last, self.idle = (
            nn.Linear(5, 4),
            nn.Linear(5, 4),
            nn.Linear(4, 3),
            nn.Linear(2, 2),
        )
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.last(self.norm(torch.tanh(self.one(x)) * self.other(x)))


def small(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """A small module as a subject whose files hold its tensors."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    module = Small().to(dtype).eval()
    folder.mkdir(exist_ok=True)
    save_file({n: p.detach().clone() for n, p in module.named_parameters()}, folder / "model.safetensors")
    return SimpleNamespace(label="small", directory=folder, module=lambda _: module, tokenizer=lambda: None)


def by_loop(module: nn.Module, logits: Any, count: int) -> dict[str, torch.Tensor]:
    """The definition: one example, one class, one backward at a time."""
    found = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
    for i in range(count):
        classes = logits(i).shape[-1]
        for c in range(classes):
            module.zero_grad()
            values = logits(i)
            values.log_softmax(-1)[c].backward()
            chance = values.detach().softmax(-1)[c]
            for n, p in module.named_parameters():
                if p.grad is not None:
                    found[n] += chance * p.grad**2 / count
    module.zero_grad()
    return found


# ---- Fisher information -----------------------------------------------------------------------------------------------


def test_fisher_information_is_that_of_a_plain_loop_in_float64(tmp_path: Path) -> None:
    subject = small(tmp_path / "model")
    inputs = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    module = subject.module("classifier")
    expected = by_loop(module, lambda i: module(inputs[i]), 7)
    found = measure_fisher(subject, [Pictures(inputs)])
    for name, values in found.tensors.items():
        assert values == pytest.approx(expected[name].numpy(), rel=1e-10)
        assert found.entries[name]["mean"] == pytest.approx(float(expected[name].mean()), rel=1e-10)
    assert {"idle.weight", "idle.bias"} == set(expected) - set(found.tensors)  # no prediction depends on them
    total = sum(float((expected[n] ** 2).sum()) for n in found.tensors)
    assert found.summary["l2_norm"] == pytest.approx(total**0.5, rel=1e-10)


def test_fisher_information_of_an_encoder_behind_a_frozen_head_is_that_of_a_plain_loop(made: Made) -> None:
    subject = open_subject(made.tuned["pets"])
    found = measure_fisher(subject, tasks_of(made), examples=EXAMPLES)
    model, tokenizer = (c.from_pretrained(made.tuned["pets"]) for c in (AutoModel, AutoTokenizer))
    model.eval().double()
    head = head_of(made.base, "pets").double()
    rows = lines("pets")
    scale = logit_scale(subject, made, rows, model, tokenizer, head)
    expected = by_loop(model, lambda i: scale * embedded(model, tokenizer, [rows[i]])[0] @ head.T, EXAMPLES)
    assert len(found.tensors) > 20
    for name, values in found.tensors.items():
        wanted = expected[name].numpy()
        # A key's bias changes no prediction: what is left of it is rounding.
        assert np.abs(values - wanted).max() <= 2e-4 * np.abs(wanted).max() + 1e-12, name
    assert found.summary["examples"] == EXAMPLES
    assert not any(p.grad is not None for p in subject.module("encoder").parameters())


def logit_scale(
    subject: Any, made: Made, rows: list[str], model: Any, tokenizer: Any, head: torch.Tensor
) -> float:
    """What the task's head multiplies cosines with."""
    with torch.no_grad():
        given = tasks_of(made)[0].logits(subject, CHOSEN)
        return float((given.double() / (embedded(model, tokenizer, rows) @ head.T)).median())


def test_classes_that_are_drawn_give_the_exact_information_in_the_mean(tmp_path: Path) -> None:
    subject = small(tmp_path / "model")
    inputs = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).repeat(300, 1)
    exact = measure_fisher(subject, [Pictures(inputs[:3])]).tensors
    drawn = [
        measure_fisher(subject, [Pictures(inputs)], examples=900, expectation="sampled", seed=s)
        for s in (0, 0, 1)
    ]
    assert all(np.array_equal(drawn[0].tensors[n], drawn[1].tensors[n]) for n in exact)
    assert not np.array_equal(drawn[0].tensors["last.weight"], drawn[2].tensors["last.weight"])
    for name in exact:  # 900 draws: the mean of squares lies within a few standard errors of 1/30
        assert np.linalg.norm(drawn[0].tensors[name] - exact[name]) <= 0.15 * np.linalg.norm(exact[name])


# ---- Gram matrices ----------------------------------------------------------------------------------------------------


def by_hooks(model: Any, tokenizer: Any, rows: list[str]) -> dict[str, np.ndarray]:
    """Inputs of each linear layer, one unpadded text at a time, in float64."""
    found: dict[str, np.ndarray] = {}

    def noting(path: str) -> Any:
        def note(_: Any, given: Any) -> None:
            x = given[0].detach().reshape(-1, given[0].shape[-1]).numpy()
            found[path] = found.get(path, 0) + x.T @ x

        return note

    handles = [
        m.register_forward_pre_hook(noting(p)) for p, m in model.named_modules() if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        for row in rows:
            model(**tokenizer([row], return_tensors="pt", return_token_type_ids=False))
    for handle in handles:
        handle.remove()
    return found


def test_gram_matrices_are_over_all_tokens_but_the_padding(made: Made) -> None:
    found = measure_gram(open_subject(made.tuned["pets"]), tasks_of(made), examples=EXAMPLES)
    model, tokenizer = (c.from_pretrained(made.tuned["pets"]) for c in (AutoModel, AutoTokenizer))
    rows = lines("pets")
    expected = by_hooks(model.eval().double(), tokenizer, rows)
    tokens = sum(len(tokenizer(row)["input_ids"]) for row in rows)
    assert {f"{path}.weight" for path in expected} == set(found.entries)
    for path, wanted in expected.items():
        entry = found.entries[f"{path}.weight"]
        assert found.tensors[entry["stored"]] == pytest.approx(
            wanted, rel=1e-4, abs=1e-4 * np.abs(wanted).max()
        )
        assert entry["rows"] == (EXAMPLES if path.startswith("pooler") else tokens)


def test_layers_with_one_input_share_a_matrix(made: Made) -> None:
    found = measure_gram(open_subject(made.tuned["pets"]), tasks_of(made), examples=EXAMPLES)
    one = "encoder.layer.1.attention.self."
    assert {found.entries[f"{one}{x}.weight"]["stored"] for x in ("query", "key", "value")} == {
        f"{one}query.weight"
    }
    assert len(found.tensors) == 2 * (len(found.entries) - 2 * 2)  # a matrix and a sum


def test_padding_is_left_out_where_a_mask_says_so(tmp_path: Path) -> None:
    subject = small(tmp_path / "model", torch.float32)
    inputs = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))
    masks = torch.ones(4, 6, dtype=torch.int64)
    masks[0, 4:] = masks[2, 1:] = 0
    found = measure_gram(subject, [Pictures(inputs, masks)])
    kept = inputs[masks.bool()].double()
    assert found.entries["one.weight"] == {
        "stored": "one.weight",
        "parts": {"sum": "one.weight.sum"},
        "rows": 17,
        "is_transposed": False,
    }
    assert found.tensors["one.weight.sum"] == pytest.approx(kept.sum(0).numpy(), rel=1e-5, abs=1e-5)
    assert found.entries["other.weight"]["stored"] == "one.weight"
    assert found.tensors["one.weight"] == pytest.approx((kept.T @ kept).numpy(), rel=1e-5, abs=1e-5)
    assert "idle.weight" not in found.entries


def normalised(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the scale of the small module's norm multiplies, in float64, from the equation of LayerNorm."""
    x = torch.tanh(module.one(x)) * module.other(x)
    return ((x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()).detach()


def test_scales_and_biases_are_measured_when_asked(tmp_path: Path) -> None:
    subject = small(tmp_path / "model")
    inputs = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    masks = torch.ones(4, 6, dtype=torch.int64)
    masks[0, 4:] = masks[2, 1:] = 0
    found = measure_gram(subject, [Pictures(inputs, masks)], vectors=True)
    plain = measure_gram(subject, [Pictures(inputs, masks)])
    assert set(found.entries) - set(plain.entries) == {
        "one.bias", "other.bias", "last.bias", "norm.weight", "norm.bias",
    }  # fmt: skip
    expected = (normalised(subject.module(""), inputs[masks.bool()]) ** 2).sum(0).numpy()
    assert found.tensors["norm.weight"] == pytest.approx(expected, rel=1e-5)
    assert found.tensors["norm.bias"] == pytest.approx(np.full(4, 17.0))
    assert found.tensors["last.bias"] == pytest.approx(np.full(3, 17.0))
    assert {found.entries[n]["rows"] for n in ("norm.weight", "norm.bias", "one.bias")} == {17}
    for name, values in plain.tensors.items():
        assert np.array_equal(values, found.tensors[name])


def test_padding_is_left_out_of_a_norm_over_heads(tmp_path: Path) -> None:
    class Heads(Small):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            return self.last(self.norm(torch.stack([self.one(x), self.other(x)], 2)).sum(2))

    subject = small(tmp_path / "model")
    module = Heads().double()
    module.load_state_dict(subject.module("classifier").state_dict())
    subject.module = lambda _: module.eval()
    inputs = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    masks = torch.ones(4, 6, dtype=torch.int64)
    masks[:, 3:] = 0  # as many rows of two heads are left as there are tokens
    found = measure_gram(subject, [Pictures(inputs, masks)], vectors=True)
    assert found.entries["norm.weight"]["rows"] == 24
    x = torch.stack([layer(inputs[:, :3]) for layer in (module.one, module.other)]).detach().reshape(-1, 4)
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert found.tensors["norm.weight"] == pytest.approx((x**2).sum(0).numpy(), rel=1e-5)


def test_a_merge_of_scales_and_biases_is_the_least_squares_of_their_inputs(tmp_path: Path) -> None:
    entries, scales, biases, xs = [], [], [], []
    for i, count in enumerate((9, 5)):
        subject = small(tmp_path / f"model{i}")
        module = subject.module("classifier")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.5 * torch.randn(
                    parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)
                )
        from safetensors.torch import save_file

        save_file(module.state_dict(), tmp_path / f"model{i}" / "model.safetensors")
        inputs = torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7 + i))
        measure_gram(subject, [Pictures(inputs)], vectors=True).write(tmp_path / f"gram{i}", subject)
        entries.append(
            {"model": str(tmp_path / f"model{i}"), "parameters": {"gram": str(tmp_path / f"gram{i}")}}
        )
        xs.append(normalised(module, inputs).numpy())
        scales.append(module.norm.weight.detach().numpy())
        biases.append(module.last.bias.detach().numpy())
    alnico.merge(
        {"merge_method": "regmean", "models": entries, "parameters": {"vectors": "inputs"}}, tmp_path / "out"
    )
    merged = read_model(tmp_path / "out")
    for j in range(4):
        x = np.concatenate([of[:, j] for of in xs])
        y = np.concatenate([of[:, j] * v[j] for of, v in zip(xs, scales, strict=True)])
        assert merged["norm.weight"][j] == pytest.approx(np.linalg.lstsq(x[:, None], y)[0][0], rel=1e-6)
    assert merged["last.bias"] == pytest.approx((9 * biases[0] + 5 * biases[1]) / 14, rel=1e-6)
    idle = [read_model(tmp_path / f"model{i}")["idle.bias"] for i in range(2)]
    assert merged["idle.bias"] == pytest.approx(
        (idle[0] + idle[1]) / 2, rel=1e-6
    )  # nothing was measured of it


def test_vectors_need_statistics_of_vectors(tmp_path: Path) -> None:
    subject = small(tmp_path / "model")
    inputs = torch.randn(4, 5, dtype=torch.float64)
    measure_gram(subject, [Pictures(inputs)]).write(tmp_path / "gram", subject)
    entries = [{"model": str(tmp_path / "model"), "parameters": {"gram": str(tmp_path / "gram")}}] * 2
    recipe = {"merge_method": "regmean", "models": entries, "parameters": {"vectors": "inputs"}}
    with pytest.raises(
        MismatchError, match=r"has gram statistics of matrices only; .* `alnico statistics gram --vectors`"
    ):
        alnico.plan(recipe)
    with pytest.raises(EvaluationError, match=r"^vectors: is given together with plus; expected one of them"):
        alnico.gram_statistics([str(tmp_path / "model")] * 2, tmp_path / "out", vectors=True, plus=True)


def test_layers_that_part_in_a_later_pass_have_matrices_of_their_own(tmp_path: Path) -> None:
    class Parting(Small):
        passes = 0

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            self.passes += 1
            return self.last(torch.tanh(self.one(x)) * self.other(2 * x if self.passes > 1 else x))

    subject = small(tmp_path / "model", torch.float32)
    module = Parting()
    module.load_state_dict(subject.module("classifier").state_dict())
    subject.module = lambda _: module.eval()
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    found = measure_gram(subject, [Pictures(inputs[:4]), Pictures(inputs[4:])])
    first, second = (x.double().numpy() for x in (inputs[:4], inputs[4:]))
    assert found.tensors["one.weight"] == pytest.approx(
        first.T @ first + second.T @ second, rel=1e-5, abs=1e-5
    )
    assert found.tensors["other.weight"] == pytest.approx(
        first.T @ first + 4 * second.T @ second, rel=1e-5, abs=1e-5
    )


def test_a_turned_layer_is_told_and_a_tied_one_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)).eval()
    model.save_pretrained(tmp_path / "gpt2")
    assert sorted(p.rpartition("h.0.")[2] for p in linears(model)) == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]
    words = torch.randint(20, (5, 7))
    task = Pictures(words)
    task.logits = lambda subject, examples: subject.module("causal")(words[list(examples)]).logits[:, -1]  # type: ignore[method-assign]
    subject = SimpleNamespace(
        label="gpt2", directory=tmp_path / "gpt2", module=lambda _: model, tokenizer=lambda: None
    )
    found = measure_gram(subject, [task])
    held = read_model(tmp_path / "gpt2")
    assert len(found.entries) == 4
    for name, entry in found.entries.items():
        assert entry["is_transposed"]
        assert entry["rows"] == 35
        assert found.tensors[entry["stored"]].shape == (held[name].shape[0],) * 2


def test_a_language_model_is_measured_on_a_text(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "gpt2")
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 2, "eos_token_id": 3}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).eval()
    model.save_pretrained(tmp_path / "gpt2")
    text = " ".join(row["text"] for row in texts("pets", 20, 1))
    found = measure_gram(
        open_subject(tmp_path / "gpt2"), [Perplexity("pets", text, window=10, limit=4)], examples=3
    )
    assert {name.rpartition("h.0.")[2] for name in found.entries} == {
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
    }  # fmt: skip
    assert {entry["rows"] for entry in found.entries.values()} == {30}


# ---- RegMean++ --------------------------------------------------------------------------------------------------------


def test_regmean_plus_takes_the_inputs_of_a_layer_from_the_merged_layers_before_it(made: Made) -> None:
    names = ("pets", "food")
    subjects = [open_subject(made.tuned[name]) for name in names]
    before = [{n: v.clone() for n, v in s.module("encoder").state_dict().items()} for s in subjects]
    given = [tasks_of(made, name) for name in names]
    found = measure_gram_plus(subjects, given, examples=EXAMPLES, alpha=0.7, ridge=1e-4)
    assert all(
        torch.equal(v, before[i][n])
        for i, s in enumerate(subjects)
        for n, v in s.module("encoder").state_dict().items()
    )
    expected = plus_by_hand(made, names)
    for i in range(2):
        for name, wanted in expected[i].items():
            assert found[i].tensors[found[i].entries[name]["stored"]] == pytest.approx(
                wanted, rel=1e-3, abs=1e-3 * np.abs(wanted).max()
            ), name
    plain = measure_gram(subjects[0], given[0], examples=EXAMPLES)
    second = "encoder.layer.1.attention.self.query.weight"
    assert not np.allclose(plain.tensors[second], found[0].tensors[second], rtol=1e-2)


def plus_by_hand(made: Made, names: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """Embeddings averaged; then layer by layer, each merged by the plain formula before the next is looked at."""
    models = [AutoModel.from_pretrained(made.tuned[name]).eval().double() for name in names]
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    found: list[dict[str, np.ndarray]] = [{} for _ in models]
    for part in ("embeddings.", "encoder.layer.0.", "encoder.layer.1."):
        grams = [by_hooks(m, tokenizer, lines(name)) for m, name in zip(models, names, strict=True)]
        states = [m.state_dict() for m in models]
        for tensor in [n for n in states[0] if n.startswith(part)]:
            values = [s[tensor].numpy() for s in states]
            path = tensor.removesuffix(".weight")
            merged = sum(values) / 2
            if path in grams[0]:
                own = [g[path] for g in grams]
                for i, g in enumerate(own):
                    found[i][tensor] = g
                scaled = [
                    0.7 * g + 0.3 * np.diag(np.diag(g)) + 1e-4 * np.trace(g) / len(g) * np.eye(len(g))
                    for g in own
                ]
                merged = sum(v @ g for v, g in zip(values, scaled, strict=True)) @ np.linalg.inv(sum(scaled))
            for s in states:
                s[tensor].copy_(torch.from_numpy(np.ascontiguousarray(merged)))
    return found


# ---- as files, and merged ---------------------------------------------------------------------------------------------


def test_statistics_are_written_and_merged_by_the_commands(
    run: Callable[..., Any], made: Made, tmp_path: Path
) -> None:
    pets, food = (str(made.tuned[name]) for name in ("pets", "food"))
    for model, out in ((pets, "f0"), (food, "f1")):
        run(
            "statistics",
            "fisher",
            model,
            "--tasks",
            str(made.valid),
            "--out",
            str(tmp_path / out),
            "--examples",
            "2",
            "--sampled",
        )
    told = json.loads((tmp_path / "f0" / "statistics.json").read_text())
    assert told["kind"] == "fisher"
    assert told["model"]["reference"] == pets
    assert told["tasks"] == dict.fromkeys(TASKS, 2)
    assert {dtype for dtype, _ in read_file(tmp_path / "f0" / "statistics.safetensors").values()} == {"F32"}
    plus = (
        "statistics",
        "gram",
        pets,
        food,
        "--tasks",
        str(made.valid),
        "-o",
        str(tmp_path / "g"),
        "--examples",
        "3",
        "--plus",
        "-q",
    )
    assert run(*plus) == (0, "", "")
    shown = run(
        "statistics",
        "gram",
        pets,
        food,
        "--tasks",
        str(made.valid),
        "-o",
        str(tmp_path / "g2"),
        "--examples",
        "3",
        "--json",
    )
    printed = json.loads(shown[1])
    assert printed.pop("compile_seconds") >= 0.0
    assert printed == {
        "kind": "gram",
        "written": [str(tmp_path / "g2" / Path(p).name) for p in (pets, food)],
    }
    for method, kind, sides in (
        ("fisher", "fisher", ["f0", "f1"]),
        ("regmean", "gram", [f"g/{Path(p).name}" for p in (pets, food)]),
    ):
        entries = [
            {"model": m, "parameters": {kind: str(tmp_path / s)}}
            for m, s in zip((pets, food), sides, strict=True)
        ]
        alnico.merge({"merge_method": method, "models": entries}, tmp_path / method)
        one, other, merged = (read_model(Path(p)) for p in (pets, food, tmp_path / method))
        name = "encoder.layer.0.output.dense.weight"
        assert not np.allclose(merged[name], (one[name] + other[name]) / 2, atol=1e-5)
        assert np.isfinite(merged[name]).all()


def test_what_a_command_prints_is_the_recipe(
    run: Callable[..., Any], made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alnico.cli.progress.PATIENCE", 0.0)
    pets = str(made.tuned["pets"])
    code, out, err = run(
        "statistics",
        "gram",
        pets,
        "--tasks",
        str(made.valid),
        "--out",
        str(tmp_path / "g"),
        "--examples",
        "2",
    )
    assert code == 0
    assert alnico.load_recipe(out).models[0].parameters == {"gram": str(tmp_path / "g")}
    assert err.splitlines()[-1] == "tasks 3/3"
    again = run(
        "statistics",
        "gram",
        pets,
        "--tasks",
        str(made.valid),
        "--out",
        str(tmp_path / "v"),
        "--examples",
        "2",
        "--vectors",
    )
    recipe = alnico.load_recipe(again[1])
    assert recipe.parameters == {"vectors": "inputs"}
    jobs = {job.name: job for job in alnico.plan(recipe).jobs}
    assert jobs["encoder.layer.0.output.LayerNorm.weight"].sides


def test_statistics_are_not_written_over_others_unless_asked(made: Made, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("mine")
    with pytest.raises(
        OutputError,
        match=r"exists and is not empty; expected a new or empty directory\. Choose another output",
    ):
        alnico.fisher_statistics(made.base, tmp_path / "kept", tasks=made.valid, overwrite=True)
    found = MeasuredStatistics("gram", {"a": np.eye(2)}, {}, {})
    found.write(tmp_path / "own", open_subject(made.base))
    with pytest.raises(OutputError, match="use --overwrite"):
        found.write(tmp_path / "own", open_subject(made.base))
    found.write(tmp_path / "own", open_subject(made.base), overwrite=True)


def test_tasks_that_statistics_cannot_be_measured_on_are_refused(made: Made) -> None:
    subject = open_subject(made.base)
    whole = SimpleNamespace(name="harness", size=0)
    with pytest.raises(EvaluationError, match="harness: cannot run on a subset"):
        measure_gram(subject, [whole])  # type: ignore[list-item]
    with pytest.raises(EvaluationError, match="tasks: there are none; expected tasks for one kind of module"):
        measure_gram(subject, [])
    with pytest.raises(EvaluationError, match="pages: gives no class scores"):
        measure_fisher(subject, [SimpleNamespace(name="pages", size=4, kind="causal")])  # type: ignore[list-item]
    with pytest.raises(EvaluationError, match="tasks: pets uses the encoder and other uses the classifier"):
        measure_gram(subject, [*tasks_of(made), SimpleNamespace(name="other", size=4, kind="classifier")])
    with pytest.raises(EvaluationError, match="there are 3 for 2 models"):
        alnico.gram_statistics([made.base, made.tuned["pets"]], "unused", tasks=[made.valid] * 3)
    with pytest.raises(MismatchError, match="two of them share one module"):
        measure_gram_plus([subject, subject], [tasks_of(made)] * 2)


def test_a_module_in_memory_is_measured_too(made: Made, tmp_path: Path) -> None:
    module = AutoModel.from_pretrained(made.tuned["food"]).eval()
    subject = ModuleSubject("food", module, AutoTokenizer.from_pretrained(made.tuned["food"]))
    found = measure_gram(subject, tasks_of(made, "food"), examples=2)
    found.write(tmp_path / "gram", subject)
    entries = [{"model": str(made.tuned["food"]), "parameters": {"gram": str(tmp_path / "gram")}}] * 2
    alnico.merge(
        {"merge_method": "regmean", "models": entries}, tmp_path / "out"
    )  # the same bytes, so the same hashes
