"""Suggested recipes plan and run on the models that they were suggested for; paths, vocabularies and sizes are those of files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import alnico
from alnico.errors import AlnicoError
from made import family, llama_config, llama_shapes, read_model, save_file, save_model
from made_tokenizers import entry, save_tokenizer
from references import tsv

WORDS = {f"w{i}": i for i in range(32)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` and ``tuned-0`` to ``tuned-2``, of independent task vectors."""
    root = tmp_path_factory.mktemp("models")
    family(root, 3, "F32", size=0.002)
    return root


def with_vocabulary(path: Path, extra: int = 0, pad: int = 0) -> Path:
    """Give a model a tokenizer: the words, ``extra`` added tokens, and ``pad`` rows more."""
    tensors = {n: ("F32", v) for n, v in read_model(path).items()}
    rows = np.ones((extra + pad, 16), np.float32)
    tensors["model.embed_tokens.weight"] = (
        "F32",
        np.concatenate([tensors["model.embed_tokens.weight"][1], rows]),
    )
    save_model(path, tensors, llama_config(vocabulary=32 + extra + pad, dtype="float32"))
    save_tokenizer(path, WORDS, [entry(f"<t{i}>", 32 + i) for i in range(extra)])
    return path


def merged(suggestion: alnico.Suggestion, out: Path) -> dict[str, np.ndarray]:
    assert suggestion.recipe is not None
    alnico.merge(suggestion.recipe, out)
    return read_model(out)


def test_the_suggested_merge_is_the_one_that_it_says(models: Path, tmp_path: Path) -> None:
    tuned = [models / "tuned-0", models / "tuned-1"]
    found = alnico.suggest(tuned, base=models / "base")
    assert (found.rule, found.method) == ("different tasks", "tsv")
    base, one, other = (read_model(m) for m in (models / "base", *tuned))
    for name, values in merged(found, tmp_path / "out").items():
        pair = [one[name].astype(float), other[name].astype(float)]
        expected = tsv.merge(pair, base[name].astype(float), {}, None)
        if "embed" in name or "lm_head" in name:
            expected = sum(pair) / 2
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "mix"),
    [
        ("same task", lambda a, b: (a + b, a)),
        ("same task, one direction", lambda a, b: (a, a + 0.3 * b)),
        ("conflict, few entries hold it", lambda a, b: (20 * a, 20 * (b - 0.5 * a))),
        ("conflict, no entry stands out", lambda a, b: (a, b - 0.5 * a)),
    ],
)
def test_what_every_rule_suggests_runs(
    rule: str, mix: Callable[..., tuple[np.ndarray, ...]], models: Path, tmp_path: Path
) -> None:
    is_flat = rule.startswith("conflict")  # for several tasks these rules are for changes outside of matrices
    base, a, b = (
        {n: v.reshape(-1) if is_flat else v for n, v in read_model(models / m).items()}
        for m in ("base", "tuned-0", "tuned-1")
    )
    config = {} if is_flat else llama_config(dtype="float32")
    paths = [save_model(tmp_path / "base", {n: ("F32", v) for n, v in base.items()}, config)]
    for i in range(2):
        tensors = {
            n: ("F32", base[n] + mix(0.5 * (a[n] - base[n]), 0.5 * (b[n] - base[n]))[i].astype(np.float32))
            for n in base
        }
        paths.append(save_model(tmp_path / f"model-{i}", tensors, config))
    found = alnico.suggest(paths[1:], base=paths[0])
    assert found.rule == rule
    assert all(np.isfinite(v).all() for v in merged(found, tmp_path / "out").values())


def test_a_model_alone_and_its_base_run(models: Path, tmp_path: Path) -> None:
    found = alnico.suggest([models / "tuned-0"], base=models / "base")
    base, one = read_model(models / "base"), read_model(models / "tuned-0")
    for name, values in merged(found, tmp_path / "out").items():
        np.testing.assert_allclose(values, (base[name].astype(float) + one[name]) / 2, rtol=0, atol=1e-6)


def test_adapters_are_told_from_models(models: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    at = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    references = []
    for name in ("sql", "chat"):
        low = {
            at + "A.weight": random.standard_normal((2, 16)),
            at + "B.weight": 0.01 * random.standard_normal((48, 2)),
        }
        save_file(
            tmp_path / name / "adapter_model.safetensors",
            {n: ("F32", v.astype(np.float32)) for n, v in low.items()},
        )
        (tmp_path / name / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
        )
        references.append(f"{models / 'base'}+{tmp_path / name}")
    found = alnico.suggest(references, base=models / "base")
    assert (found.rule, found.method) == ("different tasks", "tsv")
    assert all(np.isfinite(v).all() for v in merged(found, tmp_path / "out").values())


def test_added_tokens_and_padding_get_the_tokenizer_that_they_need(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 3, "F32", size=0.002)
    with_vocabulary(base)
    padded, chat, plain = (
        with_vocabulary(tuned[0], pad=4),
        with_vocabulary(tuned[1], extra=2),
        with_vocabulary(tuned[2]),
    )
    found = alnico.suggest([padded, plain], base=base)
    assert yaml.safe_load(found.recipe or "")["tokenizer"] == {"source": "base"}
    assert "padded" not in " ".join(found.warnings)
    assert merged(found, tmp_path / "base-tokens")["model.embed_tokens.weight"].shape == (32, 16)
    found = alnico.suggest([chat, plain], base=base)
    assert yaml.safe_load(found.recipe or "")["tokenizer_source"] == "union"
    assert any("the output has the tokens of all" in said for said in found.findings)
    assert merged(found, tmp_path / "all-tokens")["model.embed_tokens.weight"].shape == (34, 16)


def test_a_head_of_its_own_is_taken_from_the_base_and_one_more_tensor_copied(
    models: Path, tmp_path: Path
) -> None:
    sizes = {"base": 2, "tuned-0": 3, "tuned-1": 2}
    for name, labels in sizes.items():
        tensors = {n: ("F32", v) for n, v in read_model(models / name).items()} | {
            "score.weight": ("F32", np.ones((labels, 16)))
        }
        if name == "tuned-1":
            tensors["extra.weight"] = ("F32", np.ones(3))
        save_model(tmp_path / name, tensors, llama_config(dtype="float32"))
    found = alnico.suggest([tmp_path / "tuned-0", tmp_path / "tuned-1"], base=tmp_path / "base")
    assert "tuned-0: score.weight: another shape, taken from the base." in found.findings
    assert "tuned-1: extra.weight: in only one of the two, copied." in found.findings
    out = merged(found, tmp_path / "out")
    assert out["score.weight"].shape == (2, 16)
    assert out["extra.weight"].tolist() == [1, 1, 1]


def test_a_model_of_another_size_is_left_out_before_it_is_read(models: Path, tmp_path: Path) -> None:
    shapes = llama_shapes(hidden=32)
    large = save_model(
        tmp_path / "large", {n: ("F32", np.ones(s)) for n, s in shapes.items()}, llama_config(hidden=32)
    )
    found = alnico.suggest([models / "tuned-0", large, models / "tuned-1"], base=models / "base")
    assert found.findings == (
        f"{large} is left out: {large} and {models / 'base'} are models of different sizes: hidden size 32 and 16, "
        "intermediate size 96 and 48; expected one architecture and size.",
    )
    nothing = alnico.suggest([large], base=models / "base")
    assert nothing.recipe is None


def test_the_command_prints_a_recipe_that_merges_from_there(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(models)
    code, out, err = run("suggest", "--base", "base", "--models", "tuned-0", "tuned-1")
    assert code == 0
    assert "note: These numbers compare parameters, not abilities" in err
    assert yaml.safe_load(out)["models"] == [{"model": "tuned-0"}, {"model": "tuned-1"}]
    file = tmp_path / "recipe.yml"
    assert run("suggest", "--base", "base", "tuned-0", "tuned-1", "--out", str(file))[1] == f"{file}: tsv\n"
    monkeypatch.chdir(tmp_path)
    assert run("plan", "recipe.yml")[0] == 0
    assert run("suggest", "--base", str(models / "base"), str(models / "tuned-0"), "--out", str(file))[0] == 8


def test_the_command_takes_an_analysis_for_base_and_models(
    models: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    tuned = [str(models / "tuned-0"), str(models / "tuned-1")]
    alnico.analyze(tuned, base=models / "base", out=tmp_path / "report")
    data = json.loads(run("suggest", "--analysis", str(tmp_path / "report"), "--json")[1])
    assert data == alnico.suggest(tuned, base=models / "base").data()
    summary = tmp_path / "report" / "summary.json"
    summary.write_text(summary.read_text().replace("tuned-1", "gone"))
    again = alnico.suggest(analysis=tmp_path / "report")
    assert again.findings[0].startswith("gone: it is not known whether its vocabulary fits. ")


def test_without_a_model_left_the_command_says_why(
    models: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run("suggest", "--base", str(models / "base"), str(models / "base"))
    assert (code, out) == (5, "")
    assert err.startswith("alnico: base is left out: it equals the base in all ")
    assert err.endswith("No model is left to merge.\n")


def test_suggest_takes_models_or_an_analysis(models: Path) -> None:
    for given in ({}, {"base": models / "base"}, {"base": models / "base", "analysis": models}):
        with pytest.raises(AlnicoError, match=r"^suggest needs a base and models, or an analysis alone\.$"):
            alnico.suggest(**given)  # type: ignore[arg-type]
