"""Applies a merge method to the updates of adapters, with an ordinary plan, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alnico.checkpoint.shards import split_into_shards
from alnico.checkpoint.source import Source
from alnico.checkpoint.writer import OutputFiles
from alnico.engine.in_memory import Arrays, NullRecorder
from alnico.engine.merge_run import MergeRun, Output
from alnico.errors import RunError
from alnico.folders import Folder, make_folder, remove
from alnico.methods import find
from alnico.numerics.dtypes import DTYPES, decode
from alnico.output.journal import JournalState, Record
from alnico.output.staging import PartDirectory
from alnico.plan.build import build_plan
from alnico.recipe.load import load_recipe
from alnico.run_options import RunOptions
from alnico.threads import Abandoned

BASE = "a base of zeros"


class UpdateMerge:
    """Applies a method to ``sources``, one per adapter, and a ``base`` of zeros.

    Facts over all tensors are measured once.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        base: Source,
        method: str,
        options: Mapping[str, Any],
        *,
        dtype: str,
        seed: int,
        run: RunOptions,
    ) -> None:
        opened = {BASE: base, **{f"adapter {i + 1}": source for i, source in enumerate(sources)}}
        self.plan = build_plan(
            load_recipe(_recipe(list(opened)[1:], method, options, dtype, seed)),
            run=run,
            open_source=opened.__getitem__,
        )
        self._jobs = {job.name: job for job in self.plan.jobs}
        self._others = [Record(job.name, "", ()) for job in self.plan.jobs]
        self._facts: dict[int, tuple[float, ...]] = {}

    def in_memory(self, name: str) -> np.ndarray:
        """Return a merged tensor in float64."""
        job = self._jobs[name]
        raw = np.empty(job.byte_size, np.uint8)
        self._run(name, Arrays({name: raw}))
        return decode(raw, job.dtype).astype(np.float64).reshape(job.shape)

    def on_disk(self, name: str, part: PartDirectory) -> Merged:
        """Return a merged tensor in its own file; closing it removes the file."""
        job = self._jobs[name]
        folder = part.path / "merged"
        try:
            make_folder(folder, part.folder)
        except OSError as error:
            raise RunError(
                f"{folder}: cannot be created ({error.strerror}). Choose another output."
            ) from None
        files = OutputFiles(
            folder, split_into_shards([(name, job.dtype, job.shape)], 1, "merged"), part.folder
        )
        merged = Merged(name, job.dtype, job.shape, files, part.folder)
        try:
            self._run(name, files)
        except Abandoned:  # a thread may still write into the file
            raise
        except BaseException:
            merged.close()
            raise
        return merged

    def _run(self, name: str, output: Output) -> None:
        done = JournalState([r for r in self._others if r.tensor != name], dict(self._facts))
        run = MergeRun(self.plan, output, NullRecorder(self.plan), done, None)
        run.all()
        self._facts = run.facts


class Merged:
    """A merged tensor on disk, read by rows of one of its matrices."""

    def __init__(
        self, name: str, dtype: str, shape: tuple[int, ...], files: OutputFiles, inside: Folder
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self._files = files
        self._inside = inside

    def rows(self, matrix: int, rows: int, columns: int, first: int, stop: int) -> np.ndarray:
        """Read rows ``first`` to ``stop`` of matrix number ``matrix``, each (rows, columns)."""
        width = DTYPES[self.dtype].bytes
        raw = np.empty((stop - first) * columns * width, np.uint8)
        self._files.read_into(self.name, (matrix * rows + first) * columns * width, memoryview(raw))
        return decode(raw, self.dtype).reshape(stop - first, columns)

    def close(self) -> None:
        self._files.close()
        remove(self._files.path("merged"), self._inside)

    def __enter__(self) -> Merged:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _recipe(
    references: Sequence[str], method: str, options: Mapping[str, Any], dtype: str, seed: int
) -> dict[str, Any]:
    declared = find(method).options
    lists = {n: v for n, v in options.items() if isinstance(v, tuple) and declared[n].per_model}
    shared = {n: v for n, v in options.items() if n not in lists}
    return {
        "merge_method": method,
        "base_model": BASE,
        "models": [
            {"model": r, **({"parameters": {n: v[i % len(v)] for n, v in lists.items()}} if lists else {})}
            for i, r in enumerate(references)
        ],
        **({"parameters": shared} if shared else {}),
        "dtype": {"F32": "float32", "F64": "float64"}[dtype],
        "seed": seed,
        "unrelated": "allow",
    }
