"""``alnico equip``: a base with task vectors, each with its weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from alnico.cli.command import CommandCall, command
from alnico.cli.commands.merge import result_line
from alnico.cli.commands.plan import plan_text
from alnico.cli.options import JSON, QUIET, VERBOSE, Flag, dtype_names, method_names
from alnico.cli.printing import Page, page, say_page
from alnico.cli.quick import advice_as_options, further_options
from alnico.store.chosen_vectors import ChosenVector, choose_vectors
from alnico.store.equip import Equipped
from alnico.store.pair_interference import PairInterference, interference_of

if TYPE_CHECKING:
    from alnico.analysis.scores import Estimate
    from alnico.store.controls import Controls

MOST_PAIRS = 45
"""The most pairs of vectors that are shown: those of ten vectors."""

NAME = 26


@command(
    "alnico.equip",
    resumes="merge",
    fills=("interference",),
    out=Flag(
        "Directory for the model, or one file, if it ends in .safetensors.",
        is_option=True,
        also=("-o",),
    ),
    method=Flag(metavar="NAME", complete=method_names),
    density=Flag(metavar="NUMBERS"),
    dtype=Flag(metavar="NAME", complete=dtype_names),
    tokenizer=Flag(metavar="SOURCE"),
    tasks=Flag(metavar="FILE"),
    store=Flag(metavar="FOLDER"),
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
    more={
        "set": Flag(
            "Another option of the method, such as lambda=0.5; may be repeated. `alnico methods NAME` lists them.",
            type=list[str],
            metavar="NAME=VALUE",
        )
    },
)
def run(call: CommandCall) -> None:
    if call["out"] is None and not call["dry_run"]:
        raise click.BadParameter("the output is missing. Name it with -o OUT, or only plan with --dry-run.")
    chosen = choose_vectors(call["vectors"], call["store"])
    pairs = interference_of(call["base"].rstrip("/") or "/", chosen, offline=call["offline"])
    say_page(page(vector_lines(chosen, pairs)), call.is_quiet or call.is_json)
    with advice_as_options():
        equipped = call.invoke(shows_tensors=True, interference=pairs, **further_options(call["set"] or ()))
    call.note(equipped.notes)
    call.show(equipped.data, lambda: equipped_text(equipped, call.verbose), besides=call["out"])


def vector_lines(vectors: Sequence[ChosenVector], pairs: Sequence[PairInterference]) -> list[str]:
    """The vectors with their weights, and how each pair of them interferes."""
    lines = [f"{'vector':{NAME}} {'weight':>8}  description"]
    for vector in vectors:
        manifest = vector.manifest
        said = "" if manifest is None else manifest.description
        weight = f"{vector.weight:.4g}{'*' if vector.is_suggested else ' '}"
        lines.append(f"{_cut(vector.label):{NAME}} {weight:>9} {_cut(said, 70)}".rstrip())
    if any(vector.is_suggested for vector in vectors):
        lines.append("* the weight that the vector suggests, as none was given")
    if pairs:
        lines += ["", f"{'interference':{NAME}} {'and':{NAME}} {'cosine':>16} {'signs differ':>13}"]
        for pair in pairs[:MOST_PAIRS]:
            error = f" +- {pair.cosine_error:.2f}" if pair.cosine_error else ""
            lines.append(
                f"{_cut(pair.a):{NAME}} {_cut(pair.b):{NAME}} {f'{pair.cosine:+.3f}{error}':>16} {pair.sign_conflict:>12.1%}"
            )
        if len(pairs) > MOST_PAIRS:
            lines.append(f"and {len(pairs) - MOST_PAIRS} more pairs; --json has all")
    return lines


def equipped_text(equipped: Equipped, verbose: int) -> Page:
    """The plan of a dry run, or the line of the merge, with the scores beside their controls."""
    if equipped.result is None:
        return Page(plan_text(equipped.plan, verbose, equipped.path))
    lines = [result_line(equipped.result)]
    if equipped.controls is not None:
        lines += ["", *control_lines(equipped.controls)]
    return page(lines)


def control_lines(controls: Controls) -> list[str]:
    """The scores of the equipped model beside those without vectors and with random ones, and the differences."""
    from alnico.store.controls import EQUIPPED, NO_VECTOR, RANDOM

    tasks = [task.name for task in controls.card.tasks]
    heads = "  ".join(f"{_cut(task, 23):>23}" for task in tasks)
    lines = [f"{'score':{NAME}} {'mean':>23}  {heads}"]
    for model in controls.card.models:
        if model.reference in (NO_VECTOR, EQUIPPED):
            lines.append(_row(model.reference, model.mean, [model.scores[t] for t in tasks]))
    random = f"{RANDOM}, mean of {len(controls.seeds)}"
    lines.append(_row(random, controls.random_mean, [controls.random[t] for t in tasks]))
    lines.append("")
    for difference in controls.differences:
        name = f"{EQUIPPED} - {difference.control}"
        lines.append(_row(name, difference.mean, [difference.scores[t] for t in tasks], signed=True))
    lines.append(verdict(controls))
    return lines


def verdict(controls: Controls) -> str:
    """What the controls say, in a sentence."""
    better = controls.beats_random
    if better is None:
        return "the tasks report no examples, so it is not known whether random vectors of the same length do as well"
    if better:
        return "better than random vectors of the same length: the 95 % interval of the difference is above 0"
    return "not shown to be better than random vectors of the same length: the 95 % interval of the difference has 0 in it or is below"


def _row(name: str, mean: Estimate | None, scores: Sequence[Estimate], *, signed: bool = False) -> str:
    cells = "  ".join(_shown(score, signed) for score in scores)
    return f"{name:{NAME}} {_shown(mean, signed)}  {cells}"


def _shown(estimate: Estimate | None, signed: bool) -> str:
    if estimate is None:
        return f"{'-':>23}"
    form = "+.3f" if signed else ".3f"
    interval: Any = "" if estimate.low is None else f" [{estimate.low:{form}}, {estimate.high:{form}}]"
    return f"{f'{estimate.value:{form}}{interval}':>23}"


def _cut(text: str, length: int = NAME) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
