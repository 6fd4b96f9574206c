"""Make the golden cases: small models, recipes in mergekit's terms, and what mergekit 0.1.5 makes of them.

    ENV/bin/python tests/golden/make.py      # ENV: mergekit==0.1.5, torch==2.13.0, xxhash; alnico is not needed

Writes beside itself: ``inputs/`` (the models), ``parity/`` (recipes with mergekit's outputs, which alnico must give), ``evidence/``
(recipes on which mergekit does what docs/differences.md lists, with its outputs), ``outcomes.json`` (the class of the
exception with which mergekit refused a case of ``evidence/``) and ``versions.json``.

**Random drops.** DARE and DELLA draw their masks with ``torch.bernoulli``, from one stream. To compare values and not luck, that
function is replaced by draws from alnico's noise, ``uniform(noise_key(seed, tensor, position), 0, n) < probabilities``. Which
tensor is being made is noted by a wrapper around ``ExecuteMergeMethodTask.execute``; the position of the model is the number of
calls of ``sparsify`` since then, which mergekit calls once a model besides the base, in recipe order, also where density is 1
and nothing is drawn. ``torch.bernoulli`` itself still runs first, so that what it refuses (NaN) stays refused.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from made import Tensors, llama_config, llama_shapes, read_file, read_model, save_file, save_model  # noqa: E402

HIDDEN, LAYERS, VOCABULARY = 8, 1, 32
THREE = ("one", "two", "three")
SEED = 0
"""alnico's default: the recipes name no seed, because mergekit has no such key."""
MINUTE = 2.0**-30
SMALL = 2.0**-10
BIG = 2.0**13

Parameters = dict[str, Any]


def recipe(
    method: str, models: tuple[str, ...], own: dict[str, tuple[Any, ...]] | None = None, **keys: Any
) -> str:
    """Write a recipe; ``own`` has a value a model for each per-model parameter, None leaving it out."""
    entries: list[dict[str, Any]] = [{"model": m} for m in models]
    for name, values in (own or {}).items():
        for entry, value in zip(entries, values, strict=True):
            if value is not None:
                entry.setdefault("parameters", {})[name] = value
    text = {
        "merge_method": method,
        **({"base_model": b} if (b := keys.pop("base", None)) else {}),
        "models": entries,
    }
    return yaml.safe_dump(
        {**text, **keys} if "dtype" in keys else {**text, **keys, "dtype": "float32"}, sort_keys=False
    )


ONES = {"weight": (1.0, 1.0, 1.0)}
WEIGHTS = {"weight": (1.0, 0.7, 0.4)}
SIGNED = {"weight": (1.0, 0.7, -0.4)}
DENSITIES = {**WEIGHTS, "density": (0.7, 0.5, 0.3)}
SOME_WHOLE = {**WEIGHTS, "density": (0.6, 1.0, 0.4)}
HALVES = {**ONES, "density": (0.5, 0.5, 0.5)}
OUTLIERS = {**WEIGHTS, "density": (0.7, 0.5, 0.6), "gamma": (0.1, 0.05, 0.2)}
RANKED = {**WEIGHTS, "density": (0.6, 0.5, 0.4), "epsilon": (0.3, 0.1, 0.2)}


def parity() -> dict[str, str]:
    """The cases in which alnico must agree."""
    cases = {
        "linear": recipe("linear", THREE, ONES),
        "linear-weights": recipe("linear", THREE, SIGNED),
        "linear-sum": recipe("linear", THREE, WEIGHTS, parameters={"normalize": False}),
        "linear-global-weight": recipe("linear", THREE, parameters={"weight": 0.3, "normalize": False}),
        "passthrough": recipe("passthrough", ("one",)),
        "passthrough-scale": recipe("passthrough", ("one",), {"scale": (0.7,)}),
        "slerp": recipe("slerp", ("base", "far"), base="base", parameters={"t": 0.3}),
        "slerp-base-second": recipe("slerp", ("far", "base"), base="base", parameters={"t": 0.3}),
        "slerp-tuned": recipe("slerp", ("base", "one"), base="base", parameters={"t": 0.6}),
        "slerp-beyond": recipe("slerp", ("base", "far"), base="base", parameters={"t": 1.4}),
        "slerp-straight": recipe("slerp", ("base", "near"), base="base", parameters={"t": 0.5}),
        "karcher": recipe("karcher", THREE),
        "karcher-far": recipe("karcher", ("one", "far", "two")),
        "karcher-two": recipe("karcher", ("one", "far")),
        "karcher-options": recipe("karcher", ("one", "far", "two"), parameters={"max_iter": 3, "tol": 1e-3}),
        "karcher-one": recipe("karcher", ("one",)),
        "task_arithmetic": recipe("task_arithmetic", THREE, ONES, base="base"),
        "task_arithmetic-lambda": recipe(
            "task_arithmetic", THREE, SIGNED, base="base", parameters={"lambda": 0.6}
        ),
        "task_arithmetic-normalize": recipe(
            "task_arithmetic", THREE, SIGNED, base="base", parameters={"normalize": True}
        ),
        "ties": recipe("ties", THREE, HALVES, base="base"),
        "ties-densities": recipe("ties", THREE, DENSITIES, base="base"),
        "ties-sum": recipe(
            "ties", THREE, DENSITIES, base="base", parameters={"normalize": False, "lambda": 0.8}
        ),
        "ties-rescale": recipe("ties", THREE, DENSITIES, base="base", parameters={"rescale": True}),
        "ties-whole": recipe(
            "ties", THREE, SIGNED, base="base", parameters={"density": 1.0, "int8_mask": True}
        ),
        "ties-few": recipe("ties", THREE, WEIGHTS, base="base", parameters={"density": 0.01}),
        "ties-base-listed": recipe(
            "ties",
            ("base", *THREE),
            {k: (None, *v) for k, v in DENSITIES.items()},
            base="base",
            parameters={"normalize": True},
        ),
        "dare_linear": recipe("dare_linear", THREE, HALVES, base="base"),
        "dare_linear-some-whole": recipe(
            "dare_linear", THREE, SOME_WHOLE, base="base", parameters={"normalize": True}
        ),
        "dare_linear-plain": recipe(
            "dare_linear", THREE, DENSITIES, base="base", parameters={"rescale": False, "lambda": 0.7}
        ),
        "dare_ties": recipe("dare_ties", THREE, HALVES, base="base"),
        "dare_ties-normalize": recipe(
            "dare_ties", THREE, SOME_WHOLE, base="base", parameters={"normalize": True}
        ),
        "dare_ties-plain": recipe(
            "dare_ties", THREE, DENSITIES, base="base", parameters={"rescale": False, "lambda": 1.2}
        ),
        "model_stock": recipe("model_stock", THREE, base="base"),
        "model_stock-two": recipe("model_stock", ("one", "two"), base="base"),
        "model_stock-rows": recipe("model_stock", THREE, base="base", parameters={"filter_wise": True}),
        "nearswap": recipe("nearswap", ("base", "one"), base="base", parameters={"t": 0.05}),
        "nearswap-wide": recipe("nearswap", ("base", "far"), base="base", parameters={"t": 0.3}),
    }
    for space, base in (("", {}), ("-base", {"base": "base"})):
        pair = ("one", "far")
        uneven = {"weight": (0.7, 0.4)}
        cases |= {
            f"nuslerp{space}": recipe("nuslerp", pair, uneven, **base),
            f"nuslerp{space}-columns": recipe(
                "nuslerp", pair, uneven, **base, parameters={"nuslerp_flatten": False}
            ),
            f"nuslerp{space}-rows": recipe(
                "nuslerp",
                pair,
                uneven,
                **base,
                parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True},
            ),
            f"nuslerp{space}-zero-sum": recipe("nuslerp", pair, {"weight": (1.0, -1.0)}, **base),
            f"multislerp{space}": recipe("multislerp", ("one", "far", "two"), WEIGHTS, **base),
            f"multislerp{space}-sum": recipe(
                "multislerp", THREE, WEIGHTS, **base, parameters={"normalize_weights": False}
            ),
        }
    for sparse, own in (("breadcrumbs", OUTLIERS), ("della", RANKED)):
        for method in (sparse, "breadcrumbs_ties" if sparse == "breadcrumbs" else "della_linear"):
            cases |= {
                method: recipe(method, THREE, ONES, base="base", parameters={"density": 0.5}),
                f"{method}-own": recipe(method, THREE, own, base="base", parameters={"lambda": 0.8}),
                f"{method}-normalize": recipe(
                    method, THREE, own, base="base", parameters={"normalize": True, "rescale": True}
                ),
                f"{method}-plain": recipe(
                    method, THREE, own, base="base", parameters={"normalize": False, "rescale": False}
                ),
            }
    cases |= {
        "nuslerp-beyond": recipe("nuslerp", ("one", "far"), {"weight": (1.5, -0.5)}),
        "multislerp-eps": recipe("multislerp", THREE, WEIGHTS, parameters={"eps": 1e-6}),
        "multislerp-base-one": recipe("multislerp", ("one",), {"weight": (0.5,)}, base="base"),
        "karcher-zeros": recipe("karcher", ("one", "zeros", "two")),
        "multislerp-zeros": recipe("multislerp", ("one", "zeros", "two"), WEIGHTS),
        "model_stock-zeros": recipe("model_stock", ("one", "zeros", "two"), base="base"),
        "sce-one": recipe("sce", ("one",), base="base"),
        "sce-one-0.5": recipe("sce", ("one",), base="base", parameters={"select_topk": 0.5}),
        "della-whole": recipe("della", THREE, WEIGHTS, base="base", parameters={"density": 1.0}),
    }
    cases["breadcrumbs-whole"] = recipe(
        "breadcrumbs", THREE, ONES, base="base", parameters={"density": 1.0, "gamma": 0.2}
    )
    cases["breadcrumbs-dense"] = recipe(
        "breadcrumbs", THREE, ONES, base="base", parameters={"density": 0.9, "gamma": 0.2}
    )
    for share in (1.0, 0.5, 0.1):
        cases[f"sce-{share:g}"] = recipe("sce", THREE, base="base", parameters={"select_topk": share})
    for model in ("one", "far"):
        cases[f"arcee_fusion-{model}"] = recipe("arcee_fusion", ("base", model), base="base", dtype="float64")
    for method, own in (("ram", {}), ("ramplus_tl", {"r": 0.3, "alpha": 3.0})):
        cases[method] = recipe(method, THREE, base="base")
        cases[f"{method}-own"] = recipe(method, THREE, base="base", parameters={"epsilon": 0.1, **own})
    return cases


def evidence() -> dict[str, str]:
    """The cases in which mergekit does what is listed as a difference."""

    def scaled(case: str, prefix: str, text: str) -> tuple[str, str]:
        names = ("base", "far", *THREE)
        read = yaml.safe_load(text)
        for entry in read["models"]:
            entry["model"] = f"{prefix}-{entry['model']}"
            assert entry["model"].removeprefix(f"{prefix}-") in names
        if "base_model" in read:
            read["base_model"] = f"{prefix}-{read['base_model']}"
        if prefix == "minute" and "t" in read.get("parameters", {}) and read["merge_method"] == "nearswap":
            read["parameters"]["t"] *= MINUTE
        return f"{prefix}-{case}", yaml.safe_dump(read, sort_keys=False)

    agreed = parity()
    of_scale = [
        "slerp",
        "nuslerp",
        "multislerp",
        "karcher",
        "dare_linear",
        "ties-rescale",
        "model_stock",
        "sce-0.5",
        "nearswap",
    ]
    of_bits = {
        "task_arithmetic": recipe("task_arithmetic", THREE, WEIGHTS, base="base", dtype="bfloat16"),
        "ties": recipe("ties", THREE, WEIGHTS, base="base", dtype="bfloat16"),
        "linear": recipe("linear", THREE, WEIGHTS, dtype="bfloat16"),
        "multislerp": recipe("multislerp", THREE, WEIGHTS, dtype="bfloat16"),
    }
    wide = {f"{n}-float64": text.replace("bfloat16", "float64") for n, text in of_bits.items()}
    halved = [scaled(n, "bf16", text) for n, text in (of_bits | wide).items()]
    return dict(
        [
            *(scaled(n, "minute", agreed[n]) for n in of_scale),
            *(scaled(n, "small", agreed[n]) for n in ("model_stock", "sce-1")),
            *halved,
            *(
                scaled(f"ties-{t}", "big", agreed["ties-rescale"].replace("float32", t))
                for t in ("float16", "float64")
            ),
        ]
    ) | {
        "small-arcee_fusion": recipe("arcee_fusion", ("small-base", "small-one"), base="small-base"),
        "small-arcee_fusion-float64": recipe(
            "arcee_fusion", ("small-base", "small-one"), base="small-base", dtype="float64"
        ),
        "bf16-ramplus_tl": recipe(
            "ramplus_tl", tuple(f"bf16-{m}" for m in THREE), base="bf16-base", dtype="bfloat16"
        ),
        "rounded-linear": recipe("linear", THREE, SIGNED, dtype="bfloat16"),
        "one-multislerp": recipe(
            "multislerp", ("one",), {"weight": (0.5,)}, base="base", parameters={"normalize_weights": False}
        ),
        "cancel-multislerp": recipe("multislerp", ("one", "mirror", "two"), {"weight": (1.0, 1.0, 0.0)}),
        "length-0-slerp": recipe("slerp", ("base", "zeros"), base="base", parameters={"t": 0.5}),
        "length-0-nuslerp": recipe("nuslerp", ("base", "zeros"), {"weight": (1.0, 1.0)}),
        "below-nearswap": recipe("nearswap", ("base", "one"), base="base", parameters={"t": -0.1}),
        "density-0": recipe("ties", THREE, WEIGHTS, base="base", parameters={"density": 0.0}),
        "density-2": recipe("ties", THREE, SIGNED, base="base", parameters={"density": 2.0}),
        "zero-sum": recipe("linear", ("one", "two"), {"weight": (1.0, -1.0)}),
        "zero-sum-task_arithmetic": recipe(
            "task_arithmetic",
            ("one", "two"),
            {"weight": (1.0, -1.0)},
            base="base",
            parameters={"normalize": True},
        ),
        "donor-linear": recipe("linear", THREE, base="base", parameters={"weight": 1.0}),
        "donor-linear-own": recipe("linear", THREE, ONES, base="base"),
        "donor-karcher": recipe("karcher", THREE, base="base"),
        "unknown-key": recipe(
            "ties", THREE, SIGNED, base="base", parameters={"densty": 0.2}, paramters={"density": 0.2}
        ),
        "no-weight": recipe("ties", THREE, base="base", parameters={"density": 0.5}),
        "equal-ties": recipe("ties", ("ones",), {"weight": (1.0,), "density": (0.5,)}, base="zeros"),
        "equal-della_linear": recipe(
            "della_linear", ("ones",), {"weight": (1.0,), "density": (0.5,)}, base="zeros"
        ),
        "few-breadcrumbs": recipe(
            "breadcrumbs", ("one",), {"weight": (1.0,)}, base="base", parameters={"density": 0.05}
        ),
        "loose-della_linear": recipe(
            "della_linear", ("loose-one",), {"weight": (1.0,), "density": (0.5,)}, base="loose-base"
        ),
    }


def models() -> dict[str, Tensors]:
    """All inputs: a base with three fine-tunes, a model far from it and one near; the same minute, small, big, in bf16."""
    random = np.random.default_rng(20260101)
    shapes = llama_shapes(HIDDEN, LAYERS, VOCABULARY, tied=False)

    def draw(size: float, norm: float = 0.0) -> dict[str, np.ndarray]:
        return {
            n: random.standard_normal(s) * size + (norm if "norm" in n else 0.0) for n, s in shapes.items()
        }

    base, far, shared = draw(0.3, 1.0), draw(0.3, 1.0), draw(0.06)
    near, own = draw(0.002), [draw(0.08) for _ in THREE]
    change = {
        m: {n: size * (shared[n] + o[n]) for n in shapes}
        for m, o, size in zip(THREE, own, (0.8, 1.0, 1.3), strict=True)
    }
    exact = {
        "base": base, "far": far, "near": {n: base[n] + near[n] for n in shapes},
        **{m: {n: base[n] + change[m][n] for n in shapes} for m in THREE},
    }  # fmt: skip
    family = {k: {n: v.astype(np.float32) for n, v in tensors.items()} for k, tensors in exact.items()}
    found: dict[str, Tensors] = {k: {n: ("F32", v) for n, v in m.items()} for k, m in family.items()}
    for k in ("base", "far", *THREE):
        found[f"minute-{k}"] = {n: ("F32", v * np.float32(MINUTE)) for n, v in family[k].items()}
    for k in ("base", *THREE):
        small = {n: base[n] + (SMALL * change[k][n] if k in change else 0.0) for n in shapes}
        found[f"small-{k}"] = {n: ("F32", v.astype(np.float32)) for n, v in small.items()}
        found[f"big-{k}"] = {n: ("F16", v * np.float32(BIG)) for n, v in family[k].items()}
        found[f"bf16-{k}"] = {n: ("BF16", v) for n, v in family[k].items()}
    found["mirror"] = {n: ("F32", -v) for n, v in family["one"].items()}
    found["zeros"] = {n: ("F32", np.zeros(s, np.float32)) for n, s in shapes.items()}
    found["ones"] = {n: ("F32", np.ones(s, np.float32)) for n, s in shapes.items()}
    loose = {"one": (1,), "column": (6, 1), "cube": (4, 3, 5)}
    for k in ("base", "one"):
        found[f"loose-{k}"] = {
            n: ("F32", random.standard_normal(s).astype(np.float32)) for n, s in loose.items()
        }
    return found


def load(path: Path) -> ModuleType:
    """Import one file by its path, without its package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Drawn:
    """Replaces mergekit's source of random masks by alnico's noise while a tensor is made."""

    def __init__(self) -> None:
        import mergekit.merge_methods.generalized_task_arithmetic as arithmetic
        import mergekit.merge_methods.task_adapter as adapter
        import torch

        self.noise = load(HERE.parent.parent / "src" / "alnico" / "numerics" / "noise.py")
        self.tensor, self.position = "", -1
        bernoulli, sparsify = torch.bernoulli, arithmetic.sparsify
        execute = adapter.ExecuteMergeMethodTask.execute

        def noted(task: Any, *arguments: Any, **named: Any) -> Any:
            self.begin(task.output_weight.name)
            return execute(task, *arguments, **named)

        def counted(*arguments: Any, **named: Any) -> Any:
            self.position += 1
            return sparsify(*arguments, **named)

        def drawn(probabilities: Any) -> Any:
            bernoulli(probabilities)
            key = self.noise.noise_key(SEED, self.tensor, self.position)
            uniform = torch.from_numpy(self.noise.uniform(key, 0, probabilities.numel())).reshape(
                probabilities.shape
            )
            return (uniform < probabilities).to(probabilities.dtype)

        adapter.ExecuteMergeMethodTask.execute = noted
        arithmetic.sparsify = counted
        torch.bernoulli = drawn

    def begin(self, tensor: str) -> None:
        self.tensor, self.position = tensor, -1


def merged(text: str, drawn: Drawn) -> tuple[Tensors, dict[str, str]]:
    """Run mergekit on a recipe in the working directory; gives its tensors, and what it refused.

    Models without a config are merged a tensor at a time through ``merge_state_dicts``: no Llama has tensors like theirs.
    """
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.merge_methods.api import merge_state_dicts
    from mergekit.options import MergeOptions

    read = yaml.safe_load(text)
    if (Path(read["models"][0]["model"]) / "config.json").exists():
        with tempfile.TemporaryDirectory() as out:
            options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
            try:
                run_merge(MergeConfiguration.model_validate(read), out, options)
            except Exception as error:  # whatever mergekit raises is the outcome
                return {}, {"": type(error).__name__}
            return {n: t for file in Path(out).glob("*.safetensors") for n, t in read_file(file).items()}, {}
    arrays = {k: read_model(Path(k)) for k in (read["base_model"], *(e["model"] for e in read["models"]))}
    found: dict[str, tuple[str, np.ndarray]] = {}
    refused = {}
    for name in arrays[read["base_model"]]:
        drawn.begin(name)
        one = {k: {name: torch.from_numpy(v[name].copy())} for k, v in arrays.items()}
        parameters = {
            n: [e["parameters"][n] for e in read["models"]] for n in read["models"][0]["parameters"]
        }
        try:
            out = merge_state_dicts(one, read["merge_method"], parameters=parameters, base=read["base_model"])
            found[name] = ("F32", out[name].numpy())
        except Exception as error:  # as above
            refused[name] = type(error).__name__
    return found, refused


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for folder in ("inputs", "parity", "evidence"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    made = models()
    drawn = Drawn()
    outcomes: dict[str, dict[str, str]] = {}
    config = llama_config(HIDDEN, LAYERS, VOCABULARY, tied=False, dtype="float32")
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        for name, tensors in made.items():
            save_file(HERE / "inputs" / f"{name}.safetensors", tensors)
            save_model(Path(name), tensors, None if name.startswith("loose") else config)
        for folder, cases in (("parity", parity()), ("evidence", evidence())):
            for name, text in cases.items():
                (HERE / folder).mkdir(exist_ok=True)
                (HERE / folder / f"{name}.yml").write_text(text)
                tensors, refused = merged(text, drawn)
                if refused:
                    outcomes[name] = refused
                if tensors:
                    save_file(HERE / folder / f"{name}.safetensors", tensors)
                print(f"{folder}/{name}: {len(tensors)} tensors {refused or ''}", flush=True)
        os.chdir(HERE)
    (HERE / "outcomes.json").write_text(json.dumps(outcomes, indent=1) + "\n")
    versions = {
        p: importlib.metadata.version(p)
        for p in ("mergekit", "torch", "numpy", "transformers", "safetensors", "xxhash")
    }
    about = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    (HERE / "versions.json").write_text(json.dumps(about | versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
