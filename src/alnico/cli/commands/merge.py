"""``alnico merge``: merges models, by a recipe or by options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alnico.cli import mergekit_flags, quick
from alnico.cli.command import CommandCall, command
from alnico.cli.commands import plan
from alnico.cli.options import JSON, QUIET, VERBOSE, Flag
from alnico.cli.printing import page, say
from alnico.engine.run import MergeResult
from alnico.kernels.clock import time_text
from alnico.numerics.sizes import format_size
from alnico.recipe.dialect import allow_crimes
from alnico.recipe.load import load_recipes

RATED_BYTES = 50_000_000
"""Bytes read and written from which the line of a merge has a rate: a smaller merge takes the time of starting."""


@command(
    "alnico.merge_documents",
    also=quick.MAKER,
    summary="Merge models into OUT, by a recipe or by options.",
    resumes="merge",
    fills=("recipe", "models"),
    out=Flag(
        "Directory or URL (s3://bucket/model) for the model, or one file, if it ends in .safetensors or .gguf; default: the last word.",
        is_option=True,
        also=("-o",),
        default="",
    ),
    seed=Flag(also=("--random-seed",)),
    dry_run=Flag("Print the plan and stop.", type=bool, default=False),
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
    more={
        **quick.flags("RECIPE OUT | MODEL MODEL... OUT"),
        **mergekit_flags.FLAGS,
        "allow_crimes": Flag(type=bool, is_hidden=True, spelled=("--allow-crimes/--no-allow-crimes",)),
        "out_shard_size": plan.MERGEKIT_SHARD_SIZE,
    },
)
def run(call: CommandCall) -> None:
    mergekit_flags.check_flags(call)
    call = mergekit_flags.with_device(call)
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
    call.note([note for result in results for note in (*result.plan.notes, *result.notes)])
    if not call.is_json:
        for line in (line for result in results for line in plan.weighing_lines(result.plan)):
            say(f"weights: {line}", call.is_quiet)
    call.show(
        lambda: plan.one_or_all([result_data(result) for result in results]),
        lambda: page(map(result_line, results)),
        besides=out,
        stated=sum(result.compile_seconds for result in results),
    )


def result_line(result: MergeResult) -> str:
    """One line about a finished merge."""
    plan = result.plan
    resumed = f", {result.resumed} of them kept from before" if result.resumed else ""
    is_large = plan.bytes_to_read + plan.bytes_to_write >= RATED_BYTES
    rate = f", {result.bytes_per_second / 1e9:.2f} GB/s" if is_large else ""
    return (
        f"{result.path}: {len(plan.jobs)} tensors{resumed}, {plan.elements:,} parameters, "
        f"{format_size(plan.bytes_to_write)}, {time_text(result.seconds, result.compile_seconds)}{rate}"
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
        "notes": [*result.plan.notes, *result.notes],
        **({"kept": {name: round(share, 4) for name, share in result.kept.items()}} if result.kept else {}),
        **({"rebuilt": [rows.data() for rows in result.rebuilt]} if result.rebuilt else {}),
        "digests": result.digests,
    }
