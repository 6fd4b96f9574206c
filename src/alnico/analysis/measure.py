"""Measures task vectors: all statistics of all tensors, in at most two readings of base and models.

The first reading of a tensor gives sums, counts and a coarse histogram; the second gives the exact quantiles
and what the largest entries of the models have in common. A tensor that fits into a block is read once. Sums
are stored per leaf and added exactly (``math.fsum``), and counts are integers, so neither block sizes nor
threads change the result.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from alnico._version import __version__
from alnico.analysis.common_tensors import CommonTensor, model_of, names_of, pair_tensors
from alnico.analysis.histogram import Histogram
from alnico.analysis.journal import AnalysisJournal, MeasuredTensor, decode_measurement
from alnico.analysis.measure_on_nodes import measure_on_nodes
from alnico.analysis.measure_tensors import MeasuringRun, fit_memory
from alnico.analysis.results import GROUPS, AnalysedModel, Analysis, Skipped
from alnico.analysis.tally import PooledTallies, Tally
from alnico.checkpoint.file_model import describe_change, file_states
from alnico.checkpoint.renamed_model import with_names_of
from alnico.checkpoint.source import Source
from alnico.cluster.node_models import NodeModels
from alnico.engine.fetch import fetch_files
from alnico.engine.matrix_gpu import kind_of, matrix_gpus
from alnico.errors import AlnicoError, MismatchError, ModelError
from alnico.kernels.clock import CLOCK
from alnico.numerics.numbers import finite_number, quote_value, whole_number
from alnico.run_options import DEFAULT_RUN, RunOptions

SUBSPACE_SIDE = 512
"""Default: subspaces are compared for matrices whose smaller side is at most this."""


def analyze_sources(
    base: Source,
    models: Sequence[Source],
    *,
    top_share: float = 0.2,
    subspace_side: int = SUBSPACE_SIDE,
    run: RunOptions = DEFAULT_RUN,
    block_elements: int | None = None,
    unfinished: AnalysisJournal | None = None,
    names: Sequence[str] = (),
) -> Analysis:
    """Measure the task vectors of ``models``, relative to ``base``.

    ``names`` are those of the models in the result, by default short forms of their labels.
    ``top_share`` in (0, 1] is the share of each model's entries that count as its top parameters.
    ``subspace_side`` is the largest smaller side of matrices whose singular vectors are compared, 0 for none.
    Sources stay open. Tensors that ``unfinished`` has from an interrupted analysis are not measured again;
    others are added to it.
    Errors: AlnicoError for a wrong share, MismatchError for a model that shares no tensor with the base,
    ModelError for a file that changes meanwhile, NonFiniteError, ResourceError, HubError, RunError.
    """
    begin, compiled_before = time.perf_counter(), CLOCK.seconds
    if not models:
        raise AlnicoError("an analysis needs a base and at least one model.")
    subspace_side = whole_number(subspace_side, "subspace_side", 0)
    top_share = finite_number(
        top_share, "the share of top parameters", "a number in (0, 1]. The default is 0.2"
    )
    if not 0 < top_share <= 1:
        raise AlnicoError(
            f"the share of top parameters is {quote_value(top_share)}; expected a number in (0, 1]. The "
            "default is 0.2."
        )
    gpus = matrix_gpus(run.device)
    on_nodes = None if run.ray is None else NodeModels.of((*models, base), run)
    models = [with_names_of(model, base) for model in models]
    subjects, skipped = pair_tensors(base, models)
    for position, model in enumerate(models):
        if not any(position in subject.models for subject in subjects):
            raise MismatchError(
                f"{base.label} and {model.label} share no float tensor (name and shape); expected models of "
                "one architecture. `alnico inspect` lists their tensors."
            )
    sources = (*models, base)
    if on_nodes is None:
        read = [
            [i.name for s in subjects for i in s.job.read if i.model == position]
            for position in range(len(sources))
        ]
        absent = [source.absent(names, False) for source, names in zip(sources, read, strict=True)]
        fetch_files(sources, absent, run.watch)
    memory = fit_memory(subjects, sources, run, subspace_side, block_elements)
    before = file_states(path for source in sources for path in source.paths())
    recorded: dict[str, Mapping[str, Any]] = {}
    if unfinished is not None:
        options = {"top_share": top_share, "subspace_side": subspace_side, "device": kind_of(gpus)}
        recorded = unfinished.begin(base, models, subjects, run.threads, **options)
    collected = CollectedMeasurements(subjects, len(models), recorded, unfinished)
    if on_nodes is None:
        MeasuringRun(
            subjects, sources, memory, top_share, subspace_side, collected.take, run.watch, gpus
        ).measure(collected.missing)
    else:
        measure_on_nodes(
            on_nodes, subjects, collected.missing, collected.take,
            top_share=top_share, subspace_side=subspace_side, run=run,
        )  # fmt: skip
    if changed := describe_change(before):
        raise ModelError(
            f"{changed}: changed during the analysis; expected a file that stays the same. Run the command "
            "again when nothing writes to the file."
        )
    seconds, compiling = time.perf_counter() - begin, CLOCK.seconds - compiled_before
    named = [model_of(m, name) for m, name in zip(models, names_of(models, names), strict=True)]
    return _analysis(base, named, top_share, subjects, collected, skipped, seconds, compiling)


def _analysis(
    base: Source,
    models: Sequence[AnalysedModel],
    top_share: float,
    subjects: Sequence[CommonTensor],
    collected: CollectedMeasurements,
    skipped: Sequence[Skipped],
    seconds: float,
    compile_seconds: float,
) -> Analysis:
    count, tallies = len(models), collected.tallies
    groups = [group for group in GROUPS if any(s.group == group for s in subjects)]
    layers = sorted({s.layer for s in subjects if s.layer is not None})

    def over(name: str, chosen: Sequence[int], key: Any) -> PooledTallies:
        return PooledTallies(name, [tallies[i] for i in chosen], count, collected.histograms[key])

    return Analysis(
        version=__version__,
        base=model_of(base, names_of([base])[0]),
        models=tuple(models),
        top_share=top_share,
        whole=over("whole", range(len(subjects)), "whole").scope(),
        groups={g: over(g, [i for i, s in enumerate(subjects) if s.group == g], g).scope() for g in groups},
        layers={
            n: over(str(n), [i for i, s in enumerate(subjects) if s.layer == n], n).scope() for n in layers
        },
        tensors=tuple(
            PooledTallies(s.job.name, [t], count).of_tensor(s) for s, t in zip(subjects, tallies, strict=True)
        ),
        skipped=tuple(skipped),
        seconds=seconds,
        compile_seconds=compile_seconds,
    )


class CollectedMeasurements:
    """The measurements of all ``subjects``, whatever measured them: a tally per tensor, and histograms per model for each group,
    each layer number and "whole".

    Tallies keep the order of the subjects and histograms are counts, so the order of arrival changes no result.
    ``missing`` are the numbers of the subjects that ``recorded`` lacks. Those that arrive are added to
    ``unfinished``.
    """

    def __init__(
        self,
        subjects: Sequence[CommonTensor],
        models: int,
        recorded: Mapping[str, Mapping[str, Any]],
        unfinished: AnalysisJournal | None,
    ) -> None:
        self._subjects = subjects
        self._unfinished = unfinished
        self._lock = threading.Lock()
        self._tallies: list[Tally | None] = [None] * len(subjects)
        keys: list[Any] = ["whole", *{s.group for s in subjects}, *{s.layer for s in subjects}]
        self.histograms: dict[Any, list[Histogram]] = {
            key: [Histogram() for _ in range(models)] for key in keys
        }
        self.missing = [n for n, subject in enumerate(subjects) if subject.job.name not in recorded]
        for number, subject in enumerate(subjects):
            if subject.job.name in recorded:
                self._add(number, decode_measurement(recorded[subject.job.name]))

    @property
    def tallies(self) -> list[Tally]:
        return [tally for tally in self._tallies if tally is not None]

    def take(self, number: int, measured: MeasuredTensor) -> None:
        """Add a tensor, and record it. Thread-safe. Errors: RunError if an earlier one could not be written."""
        self._add(number, measured)
        if self._unfinished is not None:
            self._unfinished.add(self._subjects[number].job.name, measured)

    def _add(self, number: int, measured: MeasuredTensor) -> None:
        subject = self._subjects[number]
        self._tallies[number] = measured.tally
        with self._lock:
            for key in ("whole", subject.group, subject.layer):
                for model, histogram in zip(subject.models, measured.histograms, strict=True):
                    self.histograms[key][model].add(histogram)
