"""Combines several LoRA adapters into one from their files, without the base model."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.lora_adapter import PREFIX, Adapter
from alnico.checkpoint.lora_dialects.block_strengths import BlockInput, block_list, with_strengths
from alnico.checkpoint.output_path import check_publishable, replace_mode
from alnico.checkpoint.reference import Paths
from alnico.devices import DEFAULT_DEVICE
from alnico.engine.fetch import fetch_files
from alnico.engine.matrix_gpu import MatrixGpu, MatrixRoom, kind_of, matrix_gpus, whole_float32
from alnico.engine.method_notes import sum_up
from alnico.errors import (
    MethodError,
    MismatchError,
    ModelError,
    NonFiniteError,
    OutputError,
    RecipeError,
    ResourceError,
    RunError,
)
from alnico.events import Counted, Noted, Watcher
from alnico.folders import Folder, make_folder, open_to_write, remove
from alnico.kernels.clock import counts_compiling
from alnico.lora.combine_files import card, config_of, lock, text
from alnico.lora.combine_options import CombineOptions, check_options
from alnico.lora.common_names import with_common_names
from alnico.lora.dialect_output import (
    FILE,
    dialect_notes,
    header_of,
    kept_factors,
    shared_vectors,
    spelled_factors,
)
from alnico.lora.matching import SharedModule, SharedSavedTensor, check_bases, match_updates, saved_tensors
from alnico.lora.reduce import (
    Combine,
    RankChoice,
    ReducedUpdate,
    of_cat,
    of_matrices,
    of_small,
    of_sum,
    of_whole,
)
from alnico.lora.triples import adapter_list, is_adapter_object, open_adapters, read_triples
from alnico.lora.writer import AdapterFiles, OutputAdapter, OutputModule
from alnico.methods.base import Method
from alnico.models.open_models import path_of
from alnico.notebook import ResultTable, never_fails, result_html, result_line
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.blas import one_blas_thread
from alnico.numerics.dtypes import CONFIG_NAMES, TORCH_NAMES
from alnico.numerics.numbers import finite_number, whole_number
from alnico.numerics.sizes import count_of, format_size
from alnico.output.disk_space import check_output_place, check_space, needed_files
from alnico.output.staging import PartDirectory
from alnico.plan.memory import BASELINE_BYTES, BLAS_BYTES, GPU_LIBRARY_BYTES
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size

SAVED = ("error", "average", "drop")
UNRELATED = ("error", "allow")


@dataclass(frozen=True)
class CombinedModule:
    """An update of the combined adapter. ``error`` is the relative norm of what its rank drops."""

    name: str
    rank: int
    error: float


@dataclass(frozen=True)
class Combined:
    """A finished combination. ``error`` is as in :class:`CombinedModule`, over all updates."""

    path: Path
    method: str
    modules: tuple[CombinedModule, ...]
    error: float
    byte_size: int
    notes: tuple[str, ...]
    seconds: float
    compile_seconds: float = field(default=0.0, compare=False)

    def __repr__(self) -> str:
        ranks = sorted({m.rank for m in self.modules})
        return result_line(
            f"adapter in {self.path}",
            f"combined by {self.method}",
            count_of(len(self.modules), "module"),
            f"rank {', '.join(map(str, ranks[:4]))}"
            if len(ranks) <= 4
            else f"ranks {ranks[0]} to {ranks[-1]}",
            f"relative error {self.error:.3g}",
        )

    @never_fails
    def _repr_html_(self) -> str:
        worst = sorted(self.modules, key=lambda m: -m.error)
        return result_html(
            f"Adapter in {self.path}",
            ResultTable(("module", "rank", "relative error"), [[m.name, m.rank, m.error] for m in worst]),
            *self.notes,
            facts=[
                ("method", self.method),
                ("modules", len(self.modules)),
                ("relative error", self.error),
                ("size", format_size(self.byte_size)),
            ],
        )

    def data(self) -> dict[str, Any]:
        """Return the result as plain data, for ``--json``."""
        return {
            "out": str(self.path),
            "method": self.method,
            "error": self.error,
            "bytes": self.byte_size,
            "seconds": round(self.seconds, 3),
            "modules": [{"module": m.name, "rank": m.rank, "error": m.error} for m in self.modules],
            "notes": list(self.notes),
        }


@counts_compiling
@ieee_arithmetic()
def combine(
    adapters: Paths | Any,
    out: str | os.PathLike[str] | None = None,
    *,
    config: Any = None,
    weights: float | Sequence[float] | None = None,
    blocks: BlockInput | None = None,
    method: str | Method = "svd",
    rank: int | None = None,
    energy: float | None = None,
    space: str | None = None,
    saved: str = "error",
    unrelated: str = "error",
    dtype: Any = None,
    seed: int = 0,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    offline: bool = False,
    device: Any = DEFAULT_DEVICE,
    watch: Watcher | None = None,
    **options: Any,
) -> Any:
    """Combine LoRA adapters of one base into one adapter, from their files alone.

    The base is not needed. The output is an adapter that PEFT loads; of LoRA files without a config (kohya, ComfyUI, diffusers, ...), it is
    such a file, with the names of the first. In Python adapters may be in memory: PEFT modules, dicts of triples (A, B, scale)
    by the names of the base's tensors, or dicts of LoRA tensors with ``config``. Without ``out`` the result is
    an :class:`alnico.lora.Triples`, with the numbers of the adapter on disk. ``watch`` receives the number of updates done (:class:`alnico.events.Counted`). If
    the call fails, it leaves nothing behind.

    Options:
        adapters: LoRA adapters: directories, files of kohya and others, URLs, or owner/name@revision on the hub.
        out: Directory to create; of files without a config, a name that ends in .safetensors makes one file.
        config: Config of a dict of LoRA tensors, with r and lora_alpha; a list has one per adapter.
        weights: Weight of each adapter, or one for all, such as 0.7,0.3; default: 1.
        blocks: Strengths by block of an image model, for all adapters or one each: IN04-IN08=0.5,MID=0, or the usual list of 12, 17, 20 or 26
            numbers.
        method: How updates are combined: svd is the weighted sum, as close as its rank allows; cat is the
            exact sum, with the sum of the ranks; also any method of task vectors (ties, tsv, ...), or a name of
            PEFT's.
        rank: Largest rank of an update; default: a sum gets the largest rank of its adapters, other methods
            the sum of ranks.
        energy: Smallest share of an update's squares that its rank must keep, in (0, 1].
        space: Where a method of task vectors works: dense (whole matrices, the default), core (the adapters'
            core matrices) or knots (the basis of KnOTS).
        saved: What to do with modules that adapters store whole, if the result would need the base: error,
            average or drop.
        unrelated: What to do with adapters that name different bases: error or allow.
        dtype: Dtype of the output; default: float32, or float64 where an adapter is.
        seed: Seed of random methods.
        options: An option of the method, NAME=VALUE; a list gives one value per adapter. May be repeated.
    Errors: all of ``alnico.errors``.

    >>> import numpy as np
    >>> one = {"fc.weight": (np.float32([[1, 0]]), np.float32([[1], [0]]), 2.0)}
    >>> two = {"fc.weight": (np.float32([[0, 1]]), np.float32([[0], [1]]), 1.0)}
    >>> both = combine([one, two], weights=[1, 3], method="cat")
    >>> a, b, scale = both["fc.weight"]
    >>> (scale * b @ a).tolist()
    [[2.0, 0.0], [0.0, 3.0]]
    """
    begin = time.perf_counter()
    run = RunOptions.of(memory=memory, threads=threads, offline=offline, watch=watch, device=device)
    gpus = matrix_gpus(run.device)
    listed = adapter_list(adapters)
    if not listed or path_of(adapters) is not None or (out is not None and is_adapter_object(adapters)):
        raise RecipeError("adapters: expected a list with at least one adapter. Give one.")
    if out is None:
        with tempfile.TemporaryDirectory(prefix="alnico-") as folder:
            place = Path(folder, "combined")
            combined = combine(
                listed, place, config=config, weights=weights, blocks=blocks, method=method, rank=rank, energy=energy,
                space=space, saved=saved, unrelated=unrelated, dtype=dtype, seed=seed, memory=memory,
                threads=threads, offline=offline, device=device, watch=watch, **options,
            )  # fmt: skip
            return read_triples(place, listed, config, combined.error)
    each: Any = (
        [finite_number(weights, "weights", error=MethodError)] * len(listed)
        if isinstance(weights, Real)
        else weights
    )
    seed = whole_number(seed, "seed", None, MethodError)
    combination = check_options(method, len(listed), each, space, options)
    rank = None if rank is None else whole_number(rank, "rank", 1, MethodError)
    energy = None if energy is None else finite_number(energy, "energy", "a share in (0, 1]", MethodError)
    _check_choices(combination, rank, energy, saved, unrelated)
    target, code = Path(out), _dtype(dtype)
    check_publishable(target)
    may_replace = replace_mode(overwrite, overwrite_anything)
    with ExitStack() as stack:
        opened = _opened(listed, config, run, stack)
        strengths = block_list(blocks, len(opened))
        opened = [a if s is None else with_strengths(a, s) for a, s in zip(opened, strengths, strict=True)]
        opened, named = with_common_names(opened)
        is_dialect = opened[0].dialect is not None
        check_output_place(target, needed_files([a.files for a in opened]), may_replace)
        if target.suffix == ".safetensors" and not is_dialect:
            raise OutputError(
                f"{target}: ends in .safetensors; expected a directory, for the adapter's config and "
                "tensors. Give a name without .safetensors."
            )
        notes = [
            *combination.notes,
            *(note for a in opened for note in a.files.notes),
            *check_bases(opened, unrelated),
            *named,
        ]
        modules = match_updates(opened)
        vectors = shared_vectors(opened, combination) if is_dialect else []
        if not modules:
            raise ModelError(
                f"{opened[0].label}: has no LoRA update; expected at least one. Merge whole modules with a "
                "recipe."
            )
        saved_modules = _saved(
            opened, saved_tensors(opened, dropped=saved == "drop"), combination, saved, notes
        )
        _check_loadable(opened, modules)
        wide = code or (
            "F64" if any(t.dtype == "F64" for a in opened for t in a.files.tensors.values()) else "F32"
        )
        choice = RankChoice(rank, energy)
        _check_memory(modules, combination, choice, run.memory_bytes)
        merged = (
            8 * max(m.experts * m.rows * m.columns for m in modules) if combination.space == "dense" else 0
        )
        check_space(
            target,
            merged + 2 * 8 * sum((rank or sum(m.ranks)) * m.experts * (m.rows + m.columns) for m in modules),
        )
        with PartDirectory(target) as part:
            with _removed_on_error(part), one_blas_thread(), whole_float32(gpus):
                said: list[Noted] = []

                def note(update: str, form: str, values: tuple[int | float, ...]) -> None:
                    labels = (opened[v].label if isinstance(v, int) else v for v in values)
                    said.append(Noted(update, form, tuple(labels)))

                gpu = gpus[0] if gpus else None
                make = _combiner(opened, modules, combination, choice, part, seed, run, note, gpu)
                if gpu is not None:
                    make = _on(gpu, make, lambda module: _needed_on_gpu(module, combination, choice))
                updates = _with_equal_ranks(modules, _combine_all(modules, make, part, run))
                notes += sum_up(said, {m.name: i for i, m in enumerate(modules)})
                written = [_module(m, update, opened) for m, update in zip(modules, updates, strict=True)]
                if is_dialect:
                    written = [
                        replace(w, kept=kept_factors(opened, m, combination, choice))
                        for m, w in zip(modules, written, strict=True)
                    ]
                kept = [m.key for m, w in zip(modules, written, strict=True) if w.kept]
                given = [s.text if s is not None else "" for s in strengths] if any(strengths) else []
                notes += dialect_notes(opened, kept)
                if is_dialect:
                    made = {**combination.data(), **({"blocks": given} if given else {})}
                    name = target.name if target.suffix == ".safetensors" else FILE
                    held = {v.name: v.shape for v in vectors}
                    output = OutputAdapter(written, held, wide, metadata=header_of(opened, made), file=name)
                else:
                    saved_shapes = {s.written: s.shape for s, _ in saved_modules}
                    settings = config_of(opened, modules, [s for s, _ in saved_modules])
                    output = OutputAdapter(written, saved_shapes, wide, settings)
                error, combined = _errors(modules, updates)
                notes += _rank_notes(combination, rank, energy)
                card_and_text = card(opened), text(opened, combination, output, rank, energy, error, notes)
                errors = {m.name: m.error for m in combined}
                locked = lock(opened, combination, rank, energy, saved, given, seed, kind_of(gpus), errors)
                with AdapterFiles(part, output) as files:
                    for module, update in zip(output.modules, updates, strict=True):
                        _write(files, module, update, Path(update.path), part.folder)
                    for tensor, values in saved_modules:
                        files.write(PREFIX + tensor.written, values(opened))
                    for vector in vectors:
                        files.write(vector.name, vector.values())
                    files.finish(*card_and_text)
                    files.lock(locked)
                    byte_size = files.byte_size
            part.publish(target.name if target.suffix == ".safetensors" else None, may_replace)
    return Combined(
        target, combination.method, combined, error, byte_size, tuple(notes), time.perf_counter() - begin
    )


def _opened(adapters: Sequence[Any], config: Any, run: RunOptions, stack: ExitStack) -> list[Adapter]:
    """Open adapters of all kinds until the stack ends, and download those of the hub. Errors: ModelError, HubError; RecipeError."""
    found = open_adapters(adapters, config, access=run.access)
    stack.callback(found.close)
    if len(found.adapters) != len(adapters):
        raise RecipeError(
            f"adapters: there are {len(found.adapters)} in {len(adapters)} modules, as PEFT has several active ones; "
            "expected one per module. Set one active adapter in each."
        )
    files = [adapter.files for adapter in found.adapters]
    fetch_files(files, [f.absent(list(f.tensors), False) for f in files], run.watch)
    return list(found.adapters)


@dataclass(frozen=True)
class _WrittenUpdate:
    """A combined update whose arrays are on disk until the header of the output is known."""

    path: str
    rank: int
    scale: float
    has_bias: bool
    total: float
    left_out: float


def _combine_all(
    modules: Sequence[SharedModule],
    combine_module: Combine,
    part: PartDirectory,
    run: RunOptions,
) -> list[_WrittenUpdate]:
    folder = part.path / "factors"
    updates = []
    try:
        make_folder(folder, part.folder)
        for i, module in enumerate(modules):
            try:
                update = combine_module(module)
            except np.linalg.LinAlgError:  # because of infinities
                raise NonFiniteError(
                    f"{module.name}: the combined update, or an intermediate result, is beyond float64; "
                    "expected finite numbers. Choose smaller weights, or correct the adapters."
                ) from None
            path = folder / f"{i}.npz"
            with os.fdopen(open_to_write(path, part.folder), "wb") as file:
                np.savez(file, left=update.left, right=update.right, bias=update.bias)
            updates.append(
                _WrittenUpdate(
                    str(path), update.rank, update.scale, update.bias.size > 0, update.total, update.left_out
                )
            )
            run.report(Counted("updates", i + 1, len(modules)))
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written ({error.strerror}). Make room or check the disk."
        ) from None
    return updates


def _with_equal_ranks(
    modules: Sequence[SharedModule], updates: Sequence[_WrittenUpdate]
) -> list[_WrittenUpdate]:
    """Raise the parameters of one module to their largest rank; zeros fill the smaller ones."""
    largest: dict[str, int] = {}
    for module, update in zip(modules, updates, strict=True):
        largest[module.module] = max(update.rank, largest.get(module.module, 0))
    return [
        replace(update, rank=largest[module.module]) if module.kind == "parameter" else update
        for module, update in zip(modules, updates, strict=True)
    ]


def _write(
    files: AdapterFiles, module: OutputModule, update: _WrittenUpdate, path: Path, inside: Folder
) -> None:
    """Write the factors in PEFT's layout: of experts, A expert by expert and B rank by rank. Or write the module as it is kept."""
    if module.kept:
        remove(path, inside)
        for tensor in module.kept:
            files.write(tensor.name, tensor.values())
        return
    name_of_left, name_of_right = module.names
    with (
        os.fdopen(open_to_write(path, inside, flags=os.O_RDWR), "rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        left, right, bias = arrays["left"], arrays["right"], arrays["bias"]
    remove(path, inside)
    missing = update.rank - left.shape[2]
    left, right = np.pad(left, ((0, 0), (0, 0), (0, missing))), np.pad(right, ((0, 0), (0, missing), (0, 0)))
    spelled = module.spelled
    if spelled is not None and spelled.alpha:
        files.write(spelled.alpha, np.array(update.scale * update.rank))
    elif spelled is not None:
        left = left * update.scale
    files.write(name_of_right, right)
    files.write(name_of_left, left.transpose(1, 2, 0))
    if module.bias:
        files.write(module.bias_name, bias / update.scale if bias.size else np.zeros(module.left_shape[0]))


@contextmanager
def _removed_on_error(part: PartDirectory) -> Iterator[None]:
    """Start from an empty folder, and remove it after an error: combinations never resume."""
    part.remove_contents()
    try:
        yield
    except BaseException:
        part.remove()
        raise


def _combiner(
    adapters: Sequence[Adapter],
    modules: Sequence[SharedModule],
    combination: CombineOptions,
    choice: RankChoice,
    part: PartDirectory,
    seed: int,
    run: RunOptions,
    note: Callable[[str, str, tuple[int | float, ...]], None],
    gpu: MatrixGpu | None,
) -> Combine:
    if combination.kind == "cat":
        return of_cat(adapters, combination)
    if combination.kind == "sum":
        return of_sum(adapters, combination, choice, gpu)
    if combination.kind == "matrix":
        return of_matrices(adapters, combination, choice, note, gpu)
    if combination.space == "dense":
        return of_whole(
            adapters,
            modules,
            combination,
            choice,
            part,
            seed=seed,
            run=run,
            gpu=gpu,
        )
    return of_small(adapters, modules, combination, choice, seed=seed, run=run, gpu=gpu)


def _on(gpu: MatrixGpu, combine_module: Combine, needed: Callable[[SharedModule], int]) -> Combine:
    """Combine each update on a GPU."""
    room = MatrixRoom()

    def combine(module: SharedModule) -> ReducedUpdate:
        with room.taken(gpu.device, module.name, needed(module)):
            return combine_module(module)

    return combine


def _module(module: SharedModule, update: _WrittenUpdate, adapters: Sequence[Adapter]) -> OutputModule:
    experts, rank = module.experts, update.rank
    # In PEFT, either all layers that can have a bias have one, or none.
    biased = update.has_bias or (
        module.kind in ("linear", "convolution") and any(a.config.get("lora_bias") for a in adapters)
    )
    return OutputModule(
        module.module,
        module.kind,
        rank,
        (module.rows, rank * experts, *module.left_shape),
        (rank * experts, *module.right_shape),
        alpha=update.scale * rank,
        depth=module.depth,
        bias=biased,
        parameter=module.target,
        spelled=spelled_factors(adapters, module) if adapters[0].dialect is not None else None,
    )


def _errors(
    modules: Sequence[SharedModule], updates: Sequence[_WrittenUpdate]
) -> tuple[float, tuple[CombinedModule, ...]]:
    def share(left_out: float, total: float) -> float:
        return math.sqrt(left_out / total) if total > 0 else 0.0

    combined = tuple(
        CombinedModule(
            m.key if m.kind != "parameter" else m.name, update.rank, share(update.left_out, update.total)
        )
        for m, update in zip(modules, updates, strict=True)
    )
    return share(
        sum(update.left_out for update in updates), sum(update.total for update in updates)
    ), combined


TensorValues = Callable[[Sequence[Adapter]], np.ndarray]


def _saved(
    adapters: Sequence[Adapter],
    tensors: Sequence[SharedSavedTensor],
    combination: CombineOptions,
    saved: str,
    notes: list[str],
) -> list[tuple[SharedSavedTensor, TensorValues]]:
    """Return the tensors that replace the base's, with values. Errors: MismatchError, MethodError."""
    tensor_values: list[tuple[SharedSavedTensor, TensorValues]] = []
    dropped, averaged = [], []
    for tensor in tensors:
        holders = [adapters[i].label for i, _ in tensor.holders]
        if not tensor.is_trained:
            # PEFT stores a base's embeddings with an adapter that changes them; these are unchanged.
            tensor_values.append((tensor, _equal_values(tensor)))
            continue
        if saved == "drop":
            dropped.append(tensor.name)
            continue
        coefficients = combination.coefficients or combination.weights
        weights = [coefficients[i] for i, _ in tensor.holders]
        total = math.fsum(weights)
        exact = combination.kind in ("cat", "sum") and abs(total - 1) < 1e-9
        if not exact and saved == "error":
            why = (
                f"with weights {', '.join(f'{w:g}' for w in weights)}; expected weights that sum to 1"
                if combination.kind in ("cat", "sum")
                else f"and {combination.method} needs the change to it"
            )
            raise MismatchError(
                f"{tensor.name}: {' and '.join(holders)} store{'s' * (len(holders) == 1)} it whole "
                f"(modules_to_save or a trained bias), {why}, as its change is unknown without the base. "
                + ("Choose such weights, or set" if combination.kind in ("cat", "sum") else "Set")
                + " saved: average (--saved average) for the weighted mean, or saved: drop to leave it out; "
                "or merge BASE+ADAPTER with a recipe."
            )
        if abs(total) <= 1e-12 * math.fsum(map(abs, weights)):
            raise MethodError(
                f"{tensor.name}: the weights of {' and '.join(holders)} sum to 0, so there is no mean; "
                "expected another sum. Change a weight, or set saved: drop (--saved drop)."
            )
        if not exact:
            averaged.append(tensor.name)
        tensor_values.append((tensor, _mean(tensor, [w if exact else w / total for w in weights])))
    if dropped:
        notes.append(
            f"left out, as requested: {_names(dropped)}, which adapters store whole; the base's tensors are "
            "used instead."
        )
    if averaged:
        notes.append(
            f"{_names(averaged)}: the weighted mean of the adapters' tensors, which differs from combining "
            "the changes to the base."
        )
    return tensor_values


def _equal_values(tensor: SharedSavedTensor) -> TensorValues:
    def values(adapters: Sequence[Adapter]) -> np.ndarray:
        (first, name), *others = tensor.holders
        array = adapters[first].read(name, np.dtype(np.float64))
        for i, other in others:
            if not np.array_equal(array, adapters[i].read(other, np.dtype(np.float64))):
                raise MismatchError(
                    f"{tensor.name}: {adapters[first].label} and {adapters[i].label} store different values, "
                    "and neither trained it; expected the base's values. Combine adapters of one base with "
                    "one vocabulary."
                )
        return array

    return values


def _mean(tensor: SharedSavedTensor, weights: Sequence[float]) -> TensorValues:
    def values(adapters: Sequence[Adapter]) -> np.ndarray:
        total = np.zeros(tensor.shape)
        for weight, (i, name) in zip(weights, tensor.holders, strict=True):
            total += weight * adapters[i].read(name, np.dtype(np.float64))
        return total

    return values


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_loadable(adapters: Sequence[Adapter], modules: Sequence[SharedModule]) -> None:
    """Refuse adapters that PEFT cannot load as one. Errors: MismatchError."""
    biased = [a.label for a in adapters if a.config.get("lora_bias")]
    embedding = next((m for m in modules if m.kind == "embedding"), None)
    if biased and embedding is not None:
        raise MismatchError(
            f"{embedding.module}: an adapter changes this embedding, and {biased[0]} has lora_bias, which "
            "PEFT does not support for embeddings; expected one of the two, as no config can have both. "
            "Leave one adapter out."
        )


def _rank_notes(combination: CombineOptions, rank: int | None, energy: float | None) -> list[str]:
    if rank is not None or energy is not None or combination.kind == "cat":
        return []
    which = (
        "the largest rank of the adapters"
        if combination.kind == "sum"
        else "at most the sum of the adapters' ranks"
    )
    return [f"no rank is set, so each update has {which}. Set rank or energy to change that."]


def _check_choices(
    combination: CombineOptions, rank: int | None, energy: float | None, saved: str, unrelated: str
) -> None:
    if energy is not None and not 0 < energy <= 1:
        raise MethodError(f"energy is {energy:g}; expected a share in (0, 1]. Choose 0.9, for example.")
    if combination.kind == "cat" and (rank is not None or energy is not None):
        option = "rank" if rank is not None else "energy"
        raise MethodError(
            f"cat keeps all ranks, but {option} is set; expected neither rank nor energy. Remove it, or "
            "choose svd, which cuts the same sum to a rank."
        )
    for name, value, values in (("saved", saved, SAVED), ("unrelated", unrelated, UNRELATED)):
        if value not in values:
            raise MethodError(f"{name} is {value!r}; expected one of {', '.join(values)}. Choose one.")


def _dtype(dtype: Any) -> str | None:
    """Return the safetensors name of a dtype: text, or numpy's or torch's. Errors: MethodError."""
    if dtype is None:
        return None
    name = (dtype.__name__ if isinstance(dtype, type) else str(dtype)).removeprefix("torch.")
    if name not in TORCH_NAMES:
        raise MethodError(
            f"dtype is {name!r}; expected one of {', '.join(CONFIG_NAMES.values())}. Choose one."
        )
    return TORCH_NAMES[name]


def _check_memory(
    modules: Sequence[SharedModule], combination: CombineOptions, choice: RankChoice, budget_bytes: int
) -> None:
    """Refuse factors that do not fit the budget. Errors: ResourceError.

    Counts several copies of the factors and their decompositions, and small matrices of the sum of ranks.
    None of these are in memory while a method of task vectors merges whole matrices; the engine checks that
    step.
    """

    largest = max(modules, key=lambda module: _needed(module, combination, choice))
    least = BASELINE_BYTES + BLAS_BYTES + _needed(largest, combination, choice)
    if least > budget_bytes:
        raise ResourceError(
            f"{largest.name}: combining its {len(largest.ranks)} updates needs {format_size(least)} of "
            f"memory, the budget is {format_size(budget_bytes)}. Raise --memory to "
            f"{-(-least // (1 << 20))}MiB."
        )


def _needed_on_gpu(module: SharedModule, combination: CombineOptions, choice: RankChoice) -> int:
    """Return the bytes of a GPU to combine the updates of one parameter: a whole matrix stays there, in two dtypes."""
    held = 16 * module.rows * module.columns if combination.space == "dense" else 0
    return GPU_LIBRARY_BYTES + held + _needed(module, combination, choice)


def _needed(module: SharedModule, combination: CombineOptions, choice: RankChoice) -> int:
    """Return the bytes to combine the updates of one parameter."""
    ranks, sides = sum(module.ranks), module.rows + module.columns
    several = len(module.updates) * module.columns * ranks if combination.space == "knots" else 0
    whole = (
        5 * min(module.rows, module.columns) ** 2
        if combination.space == "dense" and choice.most(1) is None
        else 0
    )
    rank = max(ranks, choice.rank or 0) if combination.space == "dense" else ranks
    return 8 * (sides * rank * (6 + 2 * module.experts) + 8 * ranks * ranks + 2 * several + whole)
