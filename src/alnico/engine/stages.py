"""Runs all merges of one recipe file: stages into a folder next to the output, the others into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alnico.checkpoint.output_path import (
    PART,
    Replace,
    check_empty,
    check_inputs,
    check_publishable,
    check_twin,
    check_twins,
    is_single_file,
)
from alnico.engine.fetch import fetch_inputs
from alnico.engine.remote_run import run_plan_to
from alnico.engine.run import MergeResult
from alnico.errors import RecipeError, RunError
from alnico.events import Watcher
from alnico.output.disk_space import (
    bytes_on_disk,
    bytes_on_disk_at,
    check_inputs_at,
    check_output_place,
    check_place_at,
    check_space,
    count_files,
    largest_file,
    needed_paths,
    shards_on_disk,
)
from alnico.output.publish_remote import is_published_at
from alnico.output.recipe_file import format_recipe
from alnico.output.remote_target import RemoteTarget, check_replaceable_at, files_at, opened_target
from alnico.output.staging import Hold, PartDirectory, is_published
from alnico.plan.job import Plan
from alnico.plan.planned_model import PlannedModel
from alnico.recipe.schema import Recipe
from alnico.recipe.stages import Stage

if TYPE_CHECKING:
    from alnico.engine.cluster_merge import ClusterMerge


WORK = ".alnico-stages"
"""The suffix of the folder of stages, next to the output."""

PlanStage = Callable[[Recipe, Mapping[str, Any], str | None], Plan]
"""Plans a recipe. Arguments: the recipe, the outputs of stages by name (a path or a planned model), and the
name of the one output file."""

MergeOnNodes = Callable[[Recipe, Mapping[str, Any], str | None], "ClusterMerge"]
"""Says how nodes merge a recipe. Arguments: as of :data:`PlanStage`."""


def plan_stages(
    stages: Sequence[Stage], planner: PlanStage, single_file: str | None = None
) -> tuple[Plan, ...]:
    """Plan all merges of a file from headers alone; a stage that takes another's output sees what that will
    be.

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
    planner: PlanStage,
    out: Path | RemoteTarget,
    *,
    overwrite: Replace = False,
    restart: bool = False,
    watch: Watcher | None = None,
    factor_cache: Path | None = None,
    nodes: MergeOnNodes | None = None,
) -> tuple[MergeResult, ...]:
    """Run all merges of a file. Returns results, in order, without those of stages and of merges that were
    finished before.

    A single output goes to ``out``, a path or a URL, several to ``out/<label>``. Outputs of stages are kept on this machine. Everything is planned before anything runs.
    If the same command runs again, finished merges are recognised by the fingerprint of their plan and
    skipped. ``nodes`` make the tensors, in place of this machine. Errors: see ``errors``.
    """
    final = [stage for stage in stages if not stage.is_intermediate]
    single = out.single_file if isinstance(out, RemoteTarget) else out.name if is_single_file(out) else None
    if single is not None and len(final) > 1:
        raise RecipeError(
            f"{out}: one file cannot hold the outputs of {len(final)} merges. Give a directory."
        )
    targets: dict[str, Path | RemoteTarget] = {
        s.label: out if len(final) == 1 else _inside(out, s.label) for s in final
    }
    work = _work_folder(out)
    for target in targets.values():
        if isinstance(target, Path):
            check_publishable(target, may_be_gguf=True)
    if isinstance(out, Path):
        check_twin(out, WORK + "-gone")
    for stage in stages:
        path = targets.get(stage.label, work / stage.label)
        if isinstance(path, Path):
            check_twin(path, PART + "-gone")
    planned = plan_stages(stages, planner, single)
    outputs: dict[str, Any] = {}
    plans: dict[str, Plan] = {}
    results = []
    try:
        try:
            Hold(work, out).check()
            if isinstance(out, RemoteTarget):
                by_label = {stage.label: plan for stage, plan in zip(stages, planned, strict=True)}
                _check_targets_at(out, targets, by_label, overwrite, work, nodes is not None)
            else:
                paths = {label: target for label, target in targets.items() if isinstance(target, Path)}
                _check_targets(out, paths, planned, overwrite, is_begun=work.exists())
                for path in paths.values():
                    PartDirectory(path).check()
                _check_disk(planned, out, [work, *paths.values()])
        finally:
            close(planned)
        with Hold(work, out) as held:
            for stage in stages:
                target = targets.get(stage.label, work / stage.label)
                asked = stage.recipe, dict(outputs), single if not stage.is_intermediate else None
                plan = planner(*asked)
                plans[stage.label] = plan
                plan = _with_stages(plan, stage, stages, plans)
                mark = work / f"{stage.label}.json"
                try:
                    result = _run(
                        plan,
                        target,
                        mark,
                        overwrite or stage.is_intermediate,
                        restart,
                        watch,
                        factor_cache,
                        None if nodes is None else nodes(*asked),
                    )
                finally:
                    close([plan])
                outputs[stage.label] = str(target)
                if not stage.is_intermediate and result is not None:
                    results.append(result)
            held.remove()
    except OSError as error:
        raise RunError(
            f"{work}: {error.strerror}. Make room or check the disk; the same command resumes the merge."
        ) from None
    return tuple(results)


def _check_targets(
    out: Path, targets: Mapping[str, Path], plans: Sequence[Plan], overwrite: Replace, *, is_begun: bool
) -> None:
    """Refuse targets that are not empty or hold an input. Outputs that an interrupted run has finished are
    allowed."""
    inputs = [path for plan in plans for path in needed_paths(plan)]
    check_inputs(out, inputs)
    check_twins(out, inputs, (WORK, f"{WORK}-gone"))
    if is_begun and not _others(out, targets):
        return
    if len(targets) > 1 and not overwrite:
        check_empty(out)
    for target in targets.values():
        check_output_place(target, inputs, overwrite)


def _inside(out: Path | RemoteTarget, name: str) -> Path | RemoteTarget:
    return out.child(name) if isinstance(out, RemoteTarget) else out / name


def _work_folder(out: Path | RemoteTarget) -> Path:
    """The folder of stages: next to an output, or in the folder for unfinished work of outputs at URLs."""
    if isinstance(out, RemoteTarget):
        return out.unfinished.with_name(f"{out.unfinished.name}{WORK}")
    return out.parent / f".{out.name}{WORK}"


def _check_targets_at(
    out: RemoteTarget,
    targets: Mapping[str, Path | RemoteTarget],
    plans: Mapping[str, Plan],
    overwrite: Replace,
    work: Path,
    on_nodes: bool,
) -> None:
    """Refuse targets at URLs as :func:`_check_targets` does, and a disk without room for what is kept on this machine."""
    remote = {label: target for label, target in targets.items() if isinstance(target, RemoteTarget)}
    for plan in plans.values():
        check_inputs_at(plan, out)
    if len(remote) > 1 and not overwrite:
        with opened_target(out) as folder:
            files = files_at(folder, out)
            others = {name: v for name, v in files.items() if name.partition("/")[0] not in remote}
            check_replaceable_at(folder, out, others, overwrite)
    for label, target in remote.items():
        if not is_published_at(target, work / f"{label}.json"):
            check_place_at(plans[label], target, overwrite, on_nodes=on_nodes)
    held = sum(p.lstat().st_blocks * 512 for p in work.rglob("*"))
    stages = sum(bytes_on_disk(plan, work) for label, plan in plans.items() if label not in remote)
    shards = shards_on_disk(on_nodes)
    at_once = max(bytes_on_disk_at(plans[label], work, shards) for label in remote)
    check_space(work, stages + at_once - held, of_all=f"merges of all {len(plans)} documents")


def _check_disk(plans: Sequence[Plan], out: Path, places: Sequence[Path]) -> None:
    """Refuse outputs that do not fit the disk together; files of earlier runs in ``places`` count.

    Errors: ResourceError.
    """
    held = sum(p.lstat().st_blocks * 512 for place in places for p in place.rglob("*"))
    size = sum(bytes_on_disk(plan, out) for plan in plans)
    files = sum(count_files(plan, out) for plan in plans)
    check_space(
        out,
        size - held,
        max(largest_file(plan, out) for plan in plans),
        files,
        of_all=f"outputs of all {len(plans)} merges",
    )


def _others(out: Path, targets: Mapping[str, Path]) -> bool:
    """Does ``out`` hold anything that is not from a run of the same file?"""
    if len(targets) == 1 or not out.is_dir():
        return False
    own = {name for t in targets.values() for name in (t.name, f".{t.name}.alnico-part")}
    return any(p.name not in own for p in out.iterdir())


def _run(
    plan: Plan,
    target: Path | RemoteTarget,
    mark: Path,
    overwrite: Replace,
    restart: bool,
    watch: Watcher | None,
    factor_cache: Path | None,
    nodes: ClusterMerge | None,
) -> MergeResult | None:
    """Run one stage, unless it is finished."""
    is_ours = is_published_at if isinstance(target, RemoteTarget) else is_published
    if not restart and is_ours(target, mark, plan.fingerprint()):  # type: ignore[arg-type]
        return None
    overwrite = overwrite or is_ours(target, mark)  # type: ignore[arg-type] # an earlier version of this file wrote it
    fetch_inputs(plan, target, overwrite=overwrite, watch=watch, on_nodes=nodes is not None)
    return run_plan_to(
        plan,
        target,
        overwrite=overwrite,
        restart=restart,
        watch=watch,
        mark=mark,
        factor_cache=factor_cache,
        nodes=nodes,
    )


def _with_stages(plan: Plan, stage: Stage, stages: Sequence[Stage], plans: Mapping[str, Plan]) -> Plan:
    """Add the stages of an output to its recipe, each before the one that uses it."""
    named = {s.label: s for s in stages}
    needed_paths, ahead = {stage.label}, list(stage.uses)
    while ahead:
        name = ahead.pop()
        needed_paths.add(name)
        ahead += named[name].uses
    if len(needed_paths) == 1:
        return plan
    leading = [plans[s.label] for s in stages if s.label in needed_paths]
    parts = [format_recipe(p.recipe) for p in leading]
    ended = [part if part.endswith("\n") else part + "\n" for part in parts]
    text = "".join(
        part if i == 0 or part.startswith("---") else f"---\n{part}" for i, part in enumerate(ended)
    )
    recipe = dataclasses.replace(plan.recipe, text=text, written_seed=plan.recipe.seed)
    return dataclasses.replace(plan, recipe=recipe, stages=tuple(leading[:-1]))
