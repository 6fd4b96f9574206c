"""What an adapter does to the tensors of a base: which of them it changes, what it adds, and what stays true of the config."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alnico.checkpoint.layouts import SPELLINGS, Spelling
from alnico.checkpoint.lora_adapter import Adapter, Rows, Update, is_saved_module, is_targeted
from alnico.checkpoint.source import Model, Tensor
from alnico.checkpoint.tied_weights import architectures, tied_copies, untied_config
from alnico.errors import ModelError
from alnico.numerics import dtypes

TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text")
"""Types of models that store experts as (experts, in, out). Asked only where the shape is square and does not tell."""

TURNED_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
TURNED_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Types of models whose modules of these names are ``Conv1D`` of transformers: a linear layer that stores (in, out)."""

EXPERT_PARTS = {"gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")), "down_proj": (("down_proj", "w2"),)}
"""Of a fused parameter of experts, the matrices that checkpoints store one expert at a time, from its first output on."""

TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
"""PEFT's types of tasks that need a head of their own, and how transformers' classes with such a head end."""

OTHER_HEADS = (
    "lm_head.", "cls.", "embed_out.", "predictions.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.",
    "generator_predictions.", "generator_lm_head.", "discriminator_predictions.",
)  # fmt: skip
"""Beginnings of the heads that a class for such a task does not have."""

LABELLERS = ("score", "classifier", "out_proj", "qa_outputs")
"""Last words of the modules of a new head whose outputs are the labels."""


@dataclass(frozen=True)
class TensorUpdate:
    """What an adapter does to one tensor. Without anything else, the tensor is the one that ``origin`` names."""

    update: Update | None = None
    is_turned: bool = False
    """The product is the transpose of what is stored: embeddings, and GPT-2's linear layers."""
    expert: int | None = None
    """The expert whose matrix this is, where the base stores them one by one."""
    part: tuple[int, int] | None = None
    """The rows of the update that this is, where the base stores the parts of a fused matrix one by one."""
    added: Update | None = None
    """The update whose bias is added to this."""
    replaced: str = ""
    """The adapter's tensor that stands for the base's."""
    rows: Rows | None = None
    """Rows that stand for the base's."""
    origin: str = ""
    """The base's tensor that this one is a copy of, where the base does not store it."""
    joined: tuple[tuple[Update, int], ...] = ()
    """Updates of parts that the base stores as one, each with its first row: q, k and v in one matrix."""
    twin: str = ""
    """Another tensor of the adapter that must equal ``replaced``."""
    twin_update: Update | None = None
    """Another update of the adapter whose product must be the same: of a head that is tied to an embedding."""


@dataclass(frozen=True)
class AdapterEffect:
    """All that an adapter does to a base. ``removed`` are tensors of heads that the adapted model does not have."""

    changes: Mapping[str, TensorUpdate]
    removed: frozenset[str]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    is_untied: bool = False
    """The config says so: of tensors that the base ties, one is changed and another not."""


def adapter_effect(label: str, base: Model, adapter: Adapter) -> AdapterEffect:
    """Say what the adapter does to which tensors. Errors: ModelError naming a tensor that fits nowhere."""
    kind = task_class(adapter, base.config)
    copies = {} if kind else tied_copies(base.config, base.tensors)
    tensors = {
        **base.tensors,
        **{copy: base.tensors[original] for copy, original in copies.items() if copy not in base.tensors},
    }
    find = _Names(label, base, adapter, tensors)
    changes: dict[str, TensorUpdate] = {}
    heads: dict[str, str] = {}
    trained: set[str] = set()
    for wanted, name in adapter.replaced.items():
        target = find.found(wanted)
        if (
            target is None
            and kind
            and not find.candidates(wanted)
            and is_saved_module(adapter.config, wanted)
        ):
            heads[wanted] = name
            continue
        target = target or find(name, wanted)
        changes[target] = TensorUpdate(replaced=name)
        if is_saved_module(adapter.config, wanted):
            trained.add(target)
    for update in adapter.updates.values():
        for target, change in _targets(label, base, tensors, adapter, update, find):
            held = changes.get(target, change)
            if change.joined and held.joined and held is not change:
                changes[target] = replace(held, joined=(*held.joined, *change.joined))
                continue
            if held.update is not None and held is not change:
                raise ModelError(
                    f"{label}: {held.update.left} and {update.left} are both for {target}; expected one. Remove the one that is not meant."
                )
            changes[target] = replace(change, replaced=held.replaced)
        if update.bias:
            target = find(update.bias, f"{update.module}.bias")
            changes[target] = TensorUpdate(
                added=update, replaced=changes[target].replaced if target in changes else ""
            )
    for wanted, rows in adapter.rows.items():
        target = find(rows.name, wanted)
        held = changes.get(target, TensorUpdate())
        if held.update is not None or target in trained:
            raise ModelError(
                f"{label}: {rows.name} are rows of {target}, which the adapter changes as a whole, too; expected one or the other. Merge it "
                "into its base with PEFT, and give that."
            )
        changes[target] = replace(held, rows=rows)
    for target, change in changes.items():
        _check_shapes(label, target, change, tensors, adapter, find.advice)
    changes, is_untied = _tied(adapter, changes, trained, copies, base)
    config, notes = base.config, []
    if is_untied:
        config = untied_config(config)
        some = next(c for c in copies if copies[c] in base.tensors)
        notes.append(
            f"{label}: {some} is tied to {copies[some]} in the base, and with the adapter they differ; both are stored, and the config says "
            "tie_word_embeddings: false."
        )
    removed: list[str] = []
    if heads:
        shapes = {wanted: adapter.files.tensors[name].shape for wanted, name in heads.items()}
        config = _headed_config(config, kind, shapes)
        changes |= {wanted: TensorUpdate(replaced=name) for wanted, name in heads.items()}
        if kind not in architectures(base.config):
            removed = [n for n in base.tensors if n.startswith(OTHER_HEADS) and n not in changes]
        others = f", without {_some(removed)}, which belongs to another head" if removed else ""
        notes.append(
            f"{label}: {_some(list(heads))} is the adapter's own head; with it the model is a {kind}{others}."
        )
    return AdapterEffect(changes, frozenset(removed), config, tuple(notes), is_untied)


def task_class(adapter: Adapter, config: Mapping[str, Any]) -> str:
    """The class of transformers that an adapter for a task with a head of its own is of; '' for the base's."""
    ending = TASKS.get(str(adapter.config.get("task_type")))
    mapping = adapter.config.get("auto_mapping")
    named = str(mapping.get("base_model_class") or "") if isinstance(mapping, dict) else ""
    if ending is None:
        return named if named.endswith(tuple(TASKS.values())) and re.fullmatch(r"\w+", named) else ""
    if named.endswith(ending):
        return named
    for architecture in architectures(config):
        found = re.fullmatch(r"(\w+?)(For\w+|LMHeadModel|DoubleHeadsModel|LMHead|Model)", architecture)
        if found:
            return found[1] + ending
    return "" if not config else ending


def _headed_config(
    config: Mapping[str, Any], kind: str, heads: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The config of a model with a new head: its class, and a label for each of the head's outputs, named as transformers does."""
    changed = dict(config)
    if not kind.startswith("For"):
        changed["architectures"] = [kind]
    last = [
        shape[0]
        for name, shape in heads.items()
        if name.split(".")[-2:-1] and name.split(".")[-2] in LABELLERS and len(shape) == 2
    ]
    count = last[-1] if last else 0
    known = config.get("id2label")
    if (
        count
        and not kind.endswith("QuestionAnswering")
        and (len(known) if isinstance(known, dict) else 2) != count
    ):
        changed["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
        changed["label2id"] = {f"LABEL_{i}": i for i in range(count)}
        changed.pop("num_labels", None)
    return changed


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _tied(
    adapter: Adapter,
    changes: Mapping[str, TensorUpdate],
    trained: set[str],
    copies: Mapping[str, str],
    base: Model,
) -> tuple[dict[str, TensorUpdate], bool]:
    """Changes where the base ties tensors: as in PEFT's live model. Returns them, and whether something is untied.

    What stands for a module (``modules_to_save``) or is added to it changes that module alone; what stands for the base's own weight,
    beside an adapter of embeddings, changes all that share it. Trained rows of the embedding are those of the head, too, unless it
    has its own; with ``ensure_weight_tying`` the head follows the embedding.
    """
    made = dict(changes)
    is_untied = False
    groups: dict[str, list[str]] = {}
    for copy, original in copies.items():
        groups.setdefault(original, [original]).append(copy)
    for original, members in groups.items():
        if not any(m in changes for m in members):
            continue
        common = next((m for m in members if m in changes and changes[m].replaced and m not in trained), "")
        lead = changes.get(original, TensorUpdate())
        shares_rows = all(changes[m].rows in (None, lead.rows) for m in members if m in changes)
        for member in members:
            change = changes.get(member, TensorUpdate())
            if change.replaced and member not in trained and member != common:
                made[common] = replace(made[common], twin=change.replaced)
            if common and member not in trained:
                change = replace(change, replaced=changes[common].replaced)
            if shares_rows and change.rows is None and change.update is None and member not in trained:
                change = replace(change, rows=lead.rows)
            if member != original and _follows(adapter, member, change, lead):
                if change.replaced and lead.replaced and change.update is None:
                    made[original] = replace(made[original], twin=change.replaced)
                if change.update is not None:
                    made[original] = replace(made[original], twin_update=change.update)
                change = replace(made[original], twin="", twin_update=None)
            made[member] = (
                change if member == original or member in base.tensors else replace(change, origin=original)
            )
        if common and made[common].twin:
            made = {m: replace(c, twin=made[common].twin) if m in members else c for m, c in made.items()}
        is_untied |= len({_essence(made[m]) for m in members}) > 1
    for original, members in groups.items():
        for member in members:
            if is_untied:
                made.setdefault(member, TensorUpdate(origin="" if member in base.tensors else original))
            elif member not in base.tensors:
                made.pop(member, None)
    return {m: c for m, c in made.items() if c != TensorUpdate()}, is_untied


def _follows(adapter: Adapter, member: str, change: TensorUpdate, lead: TensorUpdate) -> bool:
    """Did PEFT tie what it stores for a copy to what it stores for the embedding?"""
    if not adapter.config.get("ensure_weight_tying"):
        return False
    module = member.rpartition(".")[0]
    if change.update is not None and lead.update is not None:
        return (
            lead.update.is_embedding
            and not change.update.is_embedding
            and not is_targeted(adapter.config, module)
        )
    return bool(change.replaced and lead.replaced) and not is_saved_module(adapter.config, member)


def _essence(change: TensorUpdate) -> tuple[Any, ...]:
    """What tells the values of two tied tensors apart."""
    updates = [*([change.update] if change.update else []), *(u for u, _ in change.joined)]
    return (
        change.replaced,
        tuple(u.key for u in updates),
        change.rows,
        change.added.key if change.added else "",
    )


def _targets(
    label: str, base: Model, tensors: Mapping[str, Tensor], adapter: Adapter, update: Update, find: _Names
) -> list[tuple[str, TensorUpdate]]:
    """The tensors of the base that an update is for: one, or the matrices of experts that are stored one by one."""
    rows, columns = adapter.shape(update)
    is_bare = update.experts == 1 and not any(
        t.endswith(f".{p}") for p in update.parameters for t in adapter.config.get("target_parameters") or []
    )
    if update.parameters == ("weight",) or (is_bare and find.found(f"{update.module}.weight") is not None):
        target = find.found(f"{update.module}.weight") or find.found(f"{update.module}.in_proj_weight")
        place = find.joined(update) if target is None and not update.magnitude else None
        if place is not None:
            return [(place[0], TensorUpdate(joined=((update, place[1]),)))]
        target = target or find(update.right, f"{update.module}.weight")
        is_turned = update.is_embedding or _is_turned(target, tensors[target].shape, base, adapter, update)
        return [(target, TensorUpdate(replace(update, parameters=("weight",)), is_turned))]
    fitting: list[list[tuple[str, TensorUpdate]]] = []
    wanted: dict[str, tuple[int, ...]] = {}
    for parameter in update.parameters:
        name = find.found(f"{update.module}.{parameter}")
        if name is not None:
            shape = wanted[name] = tensors[name].shape
            matrix = shape if update.experts == 1 and len(shape) == 2 else shape[1:]
            if (
                len(shape) in (2, 3)
                and math.prod(shape) == update.experts * rows * columns
                and matrix in ((rows, columns), (columns, rows))
            ):
                is_square = rows == columns
                turned = matrix != (rows, columns) or (
                    is_square and base.config.get("model_type") in TRANSPOSED_EXPERTS
                )
                fitting.append([(name, TensorUpdate(update, turned))])
        else:
            apart = _stored_apart(find, update, parameter, rows, columns)
            if apart:
                fitting.append(apart)
    if len(fitting) == 1:
        return fitting[0]
    if len(fitting) > 1:
        raise ModelError(
            f"{label}: {update.left} may be for {' or '.join(update.parameters)} of {update.module}, whose shapes are equal; the adapter "
            "does not say which. Merge it into its base with PEFT, and give that."
        )
    found = "; ".join(f"{name} is {shape}" for name, shape in wanted.items()) or "the base has no such tensor"
    raise ModelError(
        f"{label}: {update.left} is for {' or '.join(update.parameters)} of {update.module!r}, as {update.experts} matrices of "
        f"({rows}, {columns}); {found}. {find.advice}"
    )


def _stored_apart(
    find: _Names, update: Update, parameter: str, rows: int, columns: int
) -> list[tuple[str, TensorUpdate]]:
    """The matrices of a fused parameter of experts, where the base stores each by itself: ``...experts.3.w1.weight``."""
    parts = EXPERT_PARTS.get(parameter, ())
    if not parts or not update.module.endswith("experts") or rows % len(parts):
        return []
    height = rows // len(parts)
    layer, _, block = update.module.removesuffix(".experts").rpartition(".")
    for module in dict.fromkeys((f"{layer}.{block}", f"{layer}.block_sparse_moe", f"{layer}.mlp")):
        found = []
        for expert in range(update.experts):
            for i, names in enumerate(parts):
                held = [
                    t for n in names if (t := find.found(f"{module}.experts.{expert}.{n}.weight")) is not None
                ]
                if held and find.tensors[held[0]].shape == (height, columns):
                    found.append(
                        (held[0], TensorUpdate(update, False, expert, (i * height, (i + 1) * height)))
                    )
        if len({name for name, _ in found}) == update.experts * len(parts):
            return found
    return []


class _Names:
    """Finds the base's tensor that a name of the adapter means: as it is, with one component more or less at its begin, or spelled in
    another way."""

    def __init__(self, label: str, base: Model, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self._label = label
        self._base = base
        self._adapter = adapter
        self._firsts = sorted({name.split(".")[0] for name in tensors})
        self._types = {
            str(c.get("model_type")) for c in (base.config, *base.config.values()) if isinstance(c, Mapping)
        }
        self._known: dict[str, list[str]] = {}

    def candidates(self, wanted: str) -> list[str]:
        """The tensors that may be meant. Spellings of the base's type of model go before others."""
        if wanted not in self._known:
            named = [wanted] if wanted in self.tensors else self._near(wanted, self.tensors)
            for of_type in (True, False):
                for spelling, spelled in self._spelled if not named else ():
                    if of_type == any(t in self._types for t in spelling.types):
                        name = spelling(wanted)
                        near = [name] if name in spelled else self._near(name, spelled)
                        named += [n for other in near for n in spelled[other] if n not in named]
            self._known[wanted] = named
        return self._known[wanted]

    def _near(self, wanted: str, names: Collection[str]) -> list[str]:
        """The name with one component more or less at its begin."""
        named = [wanted.partition(".")[2], *(f"{first}.{wanted}" for first in self._firsts)]
        return [n for n in named if n in names]

    @functools.cached_property
    def _spelled(self) -> list[tuple[Spelling, dict[str, list[str]]]]:
        """The base's names as modules have them, by each spelling that changes one."""
        found = []
        for spelling in SPELLINGS:
            spelled: dict[str, list[str]] = {}
            for name in self.tensors:
                spelled.setdefault(spelling(name), []).append(name)
            if spelled.keys() != self.tensors.keys():
                found.append((spelling, spelled))
        return found

    def found(self, wanted: str) -> str | None:
        """The one tensor that is meant; None if there is none, or several."""
        candidates = self.candidates(wanted)
        return candidates[0] if len(candidates) == 1 else None

    def joined(self, update: Update) -> tuple[str, int] | None:
        """The tensor that has a module's weight as some of its rows, and the first of them."""
        stem, _, last = update.module.rpartition(".")
        for fused, parts in (j for s in SPELLINGS if self._types & set(s.types) for j in s.joined):
            target = self.found(f"{stem}.{fused}.weight") if last in parts else None
            if target is None:
                continue
            total = self.tensors[target].shape[0] if self.tensors[target].shape else 0
            held = {p: u for p in parts if (u := self._adapter.updates.get(f"{stem}.{p}")) is not None}
            sizes = {p: self._adapter.shape(u)[0] for p, u in held.items()}
            if set(sizes.values()) == {total // len(parts)}:
                sizes = dict.fromkeys(parts, total // len(parts))
            for one, other in (("k_proj", "v_proj"), ("v_proj", "k_proj")):
                if one in sizes and other in parts:
                    sizes.setdefault(other, sizes[one])
            unknown = [p for p in parts if p not in sizes]
            if (unknown and set(unknown) <= {"k_proj", "v_proj"}) or len(unknown) == 1:
                sizes |= dict.fromkeys(unknown, (total - sum(sizes.values())) // len(unknown))
            if all(p in sizes for p in parts) and sum(sizes.values()) == total:
                return target, sum(sizes[p] for p in parts[: parts.index(last)])
        return None

    @property
    def advice(self) -> str:
        """What to do about a base that does not fit, by what the adapter says of its own."""
        named = self._adapter.trained_on
        innermost = getattr(self._base, "innermost", self._base).label
        if named and short_name(named) != short_name(innermost):
            return f"The adapter was trained on {named}: use that as its base."
        return "If PEFT loads this adapter on this base, merge it there (merge_and_unload) and give the result; if not, use another base."

    def __call__(self, name: str, wanted: str) -> str:
        found = self.candidates(wanted)
        if len(found) == 1:
            return found[0]
        if found:
            raise ModelError(
                f"{self._label}: the adapter's {name} is for {wanted!r}, which could be {' or '.join(found)} of the base; expected one. "
                f"{self.advice}"
            )
        near = difflib.get_close_matches(wanted, self.tensors, 2, 0.5)
        nearest = f" has {' and '.join(near)}, and" if near else ""
        raise ModelError(
            f"{self._label}: the adapter's {name} is for {wanted!r}; the base{nearest} has no such tensor. {self.advice}"
        )


def short_name(reference: str) -> str:
    return Path(reference.partition("@")[0].rstrip("/")).name.lower()


def is_turned_linear(name: str, config: Mapping[str, Any]) -> bool:
    """Is a weight that of a linear layer which stores (in, out)?

    >>> [is_turned_linear("h.0.attn.c_attn.weight", {"model_type": t}) for t in ("gpt2", "gpt_bigcode")]
    [True, False]
    """
    words = name.split(".")
    return (
        config.get("model_type") in TURNED_TYPES
        and len(words) > 1
        and words[-1] == "weight"
        and words[-2] in TURNED_MODULES
    )


def _is_turned(target: str, shape: tuple[int, ...], base: Model, adapter: Adapter, update: Update) -> bool:
    """Is a matrix stored (in, out)? Its shape says so, as in PEFT its layer's kind does.

    Of one that is square the type of the model tells, and else the adapter's config, in which PEFT writes what the last layer was.
    """
    if len(shape) != 2:
        return False
    rows, columns = adapter.shape(update)
    if base.config.get("model_type") in TURNED_TYPES and rows == columns:
        return is_turned_linear(target, base.config)
    return shape == (columns, rows) and (rows != columns or bool(adapter.config.get("fan_in_fan_out")))


def _check_shapes(
    label: str,
    target: str,
    change: TensorUpdate,
    of_base: Mapping[str, Tensor],
    adapter: Adapter,
    advice: str,
) -> None:
    tensor = of_base[target]
    tensors: Mapping[str, Tensor] = adapter.files.tensors
    shape, update = tensor.shape, change.update

    def refuse(part: str, expected: object) -> ModelError:
        return ModelError(
            f"{label}: {target} is {shape} in the base, and the adapter's {part} is {tensors[part].shape}, expected {expected}. "
            f"{advice}"
        )

    begin, name = (tensors[change.replaced], change.replaced) if change.replaced else (tensor, target)
    is_computed = (
        bool(change.joined) or update is not None or change.added is not None or change.rows is not None
    )
    if is_computed and begin.dtype not in dtypes.MERGEABLE:
        raise ModelError(
            f"{label}: {name} is {begin.dtype}, expected numbers in floating point. Use another adapter or base."
        )
    if change.replaced and tensors[change.replaced].shape != shape:
        raise refuse(
            change.replaced, "the same; a vocabulary that was extended must be extended in the base too"
        )
    if change.added is not None and tensors[change.added.bias].shape != shape:
        raise refuse(change.added.bias, "the same")
    if change.rows is not None:
        width = tensors[change.rows.name].shape[1]
        if len(shape) != 2 or shape[1] != width or max(change.rows.indices, default=0) >= shape[0]:
            raise refuse(change.rows.name, f"rows of {target}, by numbers below its number of rows")
    for part, _ in change.joined:
        if len(shape) != 2 or adapter.shape(part)[1] != shape[1]:
            raise refuse(part.right, f"as many columns as {target}")
    if update is None or update.parameters != ("weight",):
        return
    rows, columns = shape[0] if shape else 0, math.prod(shape[1:])
    if change.is_turned:
        rows, columns = columns, rows
    found = adapter.shape(update)
    if found[0] != rows:
        raise refuse(update.left, f"({rows}, {update.rank})")
    if found[1] != columns or len(shape) < 2:
        raise refuse(update.right, f"{columns} columns")
    if update.magnitude and tensors[update.magnitude].elements != rows:
        raise refuse(update.magnitude, f"{rows} numbers")
