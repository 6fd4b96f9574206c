"""``alnico moe``: a mixture of experts from dense models."""

from __future__ import annotations

from alnico.cli import mergekit_flags
from alnico.cli.command import CommandCall, command
from alnico.cli.commands import plan
from alnico.cli.commands.merge import show_merge
from alnico.cli.options import JSON, QUIET, VERBOSE, Flag, scoring_dtype_names


@command(
    "alnico.build_mixture",
    resumes="build",
    seed=Flag(also=("--random-seed",)),
    gates=Flag(metavar="FOLDER"),
    dtype=Flag(metavar="NAME", complete=scoring_dtype_names),
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
    more={
        **mergekit_flags.FLAGS,
        **mergekit_flags.OF_MIXTURES,
        "out_shard_size": plan.MERGEKIT_SHARD_SIZE,
    },
)
def run(call: CommandCall) -> None:
    mergekit_flags.check_flags(call)
    mergekit_flags.check_mixture_flags(call)
    call = mergekit_flags.with_device(call)
    options = {**plan.shard_options(call), "recipe": plan.recipe_from(call["recipe"])}
    show_merge(call, call.invoke(shows_tensors=True, **options), call["out"])
