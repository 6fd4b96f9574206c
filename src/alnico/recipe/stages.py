"""Orders the documents of a file: stages that use each other's outputs, or independent merges."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alnico.errors import RecipeError
from alnico.recipe.schema import Recipe
from alnico.recipe.yaml_nodes import Node, ParseContext, quote


@dataclass(frozen=True)
class Stage:
    """One document of a file of several."""

    recipe: Recipe
    number: int
    """Its position in the file, from 1."""
    uses: tuple[str, ...]
    """The names of the stages whose outputs it uses."""
    label: str
    """Its name, or its number and method. Its output folder has this name."""
    is_intermediate: bool
    """Does another stage use its output?"""


def order_stages(recipes: Sequence[Recipe]) -> tuple[Stage, ...]:
    """Order the recipes of a file so that each runs after those whose outputs it uses.

    A reference that equals another document's name means its output, even if a path of that name exists.
    Independent documents keep the order of the file. Errors: RecipeError for stages that depend on each other
    in a cycle.
    """
    uses = _uses(recipes)
    order, blocked = _order(uses)
    if blocked:
        raise RecipeError(f"{recipes[blocked[0]].name}: {_cycle_message(recipes, blocked)}")
    used_by_others = {i for used in uses for i in used}
    labels = _labels(recipes)
    return tuple(
        Stage(recipes[i], i + 1, tuple(recipes[j].stage for j in uses[i]), labels[i], i in used_by_others)
        for i in order
    )


def _labels(recipes: Sequence[Recipe]) -> list[str]:
    return [r.stage or f"{i + 1}-{r.merge_method}" for i, r in enumerate(recipes)]


def _uses(recipes: Sequence[Recipe]) -> list[list[int]]:
    """Return for each recipe the positions of the recipes whose outputs it uses."""
    named = {r.stage: i for i, r in enumerate(recipes) if r.stage}
    return [[named[n] for n in r.references if n in named and named[n] != i] for i, r in enumerate(recipes)]


def _order(uses: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Return the order to run in, and the positions that cannot run because of a cycle."""
    left = [len(used) for used in uses]
    users: list[list[int]] = [[] for _ in uses]
    for i, used in enumerate(uses):
        for j in used:
            users[j].append(i)
    ready = [i for i, count in enumerate(left) if count == 0]
    order: list[int] = []
    while ready:
        first = heapq.heappop(ready)
        order.append(first)
        for user in users[first]:
            left[user] -= 1
            if left[user] == 0:
                heapq.heappush(ready, user)
    return order, [i for i, count in enumerate(left) if count > 0]


def _cycle_message(recipes: Sequence[Recipe], blocked: Sequence[int]) -> str:
    names = ", ".join(recipes[i].stage or f"document {i + 1}" for i in blocked)
    return f"these stages need each other's outputs: {names}; expected stages without a cycle. Change a reference."


def check_stages(recipes: Sequence[Recipe], roots: Sequence[Node], reading: ParseContext) -> list[Recipe]:
    """Report mistakes across documents; return the recipes with notes on stage names that are also paths."""
    first: dict[str, int] = {}
    lines = [root.value["name"].line if "name" in root.value else root.line for root in roots]
    for label, recipe, line in zip(_labels(recipes), recipes, lines, strict=True):
        if label in first:
            reading.wrong(
                line,
                f"name is {quote(label)}, as in line {first[label]}; expected different names. Change one.",
            )
        first.setdefault(label, line)
        if recipe.stage in (".", "..") or "/" in recipe.stage or "\\" in recipe.stage:
            reading.wrong(
                line,
                f"name is {quote(recipe.stage)}; expected the name of a folder, without / and \\. Change it.",
            )
    uses = _uses(recipes)
    _, blocked = _order(uses)
    if blocked:
        reading.wrong(lines[blocked[0]], _cycle_message(recipes, blocked))
    checked = list(recipes)
    for i, used in enumerate(uses):
        names = [recipes[j].stage for j in used]
        notes = [
            f"{n} means the stage of that name, not the path. Write ./{n} for the path."
            for n in names
            if _is_path(n, recipes[i])
        ]
        checked[i] = dataclasses.replace(recipes[i], notes=(*recipes[i].notes, *notes))
    return checked


def _is_path(name: str, recipe: Recipe) -> bool:
    try:
        return Path(name).exists() or (Path(recipe.folder) / name).exists()
    except OSError:
        return False
