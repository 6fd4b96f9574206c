"""``alnico merge``: merges the models of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from alnico.cli import quick
from alnico.cli.command import CommandCall, command
from alnico.cli.commands import plan
from alnico.cli.options import JSON, QUIET, VERBOSE, Flag
from alnico.cli.printing import page, say
from alnico.engine.run import MergeResult
from alnico.kernels.clock import time_text
from alnico.numerics.sizes import format_size
from alnico.recipe.dialect import allow_crimes
from alnico.recipe.load import load_recipes

IGNORED = {
    "copy_tokenizer": "the tokenizer is always carried over",
    "write_model_card": "the model card is always written",
    "lazy_unpickle": "files are always read in part",
    "low_cpu_memory": "--memory is the limit that holds",
}
"""mergekit's flags that change nothing, and why."""


def _mergekit(name: str) -> Flag:
    return Flag(type=bool, is_hidden=True, spelled=(f"--{name}/--no-{name}",))


MERGEKIT = {
    **{name: _mergekit(name.replace("_", "-")) for name in IGNORED},
    "allow_crimes": _mergekit("allow-crimes"),
    "trust_remote_code": _mergekit("trust-remote-code"),
    "cuda": _mergekit("cuda"),
    "device": Flag(type=str, is_hidden=True),
    "out_shard_size": plan.MERGEKIT_SHARD_SIZE,
}


@command(
    "alnico.merge_documents",
    also=quick.MAKER,
    summary="Merge models into OUT, by a recipe or by options.",
    resumes="merge",
    fills=("recipe", "models"),
    out=Flag(
        "Directory for the model, or one file, if it ends in .safetensors; default: the last word.",
        is_option=True,
        also=("-o",),
        default="",
    ),
    seed=Flag(also=("--random-seed",)),
    dry_run=Flag("Print the plan and stop.", type=bool, default=False),
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
    more={**quick.flags("RECIPE OUT | MODEL MODEL... OUT"), **MERGEKIT},
)
def run(call: CommandCall) -> None:
    _check_mergekit_options(call)
    plan.check_signature_options(call)
    needs_out = not call["dry_run"] and not call["print_recipe"]
    words = quick.read_words(call, call["out"], needs_out=needs_out)
    if plan.print_recipe(call, words):
        return
    if call["dry_run"]:
        plan.show_plan(call.of(plan.run), words)
        return
    options = plan.recipe_options(call, words)
    if call["allow_crimes"] and words.recipe is not None:
        options["recipe"] = allow_crimes(load_recipes(options["recipe"]))
    with quick.words_of_options(words):
        results = call.invoke(shows_tensors=True, **options, out=words.out)
    show_merge(call, results, words.out)


def show_merge(call: CommandCall, results: Sequence[MergeResult], out: str) -> None:
    """Print finished merges: notes, weights, and a line for each."""
    call.note([note for result in results for note in result.plan.notes])
    if not call.is_json:
        for line in (line for result in results for line in plan.weighing_lines(result.plan)):
            say(f"weights: {line}", call.is_quiet)
    call.show(
        lambda: plan.one_or_all([result_data(result) for result in results]),
        lambda: page(map(result_line, results)),
        besides=out,
        stated=sum(result.compile_seconds for result in results),
    )


def _check_mergekit_options(call: CommandCall) -> None:
    """Refuse mergekit's flags for what alnico does not do, and note those that change nothing. Errors: a wrong command line."""
    if call["trust_remote_code"]:
        raise typer.BadParameter("--trust-remote-code: alnico runs no code of a model. Leave the option out.")
    if call["cuda"] or call["device"] not in (None, "cpu"):
        option = "--cuda" if call["cuda"] else "--device"
        raise typer.BadParameter(
            f"{option}: this version merges on the processor only, at a disk's speed. Leave the option out."
        )
    for name, why in IGNORED.items():
        if call[name] is not None:
            option = f"--{'' if call[name] else 'no-'}{name.replace('_', '-')}"
            say(f"note: {option} has no effect: {why}.", call.is_quiet)


def result_line(result: MergeResult) -> str:
    """One line about a finished merge."""
    plan = result.plan
    resumed = f", {result.resumed} of them kept from before" if result.resumed else ""
    return (
        f"{result.path}: {len(plan.jobs)} tensors{resumed}, {plan.elements:,} parameters, "
        f"{format_size(plan.bytes_to_write)}, {time_text(result.seconds, result.compile_seconds)}, {result.bytes_per_second / 1e9:.2f} GB/s"
    )


def result_data(result: MergeResult) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "seconds": round(result.seconds, 4),
        "compile_seconds": round(result.compile_seconds, 4),
        "bytes_read": result.plan.bytes_to_read,
        "bytes_written": result.plan.bytes_to_write,
        "parameters": result.plan.elements,
        "resumed_tensors": result.resumed,
        **(
            {"weights": [w.data(result.plan.sources) for w in result.plan.norm_weight_groups]}
            if result.plan.norm_weight_groups
            else {}
        ),
        "notes": list(result.plan.notes),
        "digests": result.digests,
    }
