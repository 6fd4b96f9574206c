"""Reads ``weight: {from: schedule, ...}``: weights from the places of models among the checkpoints of a run."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from alnico.methods import find
from alnico.methods.base import Method, Option
from alnico.numerics.decay_schedule import SHAPES, differences
from alnico.recipe import scalars
from alnico.recipe.context import Context
from alnico.recipe.keys import SCHEDULE_WEIGHT
from alnico.recipe.norm_weight import takes_norms
from alnico.recipe.options import merged_entries
from alnico.recipe.schema import Cases, ModelEntry, Parameters, Recipe, ScheduleWeight, Setting
from alnico.recipe.yaml_nodes import Node


def read_schedule_weight(
    node: Node, where: str, takers: Sequence[tuple[Method, Option]], context: Context
) -> ScheduleWeight | None:
    """Read the mapping; return None if it is invalid."""
    reading = context.reading
    before = len(reading.mistakes)
    if any(not takes_norms(option) for _, option in takers):
        reading.wrong(
            node.line, f"{where} is a mapping with `from`; only weight follows a schedule. Write a value."
        )
        return None
    context.check_keys(node, where, SCHEDULE_WEIGHT)
    keys: dict[str, Node] = node.value
    shape = _shape(keys.get("shape"), f"{where}.shape", context)
    decay = None
    if "decay" in keys:
        decay = scalars.number(keys["decay"].value)
        if decay is None or not 0 < decay < 1:
            reading.wrong(
                keys["decay"].line,
                f"{where}.decay is {keys['decay'].kind}; expected a number above 0 and below 1.",
            )
        elif shape != "ema":
            reading.note(keys["decay"].line, f"{where}.decay has no effect: it applies to shape: ema.")
            decay = None
    return None if len(reading.mistakes) > before else ScheduleWeight(shape, decay)


def _shape(node: Node | None, where: str, context: Context) -> str | tuple[float, ...]:
    """Read the name of a shape, or the factors of a learning rate; report what is wrong with them."""
    reading = context.reading
    if node is None:
        return ScheduleWeight().shape
    if isinstance(node.value, list):
        numbers = [scalars.number(item.value) for item in node.value]
        factors = tuple(n for n in numbers if n is not None and math.isfinite(n))
        if not factors or len(factors) < len(numbers) or not all(map(math.isfinite, differences(factors))):
            wrong = next((i for i, n in enumerate(numbers) if n is None or not math.isfinite(n)), None)
            what = (
                f"{where}[{wrong}] is {node.value[wrong].kind}"
                if wrong is not None
                else f"{where} is {'an empty list' if not factors else 'a list of numbers that are too large'}"
            )
            reading.wrong(
                node.line,
                f"{what}; expected the factor of the learning rate at each checkpoint, as in [1, 0.5].",
            )
        elif factors[0] == 0:
            reading.wrong(
                node.line,
                f"{where} begins with 0, and coefficients sum to its first factor; expected a sum other than 0. Write the "
                "factors from the oldest checkpoint to the newest, as in [1, 0.5].",
            )
        return factors
    if node.value not in SHAPES:
        near = difflib.get_close_matches(str(node.value), SHAPES, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        reading.wrong(
            node.line,
            f"{where} is {node.kind}; expected one of {', '.join(SHAPES)}, or a list with a factor for each checkpoint.{hint}",
        )
        return ScheduleWeight().shape
    return str(node.value)


def schedules_of(recipe: Recipe) -> list[tuple[ScheduleWeight, tuple[str, ...]]]:
    """Return each schedule of a recipe with the models whose weights follow it, in order, without repetition."""
    found: dict[tuple[ScheduleWeight, tuple[str, ...]], None] = {}
    for method, entries, base, levels in _parts(recipe):
        merged = merged_entries(find(method), entries, base)
        for setting in (s for level in levels for s in level.values()):
            for schedule in _schedules_in(setting):
                found[schedule, tuple(entry.reference for entry in merged)] = None
    return list(found)


ScheduledPart = tuple[str, tuple[ModelEntry, ...], str | None, tuple[Parameters, ...]]


def _parts(recipe: Recipe) -> Iterator[ScheduledPart]:
    """Yield the models that are merged together, with their method, their base and the parameters that apply to them."""
    shared = (recipe.parameters,)
    base = recipe.base_model
    groups: list[ScheduledPart] = []
    if recipe.models:
        groups.append((recipe.merge_method, recipe.models, base, shared))
    for part in recipe.slices:
        own = (part.parameters, *shared)
        groups.append((part.merge_method or recipe.merge_method, part.models, part.base_model or base, own))
    for module in recipe.modules:
        method = module.merge_method or recipe.merge_method
        levels: tuple[Parameters, ...] = (module.parameters, *shared)
        if module.models:
            groups.append((method, module.models, base, levels))
        for part in module.slices:
            groups.append(
                (
                    part.merge_method or method,
                    part.models,
                    part.base_model or base,
                    (part.parameters, *levels),
                )
            )
    for method, entries, named, levels in groups:
        yield method, entries, named, (*levels, *(entry.parameters for entry in entries))
    for rule in recipe.methods:
        if rule.drops:
            continue
        if rule.models:
            own_levels = (rule.parameters, *(entry.parameters for entry in rule.models))
            yield rule.merge_method, rule.models, rule.base_of(base, False), own_levels
        elif not rule.model:
            for _, entries, named, _ in groups:
                yield rule.merge_method, entries, rule.base_of(named, False), (rule.parameters,)


def _schedules_in(setting: Setting) -> Iterable[ScheduleWeight]:
    if isinstance(setting, ScheduleWeight):
        return [setting]
    if isinstance(setting, Cases):
        return [schedule for case in setting.cases for schedule in _schedules_in(case.value)]
    return []


def schedule_data(schedule: ScheduleWeight, models: Sequence[str]) -> dict[str, Any]:
    """Return a schedule with the weight of each model, as plain data."""
    weights = schedule.weights(len(models))
    return {
        **schedule.data(),
        "models": [{"model": m, "weight": w} for m, w in zip(models, weights, strict=True)],
    }
