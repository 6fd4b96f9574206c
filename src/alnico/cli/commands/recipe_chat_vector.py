"""``alnico recipe chat_vector``: the recipe of a chat vector on another base."""

from __future__ import annotations

from pathlib import Path

from alnico.checkpoint.output_path import check_new_file, write_new_file
from alnico.cli.command import CommandCall, command
from alnico.cli.options import NEW_FILE, Flag, dtype_names
from alnico.cli.printing import page, recipe_page, show_result
from alnico.recipe.reference import relative_reference, replace_references

MODEL = Flag(metavar="MODEL")
KEEP = Flag(metavar="NAME")
DTYPE = Flag(metavar="NAME", complete=dtype_names)


@command(
    "alnico.recipe.chat_vector",
    old_base=MODEL,
    tuned=MODEL,
    new_base=MODEL,
    keep=KEEP,
    tokenizer=Flag(metavar="SOURCE"),
    dtype=DTYPE,
    out=NEW_FILE,
)
def run(call: CommandCall) -> None:
    write_recipe(call)


def write_recipe(call: CommandCall) -> None:
    """Make the recipe, and write it into a file or print it. In a file, paths are seen from its folder. Errors: OutputError."""
    out = call["out"]
    if out is not None:
        check_new_file(Path(out))
    recipe = call.invoke()
    if out is None:
        show_result(recipe_page(recipe.text))
        return
    folder = Path(out).parent
    places = {r: relative_reference(r, folder) for r in recipe.references}
    moved = {old: new for old, new in places.items() if new != old}
    write_new_file(Path(out), replace_references(recipe, moved).text if moved else recipe.text)
    show_result(page([out]), besides=out)
