"""Runs the merges of one file: stages into a folder beside the output, what nobody takes further into the output."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alnico.checkpoint.shards import format_size
from alnico.engine.card import recipe_text
from alnico.engine.fetch import fetch_inputs
from alnico.engine.output import DISK_MARGIN_BYTES, Hold, check_target, existing_folder, is_published
from alnico.engine.run import Result, Watcher, run_plan
from alnico.errors import RecipeError, ResourceError, RunError
from alnico.plan.job import Plan
from alnico.plan.planned import PlannedModel
from alnico.recipe.schema import Recipe
from alnico.recipe.stages import Stage

Planner = Callable[[Recipe, Mapping[str, Any], str | None], Plan]
"""Makes the plan of a recipe, given what stands for the names of stages (a path, or a model that is planned), and the name of the
one output file."""


def plan_stages(stages: Sequence[Stage], planner: Planner, single_file: str | None = None) -> tuple[Plan, ...]:
    """Plan all merges of a file from headers alone; a stage that takes another's output sees what that will be.

    Errors: as for one plan. The sources of all plans are open.
    """
    planned: dict[str, Any] = {}
    plans: list[Plan] = []
    try:
        for stage in stages:
            plans.append(planner(stage.recipe, planned, None if stage.is_intermediate else single_file))
            planned[stage.label] = PlannedModel(stage.label, plans[-1])
    except BaseException:
        close(plans)
        raise
    return tuple(plans)


def close(plans: Sequence[Plan]) -> None:
    for plan in plans:
        for source in plan.sources:
            source.close()


def run_stages(
    stages: Sequence[Stage],
    planner: Planner,
    out: Path,
    version: str,
    *,
    overwrite: bool = False,
    restart: bool = False,
    watch: Watcher | None = None,
) -> tuple[Result, ...]:
    """Run all merges of a file; returns the results of those whose output is kept and that were not finished before, in order.

    The one output goes to ``out``, several to ``out/<label>``. Everything is planned before anything is run. What is finished is
    not done again when the same command is given again: it is told by the plan's fingerprint, kept beside it. Errors: see ``errors``.
    """
    kept = [stage for stage in stages if not stage.is_intermediate]
    single = out.name if out.suffix == ".safetensors" else None
    if single is not None and len(kept) > 1:
        raise RecipeError(f"{out}: one file cannot hold the outputs of {len(kept)} merges. Give a directory.")
    targets = {s.label: out if len(kept) == 1 else out / s.label for s in kept}
    work = out.parent / f".{out.name}.alnico-stages"
    planned = plan_stages(stages, planner, single)
    close(planned)
    made: dict[str, Any] = {}
    plans: dict[str, Plan] = {}
    results = []
    try:
        for plan in planned:
            if not work.exists() or _others(out, targets):
                check_target(out, plan, overwrite)
        Hold(work, out).check()
        _check_disk(planned, out, [work, *targets.values()])
        with Hold(work, out) as held:
            for stage in stages:
                target = targets.get(stage.label, work / stage.label)
                plan = planner(stage.recipe, made, single if not stage.is_intermediate else None)
                plans[stage.label] = plan
                plan = _with_stages(plan, stage, stages, plans)
                mark = work / f"{stage.label}.json"
                try:
                    result = _run(plan, target, mark, version, overwrite or stage.is_intermediate, restart, watch)
                finally:
                    close([plan])
                made[stage.label] = str(target)
                if not stage.is_intermediate and result is not None:
                    results.append(result)
            held.remove()
    except OSError as error:
        raise RunError(
            f"{work}: {error.strerror}. Make room or check the disk; the same command takes the merge up again."
        ) from None
    return tuple(results)


def _check_disk(plans: Sequence[Plan], out: Path, places: Sequence[Path]) -> None:
    """Refuse outputs that do not fit the disk together; what earlier runs left in ``places`` counts. Errors: ResourceError."""
    folder = existing_folder(out)
    held = sum(p.lstat().st_blocks * 512 for place in places for p in place.rglob("*"))
    needed = sum(plan.bytes_to_write for plan in plans) + DISK_MARGIN_BYTES - held
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{folder}: the outputs of all {len(plans)} merges need {format_size(needed)}, {format_size(free)} are free. "
            "Make room, choose another disk, or a smaller dtype."
        )


def _others(out: Path, targets: Mapping[str, Path]) -> bool:
    """Does ``out`` hold what no run of the same file left there?"""
    if len(targets) == 1 or not out.is_dir():
        return False
    own = {name for t in targets.values() for name in (t.name, f".{t.name}.alnico-part")}
    return any(p.name not in own for p in out.iterdir())


def _run(
    plan: Plan, target: Path, mark: Path, version: str, overwrite: bool, restart: bool, watch: Watcher | None
) -> Result | None:
    """Run one stage, unless it is finished."""
    if not restart and is_published(target, mark, {**plan.fingerprint(), "alnico": version}):
        return None
    overwrite = overwrite or is_published(target, mark)  # an earlier run of this file left it, when the recipe was another
    fetch_inputs(plan, target, overwrite=overwrite, watch=watch)
    return run_plan(plan, target, version, overwrite=overwrite, restart=restart, watch=watch, mark=mark)


def _with_stages(plan: Plan, stage: Stage, stages: Sequence[Stage], plans: Mapping[str, Plan]) -> Plan:
    """The recipe that goes with an output has the stages that lead to it, each before the one that takes it."""
    named = {s.label: s for s in stages}
    needed, ahead = {stage.label}, list(stage.uses)
    while ahead:
        name = ahead.pop()
        needed.add(name)
        ahead += named[name].uses
    if len(needed) == 1:
        return plan
    leading = [plans[s.label] for s in stages if s.label in needed]
    parts = [recipe_text(p.recipe) for p in leading]
    ended = [part if part.endswith("\n") else part + "\n" for part in parts]
    text = "".join(part if i == 0 or part.startswith("---") else f"---\n{part}" for i, part in enumerate(ended))
    recipe = dataclasses.replace(plan.recipe, text=text, written_seed=plan.recipe.seed)
    return dataclasses.replace(plan, recipe=recipe, stages=tuple(leading[:-1]))
