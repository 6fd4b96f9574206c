"""Analyzes models: measures their task vectors, and writes the numbers, tables and pages."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path

from alnico.analysis.files import report_folder, write_analysis
from alnico.analysis.journal import AnalysisJournal, is_half_written
from alnico.analysis.measure import SUBSPACE_SIDE, analyze_sources
from alnico.analysis.plan_check import recheck
from alnico.analysis.report import write_pages
from alnico.analysis.results import Analysis
from alnico.analysis.suggest_rules import suggest_recipe
from alnico.checkpoint.durable import sync_tree
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.output_path import check_twins
from alnico.checkpoint.reference import Paths, path_list
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size


@counts_compiling
@ieee_arithmetic()
def analyze(
    models: Paths,
    *,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    top_share: float = 0.2,
    subspace_side: int = SUBSPACE_SIDE,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    restart: bool = False,
    offline: bool = False,
    watch: Watcher | None = None,
) -> Analysis:
    """Measure how far models are from their base, where, and how their task vectors relate to each other.

    Base and models are read in blocks, at most twice. With ``out`` the folder gets the numbers
    (``summary.json``, CSV files) and, if the extra ``[report]`` is installed, ``report.html`` and pictures. The
    same call resumes an interrupted analysis into ``out``.

    Options:
        models: Models: directories, files, or owner/name@revision on the hub.
        base: The model that the others were tuned from.
        out: Folder for the numbers, the tables and the page.
        subspace_side: Compare the leading singular vectors of matrices whose smaller side is at most this; 0
            compares none.
    Errors: ModelError, MismatchError, NonFiniteError, ResourceError, HubError, OutputError, RunError.
    """
    run = RunOptions.of(memory=memory, threads=threads, offline=offline, watch=watch)
    folder = None if out is None else report_folder(out, is_half_written(Path(out)))
    references = [os.fspath(base), *path_list(models)]
    if folder is not None:
        inputs = [Path(part) for reference in references for part in reference.split("+")]
        check_twins(folder, inputs, (".alnico-analysis", ".alnico-analysis-gone"))
    with ExitStack() as opened:
        unfinished = None if folder is None else opened.enter_context(AnalysisJournal(folder, restart))
        origin, *others = (
            opened.enter_context(closing(open_model(r, offline=run.offline))) for r in references
        )
        analysis = analyze_sources(
            origin,
            others,
            top_share=top_share,
            subspace_side=subspace_side,
            run=run,
            unfinished=unfinished,
        )
        if folder is not None and unfinished is not None:
            unfinished.close()
            unfinished.begin_writing()
            write_analysis(analysis, folder)
            write_pages(analysis, folder, suggest_recipe(analysis, recheck(analysis, offline=run.offline)))
            sync_tree(folder)
    return analysis
