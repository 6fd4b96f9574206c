"""``alnico statistics routers``: what fitting merged routers measures of models."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, QUIET, REQUIRED, Flag
from alnico.cli.printing import recipe_page
from alnico.methods.shared.documentation import recipe_text


@command(
    "alnico.router_statistics",
    fills=("inputs",),
    tasks=Flag(default=REQUIRED),
    out=Flag(also=("-o",), is_option=True),
    examples=Flag(least=1),
    json=JSON,
    quiet=QUIET,
)
def run(call: CommandCall) -> None:
    tasks = call["tasks"] if len(call["tasks"]) > 1 else call["tasks"][0]
    written = call.invoke(tasks=tasks)
    recipe = {
        "merge_method": "linear",
        "models": list(call["models"]),
        "routers": {"calibrate": str(call["out"])},
    }
    call.show(
        lambda: {"kind": "gram", "written": [str(path) for path in written]},
        lambda: recipe_page(recipe_text(recipe).rstrip()),
        besides=call["out"],
        indent=None,
    )
