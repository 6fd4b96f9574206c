"""Measures what a merged model kept of its parents, and writes the numbers, tables and page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

from alnico.analysis.files import report_folder, write_analysis
from alnico.analysis.measure import SUBSPACE_SIDE
from alnico.analysis.report import write_pages
from alnico.analysis.retention import Retention, compare_sources, open_recorded_base, write_retention
from alnico.analysis.retention_section import comparison, retention_section
from alnico.analysis.score_section import score_section
from alnico.analysis.scores import Estimates, values_of
from alnico.checkpoint.lineage import lineage_of
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.source import Source
from alnico.models.open_models import open_sources
from alnico.run_options import RunOptions


def compare_models(
    parents: Mapping[str, Any],
    merged: tuple[str, Any],
    base: tuple[str, Any] | None,
    *,
    estimates: Estimates,
    is_named: bool,
    out: str | os.PathLike[str] | None,
    top_share: float,
    run: RunOptions,
) -> Retention:
    """Compare a merged model with its parents, each by its label, next to scores; see :func:`alnico.compare`."""
    folder = None if out is None else report_folder(out)
    with ExitStack() as opened:

        def keep(sources: Sequence[Source]) -> list[Source]:
            return [opened.enter_context(closing(source)) for source in sources]

        models = [merged, *parents.items()]
        if base is not None:
            models.append(base)
        merged_source, *opened_parents = keep(
            open_sources(models, base=None if base is None else base[1], access=run.access)
        )
        base_source: Source | None = None
        notes: tuple[str, ...] = ()
        if base is not None:
            base_source = opened_parents.pop()
        else:
            base_source, notes = open_recorded_base(
                merged_source, lambda reference: keep([open_model(reference, access=run.access)])[0]
            )
        notes += _order_notes(merged_source, opened_parents)
        retention, analysis = compare_sources(
            opened_parents,
            merged_source,
            base_source,
            scores=values_of(estimates),
            names=list(parents) if is_named else (),
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
