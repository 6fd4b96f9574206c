"""Analyzes models: measures their task vectors, and writes the numbers, tables and pages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from alnico.analysis.files import report_folder, write_analysis
from alnico.analysis.journal import AnalysisJournal, is_half_written
from alnico.analysis.measure import SUBSPACE_SIDE, analyze_sources
from alnico.analysis.plan_check import recheck
from alnico.analysis.report import write_pages
from alnico.analysis.results import Analysis
from alnico.analysis.suggest_rules import suggest_recipe
from alnico.checkpoint.durable import sync_tree
from alnico.checkpoint.memory_model import MemoryModel
from alnico.checkpoint.output_path import check_twins
from alnico.checkpoint.source import unwrap
from alnico.devices import DEFAULT_DEVICE, devices_for
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.models.open_models import AnyModel, AnyModels, name_model, name_models, open_sources, path_of
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.run_options import DEFAULT_BUDGET_BYTES, DEFAULT_DOWNLOAD_CACHE_BYTES, RunOptions, Size


@counts_compiling
@ieee_arithmetic()
def analyze(
    models: AnyModels,
    *,
    base: AnyModel,
    names: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    top_share: float = 0.2,
    subspace_side: int = SUBSPACE_SIDE,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    restart: bool = False,
    offline: bool = False,
    stream: bool = False,
    download_cache: str | os.PathLike[str] | None = None,
    download_cache_size: Size = DEFAULT_DOWNLOAD_CACHE_BYTES,
    device: Any = DEFAULT_DEVICE,
    ray: str | bool | None = None,
    watch: Watcher | None = None,
) -> Analysis:
    """Measure how far models are from their base, where, and how their task vectors relate to each other.

    Base and models are read in blocks, at most twice. With ``out`` the folder gets the numbers
    (``summary.json``, CSV files) and, if the extra ``[report]`` is installed, ``report.html`` and pictures. The
    same call resumes an interrupted analysis into ``out``. Base and models may also be in memory: modules,
    dicts of tensors, task vectors of the base. They are read in place, and called ``base``, ``models[0]``,
    ``models[1]`` and so on. With ``ray`` the nodes of a cluster read and measure tensors, with the same results.

    Options:
        models: Models: directories, files, URLs, or owner/name@revision on the hub.
        base: The model that the others were tuned from.
        names: Names of the models in the results, one for each.
        out: Folder for the numbers, the tables and the page.
        subspace_side: Compare the leading singular vectors of matrices whose smaller side is at most this; 0
            compares none.
    Errors: ModelError, MismatchError, NonFiniteError, ResourceError, HubError, OutputError, RunError.
    """
    run = RunOptions.of(
        memory=memory,
        threads=threads,
        offline=offline,
        stream=stream,
        download_cache=download_cache,
        download_cache_size=download_cache_size,
        watch=watch,
        device=device,
        ray=ray,
    )
    devices_for("merging", run.device)  # before anything is made
    folder = None if out is None else report_folder(out, is_half_written(Path(out)))
    named = name_models(models, names=names)
    base_label = name_model(base, "base", named)
    if folder is not None:
        references = [path for model in (base, *named.values()) if (path := path_of(model)) is not None]
        inputs = [Path(part) for reference in references for part in reference.split("+")]
        check_twins(folder, inputs, (".alnico-analysis", ".alnico-analysis-gone"))
    with ExitStack() as opened:
        unfinished = None if folder is None else opened.enter_context(AnalysisJournal(folder, restart))
        sources = open_sources([(base_label, base), *named.items()], base=base, access=run.access)
        for source in sources:
            opened.enter_context(closing(source))
        origin, *others = sources
        analysis = analyze_sources(
            origin,
            others,
            top_share=top_share,
            subspace_side=subspace_side,
            run=run,
            unfinished=unfinished,
            names=list(named) if names is not None else (),
        )
        if folder is not None and unfinished is not None:
            unfinished.close()
            unfinished.begin_writing()
            write_analysis(analysis, folder)
            in_memory = {s.label: s for s in sources if isinstance(unwrap(s), MemoryModel)}
            fits = recheck(analysis, in_memory, offline=run.offline)
            write_pages(analysis, folder, suggest_recipe(analysis, fits, in_memory=in_memory))
            sync_tree(folder)
    return analysis
