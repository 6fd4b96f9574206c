"""``alnico retokenize``: a model with the vocabulary of another."""

from __future__ import annotations

from collections.abc import Iterable

from alnico.cli import tokensurgeon_flags
from alnico.cli.command import CommandCall, command
from alnico.cli.commands.merge import show_merge
from alnico.cli.options import JSON, QUIET, REQUIRED, VERBOSE, Flag, dtype_names


def _ways() -> Iterable[str]:
    from alnico.recipe.schema import APPROXIMATIONS

    return APPROXIMATIONS


@command(
    "alnico.retokenize",
    resumes="run",
    tokenizer=Flag(is_option=True, metavar="DONOR", default=REQUIRED),
    approximate=Flag(also=("-a",), complete=_ways),
    atoms=Flag(also=("-k",), least=1),
    dtype=Flag(metavar="NAME", complete=dtype_names),
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
    more=tokensurgeon_flags.FLAGS,
)
def run(call: CommandCall) -> None:
    show_merge(call, [tokensurgeon_flags.with_own_words(call).invoke(shows_tensors=True)], call["out"])
