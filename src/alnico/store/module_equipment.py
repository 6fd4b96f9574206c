"""Equips modules in memory with task vectors, in place, and undoes it to the bit: the changed tensors are kept."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alnico.checkpoint.memory_model import (
    MemoryModel,
    import_torch,
    shared_tensors,
    state_dict_of,
    to_torch,
    unwrap_module,
)
from alnico.checkpoint.renamed_model import RenamedModel
from alnico.checkpoint.source import Source, unwrap
from alnico.checkpoint.task_vectors.equipped_model import EquippedModel
from alnico.checkpoint.task_vectors.manifest import Manifest
from alnico.checkpoint.task_vectors.stored_vector import open_vector
from alnico.engine.in_memory import run_in_memory
from alnico.errors import AlnicoError, MismatchError, ModelError
from alnico.models.open_models import check_module
from alnico.models.peft_modules import has_adapters
from alnico.notebook import ResultTable, never_fails, result_html, result_line
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.sizes import count_of, format_size
from alnico.output.hashes import hash_tensors
from alnico.plan.build import build_plan
from alnico.plan.job import Input, Job, Plan
from alnico.recipe.load import load_recipe
from alnico.store.narrowed_model import NarrowedModel
from alnico.threads import Crew

STATE = "_alnico_equipment"
"""The attribute of an equipped module that holds what undoes it. A copy of the module has its own."""

GROUP_BYTES = 256 << 20
"""Bytes of tensors that are computed before they are put into the module."""

FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The dtypes of parameters, as recipes name them."""


@dataclass(frozen=True)
class ModuleEquipment:
    """The task vectors on a module: their labels with their weights, and what is kept so that they can be taken off.

    ``kept_bytes`` is the size of the ``tensors`` tensors that are kept: those of the base that the vectors change.
    """

    module: str
    vectors: tuple[tuple[str, float], ...]
    tensors: int
    kept_bytes: int

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return {
            "module": self.module,
            "vectors": [{"vector": label, "weight": weight} for label, weight in self.vectors],
            "tensors": self.tensors,
            "kept_bytes": self.kept_bytes,
        }

    def __repr__(self) -> str:
        vectors = ", ".join(f"{weight:g} x {label}" for label, weight in self.vectors)
        return result_line(
            f"{self.module} with {vectors}" if vectors else f"{self.module} without task vectors",
            f"{count_of(self.tensors, 'tensor')} of the base kept" if vectors else "",
            format_size(self.kept_bytes) if vectors else "",
        )

    @never_fails
    def _repr_html_(self) -> str:
        return result_html(
            "Equipped module" if self.vectors else "Module without task vectors",
            ResultTable(("vector", "weight"), [list(pair) for pair in self.vectors]),
            facts=[
                ("module", self.module),
                ("kept tensors", self.tensors),
                ("kept", format_size(self.kept_bytes)),
            ],
        )


@dataclass(frozen=True)
class VectorOnModule:
    """A vector on a module: its folder, its label and its weight."""

    folder: str
    label: str
    weight: float
    allow_base_mismatch: bool = False
    missing: str | None = None


@dataclass
class _State:
    """What undoes the vectors of a module: the base's tensors by name, and the hashes of what replaced them."""

    vectors: tuple[VectorOnModule, ...] = ()
    kept: dict[str, Any] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)


@ieee_arithmetic()
def equip_module(module: Any, vector: VectorOnModule) -> ModuleEquipment:
    """Put a vector on a module, in place, after those that it has.

    The result has the bits of merging the base with all vectors at once, whatever the order. Errors: AlnicoError for a
    vector that it has already, and for something that is no module; MismatchError for a base that the vector was not made
    of, and for a module that was changed since it was equipped. After an error the module is as before.
    """
    inner, state = _opened(module)
    if any(one.folder == vector.folder for one in state.vectors):
        raise AlnicoError(
            f"{vector.label}: is on the module ({type(inner).__name__}) already; expected each task vector once. Take it off "
            "first with unequip(module), to give it another weight."
        )
    return _set_vectors(inner, state, (*state.vectors, vector))


@ieee_arithmetic()
def unequip_module(module: Any, folder: str, label: str) -> ModuleEquipment:
    """Take a vector off a module, in place; the others stay. Without any left, the module has the base's bits.

    Errors: AlnicoError for a vector that it does not have; MismatchError for a module that was changed since it was equipped.
    """
    inner, state = _opened(module)
    left = tuple(one for one in state.vectors if one.folder != folder)
    if len(left) == len(state.vectors):
        has = ", ".join(one.label for one in state.vectors) or "none"
        raise AlnicoError(
            f"{label}: is not on the module ({type(inner).__name__}); expected one of its task vectors, and it has {has}. "
            "Equip it first, or pass the module that has it."
        )
    return _set_vectors(inner, state, left)


def _opened(module: Any) -> tuple[Any, _State]:
    """Return the module itself and its state, checked. Errors: AlnicoError, ModelError, MismatchError."""
    check_module(module, "the module to equip")
    inner = unwrap_module(module)
    if has_adapters(inner):
        raise ModelError(
            f"the module to equip ({type(inner).__name__}) has PEFT adapters; expected one without. Fold them with its "
            "merge_and_unload(), or take them off with unload()."
        )
    state = inner.__dict__.get(STATE) or _State()
    held = _tensors(inner)
    gone = next((name for name in state.kept if name not in held), None)
    if gone is None and state.written:
        found = _hashes({name: held[name] for name in state.written})
        gone = next((name for name, digest in state.written.items() if found[name] != digest), None)
    if gone is not None:
        raise MismatchError(
            f"{gone}: was changed in the module ({type(inner).__name__}) since it was equipped with "
            f"{', '.join(one.label for one in state.vectors)}; expected the values that equip wrote, as undoing would lose the "
            "change. Load the module again."
        )
    return inner, state


def _tensors(inner: Any) -> dict[str, Any]:
    """Return the tensors of a module by name, each once."""
    held = state_dict_of(inner, "the module to equip")
    tied = shared_tensors([held])
    return {name: value for name, value in held.items() if name not in tied}


def _hashes(tensors: Mapping[str, Any]) -> dict[str, str]:
    source = MemoryModel("the module", tensors)
    with Crew(os.cpu_count() or 1, None, "alnico-module") as crew:
        return hash_tensors(source, source.tensors, crew)


def _set_vectors(inner: Any, state: _State, chosen: tuple[VectorOnModule, ...]) -> ModuleEquipment:
    """Give a module exactly these vectors. After an error it has those that it had."""
    torch = import_torch("a module with task vectors")
    held = _tensors(inner)
    base = {name: state.kept.get(name, value) for name, value in held.items()}
    kept = dict(state.kept)
    changed: set[str] = set()
    try:
        with torch.no_grad():
            for name, value in _computed(base, chosen):
                if name not in kept:
                    kept[name] = held[name].detach().clone()
                    base[name] = kept[name]
                changed.add(name)
                held[name].data.copy_(value)
            for name in [name for name in kept if name not in changed]:
                held[name].data.copy_(kept.pop(name))
    except BaseException:
        _undo(held, kept, state, changed)
        raise
    if chosen:
        written = _hashes({name: held[name] for name in kept})
        inner.__dict__[STATE] = _State(chosen, kept, written)
    else:
        inner.__dict__.pop(STATE, None)
    size = sum(value.numel() * value.element_size() for value in kept.values())
    return ModuleEquipment(
        type(inner).__name__, tuple((one.label, one.weight) for one in chosen), len(kept), size
    )


def _undo(held: Mapping[str, Any], kept: Mapping[str, Any], state: _State, changed: set[str]) -> None:
    """Give the tensors that were changed their values from before: the base's, or those with the vectors of before."""
    for name in changed:
        held[name].data.copy_(kept[name])
    if changed & set(state.kept):
        base = {name: state.kept.get(name, value) for name, value in held.items()}
        for name, value in _computed(base, state.vectors):
            held[name].data.copy_(value)


def _computed(base: Mapping[str, Any], chosen: Sequence[VectorOnModule]) -> Iterator[tuple[str, Any]]:
    """Compute the tensors that the vectors change, some at a time, as torch tensors with the module's names.

    ``base`` is read as it is when a tensor is computed. Errors: MismatchError for a base that a vector was not made of,
    before the first tensor.
    """
    if not chosen:
        return
    vectors = []
    try:
        for one in chosen:
            vectors.append(open_vector(one.folder))
        dtypes = {
            name: dtype for vector in vectors for name, dtype in _stored_dtypes(vector.manifest).items()
        }
        start: Source = MemoryModel("the module", base)
        start = NarrowedModel(start, _by_module(start, dtypes))
        models: dict[str, Source] = {"the module": start}
        for one, vector in zip(chosen, vectors, strict=True):
            models[one.label] = EquippedModel(one.label, start, vector, 1.0)
        for one in chosen:
            equipped = models[one.label]
            assert isinstance(equipped, EquippedModel)
            if one.allow_base_mismatch:
                equipped.allow_base_mismatch()
            for name, entry in equipped.vector.manifest.tensors.items():
                if entry.encoding != "absent" and name in equipped.tensors:
                    equipped.check(name)
        kinds = {tensor.dtype for tensor in MemoryModel("the module", base).tensors.values()} & set(FLOATS)
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": "the module",
            "models": [{"model": one.label, "parameters": {"weight": one.weight}} for one in chosen],
            "unrelated": "allow",
            **(
                {"missing": missing}
                if (missing := next((o.missing for o in chosen if o.missing), None))
                else {}
            ),
            **({"dtype": FLOATS[next(iter(kinds))]} if len(kinds) == 1 else {}),
        }
        plan = build_plan(load_recipe(recipe), open_source=models.__getitem__)
        jobs = [job for job in plan.jobs if _is_changed(plan, job)]
        for group in _groups(jobs):
            for name, raw in run_in_memory(replace(plan, jobs=tuple(group))).items():
                job = next(job for job in group if job.name == name)
                yield name, to_torch(raw, job.dtype, job.shape)
    finally:
        for vector in vectors:
            vector.close()


def _stored_dtypes(manifest: Manifest) -> dict[str, str]:
    """Return the dtype that the base's tensors have in its files, by the vector's names, as far as the manifest says."""
    of_base, of_tuned = manifest.base.dtype, manifest.finetuned.dtype
    dtypes = {}
    for name, entry in manifest.tensors.items():
        is_wider = entry.dtype == of_tuned != of_base and of_base is not None
        dtypes[name] = of_base if is_wider and of_base is not None else entry.dtype
    return dtypes


def _by_module(source: Source, dtypes: Mapping[str, str]) -> dict[str, str]:
    """Return these dtypes by the module's names, which may have or lack a prefix."""
    found = {}
    by_end = {name.split(".", 1)[-1]: dtype for name, dtype in dtypes.items()}
    for name in source.tensors:
        short = name.split(".", 1)[-1]
        dtype = dtypes.get(name) or by_end.get(name) or dtypes.get(short)
        if dtype is not None:
            found[name] = dtype
    return found


def _is_changed(plan: Plan, job: Job) -> bool:
    """Does a vector change an output tensor? The others keep the module's bytes."""
    return any(_is_touched(plan.sources[given.model], given) for given in job.inputs)


def _is_touched(source: Source, given: Input) -> bool:
    names = source.stored_names(given.name) if isinstance(source, RenamedModel) else (given.name,)
    inner = unwrap(source)
    if not isinstance(inner, EquippedModel):
        return False
    tensors = inner.vector.manifest.tensors
    return any(name in tensors and tensors[name].encoding != "absent" for name in names)


def _groups(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Split jobs into groups of about :data:`GROUP_BYTES`."""
    group: list[Job] = []
    size = 0
    for job in jobs:
        if group and size + job.byte_size > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(job)
        size += job.byte_size
    if group:
        yield group
