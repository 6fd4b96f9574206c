"""Factorises matrices and compares folded adapters on the nodes of a cluster, by groups of whole tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from alnico.checkpoint.open_model import open_adapted
from alnico.checkpoint.renamed_model import with_names_of
from alnico.checkpoint.source import Source
from alnico.checkpoint.untied_model import untie
from alnico.cluster.node_models import NodeModels, node_threads
from alnico.cluster.nodes import processors_here
from alnico.cluster.units import group_by_bytes
from alnico.cluster.work import Cluster
from alnico.engine.arena import Arena
from alnico.engine.fetch import fetch_files
from alnico.errors import RunError
from alnico.events import Advanced, Reading
from alnico.lora.extract_deltas import ExtractMemory, arena_bytes, fit_extraction
from alnico.lora.extract_options import Options
from alnico.lora.extract_targets import ExtractTarget
from alnico.lora.factorise import FactorisingRun
from alnico.lora.folded_distances import RUNS, FoldedDistances
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.randomized import LowRankFactors
from alnico.run_options import RunOptions
from alnico.threads import Crew

MOST_RESULT_BYTES = 64 << 20
"""Most bytes of the factors of a unit, unless they are of one matrix."""

RESULTS_SHARE = 8
"""The results that arrive together take at most this part of the budget of the process that collects them."""

TensorRuns = tuple[str, int, int]
"""A tensor, the first of its runs (see :mod:`alnico.lora.folded_distances`) and the one after the last."""


@dataclass(frozen=True)
class ExtractNodes:
    """The nodes that an extraction uses, and what they need to know of it."""

    cluster: Cluster
    models: NodeModels
    options: Options
    targets: tuple[ExtractTarget, ...]
    run: RunOptions

    def factorise(
        self,
        targets: Sequence[ExtractTarget],
        read: Sequence[int],
        results: Sequence[int],
        put: Callable[[str, LowRankFactors], None],
    ) -> None:
        """Factorise targets, of which nodes read and return so many bytes; see :class:`FactorisingRun` for ``put``.

        Errors: those of factorising; RunError.
        """
        nodes = len(self.cluster.nodes)
        largest = max(results, default=0)
        share = self.run.memory_bytes // (RESULTS_SHARE * max(nodes, 1))
        most = max(min(largest, MOST_RESULT_BYTES, share), 1)
        units = [tuple(targets[i] for i in group) for group in group_by_bytes(read, nodes, results, most)]
        bytes_of = {target.name: size for target, size in zip(targets, read, strict=True)}
        self.run.report(Reading(len(targets), sum(read)))

        def done(_: int, found: Sequence[tuple[str, LowRankFactors]]) -> None:
            for name, factors in found:
                put(name, factors)
                self.run.report(Advanced(name, bytes_of[name]))

        self.cluster.run(FactorisingStart(*self._what, largest), units, done)

    def measure(
        self,
        adapter: str,
        runs: Mapping[str, int],
        read: Sequence[int],
        put: Callable[[str, int, tuple[float, float]], None],
    ) -> None:
        """Compare the adapter on its base with the fine-tune, for tensors of so many ``runs`` and bytes.

        See :class:`FoldedDistances` for ``put``. Errors: RunError.
        """
        parts = [
            (name, first, min(first + RUNS, count))
            for name, count in runs.items()
            for first in range(0, count, RUNS)
        ]
        each = {name: size // max(count, 1) for (name, count), size in zip(runs.items(), read, strict=True)}
        sizes = [each[name] * (last - first) for name, first, last in parts]
        units = [tuple(parts[i] for i in group) for group in group_by_bytes(sizes, len(self.cluster.nodes))]
        self.run.report(Reading(len(runs), sum(read)))

        def done(_: int, found: Sequence[tuple[str, int, tuple[float, float]]]) -> None:
            for name, run, squares in found:
                put(name, run, squares)
                self.run.report(Advanced(name, each[name]))

        self.cluster.run(MeasuringFoldedStart(*self._what, adapter), units, done)

    @property
    def _what(self) -> tuple[NodeModels, Options, tuple[ExtractTarget, ...], int, int | None]:
        return self.models, self.options, self.targets, self.run.memory_bytes, node_threads(self.run)


@dataclass(frozen=True)
class _Start:
    """What a node needs. ``models`` are the fine-tune and its base."""

    models: NodeModels
    options: Options
    targets: tuple[ExtractTarget, ...]
    memory_bytes: int
    threads: int | None
    """None: as many as the node has processors."""


@dataclass(frozen=True)
class FactorisingStart(_Start):
    """Starts a worker that factorises. Its results take up to ``result_bytes``. Errors: ModelError, HubError, ResourceError."""

    result_bytes: int

    def __call__(self) -> FactorisingWorker:
        return FactorisingWorker(self)


@dataclass(frozen=True)
class MeasuringFoldedStart(_Start):
    """Starts a worker that compares an adapter on its base with the fine-tune. Errors: as for :class:`FactorisingStart`; RunError."""

    adapter: str

    def __call__(self) -> MeasuringFoldedWorker:
        return MeasuringFoldedWorker(self)


class _OpenedPair:
    """A fine-tune and its base on a node, and the memory for work on them."""

    def __init__(self, start: _Start, held_bytes: int = 0) -> None:
        self.start = start
        opened = start.models.open()
        self._opened = opened
        models = untie(opened, opened)
        self.base: Source = models[1]
        self.tuned: Source = with_names_of(models[0], models[1])
        run = RunOptions(
            memory_bytes=start.memory_bytes,
            threads=start.threads or processors_here(),
            reserved_bytes=2 * held_bytes,  # results, and the same pickled
        )
        caps = [start.options.cap(s) if s.treatment == "factors" else 0 for s in start.targets]
        self.room: ExtractMemory = fit_extraction(self.tuned, self.base, start.targets, caps, run)
        self.arena = Arena(arena_bytes(self.room))

    def fetch(self, names: Sequence[str]) -> None:
        """Download the files of some tensors, if the models are on the hub. Errors: HubError."""
        models = self.tuned, self.base
        fetch_files(models, [model.absent(list(names), False) for model in models], None)

    def close(self) -> None:
        for source in self._opened:
            source.close()


class FactorisingWorker:
    """Factorises units of targets on one node, with all its threads."""

    def __init__(self, start: FactorisingStart) -> None:
        self._pair = _OpenedPair(start, start.result_bytes)

    @ieee_arithmetic()
    def do(self, unit: Sequence[ExtractTarget]) -> list[tuple[str, LowRankFactors]]:
        pair = self._pair
        pair.fetch([target.name for target in unit])
        found: list[tuple[str, LowRankFactors]] = []
        with Crew(pair.room.threads) as crew:
            FactorisingRun(
                pair.tuned, pair.base, pair.start.options, pair.room, crew, pair.arena,
                lambda name, factors: found.append((name, factors)),
            ).factorise(unit)  # fmt: skip
        return found

    def close(self) -> None:
        self._pair.close()


class MeasuringFoldedWorker:
    """Compares units of tensors of a folded adapter with the fine-tune on one node, with all its threads."""

    def __init__(self, start: MeasuringFoldedStart) -> None:
        if not os.path.isdir(start.adapter):
            raise RunError(
                f"{start.adapter}: no such directory there, and nodes verify the adapter; expected a folder that all nodes see. Write the "
                "adapter to one, or leave out the verification (--no-verify)."
            )
        with ExitStack() as opened:
            self._pair = _OpenedPair(start)
            opened.callback(self._pair.close)
            base = start.models.references[1]
            folded = open_adapted("the folded adapter", base, start.adapter, access=start.models.access)
            self._folded = opened.enter_context(closing(folded))
            self._close = opened.pop_all()

    @ieee_arithmetic()
    def do(self, unit: Sequence[TensorRuns]) -> list[tuple[str, int, tuple[float, float]]]:
        pair = self._pair
        pair.fetch(list(dict.fromkeys(name for name, _, _ in unit)))
        found: list[tuple[str, int, tuple[float, float]]] = []
        with Crew(pair.room.threads) as crew:
            FoldedDistances(
                self._folded, pair.tuned, crew, pair.arena,
                lambda name, run, squares: found.append((name, run, squares)),
            ).measure([(name, range(first, last)) for name, first, last in unit])  # fmt: skip
        return found

    def close(self) -> None:
        self._close.close()
