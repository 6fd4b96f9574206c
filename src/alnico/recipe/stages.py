"""Several documents of one file: stages that take one another's outputs, or merges that have nothing to do with each other."""

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
    """One document among several."""

    recipe: Recipe
    number: int
    """Its place in the file, from 1."""
    uses: tuple[str, ...]
    """The names of the stages whose outputs it takes, as its references have them."""
    label: str
    """Its name, or its number and method: the folder of its output among several."""
    is_intermediate: bool
    """Does another stage take its output?"""


def order_stages(recipes: Sequence[Recipe]) -> tuple[Stage, ...]:
    """Put the recipes of a file in an order that can be run: each after those whose outputs it takes.

    A reference that is the name of another document means its output, also where a path of that name exists. Otherwise the
    order of the file is kept. Errors: RecipeError for stages that wait for one another.
    """
    uses = _uses(recipes)
    order, waiting = _order(uses)
    if waiting:
        raise RecipeError(f"{recipes[waiting[0]].name}: {_circle(recipes, waiting)}")
    taken = {i for used in uses for i in used}
    labels = _labels(recipes)
    return tuple(
        Stage(recipes[i], i + 1, tuple(recipes[j].stage for j in uses[i]), labels[i], i in taken)
        for i in order
    )


def _labels(recipes: Sequence[Recipe]) -> list[str]:
    return [r.stage or f"{i + 1}-{r.merge_method}" for i, r in enumerate(recipes)]


def _uses(recipes: Sequence[Recipe]) -> list[list[int]]:
    """For each recipe the recipes it takes the output of."""
    named = {r.stage: i for i, r in enumerate(recipes) if r.stage}
    return [[named[n] for n in r.references if n in named and named[n] != i] for i, r in enumerate(recipes)]


def _order(uses: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The order to run in, and what is left because it waits for itself."""
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


def _circle(recipes: Sequence[Recipe], waiting: Sequence[int]) -> str:
    names = ", ".join(recipes[i].stage or f"document {i + 1}" for i in waiting)
    return f"these stages wait for one another's outputs: {names}; expected an order to run them in. Change a reference."


def check_stages(recipes: Sequence[Recipe], roots: Sequence[Node], reading: ParseContext) -> list[Recipe]:
    """Tell what is wrong with documents together; returns them with notes on names that are paths as well."""
    first: dict[str, int] = {}
    lines = [root.value["name"].line if "name" in root.value else root.line for root in roots]
    for label, recipe, line in zip(_labels(recipes), recipes, lines, strict=True):
        if label in first:
            reading.wrong(
                line,
                f"name is {quote(label)}, as in line {first[label]}; expected a name of its own. Change one.",
            )
        first.setdefault(label, line)
        if recipe.stage in (".", "..") or "/" in recipe.stage or "\\" in recipe.stage:
            reading.wrong(
                line,
                f"name is {quote(recipe.stage)}; expected the name of a folder, without / and \\. Change it.",
            )
    uses = _uses(recipes)
    _, waiting = _order(uses)
    if waiting:
        reading.wrong(lines[waiting[0]], _circle(recipes, waiting))
    found = list(recipes)
    for i, used in enumerate(uses):
        names = [recipes[j].stage for j in used]
        notes = [
            f"{n} is the stage of that name, not the path. Write ./{n} for the path."
            for n in names
            if _is_path(n, recipes[i])
        ]
        found[i] = dataclasses.replace(recipes[i], notes=(*recipes[i].notes, *notes))
    return found


def _is_path(name: str, recipe: Recipe) -> bool:
    try:
        return Path(name).exists() or (Path(recipe.folder) / name).exists()
    except OSError:
        return False
