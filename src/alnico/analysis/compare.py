"""Compares a merged model with its parents and its base."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing

from alnico.analysis.files import report_folder, write_analysis
from alnico.analysis.measure import SUBSPACE_SIDE
from alnico.analysis.report import write_pages
from alnico.analysis.retention import Retention, compare_sources, open_recorded_base, write_retention
from alnico.analysis.retention_section import comparison, retention_section
from alnico.analysis.score_section import score_section
from alnico.analysis.scores import Estimate, Estimates, ScoreTable, read_estimates, values_of
from alnico.checkpoint.lineage import lineage_of
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.source import Source
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.models.open_models import AnyModel, AnyModels, name_model, name_models, open_sources
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size


@counts_compiling
@ieee_arithmetic()
def compare(
    parents: AnyModels,
    merged: AnyModel,
    *,
    base: AnyModel | None = None,
    names: Sequence[str] | None = None,
    scores: ScoreTable | Sequence[str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] | None = None,
    top_share: float = 0.2,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    watch: Watcher | None = None,
) -> Retention:
    """Measure what a merged model kept of its parents.

    It compares distances, task vectors, signs, largest parameters and scores, by group of tensors. The base
    is the one that the merged model's recipe names, unless ``base`` is given. Without a base it measures only
    distances, and ``retention.notes`` says so. With ``out`` the folder gets ``retention.json``, ``retention.csv`` and
    everything that :func:`analyze` writes about the parents and the merged model. ``scores`` may also be a
    mapping of tasks to models to scores. The models may also be in memory, of every kind that
    :func:`alnico.merge_models` takes; they are called ``parents[0]``, ``parents[1]``, ``merged`` and ``base``,
    also in ``scores``.

    Options:
        parents: The models that were merged: directories, files, or owner/name@revision on the hub.
        merged: The merged model.
        base: The model that the parents were tuned from; default: the base recorded in the merged model.
        names: Names of the parents in the results, one for each.
        scores: Scores to show next to the distances: a .json or .csv file, or TASK:MODEL=SCORE; may be
            repeated.
        out: Folder for the numbers, the tables and the page.
    Errors: ModelError, MismatchError, NonFiniteError, ResourceError, HubError, OutputError.
    """
    named = name_models(parents, "parents", names=names)
    merged_label = name_model(merged, "merged", named)
    base_label = None if base is None else name_model(base, "base", named)
    if isinstance(scores, Mapping):
        estimates: Estimates = {
            task: {model: Estimate(value) for model, value in of.items()} for task, of in scores.items()
        }
    else:
        estimates = read_estimates(scores)
    run = RunOptions.of(memory=memory, threads=threads, offline=offline, watch=watch)
    folder = None if out is None else report_folder(out)
    with ExitStack() as opened:

        def keep(sources: Sequence[Source]) -> list[Source]:
            return [opened.enter_context(closing(source)) for source in sources]

        models = [(merged_label, merged), *named.items()]
        if base_label is not None:
            models.append((base_label, base))
        merged_source, *opened_parents = keep(open_sources(models, base=base, offline=run.offline))
        base_source: Source | None = None
        notes: tuple[str, ...] = ()
        if base_label is not None:
            base_source = opened_parents.pop()
        else:
            base_source, notes = open_recorded_base(
                merged_source, lambda reference: keep([open_model(reference, offline=run.offline)])[0]
            )
        notes += _order_notes(merged_source, opened_parents)
        retention, analysis = compare_sources(
            opened_parents,
            merged_source,
            base_source,
            scores=values_of(estimates),
            names=list(named) if names is not None else (),
            notes=notes,
            top_share=top_share,
            subspace_side=0 if folder is None else SUBSPACE_SIDE,
            run=run,
        )
    if folder is not None:
        write_analysis(analysis, folder)
        write_retention(retention, folder)
        score_sections = [score_section(estimates)] if any(estimates.values()) else []
        write_pages(
            analysis,
            folder,
            sections=[retention_section(retention), *score_sections],
            subject=comparison(retention),
        )
    return retention


def _order_notes(merged: Source, parents: Sequence[Source]) -> tuple[str, ...]:
    """A note if a parent is a merge and the model named as merged is none."""
    merges = [parent.label for parent in parents if lineage_of(parent).is_merge]
    if not merges or lineage_of(merged).is_merge:
        return ()
    return (
        f"{merges[0]} is a merge by its lock, and {merged.label}, which was named as the merged model, has no lock: "
        "the merged model is named last.",
    )
