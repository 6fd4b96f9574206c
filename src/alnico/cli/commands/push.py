"""``alnico push``: uploads a finished merge to the hub."""

from __future__ import annotations

import sys
from pathlib import Path

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, Flag
from alnico.cli.printing import is_terminal, page
from alnico.output.validate import local_paths


@command(
    "alnico.push",
    fills=("quiet",),
    branch=Flag(also=("--revision",)),
    message=Flag(also=("-m",)),
    json=JSON,
)
def run(call: CommandCall) -> None:
    call.note(
        [
            f"the lock and the recipe name {path}, which everyone who sees the model can read."
            for path in local_paths(Path(call["out"]))
        ]
    )
    url = call.invoke(quiet=call.is_json or not is_terminal(sys.stderr))
    call.show(lambda: {"url": url}, lambda: page([url]), besides=url)
