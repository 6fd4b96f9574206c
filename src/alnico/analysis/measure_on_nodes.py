"""Measures tensors on the nodes of a cluster: each opens the models, and measures groups of whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alnico.analysis.common_tensors import CommonTensor, pair_tensors
from alnico.analysis.journal import MeasuredTensor
from alnico.analysis.measure_tensors import MeasuringRun, fit_memory, input_bytes
from alnico.checkpoint.file_model import describe_change, file_states
from alnico.checkpoint.renamed_model import with_names_of
from alnico.cluster.node_models import NodeModels, node_threads
from alnico.cluster.nodes import check_numerics, processors_here
from alnico.cluster.units import group_by_bytes
from alnico.engine.fetch import fetch_files
from alnico.errors import ModelError
from alnico.events import Advanced, Reading
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.run_options import RunOptions

Unit = tuple[int, ...]
"""The numbers of tensors in the list that :func:`pair_tensors` returns."""


def measure_on_nodes(
    models: NodeModels,
    subjects: Sequence[CommonTensor],
    numbers: Sequence[int],
    finished: Callable[[int, MeasuredTensor], None],
    *,
    top_share: float,
    subspace_side: int,
    run: RunOptions,
) -> None:
    """Measure some of the ``subjects`` on the cluster of ``run``; see :class:`MeasuringRun` for ``finished``.

    ``models`` are those that are compared with the base, which is last. Errors: MismatchError if singular vectors are compared on nodes
    whose last bits may differ; those of measuring; RunError.
    """
    from alnico.cluster.connect import connect

    assert run.ray is not None
    chosen = [subjects[number] for number in numbers]
    if not chosen:
        return
    run.report(Reading(len(chosen), input_bytes(chosen)))
    with connect(run.ray) as cluster:
        if any(subject.has_subspace(subspace_side) for subject in chosen):
            check_numerics(cluster.nodes, ["the comparison of singular vectors (subspace_side)"])
        groups = group_by_bytes([input_bytes([subject]) for subject in chosen], len(cluster.nodes))
        units = [tuple(numbers[place] for place in group) for group in groups]

        def done(_: int, measured: Sequence[tuple[int, MeasuredTensor]]) -> None:
            for number, measurement in measured:
                finished(number, measurement)
                run.report(Advanced(subjects[number].job.name, input_bytes([subjects[number]])))

        cluster.run(
            MeasuringStart(models, top_share, subspace_side, run.memory_bytes, node_threads(run)), units, done
        )


@dataclass(frozen=True)
class MeasuringStart:
    """Starts the worker of a node. Errors: ModelError, HubError, ResourceError."""

    models: NodeModels
    top_share: float
    subspace_side: int
    memory_bytes: int
    threads: int | None
    """None: as many as the node has processors."""

    def __call__(self) -> MeasuringWorker:
        return MeasuringWorker(self)


class MeasuringWorker:
    """Measures units of tensors on one node, with all its threads."""

    def __init__(self, start: MeasuringStart) -> None:
        self._start = start
        *models, base = start.models.open()
        self._opened = [*models, base]
        self._sources = [*(with_names_of(model, base) for model in models), base]
        self._subjects, _ = pair_tensors(base, self._sources[:-1])
        run = RunOptions(memory_bytes=start.memory_bytes, threads=start.threads or processors_here())
        self._memory = fit_memory(self._subjects, self._sources, run, start.subspace_side, None)
        self._before = file_states(path for source in self._sources for path in source.paths())

    @ieee_arithmetic()
    def do(self, unit: Unit) -> list[tuple[int, MeasuredTensor]]:
        names = [
            [i.name for number in unit for i in self._subjects[number].job.read if i.model == position]
            for position in range(len(self._sources))
        ]
        absent = [source.absent(own, False) for source, own in zip(self._sources, names, strict=True)]
        fetch_files(self._sources, absent, None)
        measured: list[tuple[int, MeasuredTensor]] = []
        MeasuringRun(
            self._subjects,
            self._sources,
            self._memory,
            self._start.top_share,
            self._start.subspace_side,
            lambda number, measurement: measured.append((number, measurement)),
        ).measure(unit)
        if changed := describe_change(self._before):
            raise ModelError(
                f"{changed}: changed during the analysis; expected a file that stays the same. Run the command "
                "again when nothing writes to the file."
            )
        return measured

    def close(self) -> None:
        for source in self._opened:
            source.close()
