"""``alnico schema``: the JSON Schema of recipes."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.printing import json_page, show_result


@command("alnico.schema")
def run(call: CommandCall) -> None:
    show_result(json_page(call.invoke()))
