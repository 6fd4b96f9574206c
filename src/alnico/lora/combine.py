"""Several LoRA adapters as one, from their files alone: the base is neither needed nor read."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.lora_adapter import PREFIX, Adapter, open_adapter
from alnico.checkpoint.output_path import check_publishable, replace_mode
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
from alnico.events import Counted, Watcher
from alnico.folders import Folder, make_folder, open_to_write, remove
from alnico.lora.combine_files import card, config_of, lock, text
from alnico.lora.combine_options import CombineOptions, check_options
from alnico.lora.matching import SharedModule, SharedSavedTensor, check_bases, match_updates, saved_tensors
from alnico.lora.reduce import Combine, Limits, of_cat, of_small, of_spectral, of_sum, of_whole
from alnico.lora.writer import AdapterFiles, OutputAdapter, OutputModule
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.blas import one_blas_thread
from alnico.numerics.dtypes import CONFIG_NAMES, TORCH_NAMES
from alnico.numerics.numbers import finite_number, whole_number
from alnico.numerics.sizes import format_size
from alnico.output.disk_space import check_output_place, check_space, needed_files
from alnico.output.staging import PartDirectory
from alnico.plan.memory import BASELINE_BYTES, BLAS_BYTES
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size

SAVED = ("error", "average", "drop")
UNRELATED = ("error", "allow")


@dataclass(frozen=True)
class CombinedModule:
    """One update of the combined adapter. ``error`` is the norm of what its rank leaves out, by the norm of what the method made."""

    name: str
    rank: int
    error: float


@dataclass(frozen=True)
class Combined:
    """A finished combination. ``error`` is that of all updates together, as of :class:`CombinedModule`."""

    path: Path
    method: str
    modules: tuple[CombinedModule, ...]
    error: float
    byte_size: int
    notes: tuple[str, ...]
    seconds: float

    def data(self) -> dict[str, Any]:
        """The result as plain data, for ``--json``."""
        return {
            "out": str(self.path),
            "method": self.method,
            "error": self.error,
            "bytes": self.byte_size,
            "seconds": round(self.seconds, 3),
            "modules": [{"module": m.name, "rank": m.rank, "error": m.error} for m in self.modules],
            "notes": list(self.notes),
        }


@ieee_arithmetic()
def combine(
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: float | Sequence[float] | None = None,
    method: str = "svd",
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
    watch: Watcher | None = None,
    **options: Any,
) -> Combined:
    """Combine LoRA adapters of one base into one adapter that PEFT loads, from their files alone.

    The base is not needed. ``watch`` receives the number of updates done (:class:`alnico.events.Counted`). If
    the call fails, it leaves nothing behind.

    Options:
        adapters: LoRA adapters: directories, or owner/name@revision on the hub.
        out: Directory to create.
        weights: Weight of each adapter, or one for all, such as 0.7,0.3; default: 1.
        method: svd is the weighted sum, as close as its rank allows; cat is the exact sum, with the sum of
            the ranks; also any method of task vectors (ties, dare_ties, ...), tsv, iso_c, or a name of
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
    """
    begin = time.perf_counter()
    run = RunOptions.of(memory=memory, threads=threads, offline=offline, watch=watch)
    references = [os.fspath(a) for a in adapters]
    if isinstance(adapters, (str, os.PathLike)) or not references:
        raise RecipeError("adapters: expected a list of adapters, one at least.")
    each: Any = (
        [finite_number(weights, "weights", error=MethodError)] * len(references)
        if isinstance(weights, Real)
        else weights
    )
    seed = whole_number(seed, "seed", None, MethodError)
    combination = check_options(method, len(references), each, space, options)
    rank = None if rank is None else whole_number(rank, "rank", 1, MethodError)
    energy = None if energy is None else finite_number(energy, "energy", "a share in (0, 1]", MethodError)
    _check_choices(combination, rank, energy, saved, unrelated)
    target, code = Path(out), _dtype(dtype)
    check_publishable(target)
    may_replace = replace_mode(overwrite, overwrite_anything)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_adapter(r, offline=run.offline)) for r in references]
        check_output_place(target, needed_files([a.files for a in opened]), may_replace)
        if target.suffix == ".safetensors":
            raise OutputError(
                f"{target}: an adapter is a directory, with its config beside its tensors. Give a name without .safetensors."
            )
        notes = [
            *combination.notes,
            *(note for a in opened for note in a.files.notes),
            *check_bases(opened, unrelated),
        ]
        modules = match_updates(opened)
        if not modules:
            raise ModelError(
                f"{references[0]}: has no LoRA update; expected one at least. Merge whole modules by a recipe."
            )
        kept = _saved(opened, saved_tensors(opened, dropped=saved == "drop"), combination, saved, notes)
        _check_loadable(opened, modules)
        wide = code or (
            "F64" if any(t.dtype == "F64" for a in opened for t in a.files.tensors.values()) else "F32"
        )
        limits = Limits(rank, energy)
        _check_memory(modules, combination, limits, run.memory_bytes)
        merged = (
            8 * max(m.experts * m.rows * m.columns for m in modules) if combination.space == "dense" else 0
        )
        check_space(
            target,
            merged + 2 * 8 * sum((rank or sum(m.ranks)) * m.experts * (m.rows + m.columns) for m in modules),
        )
        with PartDirectory(target) as part:
            with _removed_on_error(part), one_blas_thread():
                make = _maker(opened, modules, combination, limits, part, seed, run)
                made = _at_one_rank(modules, _all(modules, make, part, run))
                output = OutputAdapter(
                    [_module(m, one, opened) for m, one in zip(modules, made, strict=True)],
                    {s.written: s.shape for s, _ in kept},
                    wide,
                    config_of(opened, modules, [s for s, _ in kept]),
                )
                error, found = _errors(modules, made)
                notes += _rank_notes(combination, rank, energy)
                said = card(opened), text(opened, combination, output, rank, energy, error, notes)
                locked = lock(
                    opened, combination, rank, energy, saved, seed, {m.name: m.error for m in found}
                )
                with AdapterFiles(part, output) as files:
                    for module, one in zip(output.modules, made, strict=True):
                        _write(files, module, one, Path(one.path), part.folder)
                    for tensor, values in kept:
                        files.write(PREFIX + tensor.written, values(opened))
                    files.finish(*said)
                    files.lock(locked)
                    byte_size = files.byte_size
            part.publish(None, may_replace)
    return Combined(
        target, combination.method, found, error, byte_size, tuple(notes), time.perf_counter() - begin
    )


@dataclass(frozen=True)
class _WrittenUpdate:
    """A piece whose arrays lie on the disk until the header of the output is known."""

    path: str
    rank: int
    scale: float
    has_bias: bool
    total: float
    left_out: float


def _all(
    modules: Sequence[SharedModule],
    make: Combine,
    part: PartDirectory,
    run: RunOptions,
) -> list[_WrittenUpdate]:
    folder = part.path / "factors"
    done = []
    try:
        make_folder(folder, part.folder)
        for i, module in enumerate(modules):
            try:
                piece = make(module)
            except np.linalg.LinAlgError:  # of infinities
                raise NonFiniteError(
                    f"{module.name}: the combined update, or what is computed on the way, is beyond float64; expected finite numbers. "
                    "Choose smaller weights, or mend the adapters."
                ) from None
            path = folder / f"{i}.npz"
            with os.fdopen(open_to_write(path, part.folder), "wb") as file:
                np.savez(file, left=piece.left, right=piece.right, bias=piece.bias)
            done.append(
                _WrittenUpdate(
                    str(path), piece.rank, piece.scale, piece.bias.size > 0, piece.total, piece.left_out
                )
            )
            run.report(Counted("updates", i + 1, len(modules)))
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written ({error.strerror}). Make room or check the disk."
        ) from None
    return done


def _at_one_rank(modules: Sequence[SharedModule], made: Sequence[_WrittenUpdate]) -> list[_WrittenUpdate]:
    """Give the parameters of one module the largest of their ranks; zeros fill the others."""
    largest: dict[str, int] = {}
    for module, one in zip(modules, made, strict=True):
        largest[module.module] = max(one.rank, largest.get(module.module, 0))
    return [
        replace(one, rank=largest[module.module]) if module.kind == "parameter" else one
        for module, one in zip(modules, made, strict=True)
    ]


def _write(
    files: AdapterFiles, module: OutputModule, done: _WrittenUpdate, path: Path, inside: Folder
) -> None:
    """Pack the factors as PEFT does: of experts, A one expert after the other, B one rank after the other."""
    name_of_left, name_of_right = module.names
    with (
        os.fdopen(open_to_write(path, inside, flags=os.O_RDWR), "rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        left, right, bias = arrays["left"], arrays["right"], arrays["bias"]
    remove(path, inside)
    more = done.rank - left.shape[2]
    left, right = np.pad(left, ((0, 0), (0, 0), (0, more))), np.pad(right, ((0, 0), (0, more), (0, 0)))
    files.write(name_of_right, right)
    files.write(name_of_left, left.transpose(1, 2, 0))
    if module.bias:
        files.write(module.bias_name, bias / done.scale if bias.size else np.zeros(module.left_shape[0]))


@contextmanager
def _removed_on_error(part: PartDirectory) -> Iterator[None]:
    """Begin anew, and leave nothing of what failed: a combination is made in seconds, and none is taken up."""
    part.remove_contents()
    try:
        yield
    except BaseException:
        part.remove()
        raise


def _maker(
    adapters: Sequence[Adapter],
    modules: Sequence[SharedModule],
    combination: CombineOptions,
    limits: Limits,
    part: PartDirectory,
    seed: int,
    run: RunOptions,
) -> Combine:
    if combination.kind == "cat":
        return of_cat(adapters, combination)
    if combination.kind == "sum":
        return of_sum(adapters, combination, limits)
    if combination.kind == "spectral":
        return of_spectral(adapters, combination, limits)
    if combination.space == "dense":
        return of_whole(
            adapters,
            modules,
            combination,
            limits,
            part,
            seed=seed,
            run=run,
        )
    return of_small(adapters, modules, combination, limits, seed=seed, run=run)


def _module(module: SharedModule, done: _WrittenUpdate, adapters: Sequence[Adapter]) -> OutputModule:
    experts, rank = module.experts, done.rank
    # PEFT gives all layers that can have one a bias, or none.
    biased = done.has_bias or (
        module.kind in ("linear", "convolution") and any(a.config.get("lora_bias") for a in adapters)
    )
    return OutputModule(
        module.module,
        module.kind,
        rank,
        (module.rows, rank * experts, *module.left_shape),
        (rank * experts, *module.right_shape),
        alpha=done.scale * rank,
        depth=module.depth,
        bias=biased,
        parameter=module.target,
    )


def _errors(
    modules: Sequence[SharedModule], made: Sequence[_WrittenUpdate]
) -> tuple[float, tuple[CombinedModule, ...]]:
    def share(left_out: float, total: float) -> float:
        return math.sqrt(left_out / total) if total > 0 else 0.0

    found = tuple(
        CombinedModule(m.key if m.kind != "parameter" else m.name, one.rank, share(one.left_out, one.total))
        for m, one in zip(modules, made, strict=True)
    )
    return share(sum(one.left_out for one in made), sum(one.total for one in made)), found


TensorValues = Callable[[Sequence[Adapter]], np.ndarray]


def _saved(
    adapters: Sequence[Adapter],
    tensors: Sequence[SharedSavedTensor],
    combination: CombineOptions,
    saved: str,
    notes: list[str],
) -> list[tuple[SharedSavedTensor, TensorValues]]:
    """The tensors that stand for the base's own, with how each is made. Errors: MismatchError, MethodError."""
    found: list[tuple[SharedSavedTensor, TensorValues]] = []
    dropped, averaged = [], []
    for tensor in tensors:
        holders = [adapters[i].label for i, _ in tensor.holders]
        if not tensor.is_trained:
            # PEFT stores a base's embeddings with an adapter that changes them; they are the base's as they were.
            found.append((tensor, _equal_values(tensor)))
            continue
        if saved == "drop":
            dropped.append(tensor.name)
            continue
        given = combination.coefficients or combination.weights
        weights = [given[i] for i, _ in tensor.holders]
        total = math.fsum(weights)
        exact = combination.kind in ("cat", "sum") and abs(total - 1) < 1e-9
        if not exact and saved == "error":
            why = (
                f"with weights {', '.join(f'{w:g}' for w in weights)}; expected weights that sum to 1"
                if combination.kind in ("cat", "sum")
                else f"and {combination.method} needs what was added to it"
            )
            raise MismatchError(
                f"{tensor.name}: {' and '.join(holders)} hold{'s' * (len(holders) == 1)} it whole (modules_to_save or a trained bias), {why}, "
                "as what training added to it cannot be told without the base. "
                + ("Choose such weights, or say" if combination.kind in ("cat", "sum") else "Say")
                + " saved: average (--saved average) for the weighted mean, or saved: drop to leave it out; or merge BASE+ADAPTER by a recipe."
            )
        if abs(total) <= 1e-12 * math.fsum(map(abs, weights)):
            raise MethodError(
                f"{tensor.name}: the weights of {' and '.join(holders)} sum to 0, so there is no mean; expected another sum. Change a weight, or "
                "say saved: drop (--saved drop)."
            )
        if not exact:
            averaged.append(tensor.name)
        found.append((tensor, _mean(tensor, [w if exact else w / total for w in weights])))
    if dropped:
        notes.append(
            f"left out, as asked: {_some(dropped)}, which adapters hold whole. The base's own take their place."
        )
    if averaged:
        notes.append(
            f"{_some(averaged)}: the weighted mean of those that adapters hold, which is not what was added to the base, combined."
        )
    return found


def _equal_values(tensor: SharedSavedTensor) -> TensorValues:
    def values(adapters: Sequence[Adapter]) -> np.ndarray:
        (first, name), *others = tensor.holders
        found = adapters[first].read(name, np.dtype(np.float64))
        for i, other in others:
            if not np.array_equal(found, adapters[i].read(other, np.dtype(np.float64))):
                raise MismatchError(
                    f"{tensor.name}: {adapters[first].label} and {adapters[i].label} come with different ones, and neither trained it; expected "
                    "the base's. Combine adapters of one base with one vocabulary."
                )
        return found

    return values


def _mean(tensor: SharedSavedTensor, weights: Sequence[float]) -> TensorValues:
    def values(adapters: Sequence[Adapter]) -> np.ndarray:
        total = np.zeros(tensor.shape)
        for weight, (i, name) in zip(weights, tensor.holders, strict=True):
            total += weight * adapters[i].read(name, np.dtype(np.float64))
        return total

    return values


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_loadable(adapters: Sequence[Adapter], modules: Sequence[SharedModule]) -> None:
    """Refuse what PEFT does not load together. Errors: MismatchError."""
    biased = [a.label for a in adapters if a.config.get("lora_bias")]
    embedding = next((m for m in modules if m.kind == "embedding"), None)
    if biased and embedding is not None:
        raise MismatchError(
            f"{embedding.module}: an adapter changes this embedding, and {biased[0]} has lora_bias, which PEFT has not for embeddings; "
            "expected one or the other, as no config says both. Leave one adapter out."
        )


def _rank_notes(combination: CombineOptions, rank: int | None, energy: float | None) -> list[str]:
    if rank is not None or energy is not None or combination.kind == "cat":
        return []
    which = (
        "the largest rank of the adapters"
        if combination.kind == "sum"
        else "at most the sum of the adapters' ranks"
    )
    return [f"no rank was asked for: each update has {which} there. Say rank or energy for another."]


def _check_choices(
    combination: CombineOptions, rank: int | None, energy: float | None, saved: str, unrelated: str
) -> None:
    if energy is not None and not 0 < energy <= 1:
        raise MethodError(f"energy is {energy:g}; expected a share in (0, 1].")
    if combination.kind == "cat" and (rank is not None or energy is not None):
        asked_for = "rank" if rank is not None else "energy"
        raise MethodError(
            f"cat keeps all ranks, and {asked_for} was asked for. Leave it out, or choose svd, which is the same sum cut to a rank."
        )
    for name, value, values in (("saved", saved, SAVED), ("unrelated", unrelated, UNRELATED)):
        if value not in values:
            raise MethodError(f"{name} is {value!r}; expected one of {', '.join(values)}.")


def _dtype(dtype: Any) -> str | None:
    """The safetensors name of an output dtype, given as text, as numpy's or as torch's. Errors: MethodError."""
    if dtype is None:
        return None
    name = (dtype.__name__ if isinstance(dtype, type) else str(dtype)).removeprefix("torch.")
    if name not in TORCH_NAMES:
        raise MethodError(f"dtype is {name!r}; expected one of {', '.join(CONFIG_NAMES.values())}.")
    return TORCH_NAMES[name]


def _check_memory(
    modules: Sequence[SharedModule], combination: CombineOptions, limits: Limits, budget_bytes: int
) -> None:
    """Refuse factors that do not fit the budget. Errors: ResourceError.

    The factors and what is decomposed of them, several times over, and small matrices of the sum of ranks. While a method of task
    vectors merges whole matrices, none of this is held, and the engine counts for itself.
    """

    def needed(module: SharedModule) -> int:
        ranks, sides = sum(module.ranks), module.rows + module.columns
        several = len(module.updates) * module.columns * ranks if combination.space == "knots" else 0
        whole = (
            5 * min(module.rows, module.columns) ** 2
            if combination.space == "dense" and limits.most(1) is None
            else 0
        )
        rank = max(ranks, limits.rank or 0) if combination.space == "dense" else ranks
        return 8 * (sides * rank * (6 + 2 * module.experts) + 8 * ranks * ranks + 2 * several + whole)

    largest = max(modules, key=needed)
    least = BASELINE_BYTES + BLAS_BYTES + needed(largest)
    if least > budget_bytes:
        raise ResourceError(
            f"{largest.name}: combining its {len(largest.ranks)} updates needs {format_size(least)} of memory, the budget is "
            f"{format_size(budget_bytes)}. Raise --memory to {-(-least // (1 << 20))}MiB."
        )
