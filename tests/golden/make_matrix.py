"""Make the matrix: every method of mergekit over models and slices, with plain values, gradients and filters; and what goes across.

    pip install mergekit==0.1.5 torch==2.14.1 xxhash
    PYTHONHASHSEED=0 python tests/golden/make_matrix.py      # alnico is not needed; with names of groups, only these

Writes ``matrix/``: ``GROUP/CASE.yml``, recipes that both programs read unchanged; ``GROUP.safetensors``, what mergekit made of them,
a case the tensors of its output in the order of their names, one after the other; ``inputs.safetensors``, the models in the same way;
``outputs.json``, the layers and the vocabulary of each output, and the exception where mergekit refused a case. Random masks are drawn
as in ``make.py``. Without the seed of hashes, the tokens of a union have other ids in every run: mergekit numbers them in the order of
sets.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from make import THREE, Drawn  # noqa: E402
from recipes_in_circulation import circulation  # noqa: E402

from made import llama_config, llama_shapes, read_file, read_model, save_file, save_model  # noqa: E402
from made_tokenizers import CASES, EMBED, save_family  # noqa: E402

MATRIX = HERE / "matrix"
HIDDEN, LAYERS, VOCABULARY = 4, 3, 6
RANGES = ((0, 2), (1, 3))
"""The slices of the matrix: the middle layer is taken twice."""

Recipe = dict[str, Any]


def values(plain: Any, gradient: Any, filters: Any) -> dict[str, Any]:
    return {"scalar": plain, "gradient": gradient, "filter": filters}


def filters(**cases: Any) -> list[dict[str, Any]]:
    """A list of filters; ``rest`` is the entry without one, ``all`` the one with a star."""
    names = {"rest": None, "all": "*", "second": "layers.1."}
    return [{"value": v} | ({"filter": names.get(k, k)} if k != "rest" else {}) for k, v in cases.items()]


OWN: dict[str, dict[str, tuple[Any, ...]]] = {
    "weight": values(
        (1.0, 0.7, 0.4),
        ([0.2, 1.0], [0.9, 0.1, 0.5], [0.4, 0.8, 0.3, 0.6]),
        (filters(self_attn=0.3, mlp=[0.2, 0.9], rest=0.6), 0.7, filters(second=0.9, norm=0.25, all=0.5)),
    ),
    "density": values(
        (0.7, 0.5, 0.4),
        ([0.3, 0.9], [0.8, 0.4], [0.5, 0.7, 0.6]),
        (filters(mlp=0.3, rest=0.7), filters(self_attn=[0.4, 0.8], all=0.5), filters(second=0.9, rest=0.6)),
    ),
    "gamma": values(
        (0.1, 0.05, 0.2),
        ([0.0, 0.3], 0.1, [0.2, 0.05]),
        (filters(mlp=0.2, rest=0.01), 0.05, filters(second=0.3, all=[0.0, 0.1])),
    ),
    "epsilon": values(
        (0.3, 0.1, 0.2),
        ([0.05, 0.25], 0.1, [0.2, 0.1, 0.3]),
        (filters(mlp=0.2, rest=0.05), 0.1, filters(second=0.3, all=[0.05, 0.15])),
    ),
    "scale": values((0.7,), ([0.4, 1.3],), (filters(o_proj=0.0, down_proj=[0.2, 0.8], rest=1.1),)),
}
"""Values a model, by what is varied."""

RANKED = values(
    (0.6, 0.5, 0.4),
    ([0.4, 0.7], [0.6, 0.45], 0.5),
    (filters(mlp=0.4, rest=0.6), 0.5, filters(second=0.6, all=0.5)),
)
"""Densities that leave room for ``epsilon``."""

ARC = values(0.3, [0.1, 0.9], filters(self_attn=[0, 0.5, 0.3, 0.7, 1], mlp=[1, 0.5, 0.7, 0.3, 0], rest=0.4))
SWITCH = values(True, [True, False], filters(mlp=True, rest=False))
EXTENT = values(0.8, [0.5, 1.3], filters(mlp=0.6, self_attn=[0.4, 1.2], rest=0.9))
SHARES = values(0.5, [1.0, 0.3], filters(mlp=0.5, self_attn=[0.9, 0.4], all=0.75))
SMALL = values(0.05, [0.02, 0.1], filters(mlp=0.04, self_attn=[0.01, 0.09], rest=0.06))
GENERAL = {"lambda": EXTENT, "normalize": SWITCH}
TRIMMED = {"own": ("weight", "density"), "shared": {**GENERAL, "rescale": SWITCH}}

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"own": ("weight",), "shared": {"normalize": SWITCH}, "base": False},
    "slerp": {"models": ("far",), "shared": {"t": ARC}},
    "nuslerp": {"models": ("one", "far"), "own": ("weight",), "shared": {"nuslerp_flatten": SWITCH}, "base": False},
    "multislerp": {"models": ("one", "far", "two"), "own": ("weight",), "shared": {"normalize_weights": SWITCH}},
    "karcher": {
        "models": ("one", "far", "two"), "base": False,
        "shared": {"max_iter": values(3, [1, 3], filters(mlp=1, self_attn=[3, 1], rest=2)), "tol": values(1e-3, [1e-3, 1e-1], 1e-5)},
    },
    "passthrough": {"models": ("one",), "own": ("scale",), "base": False},
    "model_stock": {"shared": {"filter_wise": SWITCH}},
    "arcee_fusion": {"models": ("far",), "dtype": "float64"},
    "nearswap": {"models": ("one",), "shared": {"t": SMALL}},
    "sce": {"shared": {"select_topk": SHARES}},
    "ram": {"shared": {"epsilon": SMALL}},
    "ramplus_tl": {"shared": {"epsilon": SMALL, "r": EXTENT, "alpha": values(3.0, [0.5, 4.0], filters(mlp=1.0, rest=[0.2, 2.0]))}},
    "task_arithmetic": {"own": ("weight",), "shared": GENERAL},
    "ties": TRIMMED,
    "dare_linear": TRIMMED,
    "dare_ties": TRIMMED,
    "breadcrumbs": {**TRIMMED, "own": ("weight", "density", "gamma")},
    "breadcrumbs_ties": {**TRIMMED, "own": ("weight", "density", "gamma")},
    "della": {**TRIMMED, "own": ("weight", "density", "epsilon"), "density": RANKED},
    "della_linear": {**TRIMMED, "own": ("weight", "density", "epsilon"), "density": RANKED},
}  # fmt: skip


def cell(method: str, form: str, kind: str) -> Recipe:
    """The recipe of one cell of the matrix."""
    about = METHODS[method]
    models = about.get("models", THREE)
    tables = {**OWN, **({"density": about["density"]} if "density" in about else {})}
    entries: list[Recipe] = [{"model": m} for m in models]
    for name in about.get("own", ()):
        for entry, value in zip(entries, tables[name][kind], strict=False):
            entry.setdefault("parameters", {})[name] = value
    shared = {name: table[kind] for name, table in about.get("shared", {}).items()}
    recipe: Recipe = {"merge_method": method}
    if about.get("base", True):
        entries = [{"model": "base"}, *entries]
        recipe["base_model"] = "base"
    if form == "models":
        recipe["models"] = entries
    else:
        recipe["slices"] = [{"sources": [{**e, "layer_range": list(r)} for e in entries]} for r in RANGES]
    return recipe | ({"parameters": shared} if shared else {}) | {"dtype": about.get("dtype", "float32")}


def matrix() -> dict[str, str]:
    cells = {}
    for method, about in METHODS.items():
        kinds = ("scalar", "gradient", "filter") if about.get("own") or about.get("shared") else ("scalar",)
        for form in ("models", "slices"):
            cells |= {f"{method}/{form}-{kind}": written(cell(method, form, kind)) for kind in kinds}
    return cells


class Plain(yaml.SafeDumper):
    """YAML without anchors: each value where it is used."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def written(*documents: Recipe) -> str:
    return "---\n".join(yaml.dump(d, Dumper=Plain, sort_keys=False, width=120) for d in documents)


def piece(*sources: tuple[Any, ...], **keys: Any) -> Recipe:
    """A slice of (model, first layer, end, parameters...)."""
    made = [
        {"model": m, "layer_range": [low, high], **({"parameters": p[0]} if p else {})}
        for m, low, high, *p in sources
    ]
    return {"sources": made, **keys}


def stacks() -> dict[str, str]:
    """Layers put together from several models."""

    def stack(*slices: Recipe, method: str = "passthrough", **keys: Any) -> str:
        return written({"merge_method": method, "slices": list(slices), **keys, "dtype": "float32"})

    muted = {"scale": filters(o_proj=0.0, down_proj=0.0, rest=1.0)}
    return {
        "two-models": stack(piece(("one", 0, 2)), piece(("two", 1, 3))),
        "three-models": stack(piece(("one", 0, 1)), piece(("two", 0, 3)), piece(("far", 2, 3))),
        "repeated": stack(piece(("one", 0, 2)), piece(("one", 1, 2)), piece(("one", 1, 3))),
        "pruned": stack(piece(("one", 0, 1)), piece(("one", 2, 3))),
        "one-layer": stack(piece(("one", 1, 2))),
        "muted-copies": stack(piece(("one", 0, 2)), piece(("one", 1, 3, muted))),
        "scaled-slice": stack(piece(("one", 0, 2)), piece(("two", 1, 3), parameters={"scale": [0.5, 2.0]})),
        "scaled-everywhere": stack(piece(("one", 0, 3)), piece(("two", 0, 3)), parameters={"scale": filters(norm=1.0, all=[0.5, 1.5])}),
        "shifted": stack(piece(("one", 0, 2), ("two", 1, 3)), method="linear", parameters={"weight": 0.5}),
        "nested-method": stack(
            piece(("one", 0, 1), ("two", 0, 1), merge_method="linear"), piece(("one", 1, 3), ("two", 1, 3), merge_method="linear"),
            method="linear", parameters={"weight": 0.5},
        ),
        "shifted-ties": stack(
            piece(("base", 0, 1), ("one", 0, 1), ("two", 0, 1), ("three", 0, 1)), piece(("base", 1, 2), ("one", 2, 3), ("two", 0, 1), ("three", 0, 1)),
            method="ties", base_model="base", parameters={"density": 0.5, "weight": [0.3, 0.9]},
        ),
        "slerp-halves": stack(
            piece(("base", 0, 2), ("far", 0, 2)), piece(("base", 2, 3), ("far", 2, 3)),
            method="slerp", base_model="base", parameters={"t": 0.5},
        ),
    }  # fmt: skip


def levels() -> dict[str, str]:
    """Where a value is written, which one wins, and what a gradient gives to what lies outside the layers."""

    def listed(method: str, models: Mapping[str, Any], **keys: Any) -> Recipe:
        entries = [{"model": m, **({"parameters": p} if p else {})} for m, p in models.items()]
        return {"merge_method": method, "models": entries, **keys, "dtype": "float32"}

    def sliced(method: str, *slices: Recipe, **keys: Any) -> Recipe:
        return {"merge_method": method, "slices": list(slices), **keys, "dtype": "float32"}

    plain = dict.fromkeys(THREE)
    own = {"weight": filters(mlp=1.5)}
    module = {
        "models": [{"model": m} for m in THREE],
        "parameters": {"weight": filters(self_attn=[0.2, 0.6])},
    }
    recipes = {
        "gradient-global": listed("linear", plain, parameters={"weight": [0.2, 1.0], "normalize": False}),
        "gradient-of-many": listed("slerp", {"base": None, "far": None}, base_model="base", parameters={"t": [0, 1, 0.25, 0.9]}),
        "gradient-of-one": listed("linear", {"one": {"weight": [0.5]}, "two": {"weight": 0.7}}),
        "gradient-in-slices-of-one": sliced(
            "slerp", piece(("base", 0, 1), ("far", 0, 1)), piece(("base", 1, 2), ("far", 1, 2)),
            base_model="base", parameters={"t": [0.2, 0.5, 0.9]},
        ),
        "gradient-of-words": listed("linear", {"one": {"weight": [5e-1, "1e-1"]}, "two": {"weight": "4e-1"}}),
        "switch-of-three": listed("linear", plain, parameters={"weight": 0.8, "normalize": [True, False, True]}),
        "gradient-of-rows": sliced(
            "nuslerp", piece(("base", 0, 2), ("one", 0, 2), ("far", 0, 2)), piece(("base", 1, 3), ("one", 1, 3), ("far", 1, 3)),
            base_model="base", parameters={"weight": [0.2, 0.7], "nuslerp_flatten": False, "nuslerp_row_wise": filters(mlp=True, rest=False)},
        ),
        "filter-alone": listed("linear", plain, parameters={"weight": 0.5, "normalize": {"filter": "mlp", "value": False}}),
        "filter-order": listed("linear", plain, parameters={"weight": filters(all=0.5, mlp=0.9), "normalize": filters(proj=False, rest=True)}),
        "model-over-global": listed("linear", {"one": own, "two": {"weight": 0.3}, "three": None}, parameters={"weight": 0.6}),
        "model-falls-through": listed(
            "ties", {"base": None, "one": {"density": filters(mlp=0.4)}, "two": {"density": filters(norm=1.0, self_attn=0.6)}, "three": None},
            base_model="base", parameters={"density": 0.8, "weight": filters(mlp=[0.2, 0.9], rest=0.5)},
        ),
        "slice-over-global": sliced(
            "linear", piece(("one", 0, 2), ("two", 0, 2)), piece(("one", 1, 3), ("two", 1, 3), parameters={"normalize": False}),
            parameters={"weight": 0.4, "normalize": True},
        ),
        "source-over-slice": sliced(
            "linear", piece(("one", 0, 2, own), ("two", 0, 2), parameters={"weight": filters(norm=0.2, self_attn=[0.3, 0.8])}),
            piece(("one", 1, 3), ("two", 1, 3, {"weight": 0.9})), parameters={"weight": 0.5, "normalize": False},
        ),
        "slice-falls-through": sliced(
            "ties", piece(("base", 0, 2), ("one", 0, 2, {"density": 0.6}), ("two", 0, 2), ("three", 0, 2), parameters={"lambda": filters(mlp=0.5)}),
            piece(("base", 2, 3), ("one", 2, 3), ("two", 2, 3), ("three", 2, 3), parameters={"density": 0.9, "normalize": False}),
            base_model="base", parameters={"density": 0.5, "weight": 0.7, "lambda": 1.2},
        ),
        "slice-base": sliced(
            "task_arithmetic", piece(("base", 0, 2), ("one", 0, 2), ("two", 0, 2), ("three", 0, 2)),
            piece(("far", 1, 3), ("one", 1, 3), ("two", 1, 3), ("three", 1, 3), base_model="far"),
            base_model="base", parameters={"weight": [0.3, 0.8]},
        ),
        "slice-bases-only": sliced(
            "slerp", piece(("base", 0, 2), ("far", 0, 2), base_model="base"), piece(("base", 1, 3), ("far", 1, 3), base_model="far"),
            parameters={"t": 0.25},
        ),
        "module": {"merge_method": "linear", "modules": {"default": module}, "parameters": {"weight": 0.5, "normalize": False}, "dtype": "float32"},
        "filters-read-the-models-own-name": sliced(
            "linear", piece(("one", 0, 1), ("two", 0, 1)),
            piece(("one", 2, 3, {"weight": filters(**{"layers.2.": 0.9, "layers.1.": 0.1, "all": 0.4})}), ("two", 1, 2)),
            parameters={"weight": 0.5},
        ),
        "filters-of-all-read-the-name-of-the-output": sliced(
            "slerp", piece(("base", 0, 1), ("far", 0, 1)), piece(("base", 2, 3), ("far", 2, 3)),
            base_model="base", parameters={"t": filters(**{"layers.2.": 0.9, "layers.1.": 0.1, "all": 0.4})},
        ),
        "filters-of-a-global-weight": sliced(
            "linear", piece(("one", 0, 1), ("two", 0, 1)), piece(("one", 2, 3), ("two", 1, 2)),
            parameters={"weight": filters(**{"layers.2.": 0.9, "layers.1.": 0.1, "all": 0.4})},
        ),
        "weight-of-a-base-is-none": listed(
            "ties", {"base": {"weight": 5.0, "density": 0.1}, "one": None, "two": None, "three": None},
            base_model="base", parameters={"weight": 0.6, "density": 0.5},
        ),
        "base-among-the-last": listed("slerp", {"far": None, "base": None}, base_model="base", parameters={"t": [0.1, 0.7]}),
        "base-unlisted": listed("dare_ties", plain, base_model="base", parameters={"weight": [0.3, 0.6], "density": 0.5}),
    }  # fmt: skip
    return {name: written(recipe) for name, recipe in recipes.items()}


def stages() -> dict[str, str]:
    """Several documents, those with a name for the others to use; what the last one makes."""

    def plain(method: str, models: Mapping[str, Any], **keys: Any) -> Recipe:
        entries = [
            {"model": m, "parameters": {"weight": w}} if w is not None else {"model": m}
            for m, w in models.items()
        ]
        return {"merge_method": method, "models": entries, **keys, "dtype": "float32"}

    mean = {"name": "mean", **plain("linear", {"one": 0.7, "two": 0.4})}
    change = plain("task_arithmetic", {"mean": 0.6, "two": 0.3, "three": [0.2, 0.8]}, base_model="base")
    deep = {
        "name": "deep", "merge_method": "passthrough", "dtype": "float32",
        "slices": [piece(("mean", 0, 2)), piece(("three", 1, 3))],
    }  # fmt: skip
    arc = {"merge_method": "slerp", "base_model": "deep", "parameters": {"t": [0.1, 0.8]}, "dtype": "float32"}
    mapped = {"model": {"model": {"path": "mean"}}, "parameters": {"weight": 0.6}}
    return {
        "two": written(mean, change),
        "backwards": written(change, mean),
        "base-is-a-stage": written(mean, plain("ties", {"one": 1.0, "two": 0.7, "three": 0.5}, base_model="mean", parameters={"density": 0.5})),
        "chain": written(mean, deep, {**arc, "slices": [piece(("deep", 0, 4), ("deeper", 0, 4))]}, {**deep, "name": "deeper",
                         "slices": [piece(("far", 0, 2)), piece(("one", 1, 3))]}),
        "mapping": written(mean, {**change, "models": [mapped, *change["models"][1:]]}),
    }  # fmt: skip


def tokenizers() -> dict[str, str]:
    """Models of different vocabularies, merged whole: the cases of ``made_tokenizers.py``, and other methods and forms."""

    def case(name: str, method: str = "linear", **parameters: Any) -> str:
        about = CASES[name]
        entries = [{"model": m} for m in about["models"]]
        if method == "linear":
            entries = [
                {**e, "parameters": {"weight": w}} for e, w in zip(entries, (1.0, 0.7, 0.4), strict=False)
            ]
        tokenizer = dict(about["tokenizer"])
        head = {
            "merge_method": method,
            **({"base_model": about["base_model"]} if "base_model" in about else {}),
        }
        shared = {"parameters": parameters} if parameters else {}
        return written({**head, "models": entries, **shared, "tokenizer": tokenizer, "dtype": "float32"})

    found = {name: case(name) for name in CASES}
    found |= {
        "ties-union": case("union", "ties", weight=filters(embed=0.9, rest=0.5), density=0.5),
        "task_arithmetic-model": case("model-orders", "task_arithmetic", weight=[0.3, 0.9]),
        "slerp-force": case("force", "slerp", t=[0.2, 0.8]),
        "passthrough-pad": case("pad", "passthrough"),
        "karcher-orders": case("union-orders", "karcher"),
        "model_stock-base": case("base", "model_stock"),
    }
    for source in ("union", "base", "other"):
        read = yaml.safe_load(found["model-orders"])
        del read["tokenizer"]
        found[f"tokenizer_source-{source}"] = written({**read, "tokenizer_source": source})
    found["slices-union"] = written({
        "merge_method": "linear", "tokenizer_source": "union", "base_model": "base", "dtype": "float32", "parameters": {"weight": 0.5},
        "slices": [piece(("base", 0, 1), ("other", 0, 1)), piece(("base", 0, 1), ("other", 0, 1))],
    })  # fmt: skip
    return found


def differences() -> dict[str, str]:
    """The cases in which mergekit does what docs/differences.md lists."""
    unlisted = cell("ties", "slices", "gradient")
    for part in unlisted["slices"]:
        part["sources"] = part["sources"][1:]
    under = cell("slerp", "models", "scalar")
    share = under.pop("parameters")
    under["models"] = [{**e, "parameters": share} for e in under["models"]]
    shared = cell("ties", "models", "scalar")
    shared["models"][1]["parameters"]["lambda"] = shared["parameters"].pop("lambda")
    both = cell("ties", "models", "scalar")
    del both["parameters"]["lambda"]
    for entry, extent in zip(both["models"][1:], (0.8, 0.5, 0.8), strict=True):
        entry["parameters"]["lambda"] = extent
    base, other, chat = (f"tokenizers/{m}" for m in ("base", "other", "chat"))
    vocabularies = {
        "merge_method": "linear", "tokenizer_source": "union", "base_model": base, "dtype": "float32", "parameters": {"weight": 0.5},
        "slices": [piece((base, 0, 1), (other, 0, 1)), piece((base, 0, 1), (chat, 0, 1))],
    }  # fmt: skip
    twice = {
        "merge_method": "linear",
        "slices": [piece(("one", 0, 2), ("one", 1, 3))],
        "parameters": {"weight": 0.5},
    }
    alone = {"merge_method": "ties", "base_model": "base", "parameters": {"weight": 1.0, "density": 0.5}}
    found = {
        "slices-without-the-base": unlisted,
        "t-of-every-model": under,
        "lambda-of-a-model": shared,
        "lambdas-of-models": both,
        "passthrough-with-a-base": {**cell("passthrough", "models", "scalar"), "base_model": "base"},
        "one-model-twice": {**twice, "dtype": "float32"},
        "a-slice-of-the-base": {
            **alone,
            "slices": [piece(("base", 0, 2)), piece(("base", 2, 3), ("one", 2, 3))],
            "dtype": "float32",
        },
        "slices-of-other-vocabularies": vocabularies,
    }
    unnamed = written(cell("linear", "models", "scalar"), cell("slerp", "models", "scalar"))
    return {name: written(recipe) for name, recipe in found.items()} | {"documents-without-names": unnamed}


GROUPS: dict[str, Callable[[], dict[str, str]]] = {
    "stacks": stacks,
    "levels": levels,
    "stages": stages,
    "tokenizers": tokenizers,
    "differences": differences,
    "circulation": circulation,
}


def flat(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """All values of a model, in the order of the tensors' names."""
    return np.concatenate([tensors[n].ravel() for n in sorted(tensors)])


def models() -> dict[str, dict[str, np.ndarray]]:
    """A base, three fine-tunes of it and a model far from it; and, named ``tokenizers/...``, models of the made vocabularies."""
    random = np.random.default_rng(20260102)
    shapes = llama_shapes(HIDDEN, LAYERS, VOCABULARY, tied=False)

    def draw(shapes: Mapping[str, tuple[int, ...]], size: float, norm: float = 0.0) -> dict[str, np.ndarray]:
        return {
            n: random.standard_normal(s) * size + (norm if "norm" in n else 0.0) for n, s in shapes.items()
        }

    base, far, shared = draw(shapes, 0.3, 1.0), draw(shapes, 0.3, 1.0), draw(shapes, 0.06)
    made = {"base": base, "far": far}
    for name, size in zip(THREE, (0.8, 1.0, 1.3), strict=True):
        own = draw(shapes, 0.08)
        made[name] = {n: base[n] + size * (shared[n] + own[n]) for n in shapes}
    with tempfile.TemporaryDirectory() as work:
        rows = {name: len(read_model(folder)[EMBED]) for name, folder in save_family(Path(work)).items()}
    for name, count in rows.items():
        made[f"tokenizers/{name}"] = draw(llama_shapes(HIDDEN, 1, count, tied=False), 0.3, 1.0)
    return {k: {n: v.astype(np.float32) for n, v in m.items()} for k, m in made.items()}


def save_inputs(root: Path, found: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write the models as directories; those with vocabularies below ``tokenizers``."""
    save_family(root / "tokenizers")
    for name, tensors in found.items():
        rows = len(tensors[EMBED])
        layers = sum(n.endswith("q_proj.weight") for n in tensors)
        config = llama_config(HIDDEN, layers, rows, tied=False, dtype="float32")
        save_model(root / name, {n: ("F32", v) for n, v in tensors.items()}, config)


def merged(text: str, out: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    LoaderCache().loaders.clear()  # it knows models by the names they have in recipes, and base is the name of two
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options)


def merged_stages(text: str, out: Path) -> None:
    (out.parent / "stages.yml").write_text(text)
    program = Path(sys.executable).parent / "mergekit-multi"
    words = [
        "--out-path",
        str(out),
        "-I",
        str(out.parent / "between"),
        "--no-write-model-card",
        "--no-copy-tokenizer",
    ]
    subprocess.run(
        [program, str(out.parent / "stages.yml"), *words], check=True, capture_output=True, text=True
    )


def record(out: Path) -> tuple[str, np.ndarray, dict[str, Any]]:
    """What mergekit wrote: dtype, values and what the test must know of them."""
    tensors = {n: t for file in sorted(out.glob("*.safetensors")) for n, t in read_file(file).items()}
    (dtype,) = {d for d, _ in tensors.values()}
    config = json.loads((out / "config.json").read_text())
    rows = len(tensors[EMBED][1])
    shapes = llama_shapes(HIDDEN, config["num_hidden_layers"], rows, tied=False)
    assert {n: v.shape for n, (_, v) in tensors.items()} == shapes
    about = {"layers": config["num_hidden_layers"], "vocabulary": config["vocab_size"], "rows": rows}
    if (out / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokens = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab()
        about["tokens"] = dict(sorted(tokens.items(), key=lambda item: item[1]))
    return dtype, flat({n: v for n, (_, v) in tensors.items()}), about


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    asked = sys.argv[1:]
    about: dict[str, Any] = json.loads((MATRIX / "outputs.json").read_text()) if asked else {}
    about = {case: found for case, found in about.items() if case.split("/")[0] not in asked}
    for part in [MATRIX / group for group in asked] or [MATRIX]:
        shutil.rmtree(part, ignore_errors=True)
    made = models()
    if not asked:
        save_file(MATRIX / "inputs.safetensors", {k: ("F32", flat(m)) for k, m in made.items()})
    cases = matrix() | {
        f"{group}/{name}": text for group, make in GROUPS.items() for name, text in make().items()
    }
    cases = {case: text for case, text in cases.items() if not asked or case.split("/")[0] in asked}
    Drawn()
    values: dict[str, dict[str, tuple[str, np.ndarray]]] = {}
    with tempfile.TemporaryDirectory() as work:
        save_inputs(Path(work), made)
        for case, text in cases.items():
            group, name = case.split("/")
            (MATRIX / group).mkdir(exist_ok=True)
            (MATRIX / f"{case}.yml").write_text(text)
            os.chdir(Path(work) / ("tokenizers" if group == "tokenizers" else "."))
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                try:
                    (merged_stages if "\n---\n" in text else merged)(text, out)
                except Exception as error:  # whatever mergekit raises is the outcome
                    last = (getattr(error, "stderr", None) or type(error).__name__).splitlines()[-1]
                    about[case] = {"refused": last.partition(":")[0]}
                    print(f"{case}: {error!r}", flush=True)
                    continue
                dtype, data, about[case] = record(out)
                values.setdefault(group, {})[name] = (dtype, data)
        os.chdir(HERE)
    for group, found in values.items():
        save_file(MATRIX / f"{group}.safetensors", found)
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(found)}" for case, found in about.items())
    (MATRIX / "outputs.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
