"""Compares two models: which tensors are equal byte for byte, and how the others differ.

First all tensors of both are hashed, as merges hash them; then the values of tensors whose hashes differ are
compared. Each step goes through the tensors in chunks, with all threads.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from alnico.checkpoint.files import read_small
from alnico.checkpoint.renamed_model import RenamedModel, with_names_of
from alnico.checkpoint.sidecars import side_files
from alnico.checkpoint.source import Source, Tensor
from alnico.errors import ResourceError
from alnico.kernels.clock import counts_compiling
from alnico.models.open_models import AnyModel, name_model, open_sources
from alnico.notebook import ResultTable, name_text, never_fails, result_html, result_line, share_text
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.dtypes import DTYPES, MERGEABLE, decode
from alnico.numerics.sizes import format_size
from alnico.output.hashes import READ_BYTES, hash_file, hash_tensors
from alnico.plan.memory import BASELINE_BYTES, BYTES_A_TENSOR
from alnico.run_options import DEFAULT_BUDGET_BYTES, DEFAULT_DOWNLOAD_CACHE_BYTES, RunOptions, Size
from alnico.threads import Crew

TensorVerdict = Literal["equal", "same values", "differs", "other bytes", "other shape"]

RUN = 15 << 10
"""Elements whose values are compared and summed together. As float64 they take just under 128 KiB; from there
on each allocation maps fresh pages, which costs more than the arithmetic."""

CHUNK_RUNS = 256
"""Runs that a thread processes at a time, one after the other."""

WORKER_BYTES = 2 * READ_BYTES
"""Memory of one thread: the bytes that it hashes, or two runs with their values and differences as
float64."""

MAX_KEYED_BYTES = 4 << 20
"""Longest side file whose keys are compared; longer ones are only reported as different."""


@dataclass(frozen=True)
class ValuesDiffer:
    """How the values of a tensor b differ from those of a, in float64.

    ``differing`` entries have different values; two NaN count as equal, and so do 0 and -0. In ``not_finite``
    of these one side is a NaN or an infinity; they are left out of the other figures. ``max_abs`` is max |b -
    a|, ``l2`` |b - a|, ``relative_l2`` |b - a| / |a|, ``cosine`` a b / (|a| |b|). A value is None if the
    divisor is 0.
    """

    elements: int
    differing: int
    not_finite: int
    max_abs: float
    l2: float
    relative_l2: float | None
    cosine: float | None


@dataclass(frozen=True)
class TensorPair:
    """A tensor that both models have; pairs are (in a, in b).

    ``equal``: the same dtype, shape and bytes, by their digests. ``same values``: different bytes but equal
    values: another dtype that holds them, 0 and -0, or a NaN with other bits. ``differs``: see ``values``.
    ``other bytes``: different bytes, of a dtype whose values cannot be compared.
    """

    name: str
    verdict: TensorVerdict
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    digests: tuple[str, str]
    values: ValuesDiffer | None = None


@dataclass(frozen=True)
class Alone:
    """A tensor of one model only; ``twins`` are equal tensors of the other model under other names."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    twins: tuple[str, ...]


@dataclass(frozen=True)
class KeyPair:
    """A key of a JSON file that differs, and its values as JSON; None where the key is missing.

    A key in a nested object has the path to it: ``rope_scaling.factor``.
    """

    key: str
    a: str | None
    b: str | None


@dataclass(frozen=True)
class FilePair:
    """A file next to the weights that differs, or that only one model has.

    If it holds a JSON object in both, ``keys`` are the keys that differ (empty if only the formatting does);
    else it is None.
    """

    name: str
    in_a: bool
    in_b: bool
    keys: tuple[KeyPair, ...] | None = None


@dataclass(frozen=True)
class ModelDiff:
    """How model b differs from model a.

    ``files`` (``config.json`` first) is None if a model is not a directory and so has no files to compare.
    """

    a: str
    b: str
    tensors: tuple[TensorPair, ...]
    only_in_a: tuple[Alone, ...]
    only_in_b: tuple[Alone, ...]
    files: tuple[FilePair, ...] | None
    seconds: float
    layout: str = ""
    """How b's names differ from a's, which b's tensors are compared under; '' if they do not."""
    compile_seconds: float = field(default=0.0, compare=False)

    @property
    def is_equal(self) -> bool:
        """Do both have the same tensors, byte for byte and by name, and the same files?"""
        is_same = all(t.verdict == "equal" for t in self.tensors) and not self.layout
        return is_same and not (self.only_in_a or self.only_in_b or self.files)

    def __repr__(self) -> str:
        counts = Counter(t.verdict for t in self.tensors)
        return result_line(
            f"{'no difference' if self.is_equal else 'difference'} between {name_text(self.a)} and {name_text(self.b)}",
            ", ".join(f"{verdict} {count:,}" for verdict, count in counts.items()),
            f"only in a: {len(self.only_in_a):,}" if self.only_in_a else "",
            f"only in b: {len(self.only_in_b):,}" if self.only_in_b else "",
            f"files: {len(self.files):,}" if self.files else "",
        )

    @never_fails
    def _repr_html_(self) -> str:
        differing = [t for t in self.tensors if t.verdict != "equal"]
        differing.sort(key=lambda t: -(t.values.l2 if t.values is not None else 0.0))
        rows = [
            [
                t.name,
                t.verdict,
                *(
                    (None,) * 4
                    if (v := t.values) is None
                    else (share_text(v.differing / max(v.elements, 1)), v.max_abs, v.l2, v.cosine)
                ),
            ]
            for t in differing
        ]
        alone = [[t.name, "a", t.dtype] for t in self.only_in_a] + [
            [t.name, "b", t.dtype] for t in self.only_in_b
        ]
        files = [[f.name, f.in_a, f.in_b] for f in self.files or ()]
        parts = [
            (
                ("tensor", "verdict", "entries that differ", "largest", "L2", "cosine"),
                rows,
                "Tensors that differ",
            ),
            (("tensor", "only in", "dtype"), alone, "Tensors of one model"),
            (("file", "in a", "in b"), files, "Files that differ"),
        ]
        return result_html(
            "The models are equal" if self.is_equal else "The models differ",
            *(ResultTable(columns, of_part, heading) for columns, of_part, heading in parts if of_part),
            facts=[
                ("a", self.a),
                ("b", self.b),
                ("tensors in both", len(self.tensors)),
                ("differ", len(differing)),
            ],
        )

    def data(self) -> dict[str, Any]:
        """Return everything as plain data, for ``--json``."""
        return {"is_equal": self.is_equal, **asdict(self)}


@counts_compiling
@ieee_arithmetic()
def diff(
    a: AnyModel,
    b: AnyModel,
    *,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    stream: bool = False,
    download_cache: str | os.PathLike[str] | None = None,
    download_cache_size: Size = DEFAULT_DOWNLOAD_CACHE_BYTES,
) -> ModelDiff:
    """Compare two models: tensors by content hash and by value, configs by key, side files by content.

    Both are read completely, in blocks; files of models on the hub are downloaded. ``difference.is_equal``
    is the short answer. A model in memory has tensors, and no files to compare.

    Options:
        a: A model: a directory, a file, a URL, or owner/name@revision on the hub.
        b: The model to compare with it.
    Errors: ModelError, ResourceError, HubError.
    """
    run = RunOptions.of(
        memory=memory,
        threads=threads,
        offline=offline,
        stream=stream,
        download_cache=download_cache,
        download_cache_size=download_cache_size,
    )
    models = [(name_model(model, name), model) for name, model in (("a", a), ("b", b))]
    with ExitStack() as opened:
        sources = open_sources(models, access=run.access, may_be_adapter=True)
        first, second = (opened.enter_context(closing(source)) for source in sources)
        return diff_sources(first, second, run)


def diff_sources(a: Source, b: Source, run: RunOptions) -> ModelDiff:
    """Compare two open models, tensor by tensor and file by file. Threads do not change the result.

    Errors: ResourceError if the budget does not suffice for one thread; those of reading; HubError.
    """
    begin = time.perf_counter()
    b = with_names_of(b, a)
    layout = b.layout.title if isinstance(b, RenamedModel) else ""
    workers = _workers((a, b), run)
    for source in (a, b):
        source.fetch(source.absent(list(source.tensors), True))
    with Crew(workers, name="alnico-diff") as crew:
        digests = [hash_tensors(source, source.tensors, crew) for source in (a, b)]
        both = [name for name in a.tensors if name in b.tensors]
        verdicts = {
            name: _verdict(a.tensors[name], b.tensors[name], *(d[name] for d in digests)) for name in both
        }
        values = _compare_values(a, b, [name for name in both if verdicts[name] is None], crew)
    tensors = []
    for name in both:
        in_a, in_b = a.tensors[name], b.tensors[name]
        differ = values.get(name)
        verdict = verdicts[name] or ("differs" if differ and differ.differing else "same values")
        pair = (in_a.dtype, in_b.dtype), (in_a.shape, in_b.shape), (digests[0][name], digests[1][name])
        tensors.append(TensorPair(name, verdict, *pair, differ if verdict == "differs" else None))
    only_in_a, only_in_b = _alone(a, b, *digests), _alone(b, a, *digests[::-1])
    files, seconds = _files(a, b), time.perf_counter() - begin
    return ModelDiff(a.label, b.label, tuple(tensors), only_in_a, only_in_b, files, seconds, layout)


def _workers(sources: Sequence[Source], run: RunOptions) -> int:
    """Return the number of threads that fit the budget. Errors: ResourceError if not even one fits."""
    fixed = BASELINE_BYTES + sum(s.held_bytes + BYTES_A_TENSOR * len(s.tensors) for s in sources)
    worker = WORKER_BYTES + max(s.reading_bytes for s in sources)
    if fixed + worker > run.memory_bytes:
        raise ResourceError(
            f"diff: needs at least {format_size(fixed + worker)} of memory, the budget is "
            f"{format_size(run.memory_bytes)}. "
            f"Raise --memory to {-(-(fixed + worker) // (1 << 20))}MiB."
        )
    return min(run.threads, (run.memory_bytes - fixed) // worker)


def _verdict(a: Tensor, b: Tensor, digest_a: str, digest_b: str) -> TensorVerdict | None:
    """Return the verdict on two tensors without their values; None if these must be compared."""
    if a.shape != b.shape:
        return "other shape"
    if digest_a == digest_b:
        return "equal"
    return None if _has_values(a.dtype) and _has_values(b.dtype) else "other bytes"


def _has_values(dtype: str) -> bool:
    return DTYPES[dtype].kind in ("integer", "bool") or dtype in MERGEABLE


@dataclass(frozen=True)
class _RunSums:
    """Sums over a run of elements."""

    differing: int = 0
    not_finite: int = 0
    max_abs: float = 0.0
    change: float = 0.0
    a: float = 0.0
    b: float = 0.0
    product: float = 0.0


def _compare_values(a: Source, b: Source, names: Sequence[str], crew: Crew) -> dict[str, ValuesDiffer]:
    """Compare the values of tensors of the same shape in both models."""
    parts = {name: [_RunSums()] * -(-a.tensors[name].elements // RUN) for name in names}

    def compare(name: str, first: int, last: int) -> None:
        elements = a.tensors[name].elements
        for run in range(first, last):
            crew.check()
            span = run * RUN, min((run + 1) * RUN, elements)
            parts[name][run] = _sum_run(_read(a, name, *span), _read(b, name, *span))

    spans = [
        (n, s, min(s + CHUNK_RUNS, len(p))) for n, p in parts.items() for s in range(0, len(p), CHUNK_RUNS)
    ]
    crew.run([(compare, span) for span in spans])
    return {name: _join(a.tensors[name].elements, sums) for name, sums in parts.items()}


def _read(source: Source, name: str, start: int, stop: int) -> np.ndarray:
    dtype = source.tensors[name].dtype
    width = DTYPES[dtype].bytes
    raw = np.empty((stop - start) * width, np.uint8)
    source.read_into(name, start * width, memoryview(raw))
    return decode(raw, dtype) if dtype in MERGEABLE else raw.view(np.dtype(DTYPES[dtype].storage))


def _sum_run(a: np.ndarray, b: np.ndarray) -> _RunSums:
    # Compare before converting to float64, which cannot distinguish large integers.
    differ = a != b
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        differ &= ~(np.isnan(a) & np.isnan(b))
        finite = np.isfinite(a) & np.isfinite(b)
        not_finite = int(np.count_nonzero(differ & ~finite))
        a, b = a[finite], b[finite]
    else:
        not_finite = 0
    change = b - a
    largest = float(np.abs(change).max(initial=0.0))
    return _RunSums(
        int(np.count_nonzero(differ)), not_finite, largest, _dot(change, change), _dot(a, a), _dot(b, b), _dot(a, b)
    )  # fmt: skip


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    # Not a @ b: BLAS spreads even so short a sum over all threads.
    return float(np.einsum("i,i->", a, b))


def _join(elements: int, parts: Sequence[_RunSums]) -> ValuesDiffer:
    def total(name: str) -> float:
        return math.fsum(getattr(part, name) for part in parts)

    l2, of_a, of_b = (math.sqrt(total(name)) for name in ("change", "a", "b"))
    return ValuesDiffer(
        elements,
        sum(part.differing for part in parts),
        sum(part.not_finite for part in parts),
        max((part.max_abs for part in parts), default=0.0),
        l2,
        l2 / of_a if of_a else None,
        min(max(total("product") / of_a / of_b, -1.0), 1.0) if of_a and of_b else None,
    )


def _alone(
    source: Source, other: Source, digests: Mapping[str, str], others: Mapping[str, str]
) -> tuple[Alone, ...]:
    twins: dict[str, list[str]] = {}
    for name, digest in others.items():
        if other.tensors[name].elements:
            twins.setdefault(digest, []).append(name)
    return tuple(
        Alone(name, t.dtype, t.shape, digests[name], tuple(twins.get(digests[name], ())))
        for name, t in source.tensors.items()
        if name not in other.tensors
    )


def _files(a: Source, b: Source) -> tuple[FilePair, ...] | None:
    """Return the configs and side files that differ; None if a model is not a directory."""
    if a.directory is None or b.directory is None:
        return None
    mine, others = _files_in(a.directory), _files_in(b.directory)
    pairs = []
    for name in sorted(mine | others, key=lambda name: (name != "config.json", name)):
        pair = FilePair(name, name in mine, name in others)
        if not (pair.in_a and pair.in_b):
            pairs.append(pair)
        elif hash_file(a.directory / name) != hash_file(b.directory / name):
            in_a, in_b = _read_object(a.directory / name), _read_object(b.directory / name)
            pairs.append(
                FilePair(name, True, True, None if in_a is None or in_b is None else tuple(_keys(in_a, in_b)))
            )
    return tuple(pairs)


def _files_in(directory: Path) -> set[str]:
    files = {path.as_posix() for path in side_files(directory)[0]}
    return files | {"config.json"} if (directory / "config.json").exists() else files


def _read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if it holds something else or is too long."""
    if path.suffix != ".json" or path.stat().st_size > MAX_KEYED_BYTES:
        return None
    try:
        loaded = json.loads(read_small(path, MAX_KEYED_BYTES, "a small JSON file"))
    except (ValueError, RecursionError):
        return None
    return loaded if isinstance(loaded, dict) else None


def _keys(a: Mapping[str, Any], b: Mapping[str, Any], above: str = "") -> list[KeyPair]:
    """Return the keys whose values differ in two JSON objects; of nested objects, each key."""
    pairs: list[KeyPair] = []
    for key in dict.fromkeys([*a, *b]):
        if key in a and key in b and isinstance(a[key], dict) and isinstance(b[key], dict):
            pairs += _keys(a[key], b[key], f"{above}{key}.")
        else:
            in_a, in_b = (
                json.dumps(d[key], ensure_ascii=False, sort_keys=True) if key in d else None for d in (a, b)
            )
            pairs += [KeyPair(above + key, in_a, in_b)] if in_a != in_b else []
    return pairs
