"""Decides how an extraction treats each tensor: as factors, saved whole, or left out."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from alnico.checkpoint.adapter_changes import TRANSPOSED_EXPERTS, TRANSPOSED_MODULES, is_transposed_linear
from alnico.checkpoint.layouts import PACKED_EXPERTS, transformers_names
from alnico.checkpoint.source import Source
from alnico.checkpoint.tied_weights import architectures
from alnico.errors import MismatchError, RecipeError
from alnico.lora.writer import ModuleKind
from alnico.numerics.dtypes import DTYPES, MERGEABLE
from alnico.plan.compatibility import Misfit, explain_mismatch
from alnico.plan.families import OTHER_TABLES, ROUTERS, is_lookup, is_tied, tied_heads
from alnico.recipe.options import matches_filter
from alnico.vocabulary.tables import find_tables, is_input

Treatment = Literal["factors", "saved", "left out"]
OthersChoice = Literal["save", "leave"]
EmbeddingsChoice = Literal["lora", "save", "leave"]


@dataclass(frozen=True)
class ExtractTarget:
    """A tensor of both models, with its planned treatment; an unchanged tensor is always left out.

    One of kind ``parameter`` is a stack of matrices, those of the experts of a layer, (experts, rows, columns). Each has
    factors of its own, all of one rank.
    """

    name: str
    shape: tuple[int, ...]
    treatment: Treatment
    why: str = ""
    kind: ModuleKind = "linear"
    is_turned: bool = False
    """Stored (in, out): an embedding, GPT-2's linear layer, or the experts of gpt-oss."""
    first: int = 0
    """The element of the stored tensor at which it begins: a matrix of a stack begins after those before it."""

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns as stored, of one matrix of a stack; the other dimensions of a convolution are flattened into
        columns."""
        if self.kind == "parameter":
            return self.shape[1], self.shape[2]
        rows = self.shape[0] if self.shape else 1
        return rows, self.elements // max(rows, 1)

    @property
    def experts(self) -> int:
        """The number of matrices."""
        return self.shape[0] if self.kind == "parameter" else 1

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of all matrices: what a rank more costs in numbers of the two factors."""
        rows, columns = self.matrix
        return self.experts * rows, self.experts * columns

    def matrices(self) -> list[ExtractTarget]:
        """Return each matrix of a stack as a target of its own; a single one unchanged."""
        if self.kind != "parameter":
            return [self]
        size = self.elements // self.experts
        return [
            replace(self, shape=self.shape[1:], kind="linear", first=i * size) for i in range(self.experts)
        ]


@dataclass(frozen=True)
class UnmatchedTensor:
    """A tensor without a counterpart of the same shape, or whose dtype has no difference."""

    name: str
    why: str


@dataclass(frozen=True)
class ExtractTargets:
    """All tensors of an extraction. ``tied`` are the embeddings that the base ties to its head."""

    compared: tuple[ExtractTarget, ...]
    unmatched: tuple[UnmatchedTensor, ...]
    tied: tuple[str, ...]

    @property
    def factored(self) -> tuple[ExtractTarget, ...]:
        return tuple(s for s in self.compared if s.treatment == "factors")


def find_targets(
    tuned: Source,
    base: Source,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    others: OthersChoice = "save",
    embeddings: EmbeddingsChoice = "lora",
) -> ExtractTargets:
    """Decide the treatment of each tensor from names, shapes and dtypes alone.

    Errors: MismatchError for models of different kinds or sizes; RecipeError for a filter that matches no
    tensor.
    """
    _check_filters(base, include, exclude)
    _check_fit(tuned, base)
    compared: list[ExtractTarget] = []
    unmatched: list[UnmatchedTensor] = []
    has_head = any("For" in a or "LMHead" in a for a in architectures(base.config))
    tables = find_tables(base).rows
    tied = tuple(n for n in tables if is_input(n)) if has_head and is_tied(base.config) else ()
    heads = tied_heads(base.config, base.tensors, [n for n in tables if not is_input(n)])
    spelled = transformers_names(base.config, base.tensors)
    for name, tensor in base.tensors.items():
        other = tuned.tensors.get(name)
        if other is None:
            if name not in heads:
                unmatched.append(UnmatchedTensor(name, f"{tuned.label} has no such tensor"))
        elif name in heads:
            unmatched.append(UnmatchedTensor(name, f"is tied to {heads[name]}, which represents both"))
        elif other.shape != tensor.shape:
            unmatched.append(
                UnmatchedTensor(name, f"is {other.shape} in {tuned.label} and {tensor.shape} in {base.label}")
            )
        elif tensor.dtype not in MERGEABLE or other.dtype not in MERGEABLE:
            if not _are_equal(tuned, base, name):
                unmatched.append(
                    UnmatchedTensor(name, f"is {other.dtype}, which has no floating-point difference")
                )
        else:
            treatment, why, kind = _treatment(
                spelled[name],
                name,
                tensor.shape,
                include,
                exclude,
                others,
                embeddings,
                is_of_tokens=name in tables,
            )
            if name in tied and treatment == "factors":
                treatment, why = (
                    "left out",
                    "tied to the head, which PEFT does not update through factors of the embedding; it can "
                    "be saved",
                )
            turned = kind == "embedding" or (kind == "linear" and is_transposed_linear(name, base.config))
            turned |= kind == "parameter" and _stores_inputs_first(base)
            compared.append(ExtractTarget(name, tensor.shape, treatment, why, kind, turned))
    compared = _without_ambiguous(compared, base)
    unmatched += [
        UnmatchedTensor(name, f"{base.label} has no such tensor")
        for name in tuned.tensors
        if name not in base.tensors
    ]
    return ExtractTargets(tuple(compared), tuple(unmatched), tied)


def _treatment(
    name: str,
    stored: str,
    shape: tuple[int, ...],
    include: Sequence[str],
    exclude: Sequence[str],
    others: OthersChoice,
    embeddings: EmbeddingsChoice,
    *,
    is_of_tokens: bool,
) -> tuple[Treatment, str, ModuleKind]:
    if any(matches_filter(pattern, stored) for pattern in exclude) or (
        include and not any(matches_filter(pattern, stored) for pattern in include)
    ):
        return "left out", "excluded by the filters", "linear"
    is_weight = name.endswith(".weight")
    is_table = is_weight and len(shape) == 2 and (is_lookup(name) or (is_of_tokens and is_input(name)))
    if (is_table or is_of_tokens or name.endswith(OTHER_TABLES)) and embeddings != "lora":
        return (
            ("saved", "", "linear")
            if embeddings == "save"
            else ("left out", "embeddings and heads are left out (embeddings: leave)", "linear")
        )
    if is_table:
        return "factors", "", "embedding"
    if is_weight and len(shape) == 2 and min(shape) > 0 and not name.endswith((*ROUTERS, *OTHER_TABLES)):
        return "factors", "", "linear"
    if is_weight and len(shape) in (3, 4, 5) and shape[1] > 1:
        return "factors", "", "convolution"
    if PACKED_EXPERTS.fullmatch(name) and len(shape) == 3 and min(shape) > 0:
        return "factors", "", "parameter"
    if sum(n > 1 for n in shape) > 1 and not is_weight:
        return (
            "left out",
            "a parameter of two or more dimensions that is not the weight of a module",
            "linear",
        )
    return (
        ("saved", "", "linear")
        if others == "save"
        else ("left out", "not a matrix, left out (others: leave)", "linear")
    )


def _stores_inputs_first(base: Source) -> bool:
    """Are a model's stacks of experts (experts, in, out), in its module too?"""
    parts = (base.config, *base.config.values())
    return any(isinstance(part, Mapping) and part.get("model_type") in TRANSPOSED_MODULES for part in parts)


def _without_ambiguous(compared: Sequence[ExtractTarget], base: Source) -> list[ExtractTarget]:
    """Leave out stacks of experts of which an adapter could not say to which parameter their factors belong.

    Factors of one module's parameters are told apart by their shapes alone, and those of a square matrix by the type of
    the model, which programs read in two ways for Llama 4.
    """
    stacks: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for target in compared:
        if target.kind == "parameter":
            stacks.setdefault((target.module, tuple(sorted(target.matrix))), []).append(target.name)
    same = {name for names in stacks.values() if len(names) > 1 for name in names}
    kinds = {str(p.get("model_type")) for p in (base.config, *base.config.values()) if isinstance(p, Mapping)}
    is_unclear = bool(kinds & (set(TRANSPOSED_EXPERTS) - set(TRANSPOSED_MODULES)))
    why = "a stack of experts of the shape of another in its module: an adapter does not say which is whose"
    unclear = "a stack of square matrices, which programs turn in different ways"
    return [
        replace(t, treatment="left out", why=why, kind="linear")
        if t.name in same
        else replace(t, treatment="left out", why=unclear, kind="linear")
        if t.kind == "parameter" and is_unclear and t.shape[1] == t.shape[2]
        else t
        for t in compared
    ]


def _check_filters(base: Source, include: Sequence[str], exclude: Sequence[str]) -> None:
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(matches_filter(pattern, name) for name in base.tensors):
                raise RecipeError(
                    f"{option} is {pattern!r}, which matches no tensor of {base.label}; an example of a "
                    f"name is {next(iter(base.tensors), 'none')}. Correct the filter, or remove it."
                )


def _check_fit(tuned: Source, base: Source) -> None:
    """Refuse models whose difference is not defined. Errors: MismatchError."""
    names = [*base.tensors, *(n for n in tuned.tensors if n not in base.tensors)]
    shapes = [
        {i: s.tensors[n].shape if n in s.tensors else None for i, s in enumerate((base, tuned))}
        for n in names
    ]
    misfits = [Misfit(n, s) for n, s in zip(names, shapes, strict=True) if len(set(s.values())) > 1]
    fitting = len(names) - len(misfits)
    if fitting and fitting >= len(misfits):
        return
    explanation = explain_mismatch(
        [m for m in misfits if None not in m.shapes.values()] or misfits, (base, tuned)
    )
    if explanation is not None:
        raise MismatchError(f"{explanation[0]} Give a fine-tune and its own base.")
    raise MismatchError(
        f"{tuned.label} and {base.label} share {fitting} tensors of the same name and shape; {len(misfits)} "
        f"are missing in one of them or have another shape, such as {misfits[0].name}; expected a fine-tune "
        "and its base. Check that both are the right models, stored under the same names."
    )


def _are_equal(tuned: Source, base: Source, name: str) -> bool:
    """Check whether two tensors have the same dtype and bytes."""
    tensor, other = tuned.tensors[name], base.tensors[name]
    if tensor.dtype != other.dtype:
        return False
    for source in (tuned, base):
        source.fetch(source.absent([name], False))
    step = 1 << 22
    tuned_bytes, base_bytes = bytearray(step), bytearray(step)
    for offset in range(0, tensor.byte_size, step):
        count = min(step, tensor.byte_size - offset)
        for source, buffer in ((tuned, tuned_bytes), (base, base_bytes)):
            source.read_into(name, offset, memoryview(buffer)[:count])
        if tuned_bytes[:count] != base_bytes[:count]:
            return False
    return True


@dataclass(frozen=True)
class SavedTensors:
    """How tensors that are not factorised are written.

    ``names`` maps names in the base to names in the file; ``modules`` are for ``modules_to_save``.
    """

    names: Mapping[str, str]
    modules: tuple[str, ...]
    has_biases: bool


def saved_of(
    base: Source, changed: Collection[str], factored: Mapping[str, int], tied: Collection[str]
) -> SavedTensors:
    """Decide how to store the ``changed`` tensors for PEFT; ``factored`` counts the parameters with factors of
    each module.

    The bias of a module with factors is stored through ``bias: all``. A module with only a weight and a bias
    is stored whole, through ``modules_to_save``. Any other tensor keeps its own name, and PEFT loads it into
    the base; so does an embedding ``tied`` to a head, because PEFT would wrap it without the head.
    """
    tensors_of: dict[str, list[str]] = {}
    parents: set[str] = set()
    for name in base.tensors:
        words = name.split(".")
        tensors_of.setdefault(".".join(words[:-1]), []).append(name)
        parents.update(".".join(words[:i]) for i in range(1, len(words) - 1))
    names: dict[str, str] = {}
    modules: dict[str, None] = {}
    has_biases = False
    for name in changed:
        module, _, parameter = name.rpartition(".")
        is_leaf = module and module not in parents
        plain = all(
            n.rpartition(".")[2] in ("weight", "bias") and base.tensors[n].dtype in MERGEABLE
            for n in tensors_of[module]
        )
        if module in factored:
            names[name] = f"{module}{'.base_layer' * factored[module]}.{parameter}"
            has_biases |= parameter == "bias"
        elif is_leaf and plain and name not in tied:
            modules[module] = None
            names |= {n: n for n in tensors_of[module]}
        else:
            names[name] = name
    return SavedTensors(names, tuple(modules), has_biases)


def module_names(names: Collection[str], modules: Collection[str]) -> list[str]:
    """Return names for ``modules_to_save``: the shortest suffixes that match only ``modules``.

    PEFT saves every module whose name ends with one of them.
    """
    every = {
        ".".join(words[:i]) for name in names if (words := name.split(".")) for i in range(1, len(words))
    }
    suffixes: set[str] = set()
    for module in modules:
        last = module.rpartition(".")[2]
        suffixes.add(last if all(m in modules for m in every if m.endswith(last)) else module)
    return sorted(suffixes)


def byte_size(tensors: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    return sum(math.prod(shape) for shape in tensors.values()) * DTYPES[dtype].bytes
