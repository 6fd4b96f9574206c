"""Works out which tensors of a base an adapter changes, and what its config must say then."""

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
from alnico.checkpoint.memory_model import MemoryModel
from alnico.checkpoint.source import Model, Tensor
from alnico.checkpoint.tied_weights import architectures, tied_copies, untied_config
from alnico.errors import ModelError
from alnico.numerics import dtypes

TRANSPOSED_MODULES = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
"""Model types whose modules have experts as (experts, in, out) and say so, which PEFT follows."""

TRANSPOSED_EXPERTS = (*TRANSPOSED_MODULES, "llama4", "llama4_text")
"""Model types that store experts as (experts, in, out). Used only where a square shape leaves it open."""

CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Model types whose modules of these names are transformers' ``Conv1D``: linear layers that store (in,
out)."""

EXPERT_PARTS = {"gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")), "down_proj": (("down_proj", "w2"),)}
"""The matrices that a fused parameter of experts consists of, in the order of its outputs, where checkpoints
store each expert's separately."""

HEAD_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
"""PEFT's task types that need their own head, and how transformers names the classes with such a head."""

OTHER_HEADS = (
    "lm_head.", "cls.", "embed_out.", "predictions.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.",
    "generator_predictions.", "generator_lm_head.", "discriminator_predictions.",
)  # fmt: skip
"""How the names of other heads begin, which a class for such a task does not have."""

LABEL_HEADS = ("score", "classifier", "out_proj", "qa_outputs")
"""Last component of the modules in a new head whose outputs are the labels."""


@dataclass(frozen=True)
class TensorUpdate:
    """What an adapter does to one tensor. With only ``origin`` set, the tensor is a copy of that one."""

    update: Update | None = None
    is_transposed: bool = False
    """The product is the transpose of the stored matrix: embeddings, and GPT-2's linear layers."""
    expert: int | None = None
    """The expert that this matrix belongs to, where the base stores each expert separately."""
    part: tuple[int, int] | None = None
    """The rows of the update that apply here, where the base stores the parts of a fused matrix
    separately."""
    added: Update | None = None
    """The update whose bias is added to this tensor."""
    replaced: str = ""
    """The adapter's tensor that replaces the base's."""
    rows: Rows | None = None
    """Rows that replace the base's."""
    origin: str = ""
    """The base's tensor that this one copies, where the base does not store it."""
    joined: tuple[tuple[Update, int], ...] = ()
    """Updates of parts that the base stores as one matrix (q, k and v), each with its first row."""
    is_swapped: bool = False
    """The halves of its rows stand in the other order in the base."""
    twin: str = ""
    """Another tensor of the adapter that must equal ``replaced``."""
    twin_update: Update | None = None
    """Another update of the adapter whose product must be equal: that of a head tied to an embedding."""


@dataclass(frozen=True)
class AdapterEffect:
    """Everything an adapter does to a base. ``removed`` are tensors of heads that the adapted model lacks."""

    changes: Mapping[str, TensorUpdate]
    removed: frozenset[str]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    is_untied: bool = False
    """The base ties tensors that now differ; the new config declares them untied."""


def adapter_effect(label: str, base: Model | MemoryModel, adapter: Adapter) -> AdapterEffect:
    """Work out what an adapter does to each tensor. Errors: ModelError naming a tensor that fits nowhere."""
    head_class = task_class(adapter, base.config)
    copies = {} if head_class else tied_copies(base.config, base.tensors)
    tensors = {
        **base.tensors,
        **{copy: base.tensors[original] for copy, original in copies.items() if copy not in base.tensors},
    }
    matcher = _NameMatcher(label, base, adapter, tensors)
    changes: dict[str, TensorUpdate] = {}
    heads: dict[str, str] = {}
    trained: set[str] = set()
    for name_in_base, name in adapter.replaced.items():
        target = matcher.match(name_in_base)
        if (
            target is None
            and head_class
            and not matcher.candidates(name_in_base)
            and is_saved_module(adapter.config, name_in_base)
        ):
            heads[name_in_base] = name
            continue
        target = target or matcher.require(name, name_in_base)
        changes[target] = TensorUpdate(replaced=name)
        if is_saved_module(adapter.config, name_in_base):
            trained.add(target)
    for update in adapter.updates.values():
        for target, change in _find_targets(label, base, tensors, adapter, update, matcher):
            earlier = changes.get(target, change)
            if change.joined and earlier.joined and earlier is not change:
                changes[target] = replace(earlier, joined=(*earlier.joined, *change.joined))
                continue
            if earlier.update is not None and earlier is not change:
                raise ModelError(
                    f"{label}: {earlier.update.left} and {update.left} both change {target}; expected one "
                    "update. Remove the one that is not meant."
                )
            changes[target] = replace(change, replaced=earlier.replaced)
        if update.bias:
            target = matcher.require(update.bias, f"{update.module}.bias")
            changes[target] = TensorUpdate(
                added=update, replaced=changes[target].replaced if target in changes else ""
            )
    for name_in_base, rows in adapter.rows.items():
        target = matcher.require(rows.name, name_in_base)
        earlier = changes.get(target, TensorUpdate())
        if earlier.update is not None or target in trained:
            raise ModelError(
                f"{label}: {rows.name} holds rows of {target}, which the adapter also changes as a whole; "
                "expected one of the two. Merge the adapter into its base with PEFT and use the result."
            )
        changes[target] = replace(earlier, rows=rows)
    for target, change in changes.items():
        _check_shapes(label, target, change, tensors, adapter, matcher.advice)
    changes, is_untied = _tie_changes(adapter, changes, trained, copies, base)
    config, notes = base.config, []
    if is_untied:
        config = untied_config(config)
        copy = next(c for c in copies if copies[c] in base.tensors)
        notes.append(
            f"{label}: {copy} is tied to {copies[copy]} in the base; with the adapter they differ. Both are "
            "stored, and the config says tie_word_embeddings: false."
        )
    removed: list[str] = []
    if heads:
        shapes = {name_in_base: adapter.files.tensors[name].shape for name_in_base, name in heads.items()}
        config = _headed_config(config, head_class, shapes)
        changes |= {name_in_base: TensorUpdate(replaced=name) for name_in_base, name in heads.items()}
        if head_class not in architectures(base.config):
            removed = [n for n in base.tensors if n.startswith(OTHER_HEADS) and n not in changes]
        others = f", without {_list_some(removed)}, which belongs to another head" if removed else ""
        notes.append(
            f"{label}: {_list_some(list(heads))} is the adapter's own head; the model becomes a "
            f"{head_class}{others}."
        )
    return AdapterEffect(changes, frozenset(removed), config, tuple(notes), is_untied)


def task_class(adapter: Adapter, config: Mapping[str, Any]) -> str:
    """The transformers class of an adapter for a task with its own head; '' where the base's class stays."""
    ending = HEAD_CLASSES.get(str(adapter.config.get("task_type")))
    mapping = adapter.config.get("auto_mapping")
    named = str(mapping.get("base_model_class") or "") if isinstance(mapping, dict) else ""
    if ending is None:
        return named if named.endswith(tuple(HEAD_CLASSES.values())) and re.fullmatch(r"\w+", named) else ""
    if named.endswith(ending):
        return named
    for architecture in architectures(config):
        match = re.fullmatch(r"(\w+?)(For\w+|LMHeadModel|DoubleHeadsModel|LMHead|Model)", architecture)
        if match:
            return match[1] + ending
    return "" if not config else ending


def _headed_config(
    config: Mapping[str, Any], head_class: str, heads: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Return the config of a model with a new head: its class, and a label per output, named as transformers
    does."""
    changed = dict(config)
    if not head_class.startswith("For"):
        changed["architectures"] = [head_class]
    last = [
        shape[0]
        for name, shape in heads.items()
        if name.split(".")[-2:-1] and name.split(".")[-2] in LABEL_HEADS and len(shape) == 2
    ]
    count = last[-1] if last else 0
    labels = config.get("id2label")
    if (
        count
        and not head_class.endswith("QuestionAnswering")
        and (len(labels) if isinstance(labels, dict) else 2) != count
    ):
        changed["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
        changed["label2id"] = {f"LABEL_{i}": i for i in range(count)}
        changed.pop("num_labels", None)
    return changed


def _list_some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _tie_changes(
    adapter: Adapter,
    changes: Mapping[str, TensorUpdate],
    trained: set[str],
    copies: Mapping[str, str],
    base: Model | MemoryModel,
) -> tuple[dict[str, TensorUpdate], bool]:
    """Apply the base's ties to the changes, as PEFT's live model does. Returns them, and whether something is
    untied.

    A tensor that replaces a module (``modules_to_save``) or is added to one changes that module only; one
    that replaces the base's own weight, saved next to an adapter of embeddings, changes every tensor tied to
    it. Trained rows of the embedding apply to the head too, unless it has its own; with
    ``ensure_weight_tying`` the head follows the embedding.
    """
    result = dict(changes)
    is_untied = False
    groups: dict[str, list[str]] = {}
    for copy, original in copies.items():
        groups.setdefault(original, [original]).append(copy)
    for original, members in groups.items():
        if not any(m in changes for m in members):
            continue
        shared = next((m for m in members if m in changes and changes[m].replaced and m not in trained), "")
        of_original = changes.get(original, TensorUpdate())
        shares_rows = all(changes[m].rows in (None, of_original.rows) for m in members if m in changes)
        for member in members:
            change = changes.get(member, TensorUpdate())
            if change.replaced and member not in trained and member != shared:
                result[shared] = replace(result[shared], twin=change.replaced)
            if shared and member not in trained:
                change = replace(change, replaced=changes[shared].replaced)
            if shares_rows and change.rows is None and change.update is None and member not in trained:
                change = replace(change, rows=of_original.rows)
            if member != original and _follows_embedding(adapter, member, change, of_original):
                if change.replaced and of_original.replaced and change.update is None:
                    result[original] = replace(result[original], twin=change.replaced)
                if change.update is not None:
                    result[original] = replace(result[original], twin_update=change.update)
                change = replace(result[original], twin="", twin_update=None)
            result[member] = (
                change if member == original or member in base.tensors else replace(change, origin=original)
            )
        if shared and result[shared].twin:
            result = {
                m: replace(c, twin=result[shared].twin) if m in members else c for m, c in result.items()
            }
        is_untied |= len({_content(result[m]) for m in members}) > 1
    for original, members in groups.items():
        for member in members:
            if is_untied:
                result.setdefault(member, TensorUpdate(origin="" if member in base.tensors else original))
            elif member not in base.tensors:
                result.pop(member, None)
    return {m: c for m, c in result.items() if c != TensorUpdate()}, is_untied


def _follows_embedding(
    adapter: Adapter, member: str, change: TensorUpdate, of_original: TensorUpdate
) -> bool:
    """Did PEFT tie what it stores for a copy to what it stores for the embedding?"""
    if not adapter.config.get("ensure_weight_tying"):
        return False
    module = member.rpartition(".")[0]
    if change.update is not None and of_original.update is not None:
        return (
            of_original.update.is_embedding
            and not change.update.is_embedding
            and not is_targeted(adapter.config, module)
        )
    return bool(change.replaced and of_original.replaced) and not is_saved_module(adapter.config, member)


def _content(change: TensorUpdate) -> tuple[Any, ...]:
    """What determines the values of a tied tensor: equal for equal values."""
    updates = [*([change.update] if change.update else []), *(u for u, _ in change.joined)]
    return (
        change.replaced,
        tuple(u.key for u in updates),
        change.rows,
        change.added.key if change.added else "",
    )


def _find_targets(
    label: str,
    base: Model | MemoryModel,
    tensors: Mapping[str, Tensor],
    adapter: Adapter,
    update: Update,
    matcher: _NameMatcher,
) -> list[tuple[str, TensorUpdate]]:
    """Find the tensors of the base that an update changes: one, or the separately stored matrices of
    experts."""
    rows, columns = adapter.shape(update)
    is_bare = update.experts == 1 and not any(
        t.endswith(f".{p}") for p in update.parameters for t in adapter.config.get("target_parameters") or []
    )
    if update.parameters == ("weight",) or (is_bare and matcher.match(f"{update.module}.weight") is not None):
        target = matcher.match(f"{update.module}.weight") or matcher.match(f"{update.module}.in_proj_weight")
        fused = matcher.fused(update) if target is None and not update.magnitude else None
        if fused is not None:
            return [(fused[0], TensorUpdate(joined=((update, fused[1]),)))]
        target = target or matcher.require(update.right, f"{update.module}.weight")
        is_transposed = update.is_embedding or _is_transposed(
            target, tensors[target].shape, base, adapter, update
        )
        return [(target, TensorUpdate(replace(update, parameters=("weight",)), is_transposed))]
    fits: list[list[tuple[str, TensorUpdate]]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in update.parameters:
        name = matcher.match(f"{update.module}.{parameter}")
        if name is not None:
            shape = shapes[name] = tensors[name].shape
            matrix = shape if update.experts == 1 and len(shape) == 2 else shape[1:]
            if (
                len(shape) in (2, 3)
                and math.prod(shape) == update.experts * rows * columns
                and matrix in ((rows, columns), (columns, rows))
            ):
                is_square = rows == columns
                is_swapped = matrix != (rows, columns) or (
                    is_square and base.config.get("model_type") in TRANSPOSED_EXPERTS
                )
                fits.append([(name, TensorUpdate(update, is_swapped))])
        else:
            separate = _separate_experts(matcher, update, parameter, rows, columns)
            if separate:
                fits.append(separate)
    if len(fits) == 1:
        return fits[0]
    if len(fits) > 1:
        raise ModelError(
            f"{label}: {update.left} may belong to {' or '.join(update.parameters)} of {update.module}, "
            "whose shapes are equal; the adapter does not say which. Merge it into its base with PEFT and "
            "use the result."
        )
    shapes_text = (
        "; ".join(f"{name} is {shape}" for name, shape in shapes.items()) or "the base has no such tensor"
    )
    raise ModelError(
        f"{label}: {update.left} belongs to {' or '.join(update.parameters)} of {update.module!r}, as "
        f"{update.experts} matrices of ({rows}, {columns}); {shapes_text}. {matcher.advice}"
    )


def _separate_experts(
    matcher: _NameMatcher, update: Update, parameter: str, rows: int, columns: int
) -> list[tuple[str, TensorUpdate]]:
    """Find the matrices of a fused parameter of experts where the base stores each separately:
    ``...experts.3.w1.weight``."""
    parts = EXPERT_PARTS.get(parameter, ())
    if not parts or not update.module.endswith("experts") or rows % len(parts):
        return []
    height = rows // len(parts)
    layer, _, block = update.module.removesuffix(".experts").rpartition(".")
    for module in dict.fromkeys((f"{layer}.{block}", f"{layer}.block_sparse_moe", f"{layer}.mlp")):
        matrices = []
        for expert in range(update.experts):
            for i, names in enumerate(parts):
                matches = [
                    t
                    for n in names
                    if (t := matcher.match(f"{module}.experts.{expert}.{n}.weight")) is not None
                ]
                if matches and matcher.tensors[matches[0]].shape == (height, columns):
                    matrices.append(
                        (matches[0], TensorUpdate(update, False, expert, (i * height, (i + 1) * height)))
                    )
        if len({name for name, _ in matrices}) == update.experts * len(parts):
            return matrices
    return []


class _NameMatcher:
    """Finds the base's tensor that a name in the adapter means: the same name, one with a component more or
    less at its start, or one in another spelling."""

    def __init__(
        self, label: str, base: Model | MemoryModel, adapter: Adapter, tensors: Mapping[str, Tensor]
    ) -> None:
        self.tensors = tensors
        self._label = label
        self._base = base
        self._adapter = adapter
        self._first_components = sorted({name.split(".")[0] for name in tensors})
        self._types = {
            str(c.get("model_type")) for c in (base.config, *base.config.values()) if isinstance(c, Mapping)
        }
        self._candidates: dict[str, list[str]] = {}

    def candidates(self, name: str) -> list[str]:
        """The base's tensors that a name may mean. Spellings of the base's own model type come first."""
        if name not in self._candidates:
            matches = [name] if name in self.tensors else self._variants(name, self.tensors)
            for of_type in (True, False):
                for spelling, respellings in self._spellings if not matches else ():
                    if of_type == any(t in self._types for t in spelling.types):
                        respelled = spelling(name)
                        near = (
                            [respelled]
                            if respelled in respellings
                            else self._variants(respelled, respellings)
                        )
                        matches += [n for other in near for n in respellings[other] if n not in matches]
            self._candidates[name] = matches
        return self._candidates[name]

    def _variants(self, name: str, names: Collection[str]) -> list[str]:
        """The name with one component more or less at its start."""
        variants = [name.partition(".")[2], *(f"{first}.{name}" for first in self._first_components)]
        return [n for n in variants if n in names]

    @functools.cached_property
    def _spellings(self) -> list[tuple[Spelling, dict[str, list[str]]]]:
        """The base's names as transformers' modules have them, for each spelling that changes any."""
        result = []
        for spelling in SPELLINGS:
            respellings: dict[str, list[str]] = {}
            for name in self.tensors:
                respellings.setdefault(spelling(name), []).append(name)
            if respellings.keys() != self.tensors.keys():
                result.append((spelling, respellings))
        return result

    def match(self, name: str) -> str | None:
        """The one tensor that a name means; None if there are none or several."""
        candidates = self.candidates(name)
        return candidates[0] if len(candidates) == 1 else None

    def fused(self, update: Update) -> tuple[str, int] | None:
        """The fused tensor that holds a module's weight as some of its rows, and the first of these rows."""
        stem, _, last = update.module.rpartition(".")
        for fused, parts in (j for s in SPELLINGS if self._types & set(s.types) for j in s.joined):
            target = self.match(f"{stem}.{fused}.weight") if last in parts else None
            if target is None:
                continue
            total = self.tensors[target].shape[0] if self.tensors[target].shape else 0
            updates = {p: u for p in parts if (u := self._adapter.updates.get(f"{stem}.{p}")) is not None}
            sizes = {p: self._adapter.shape(u)[0] for p, u in updates.items()}
            if set(sizes.values()) == {total // len(parts)}:
                sizes = dict.fromkeys(parts, total // len(parts))
            for first, second in (("k_proj", "v_proj"), ("v_proj", "k_proj")):
                if first in sizes and second in parts:
                    sizes.setdefault(second, sizes[first])
            unsized = [p for p in parts if p not in sizes]
            if (unsized and set(unsized) <= {"k_proj", "v_proj"}) or len(unsized) == 1:
                sizes |= dict.fromkeys(unsized, (total - sum(sizes.values())) // len(unsized))
            if all(p in sizes for p in parts) and sum(sizes.values()) == total:
                return target, sum(sizes[p] for p in parts[: parts.index(last)])
        return None

    @property
    def advice(self) -> str:
        """What to do about a base that does not fit, from the base that the adapter's config names."""
        named = self._adapter.trained_on
        innermost = getattr(self._base, "innermost", self._base).label
        if named and short_name(named) != short_name(innermost):
            return f"The adapter was trained on {named}: use that as its base."
        return (
            "If PEFT loads this adapter on this base, merge it there (merge_and_unload) and give the result; "
            "if not, use another base."
        )

    def require(self, name: str, name_in_base: str) -> str:
        """The one tensor that the adapter's ``name`` changes. Errors: ModelError if there are none or
        several."""
        matches = self.candidates(name_in_base)
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ModelError(
                f"{self._label}: the adapter's {name} is for {name_in_base!r}, which may be "
                f"{' or '.join(matches)} of the base; expected one match. {self.advice}"
            )
        similar = difflib.get_close_matches(name_in_base, self.tensors, 2, 0.5)
        hint = f" has {' and '.join(similar)}, and" if similar else ""
        raise ModelError(
            f"{self._label}: the adapter's {name} is for {name_in_base!r}; the base{hint} has no such "
            f"tensor. {self.advice}"
        )


def short_name(reference: str) -> str:
    """The last component of a model's reference, in lower case and without its revision."""
    return Path(reference.partition("@")[0].rstrip("/")).name.lower()


def is_transposed_linear(name: str, config: Mapping[str, Any]) -> bool:
    """Does a weight belong to a linear layer that stores (in, out)?

    >>> [is_transposed_linear("h.0.attn.c_attn.weight", {"model_type": t}) for t in ("gpt2", "gpt_bigcode")]
    [True, False]
    """
    words = name.split(".")
    return (
        config.get("model_type") in CONV1D_TYPES
        and len(words) > 1
        and words[-1] == "weight"
        and words[-2] in CONV1D_MODULES
    )


def _is_transposed(
    target: str, shape: tuple[int, ...], base: Model | MemoryModel, adapter: Adapter, update: Update
) -> bool:
    """Is a matrix stored (in, out)? Its shape decides, as the kind of layer does in PEFT.

    For a square matrix the model type decides, or else ``fan_in_fan_out`` in the adapter's config, which PEFT
    sets from the last layer.
    """
    if len(shape) != 2:
        return False
    rows, columns = adapter.shape(update)
    if base.config.get("model_type") in CONV1D_TYPES and rows == columns:
        return is_transposed_linear(target, base.config)
    return shape == (columns, rows) and (rows != columns or bool(adapter.config.get("fan_in_fan_out")))


def _check_shapes(
    label: str,
    target: str,
    change: TensorUpdate,
    base_tensors: Mapping[str, Tensor],
    adapter: Adapter,
    advice: str,
) -> None:
    tensor = base_tensors[target]
    tensors: Mapping[str, Tensor] = adapter.files.tensors
    shape, update = tensor.shape, change.update

    def refuse(part: str, expected: object) -> ModelError:
        return ModelError(
            f"{label}: {target} is {shape} in the base, the adapter's {part} is {tensors[part].shape}; "
            f"expected {expected}. {advice}"
        )

    source, name = (tensors[change.replaced], change.replaced) if change.replaced else (tensor, target)
    is_computed = (
        bool(change.joined) or update is not None or change.added is not None or change.rows is not None
    )
    if is_computed and source.dtype not in dtypes.MERGEABLE:
        raise ModelError(
            f"{label}: {name} is {source.dtype}; expected floating-point numbers. Use another adapter or "
            "base."
        )
    if change.replaced and tensors[change.replaced].shape != shape:
        raise refuse(
            change.replaced, "the same shape; if the vocabulary was extended, extend it in the base too"
        )
    if change.added is not None and tensors[change.added.bias].shape != shape:
        raise refuse(change.added.bias, "the same")
    if change.rows is not None:
        width = tensors[change.rows.name].shape[1]
        if len(shape) != 2 or shape[1] != width or max(change.rows.indices, default=0) >= shape[0]:
            raise refuse(change.rows.name, f"rows of {target}, with row numbers below its number of rows")
    for part, _ in change.joined:
        if len(shape) != 2 or adapter.shape(part)[1] != shape[1]:
            raise refuse(part.right, f"as many columns as {target}")
    if update is None or update.parameters != ("weight",):
        return
    rows, columns = shape[0] if shape else 0, math.prod(shape[1:])
    if change.is_transposed:
        rows, columns = columns, rows
    factor_shape = adapter.shape(update)
    if factor_shape[0] != rows:
        raise refuse(update.left, f"({rows}, {update.rank})")
    if factor_shape[1] != columns or len(shape) < 2:
        raise refuse(update.right, f"{columns} columns")
    if update.magnitude and tensors[update.magnitude].elements != rows:
        raise refuse(update.magnitude, f"{rows} numbers")
