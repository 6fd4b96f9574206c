"""Matches the tensors of the models by the names and shapes in their headers; reports mismatches."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alnico.checkpoint.duplicate_tensors import find_original
from alnico.checkpoint.factors import is_factor
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.sidecars import modules_of
from alnico.checkpoint.source import Source, Tensor
from alnico.checkpoint.tied_weights import tied_copies
from alnico.errors import MismatchError
from alnico.numerics.dtypes import COPYABLE_KINDS, DTYPES, MERGEABLE
from alnico.plan import families
from alnico.plan.compatibility import NEARLY_ALL, Misfit, explain_mismatch
from alnico.plan.completion import counted_groups
from alnico.plan.job import Job
from alnico.plan.layers import count_layers
from alnico.plan.own_heads import has_own_values
from alnico.plan.sections import ModelPart, Section, TensorMethod
from alnico.recipe.schema import Missing
from alnico.vocabulary.compare import (
    count_renamed,
    difference,
    read_vocabulary,
    rows_differ_message,
    same_files,
    unread_file,
    vocabularies_differ_message,
)
from alnico.vocabulary.tables import find_tables, rows_of

MAX_SHOWN = 5

OR_MISSING = ", or set missing: copy or missing: drop in the recipe."
"""The end of the advice for a tensor that some model lacks, unless nearly all tensors are lacking."""

WORD_LISTS = ("whitespacetokenizer_config.json", "phrasetokenizer_config.json")
"""Vocabulary files of sentence-transformers' word embeddings."""
IGNORED_SETTINGS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")

MOST_COPIES = 64
"""The most tensors to check for tied copies. Models that differ in more do not differ by their ties."""


@dataclass(frozen=True)
class TensorAction:
    """What happens to a tensor, and why: merge, require equal buffers, or copy from one model."""

    kind: Literal["merged", "buffer", "from one"]
    origin: ModelPart | None = None
    why: str = ""


@dataclass
class TensorMatcher:
    """Matches tensors one by one; collects mismatches, dropped tensors (model, name, why) and notes."""

    sources: Sequence[Source]
    donor: int
    missing: Missing
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    misfits: list[Misfit] = field(default_factory=list)
    matched: int = 0
    """The number of tensors passed to :meth:`match`."""
    copies: int = 0
    """The number of tensors that were checked for tied copies."""

    def __post_init__(self) -> None:
        names = dict.fromkeys(n for s in self.sources for n in s.tensors if n.endswith(tuple(families.TIED)))
        self.tied = families.tied_heads(
            self.sources[self.donor].config, self.sources[self.donor].tensors, names
        )

    def match(self, name: str, section: Section, chosen: TensorMethod) -> TensorAction | None:
        """Return what happens to the tensor ``name``; None if it is dropped or does not match."""
        self.matched += 1
        holders = [p for p in chosen.needed if name in p.names]
        lacking = [p for p in chosen.needed if name not in p.names]
        donor = section.donor if section.donor is not None and name in section.donor.names else None
        if not holders and donor is None and chosen.rule is not None and chosen.rule.models:
            donor = next((p for p in section.listed if name in p.names), None)  # not lost silently
        completing = section.completing
        others = [p for p in holders if completing is None or p.model != completing.model]
        given = completing if completing is not None and not others and name in completing.names else None
        donor = donor or given
        if not holders and donor is None:
            return None  # only a base that the method does not use has it
        if not lacking:
            return self._match_all(name, holders, donor)
        reference = donor or holders[0]
        tensor = self._tensor(reference, name)
        if DTYPES[tensor.dtype].kind in COPYABLE_KINDS or families.counter_meaning(name):
            why = f"a buffer that {self._lack(lacking)}"
            self._drop(name, [p for p in holders if donor is None or p.place != donor.place], why)
            return (
                TensorAction("from one", donor, f"{why}; copied from {self._label(donor)}")
                if donor is not None
                else None
            )
        if name in self.tied:
            self._note_own_heads(name, holders)
            self._drop(
                name,
                [*holders, *([donor] if donor else [])],
                f"tied to {self.tied[name]} in the config, and {self._lack(lacking)} it",
            )
            return None
        original = (
            None if self._cannot_be_copy(name, given) else self._original(name, holders, donor, lacking)
        )
        if original is not None:
            self._drop(
                name,
                [*holders, *([donor] if donor else [])],
                f"a tied copy of {original}, which {self._labels_with(lacking, 'store')} once",
            )
            return None
        if given is not None:
            why = f"{self._lack(lacking)} it; copied from {self._label(given)}"
            return TensorAction("from one", given, why)
        if self.missing == "drop":
            self._drop(
                name, holders or [reference], f"{self._lack(lacking)} it, and the recipe sets missing: drop"
            )
            return None
        if self.missing == "copy":
            why = f"{self._lack(lacking)} it, and the recipe sets missing: copy"
            self._drop(
                name,
                [p for p in holders if p.place != reference.place],
                f"copied from {self._label(reference)}: {why}",
            )
            return TensorAction("from one", reference, why)
        self.misfits.append(
            Misfit(
                name, {p.model: self._tensor(p, name).shape if p in holders else None for p in chosen.needed}
            )
        )
        # Only messages that are shown are made: searching 10,000 names for similar ones is slow.
        self.problems.append(
            self._missing_problem(name, lacking, reference) if len(self.problems) < MAX_SHOWN else ""
        )
        return None

    def leave_out(self, name: str, section: Section, why: str) -> None:
        """Drop a tensor of every model of a section."""
        self.matched += 1
        self._drop(name, section.holders(name), why)

    def refuse(self) -> None:
        """Raise the mismatches, if there are any. Errors: MismatchError."""
        if self.problems:
            offers = self._offers()
            if not offers and (explained := explain_mismatch(self.misfits, self.sources)) is not None:
                raise MismatchError(*explained)
            more = len(self.problems) - MAX_SHOWN
            rest = [f"... and {more} more tensors that do not match."] if more > 0 else []
            lines = self.problems[:MAX_SHOWN] + rest
            lacking = sum(None in m.shapes.values() for m in self.misfits)
            if offers:
                advice = f" Use models of one architecture{OR_MISSING}"
                lines = [*(line.replace(advice, "") for line in lines), *offers]
            elif lacking > NEARLY_ALL * self.matched:
                nothing = (
                    f"{lacking} of {self.matched} tensors are not in all models, so missing: drop would leave "
                    "almost nothing"
                )
                lines = [line.replace(OR_MISSING, ".") for line in lines]
                lines.append(
                    f"{nothing}. Compare the names: one model may have a prefix that the others lack."
                )
            raise MismatchError(*lines)

    def _offers(self) -> list[str]:
        """Say how to take tensors from another model that a program left out when it saved a model.

        Only where a model lacks some, has none that others lack, and all shapes fit.
        """
        if len(self.misfits) < len(self.problems) or any(None not in m.shapes.values() for m in self.misfits):
            return []
        offers = []
        for model in dict.fromkeys(m for misfit in self.misfits for m in misfit.shapes):
            involved = [misfit for misfit in self.misfits if model in misfit.shapes]
            if any(misfit.shapes[model] is not None for misfit in involved):
                continue
            names = [misfit.name for misfit in involved]
            holder = next((m for m, shape in involved[0].shapes.items() if shape is not None), self.donor)
            if names[0] in self.sources[holder].tensors and _are_often_left_out(names):
                label, other = self.sources[model].label, self.sources[holder].label
                offers.append(
                    f"{label} lacks {counted_groups(names)} that {other} has; programs that train often leave these out "
                    f"when they save. Set missing: copy in the recipe to take them from {other}, or complete {label} "
                    f"first: alnico complete {label} --from {other} OUT."
                )
        return offers

    def refuse_empty_output(self, jobs: Collection[Job]) -> None:
        """Refuse an output without weights.

        Errors: MismatchError that says where the models' tensors went.
        """
        has_weights = any(
            t.dtype in MERGEABLE and t.elements for s in self.sources for t in s.tensors.values()
        )
        if any(job.dtype in MERGEABLE and job.elements for job in jobs) or (jobs and not has_weights):
            return
        what = "weights" if jobs else "tensors"
        dropped = [
            (m, name, why)
            for m, name, why in self.dropped
            if self.sources[m].tensors[name].dtype in MERGEABLE
        ]
        first = {m: name for m, name, _ in reversed(dropped)}
        examples = ", ".join(f"{name} of {self.sources[m].label}" for m, name in sorted(first.items()))
        if self.missing == "drop" and dropped:
            raise MismatchError(
                f"the output would have no {what}: no weight is in all models, and missing: drop removes the "
                f"others (first: {examples}); expected weights that all models have. Use models of one "
                "architecture with the same tensor names."
            )
        names = ", ".join(s.label for s in self.sources)
        raise MismatchError(
            f"the output would have no {what}: no tensor of {names} is part of it; expected at least one. "
            "Check the models, and the modules, slices and filters of the recipe."
        )

    def _match_all(
        self, name: str, parts: Sequence[ModelPart], donor: ModelPart | None
    ) -> TensorAction | None:
        tensors = [self._tensor(p, name) for p in parts]
        for part, tensor in zip(parts[1:], tensors[1:], strict=True):
            if tensor.shape != tensors[0].shape:
                self.misfits.append(
                    Misfit(name, {p.model: t.shape for p, t in zip(parts, tensors, strict=True)})
                )
                self.problems.append(self._shape_problem(name, parts[0], part))
                return None
        kinds = {DTYPES[t.dtype].kind for t in tensors}
        counter, is_position = families.counter_meaning(name), name.endswith("position_ids")
        if (
            counter is not None
            and len(parts) > 1
            and (len({t.dtype for t in tensors}) > 1 if is_position else True)
        ):
            origin = donor or parts[0]
            if not name.endswith(families.BATCH_COUNT):
                dtypes = ", ".join(dict.fromkeys(t.dtype for t in tensors))
                stored_as = f" (stored as {dtypes})" if len({t.dtype for t in tensors}) > 1 else ""
                self.notes.append(
                    f"{name}: {counter}{stored_as}, not a weight; it is copied from {self._label(origin)}."
                )
            why = f"{counter}; copied from {self._label(origin)}"
            self._drop(name, [p for p in parts if p.place != origin.place], why)
            return TensorAction("from one", origin, why)
        if kinds == {"float"}:
            return TensorAction("merged")
        if len({t.dtype for t in tensors}) == 1 and kinds <= {*COPYABLE_KINDS, "packed", "complex"}:
            return TensorAction("buffer")
        dtypes = ", ".join(f"{self._label(p)}: {t.dtype}" for p, t in zip(parts, tensors, strict=True))
        self.problems.append(
            f"{name}: the dtypes cannot be merged ({dtypes}); expected {', '.join(MERGEABLE)} in all models, "
            "or one integer dtype. Convert the model that differs."
        )
        return None

    def _cannot_be_copy(self, name: str, given: ModelPart | None) -> bool:
        """Is a tensor, given by a model that completes the output, none that its config ties to another?

        Values of these alone are compared: the model may be on the hub, where others need not be downloaded.
        """
        if given is None:
            return False
        source = self.sources[given.model]
        return given.names[name] not in tied_copies(source.config, source.tensors)

    def _original(
        self, name: str, holders: Sequence[ModelPart], donor: ModelPart | None, lacking: Sequence[ModelPart]
    ) -> str | None:
        """Return the tensor that ``name`` is a tied copy of in every model that has it; None if none is.

        A model without the copy gets it from that tensor when it is loaded, unless its config unties the
        head.
        """
        if len(self.problems) + self.copies > MOST_COPIES:
            return None
        untied = any(self.sources[p.model].config.get("tie_word_embeddings") is False for p in lacking)
        if untied and "embed" not in name:
            return None
        having = [*holders, *([donor] if donor is not None and donor not in holders else [])]
        shared = set.intersection(*(set(p.names) for p in (*having, *lacking)))
        originals = set()
        for part in having:
            named = {full: n for n, full in part.names.items() if n in shared}
            original = find_original(self.sources[part.model], part.names[name], named)
            originals.add(named.get(original) if original is not None else None)
        self.copies += 1
        return originals.pop() if len(originals) == 1 else None

    def _note_own_heads(self, head: str, parts: Sequence[ModelPart]) -> None:
        """Note heads that are dropped as tied, by the configs of their models, and have values of their own."""
        embedding = self.tied[head]
        for part in parts:
            source = self.sources[part.model]
            stored = part.names.get(embedding, embedding)
            if has_own_values(source, part.names[head], stored):
                self.notes.append(
                    f"{head}: {source.label} stores values that differ from {embedding}, but its config ties the "
                    "two, so they are left out, as programs that follow the config ignore them. If this head was "
                    f"trained, set tie_word_embeddings to false in the config.json of {source.label}."
                )

    def _drop(self, name: str, parts: Sequence[ModelPart], why: str) -> None:
        self.dropped += dict.fromkeys((p.model, p.names[name], why) for p in parts)

    def _tensor(self, part: ModelPart, name: str) -> Tensor:
        return self.sources[part.model].tensors[part.names[name]]

    def _label(self, part: ModelPart) -> str:
        return self.sources[part.model].label

    def _shape_problem(self, name: str, part: ModelPart, other: ModelPart) -> str:
        a, b = self._tensor(part, name).shape, self._tensor(other, name).shape
        text = f"{name}: {self._label(part)} is {a}, {self._label(other)} is {b}; "
        if all(p.names[name] in find_tables(self.sources[p.model]).rows for p in (part, other)) and _widths(
            a
        ) == _widths(b):
            size = self._shared_size(part.model, other.model)
            return rows_differ_message(
                name, self._label(part), rows_of(a), self._label(other), rows_of(b), size
            )
        return text + "expected one shape. Use models of one architecture and size."

    def _shared_size(self, model: int, other: int) -> int | None:
        """Return the number of rows that the tokens of two models need, if their vocabularies are equal."""
        a, b = (read_vocabulary(self.sources[m].directory) for m in (model, other))
        is_same = a is not None and b is not None and a.size == b.size and difference(a, b) is None
        return a.size if a is not None and is_same else None

    def _missing_problem(self, name: str, lacking: Sequence[ModelPart], reference: ModelPart) -> str:
        shape, matched_names = self._tensor(reference, name).shape, set(reference.names.values())
        tensors = self.sources[lacking[0].model].tensors
        near = difflib.get_close_matches(
            name, [n for n, t in tensors.items() if n not in matched_names and t.shape == shape], 1, 0.8
        )
        hint = f" It has {near[0]!r}." if near else ""
        return (
            f"{name}: {self._label(reference)} has it, {self._lack(lacking)} it; expected it in all "
            f"models.{hint} Use models of one architecture{OR_MISSING}"
        )

    def _lack(self, parts: Sequence[ModelPart]) -> str:
        return self._labels_with(parts, "lack")

    def _labels_with(self, parts: Sequence[ModelPart], verb: str) -> str:
        """Return the labels with a verb: "b lacks", "b and c lack"."""
        labels = dict.fromkeys(self._label(p) for p in parts)
        return f"{' and '.join(labels)} {verb}{'' if len(labels) > 1 else 's'}"

    def check_vocabularies(self, models: Sequence[int], own: int) -> None:
        """Compare the vocabularies of ``models`` with that of the model whose tokenizer the output has, ``own``."""
        reference = None
        donor = self.sources[own]
        for model in models:
            source = self.sources[model]
            if model == own or same_files(donor.directory, source.directory):
                continue
            reference = reference or read_vocabulary(donor.directory)
            other = read_vocabulary(source.directory)
            if reference is None or other is None:
                unread = unread_file(donor.directory) or unread_file(source.directory)
                if unread is not None:
                    self.notes.append(
                        f"the vocabularies of {donor.label} and {source.label} were not compared: {unread} "
                        "cannot be read by this version. Make sure that they are equal."
                    )
                continue
            differs = difference(reference, other)
            if differs is not None:
                self.problems.append(vocabularies_differ_message(donor.label, source.label, differs))
            elif (count := count_renamed(reference, other)) > 0:
                self.notes.append(
                    f"{count} added tokens of {donor.label} have another row in {source.label}; the output "
                    f"has the tokenizer of {donor.label}."
                )


def _are_often_left_out(names: Sequence[str]) -> bool:
    """Is all that a model lacks part of layers for multi-token prediction, or of vision and audio towers?"""
    layers = count_layers(names)
    return all(
        families.is_predictor(name)
        or families.is_vision(name)
        or families.is_tower(name)
        or layers.predictor_place(name) is not None
        for name in names
    )


def check_factors(jobs: Iterable[Job], sources: Sequence[Source]) -> None:
    """Refuse to merge adapter factors stored next to a model's weights. Errors: MismatchError."""
    factor_jobs = [job for job in jobs if job.is_computed and is_factor(job.name)]
    if factor_jobs:
        labels = ", ".join(dict.fromkeys(sources[tensor.model].label for tensor in factor_jobs[0].merged))
        raise MismatchError(
            f"{factor_jobs[0].name}: is a factor of an adapter's update and would be merged on its own "
            f"({len(factor_jobs)} such tensors of {labels}); merging factors does not merge their products. "
            "Expected models without adapters, or with adapters merged into their weights. Merge each "
            "model's adapter into it first (PEFT: merge_and_unload), or copy the factors from one model "
            "with a rule under `methods` with merge_method: passthrough."
        )


def check_modules(jobs: Sequence[Job], sources: Sequence[Source], donor: int) -> list[str]:
    """Compare configs and vocabularies of the donor's module folders with other models'; return notes.

    Errors: MismatchError if a module has its own vocabulary and rows of different tokens would be merged.
    """
    notes = []
    for folder in modules_of(sources[donor]):
        merged = [job for job in jobs if job.is_computed and job.name.startswith(f"{folder}/")]
        for model in sorted({tensor.model for job in merged for tensor in job.merged} - {donor}):
            roots = [sources[i].directory for i in (donor, model)]
            if roots[0] is None or roots[1] is None:
                continue
            folder_of_donor, folder_of_model = roots[0] / folder, roots[1] / folder
            labels = f"{sources[donor].label} and {sources[model].label}"
            vocabularies = [_vocabulary_folder(root, folder) for root in (roots[0], roots[1])]
            if (differs := _vocabulary_difference(*vocabularies)) is not None:
                raise MismatchError(
                    f"{folder}: {labels} have different vocabularies ({differs}); expected equal ones, "
                    f"because rows are merged by position ({merged[0].name}). Use models with one "
                    "vocabulary, or copy the module from one model with a rule under `methods` with "
                    "merge_method: passthrough."
                )
            if _settings(folder_of_donor) != _settings(folder_of_model):
                notes.append(
                    f"{folder}: the configs of {labels} differ; the output has that of "
                    f"{sources[donor].label}."
                )
    return notes


def _vocabulary_folder(root: Path, folder: str) -> Path:
    """The folder of a module's tokenizer: a pipeline has ``tokenizer_2`` for ``text_encoder_2``."""
    own = root / re.sub("^text_encoder", "tokenizer", folder)
    return own if own.is_dir() else root / folder


def _vocabulary_difference(folder: Path, other: Path) -> str | None:
    """Say how the vocabularies of two folders differ; None if they are equal or missing."""
    for name in WORD_LISTS:
        if (folder / name).exists() or (other / name).exists():
            contents = [read_json(f / name) if (f / name).exists() else None for f in (folder, other)]
            return None if contents[0] == contents[1] else f"{name} is not the same in both"
    if same_files(folder, other):
        return None
    reference, others = read_vocabulary(folder), read_vocabulary(other)
    if reference is None or others is None:
        unread = [name for name in (unread_file(folder), unread_file(other)) if name is not None]
        return f"{unread[0]} is not the same in both, and cannot be read" if unread else None
    return difference(reference, others)


def _settings(folder: Path) -> dict[str, Any]:
    """Return a module's config without the keys that may differ between equal modules."""
    path = folder / "config.json"
    config = read_json(path) if path.exists() else {}
    return {key: value for key, value in config.items() if key not in IGNORED_SETTINGS}


def _widths(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the dimensions of a token table without its rows."""
    return tuple(n for n in shape if n != 1)[1:]
