"""Every method of mergekit 0.1.5 over models and slices, with plain values, gradients and filters: alnico makes what mergekit made.

And what goes across methods: stacks of layers, levels of parameters, stages, tokenizers. See README.md and make_matrix.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.vocabulary.tokenizer import read_tokenizer
from made import llama_config, llama_shapes, read_file, read_model, save_model
from made_tokenizers import EMBED, HEAD, save_family

MATRIX = Path(__file__).parent / "matrix"
OUTPUTS: dict[str, dict[str, Any]] = json.loads((MATRIX / "outputs.json").read_text())
TOLERANCE = 1e-5
"""Of the largest value of a tensor: the promise of docs/differences.md."""

HIDDEN, LAYERS = 4, 3

Tensors = dict[str, np.ndarray]
Merge = Callable[[str], Path]


def unflat(data: np.ndarray, layers: int, rows: int) -> Tensors:
    """The tensors of a model from its values, which lie in the order of the names."""
    shapes = llama_shapes(HIDDEN, layers, rows, tied=False)
    names = sorted(shapes)
    ends = np.cumsum([np.prod(shapes[n], dtype=int) for n in names])
    assert ends[-1] == data.size
    return {n: part.reshape(shapes[n]) for n, part in zip(names, np.split(data, ends[:-1]), strict=True)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("matrix")
    save_family(root / "tokenizers")
    for name, data in read_model(MATRIX / "inputs.safetensors").items():
        layers = 1 if name.startswith("tokenizers/") else LAYERS
        fixed = sum(np.prod(s, dtype=int) for s in llama_shapes(HIDDEN, layers, 0, tied=False).values())
        rows = int(data.size - fixed) // (2 * HIDDEN)
        tensors = {n: ("F32", v) for n, v in unflat(data, layers, rows).items()}
        save_model(root / name, tensors, llama_config(HIDDEN, layers, rows, tied=False, dtype="float32"))
    return root


def differing(found: Tensors, expected: Tensors) -> dict[str, float]:
    """The largest differences of the tensors that differ by more than ``TOLERANCE`` of their largest value; of zeros, by any."""
    apart = {n: float(np.abs(found[n].astype(np.float64) - v).max()) for n, v in expected.items()}
    return {n: d for n, d in apart.items() if not d <= TOLERANCE * np.abs(expected[n]).max()}


def in_order(found: Tensors, out: Path, tokens: dict[str, int]) -> None:
    """Put the rows of embedding and head in the order of mergekit's vocabulary; padding keeps its place."""
    written = read_tokenizer(out)
    assert written is not None
    assert written.tokens.keys() == tokens.keys()
    order = np.arange(len(found[EMBED]))
    order[list(tokens.values())] = [written.tokens[t] for t in tokens]
    assert sorted(order) == list(range(len(order)))
    for name in (EMBED, HEAD):
        found[name] = found[name][order]


@pytest.fixture
def merge(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Merge:
    """Run alnico on a stored recipe, ``group/name``; gives the folder of its output."""

    def run(case: str) -> Path:
        monkeypatch.chdir(inputs / "tokenizers" if case.startswith("tokenizers/") else inputs)
        alnico.merge_documents(MATRIX / f"{case}.yml", tmp_path / case)
        return tmp_path / case

    return run


def theirs(case: str) -> Tensors:
    """What mergekit wrote."""
    group, name = case.split("/")
    about = OUTPUTS[case]
    return unflat(read_file(MATRIX / f"{group}.safetensors")[name][1], about["layers"], about["rows"])


@pytest.mark.parametrize("case", sorted(c for c in OUTPUTS if not c.startswith("differences/")))
def test_a_recipe_of_the_matrix_gives_mergekits_model(case: str, merge: Merge) -> None:
    group, name = case.split("/")
    out, about, expected = merge(case), OUTPUTS[case], theirs(case)
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"]) == (about["layers"], about["vocabulary"])
    (dtype,) = {d for p in out.glob("*.safetensors") for d, _ in read_file(p).values()}
    assert dtype == read_file(MATRIX / f"{group}.safetensors")[name][0]
    found = read_model(out)
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in expected.items()}
    if "tokens" in about:
        in_order(found, out, about["tokens"])
    assert differing(found, expected) == {}


def test_the_matrix_has_every_cell() -> None:
    """Methods without a parameter have no gradient and no filter."""
    methods = {p.parent.name for p in MATRIX.glob("*/models-scalar.yml")}
    assert methods == {
        "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "karcher", "linear",
        "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl", "sce", "slerp", "task_arithmetic", "ties",
    }  # fmt: skip
    kinds = {m: ("scalar",) if m == "arcee_fusion" else ("scalar", "gradient", "filter") for m in methods}
    expected = {f"{m}/{form}-{kind}" for m in methods for form in ("models", "slices") for kind in kinds[m]}
    assert (
        expected
        <= OUTPUTS.keys()
        == {p.relative_to(MATRIX).with_suffix("").as_posix() for p in MATRIX.rglob("*.yml")}
    )


@pytest.mark.parametrize(
    ("case", "error", "same_as"),
    [
        ("slices-without-the-base", "ValueError", "ties/slices-gradient"),
        ("t-of-every-model", "RuntimeError", "slerp/models-scalar"),
        ("passthrough-with-a-base", "ValueError", "passthrough/models-scalar"),
    ],
)
def test_a_recipe_that_can_mean_one_thing_runs(case: str, error: str, same_as: str, merge: Merge) -> None:
    assert OUTPUTS[f"differences/{case}"] == {"refused": error}
    assert differing(read_model(merge(f"differences/{case}")), theirs(same_as)) == {}


def test_a_value_of_the_whole_merge_under_a_model_counts(merge: Merge) -> None:
    meant = theirs("ties/models-scalar")
    assert len(differing(theirs("differences/lambda-of-a-model"), meant)) == len(meant), (
        "mergekit leaves it out"
    )
    assert differing(read_model(merge("differences/lambda-of-a-model")), meant) == {}


def test_two_values_of_the_whole_merge_under_models_are_refused(merge: Merge) -> None:
    assert differing(theirs("differences/lambdas-of-models"), theirs("differences/lambda-of-a-model")) == {}
    with pytest.raises(alnico.errors.RecipeError, match="lambda"):
        merge("differences/lambdas-of-models")


def test_two_layers_of_one_model_are_averaged(merge: Merge, inputs: Path) -> None:
    assert OUTPUTS["differences/one-model-twice"] == {"refused": "ValueError"}
    one = read_model(inputs / "one")

    def moved(name: str, by: int) -> str:
        return name.replace("layers.1.", f"layers.{1 + by}.").replace("layers.0.", f"layers.{by}.")

    expected = {
        n: (v + one[moved(n, 1)].astype(np.float64)) / 2 for n, v in one.items() if "layers.2." not in n
    }
    assert differing(read_model(merge("differences/one-model-twice")), expected) == {}


def test_what_comes_after_the_layers_is_merged_from_all_sources_of_the_last_slice(
    merge: Merge, inputs: Path
) -> None:
    """mergekit takes as many of them as the first slice has: one, the base."""
    case = "differences/a-slice-of-the-base"
    base, made, found = read_model(inputs / "base"), theirs(case), read_model(merge(case))
    after = ("lm_head.weight", "model.norm.weight")
    assert (
        differing(
            {n: v for n, v in found.items() if n not in after},
            {n: v for n, v in made.items() if n not in after},
        )
        == {}
    )
    assert differing({n: made[n] for n in after}, {n: base[n] for n in after}) == {}
    assert sorted(differing({n: found[n] for n in after}, {n: base[n] for n in after})) == sorted(after)


def test_a_token_that_a_slice_lacks_has_the_row_of_another_slices_model(merge: Merge, inputs: Path) -> None:
    """The first slice, which gives the embedding, has base and other; the second, which gives the head, base and chat."""
    case = "differences/slices-of-other-vocabularies"
    tokens, made, out = OUTPUTS[case]["tokens"], theirs(case), merge(case)
    found = read_model(out)
    in_order(found, out, tokens)
    models = {m: read_model(inputs / "tokenizers" / m) for m in ("other", "chat")}
    rows = {m: read_tokenizer(inputs / "tokenizers" / m) for m in models}

    def row(model: str, matrix: str, token: str) -> np.ndarray:
        held = rows[model]
        assert held is not None
        return models[model][matrix][held.tokens[token]].astype(np.float64)

    for matrix, token, model in (
        (EMBED, "<|im_start|>", "chat"),
        (HEAD, "ef", "other"),
        (HEAD, "gh", "other"),
    ):
        assert not made[matrix][tokens[token]].any()
        np.testing.assert_allclose(found[matrix][tokens[token]], row(model, matrix, token), rtol=1e-5)
    # Of the other rows only that of the token of both differs: for base it is the mean of both, not the one of its slice.
    missing = {EMBED: ["<|im_start|>"], HEAD: ["ef", "gh"]}
    for matrix, model in ((EMBED, "other"), (HEAD, "chat")):
        mean = (row("other", matrix, "<|im_end|>") + row("chat", matrix, "<|im_end|>")) / 2
        both = tokens["<|im_end|>"]
        np.testing.assert_allclose(made[matrix][both], row(model, matrix, "<|im_end|>"), rtol=1e-5)
        np.testing.assert_allclose(
            found[matrix][both], (mean + row(model, matrix, "<|im_end|>")) / 2, rtol=1e-5
        )
        rest = [i for t, i in tokens.items() if t not in ("<|im_end|>", *missing[matrix])]
        np.testing.assert_allclose(found[matrix][rest], made[matrix][rest], rtol=1e-5, atol=1e-6)


def test_documents_without_names_are_merges_of_their_own(merge: Merge) -> None:
    assert OUTPUTS["differences/documents-without-names"] == {"refused": "ValueError"}
    out = merge("differences/documents-without-names")
    for folder, same_as in (("1-linear", "linear/models-scalar"), ("2-slerp", "slerp/models-scalar")):
        assert differing(read_model(out / folder), theirs(same_as)) == {}


def test_a_tokenizer_source_may_have_the_word_model_before_its_path(merge: Merge, tmp_path: Path) -> None:
    """As mergekit wanted it once; its 0.1.5 looks for a model of that name."""
    case = "tokenizers/tokenizer_source-other"
    expected = merge(case)
    text = (
        (MATRIX / f"{case}.yml")
        .read_text()
        .replace("tokenizer_source: other", "tokenizer_source: model:other")
    )
    assert "model:other" in text
    alnico.merge(text, tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (expected / name).read_bytes()
