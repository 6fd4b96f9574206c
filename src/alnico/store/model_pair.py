"""Opens a fine-tune and its base, and matches their tensors under the base's names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from alnico.checkpoint.adapter_changes import adapter_effect
from alnico.checkpoint.duplicate_tensors import find_original
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.lora_adapter import CONFIG, Adapter
from alnico.checkpoint.lora_model import AdaptedModel
from alnico.checkpoint.open_adapter import open_adapter
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.quantised.dequantised_model import DequantisedModel
from alnico.checkpoint.reference import is_hub_reference
from alnico.checkpoint.renamed_model import with_names_of
from alnico.checkpoint.source import Origin, Source, Tensor, TensorSpec, unwrap
from alnico.checkpoint.task_vector_file import is_task_vector_file
from alnico.checkpoint.task_vectors.manifest import StoredFile
from alnico.engine.fetch import fetch_files
from alnico.errors import MismatchError, ModelError
from alnico.methods import find
from alnico.methods.base import MatrixMethod
from alnico.models.open_models import is_task_vector, name_model, open_models, path_of
from alnico.numerics.dtypes import DTYPES
from alnico.numerics.sizes import count_of
from alnico.plan.job import stack_of
from alnico.plan.statistics_inputs import why_no_matrix
from alnico.run_options import RunOptions
from alnico.store.weight_hashes import HashingModel, hashed_files
from alnico.values.differences import Differences
from alnico.values.displaced_model import read_values
from alnico.values.operands import Term
from alnico.values.task_vector import TaskVector
from alnico.vocabulary.tables import find_tables


@dataclass(frozen=True)
class PairedTensor:
    """A tensor of the fine-tune and that of the base: its name, the fine-tune's name for it, and None where the base has none."""

    name: str
    own: str
    finetuned: Tensor
    base: Tensor | None
    stack: tuple[int, int, int] | None = None


@dataclass
class ModelPair:
    """A fine-tune and its base, open. Use it in ``with``, which closes both.

    ``finetuned`` has the base's names. ``has_bits`` is false for a sum of task vectors, which has no values of its own.
    """

    finetuned: Source
    base: Source
    tensors: Sequence[PairedTensor]
    left_out: Mapping[str, str]
    notes: Sequence[str]
    has_bits: bool
    adapter: Adapter | None
    """The adapter that the fine-tune is, on the base."""
    hashed: Mapping[str, HashingModel]
    stack: ExitStack = field(repr=False)

    def fetch(self, run: RunOptions) -> None:
        """Download what is read of models on the hub. Errors: HubError."""
        if not self.has_bits:
            self.finetuned.fetch([])
        own = self.finetuned.absent([pair.own for pair in self.tensors], False)
        base = self.base.absent([pair.name for pair in self.tensors if pair.base is not None], False)
        fetch_files([self.finetuned, self.base], [own, base], run.watch)

    def files(self, side: str) -> dict[str, StoredFile]:
        """Return the files of ``finetuned`` or ``base`` with their hashes; empty for a model in memory."""
        source = unwrap(self.finetuned if side == "finetuned" else self.base)
        if isinstance(source, DequantisedModel):
            return hashed_files(source.shards, source.origin)
        return self.hashed[side].files() if side in self.hashed else {}

    def __enter__(self) -> ModelPair:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()


class SumModel:
    """A base plus a sum of task vectors, in float64, so that the difference to the base is the sum."""

    directory: Path | None = None
    origin: Origin | None = None

    def __init__(self, terms: Sequence[Term], missing: str, base: Source) -> None:
        self.label = "the task vector"
        self._differences = Differences([terms], missing)
        self._base = base
        self.config: Mapping[str, Any] = base.config
        self.tensors: Mapping[str, Tensor] = {
            job.name: TensorSpec(
                "F64", job.shape, base.tensors[job.name].nominal if job.name in base.tensors else job.dtype
            )
            for job in self._differences.stored
        }

    @property
    def held_bytes(self) -> int:
        return 0

    @property
    def reading_bytes(self) -> int:
        return sum(s.reading_bytes for s in self._differences.plan.sources) + (16 << 20)

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        self._differences.fetch()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        width = DTYPES["F64"].bytes
        first, last = offset // width, (offset + len(buffer)) // width
        out = np.frombuffer(buffer, np.float64)
        job = self._differences.job(name)
        for start, values in self._differences.blocks(job, span=(first, last)):
            out[start - first : start - first + len(values)] = values
        if name in self._base.tensors:
            out += read_values(self._base, name, first, last)

    def identity(self) -> list[dict[str, Any]]:
        return [entry for source in self._differences.plan.sources for entry in source.identity()]

    def paths(self) -> list[Path]:
        return [path for source in self._differences.plan.sources for path in source.paths()]

    def close(self) -> None:
        self._differences.close()


def open_pair(finetuned: Any, base: Any, run: RunOptions) -> ModelPair:
    """Open a fine-tune and its base, and match their tensors; reads headers only, but for tensors that one of them stores twice.

    Errors: ModelError, HubError; MismatchError where no tensor fits.
    """
    if base is None:
        raise ModelError(
            "base is missing; expected the model that the fine-tune was tuned from: a path, a hub id, a dict of tensors or a "
            "module. Name it with --base (in Python base=...)."
        )
    terms, missing = _terms_of(finetuned, run)
    stack = ExitStack()
    try:
        names = {"base": name_model(base, "base")}
        models: dict[str, Any] = {names["base"]: base}
        if terms is None:
            names["finetuned"] = name_model(finetuned, "finetuned", models)
            if names["finetuned"] in models:
                raise MismatchError(
                    f"finetuned and base are the same model, {names['base']}; expected a fine-tune and the model it was tuned "
                    "from. Name the other one."
                )
            models[names["finetuned"]] = finetuned
        opened = stack.enter_context(open_models(models, access=run.access))
        sources = {side: opened.sources[name] for side, name in names.items()}
        if terms is not None:
            sources["finetuned"] = stack.enter_context(closing(SumModel(terms, missing, sources["base"])))
        hashed = {s: HashingModel(m) for s, m in sources.items() if isinstance(m, FileModel)}
        sources |= hashed
        own = with_names_of(sources["finetuned"], sources["base"])
        tensors, left_out, notes = _match(own, sources["base"], terms is None)
        return ModelPair(own, sources["base"], tensors, left_out, notes, terms is None, None, hashed, stack)
    except BaseException:
        stack.close()
        raise


def find_adapter(finetuned: Any, run: RunOptions) -> Adapter | None:
    """Open a fine-tune that is a LoRA adapter, in a folder or on the hub; None for anything else. Errors: ModelError, HubError."""
    path = path_of(finetuned)
    if path is None or not isinstance(finetuned, (str, os.PathLike)):
        return None
    location = Path(os.path.expanduser(path))
    if location.exists():
        return open_adapter(path, access=run.access) if (location / CONFIG).is_file() else None
    if not is_hub_reference(path):
        return None
    try:
        open_model(path, access=run.access).close()
    except ModelError as error:
        try:
            adapter = open_adapter(path, access=run.access)
        except ModelError:
            raise error from None
        if adapter.dialect is None:
            return adapter
        adapter.close()
        raise
    return None


def open_adapter_pair(adapter: Adapter, base: Any, run: RunOptions) -> ModelPair:
    """Put an adapter on its base, and pair the tensors that it changes. Closing the pair closes both.

    Errors: ModelError for an adapter that does not fit; HubError.
    """
    stack = ExitStack()
    stack.enter_context(closing(adapter))
    try:
        name = name_model(base, "base")
        opened = stack.enter_context(open_models({name: base}, access=run.access))
        source: Any = opened.sources[name]
        hashed = {"base": HashingModel(source)} if isinstance(source, FileModel) else {}
        source = hashed.get("base", source)
        effect = adapter_effect(adapter.files.label, source, adapter)
        own = AdaptedModel(adapter.files.label, source, adapter, effect=effect)
        pairs, _, _ = _match(own, source, has_bits=False)
        changed = [pair for pair in pairs if pair.name in effect.changes]
        notes = list(dict.fromkeys(own.notes))
        return ModelPair(own, source, changed, {}, notes, False, adapter, hashed, stack)
    except BaseException:
        stack.close()
        raise


def _terms_of(finetuned: Any, run: RunOptions) -> tuple[Sequence[Term] | None, str]:
    """Return the terms of a task vector, or of a file of one; None for a model."""
    if is_task_vector(finetuned):
        return finetuned.terms, finetuned._missing or "error"
    path = path_of(finetuned)
    if (
        path is not None
        and isinstance(finetuned, (str, os.PathLike))
        and Path(os.path.expanduser(path)).exists()
    ):
        with closing(open_model(path, access=run.access, may_be_adapter=True)) as model:
            if is_task_vector_file(model):
                return TaskVector.load(path).terms, "error"
    return None, "error"


def _match(own: Source, base: Source, has_bits: bool) -> tuple[list[PairedTensor], dict[str, str], list[str]]:
    """Pair the tensors of two models; say what is left out and what stays as the base has it."""
    method = find("tsv").bind({"embeddings": "others"}, 2)
    assert isinstance(method, MatrixMethod)
    tables = find_tables(base).rows
    pairs: list[PairedTensor] = []
    left_out: dict[str, str] = {}
    notes = list(dict.fromkeys([*getattr(own, "notes", ()), *getattr(base, "notes", ())]))

    def pair(name: str, stored: str) -> PairedTensor:
        tensor, other = own.tensors[stored], base.tensors.get(name)
        is_matrix = name not in tables and not why_no_matrix(name, tensor.shape, method)
        return PairedTensor(name, stored, tensor, other, stack_of(tensor.shape) if is_matrix else None)

    for name in own.tensors:
        if name not in base.tensors:
            if not has_bits:
                left_out[name] = "the base has no such tensor"
                continue
            if (
                original := find_original(own, name, [n for n in own.tensors if n in base.tensors])
            ) is not None:
                left_out[name] = f"a copy of {original}, which the base stores once"
                continue
        pairs.append(pair(name, name))
    fitting = sum(p.base is not None and p.base.shape == p.finetuned.shape for p in pairs)
    if not fitting or (has_bits and 2 * fitting < min(len(pairs), len(base.tensors))):
        raise MismatchError(
            f"{own.label} and {base.label} share {count_of(fitting, 'tensor')} of one name and shape, of {len(own.tensors)} and "
            f"{len(base.tensors)}; expected a fine-tune and the model it was tuned from. Check that both are the right models."
        )
    alone = []
    for name in base.tensors:
        if name in own.tensors:
            continue
        original = (
            find_original(base, name, [n for n in base.tensors if n in own.tensors]) if has_bits else None
        )
        if original is not None:
            pairs.append(pair(name, original))
        else:
            alone.append(name)
            if has_bits:
                left_out[name] = "the fine-tune has no such tensor; a base keeps its own"
    if alone:
        more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
        notes.append(f"{alone[0]}{more}: {own.label} has no such tensor; on a base it stays as it is.")
    without = [p.name for p in pairs if p.base is None]
    if without:
        notes.append(
            f"{base.label} has no {without[0]}{f' and {len(without) - 1} more' if len(without) > 1 else ''}; the fine-tune's "
            "values are stored whole."
        )
    return pairs, left_out, notes


def repository_of(source: Source) -> Origin | None:
    """The hub repository of a model, if it is from there."""
    return unwrap(source).origin
