"""Every method of mergekit 0.1.5 over models and slices, with plain values, gradients and filters: alnico makes what mergekit made.

And what goes across methods: stacks of layers, levels of parameters, stages, tokenizers. See README.md and make_matrix.py.
"""

from __future__ import annotations

import json
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


def unflat(data: np.ndarray, layers: int, rows: int) -> dict[str, np.ndarray]:
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


def differing(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest differences of the tensors that differ by more than ``TOLERANCE`` of their largest value; of zeros, by any."""
    apart = {n: float(np.abs(found[n].astype(np.float64) - v).max()) for n, v in expected.items()}
    return {n: d for n, d in apart.items() if not d <= TOLERANCE * np.abs(expected[n]).max()}


def in_order(found: dict[str, np.ndarray], out: Path, tokens: dict[str, int]) -> None:
    """Put the rows of embedding and head in the order of mergekit's vocabulary; padding keeps its place."""
    written = read_tokenizer(out)
    assert written is not None
    assert written.tokens.keys() == tokens.keys()
    order = np.arange(len(found[EMBED]))
    order[list(tokens.values())] = [written.tokens[t] for t in tokens]
    assert sorted(order) == list(range(len(order)))
    for name in (EMBED, HEAD):
        found[name] = found[name][order]


@pytest.mark.parametrize("case", sorted(OUTPUTS))
def test_a_recipe_of_the_matrix_gives_mergekits_model(
    case: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, name = case.split("/")
    monkeypatch.chdir(inputs / "tokenizers" if group == "tokenizers" else inputs)
    alnico.merge_all(MATRIX / f"{case}.yml", tmp_path / "out")
    about = OUTPUTS[case]
    dtype, data = read_file(MATRIX / f"{group}.safetensors")[name]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"]) == (about["layers"], about["vocabulary"])
    assert {d for p in (tmp_path / "out").glob("*.safetensors") for d, _ in read_file(p).values()} == {dtype}
    found, expected = read_model(tmp_path / "out"), unflat(data, about["layers"], about["rows"])
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in expected.items()}
    if "tokens" in about:
        in_order(found, tmp_path / "out", about["tokens"])
    assert differing(found, expected) == {}


def test_the_matrix_has_every_cell() -> None:
    """Methods without a parameter have no gradient and no filter."""
    methods = {p.parent.name for p in MATRIX.glob("*/models-scalar.yml")}
    assert methods == set("""
        linear slerp nuslerp multislerp karcher passthrough model_stock arcee_fusion nearswap sce ram ramplus_tl task_arithmetic ties
        dare_linear dare_ties breadcrumbs breadcrumbs_ties della della_linear
    """.split())
    kinds = {m: ("scalar",) if m == "arcee_fusion" else ("scalar", "gradient", "filter") for m in methods}
    expected = {f"{m}/{form}-{kind}" for m in methods for form in ("models", "slices") for kind in kinds[m]}
    assert expected <= OUTPUTS.keys() == {p.relative_to(MATRIX).with_suffix("").as_posix() for p in MATRIX.rglob("*.yml")}
