"""Whether the tensors that make one fit together: by names and shapes in the headers, never by a template of a family."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alnico.checkpoint.duplicate_tensors import find_original
from alnico.checkpoint.factors import is_factor
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.sidecars import modules_of
from alnico.checkpoint.source import Source, Tensor
from alnico.errors import MismatchError
from alnico.numerics.dtypes import COPYABLE_KINDS, DTYPES, MERGEABLE
from alnico.plan import families
from alnico.plan.compatibility import NEARLY_ALL, Misfit, explain_mismatch
from alnico.plan.job import Job
from alnico.plan.sections import ModelPart, Section, TensorMethod
from alnico.recipe.schema import Missing
from alnico.vocabulary.compare import (
    difference,
    different_rows,
    different_vocabularies,
    read_vocabulary,
    renamed,
    same_files,
    unread_file,
)
from alnico.vocabulary.tables import rows_of, tables_of

MAX_SHOWN = 5

OR_MISSING = ", or say missing: copy or missing: drop in the recipe."
"""How the advice on a tensor that some model lacks ends, unless nearly all are such."""

WORD_LISTS = ("whitespacetokenizer_config.json", "phrasetokenizer_config.json")
"""Vocabularies of sentence-transformers' word embeddings."""
NO_SETTINGS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")

MOST_COPIES = 64
"""Most tensors that are looked for as tied copies: models that differ in more are not told apart by their ties."""


@dataclass(frozen=True)
class TensorAction:
    """What becomes of a tensor: it is merged, a buffer that all must agree on, or taken from one model, with the reason."""

    kind: Literal["merged", "buffer", "from one"]
    origin: ModelPart | None = None
    why: str = ""


@dataclass
class TensorMatcher:
    """Matches tensors one by one and collects what does not fit, what is dropped (model, name, why), and notes."""

    sources: Sequence[Source]
    donor: int
    missing: Missing
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    misfits: list[Misfit] = field(default_factory=list)
    asked: int = 0
    """Tensors whose fate was asked for."""
    copies: int = 0
    """Tensors that were looked for as tied copies."""

    def __post_init__(self) -> None:
        names = dict.fromkeys(n for s in self.sources for n in s.tensors if n.endswith(tuple(families.TIED)))
        self.tied = families.tied_heads(
            self.sources[self.donor].config, self.sources[self.donor].tensors, names
        )

    def fate(self, name: str, section: Section, asked: TensorMethod) -> TensorAction | None:
        """Say what becomes of the tensor ``name``; None if it is dropped, or does not fit."""
        self.asked += 1
        holders = [p for p in asked.needed if name in p.names]
        lacking = [p for p in asked.needed if name not in p.names]
        donor = section.donor if section.donor is not None and name in section.donor.names else None
        if not holders and donor is None:
            return None  # only a base has it that the method does not use
        if not lacking:
            return self._all_have_it(name, holders, donor)
        reference = donor or holders[0]
        tensor = self._tensor(reference, name)
        if DTYPES[tensor.dtype].kind in COPYABLE_KINDS or families.counter_meaning(name):
            why = f"a buffer that {self._lack(lacking)}"
            self._drop(name, [p for p in holders if donor is None or p.place != donor.place], why)
            return (
                TensorAction("from one", donor, f"{why}; taken from {self._label(donor)}")
                if donor is not None
                else None
            )
        if name in self.tied:
            self._drop(
                name,
                [*holders, *([donor] if donor else [])],
                f"tied to {self.tied[name]} in the config, and {self._lack(lacking)} it",
            )
            return None
        original = self._original(name, holders, donor, lacking)
        if original is not None:
            self._drop(
                name,
                [*holders, *([donor] if donor else [])],
                f"a tied copy of {original}, which {self._they(lacking, 'store')} once",
            )
            return None
        if self.missing == "drop":
            self._drop(
                name, holders or [reference], f"{self._lack(lacking)} it, and the recipe says missing: drop"
            )
            return None
        if self.missing == "copy":
            why = f"{self._lack(lacking)} it, and the recipe says missing: copy"
            self._drop(
                name,
                [p for p in holders if p.place != reference.place],
                f"taken from {self._label(reference)}: {why}",
            )
            return TensorAction("from one", reference, why)
        self.misfits.append(
            Misfit(
                name, {p.model: self._tensor(p, name).shape if p in holders else None for p in asked.needed}
            )
        )
        # Messages are made for those that are shown only: looking for near names among 10,000 takes its time.
        self.problems.append(self._lacks(name, lacking, reference) if len(self.problems) < MAX_SHOWN else "")
        return None

    def refuse(self) -> None:
        """Raise what was found. Errors: MismatchError."""
        if self.problems:
            if (explained := explain_mismatch(self.misfits, self.sources)) is not None:
                raise MismatchError(*explained)
            more = len(self.problems) - MAX_SHOWN
            rest = [f"... and {more} more tensors that do not fit."] if more > 0 else []
            told = self.problems[:MAX_SHOWN] + rest
            lacking = sum(None in m.shapes.values() for m in self.misfits)
            if lacking > NEARLY_ALL * self.asked:
                nothing = f"{lacking} of {self.asked} tensors are not in all models, so that missing: drop would leave next to nothing"
                told = [line.replace(OR_MISSING, ".") for line in told]
                told.append(
                    f"{nothing}. Look at the names: one model may have a prefix that the others lack."
                )
            raise MismatchError(*told)

    def refuse_nothing(self, jobs: Collection[Job]) -> None:
        """Refuse an output without weights. Errors: MismatchError, saying what became of the models' tensors."""
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
        found = ", ".join(f"{name} of {self.sources[m].label}" for m, name in sorted(first.items()))
        if self.missing == "drop" and dropped:
            raise MismatchError(
                f"the output would have no {what}: no weight is in all models, and missing: drop leaves out the others (the first are {found}); "
                "expected weights that all models have. Use models of one architecture, under the same names."
            )
        names = ", ".join(s.label for s in self.sources)
        raise MismatchError(
            f"the output would have no {what}: nothing of {names} is taken into it; expected some. Check the models, and the modules, slices and "
            "filters of the recipe."
        )

    def _all_have_it(
        self, name: str, parts: Sequence[ModelPart], donor: ModelPart | None
    ) -> TensorAction | None:
        tensors = [self._tensor(p, name) for p in parts]
        for part, tensor in zip(parts[1:], tensors[1:], strict=True):
            if tensor.shape != tensors[0].shape:
                self.misfits.append(
                    Misfit(name, {p.model: t.shape for p, t in zip(parts, tensors, strict=True)})
                )
                self.problems.append(self._shapes(name, parts[0], part))
                return None
        kinds = {DTYPES[t.dtype].kind for t in tensors}
        what, is_position = families.counter_meaning(name), name.endswith("position_ids")
        if (
            what is not None
            and len(parts) > 1
            and (len({t.dtype for t in tensors}) > 1 if is_position else True)
        ):
            origin = donor or parts[0]
            if not name.endswith(families.BATCH_COUNT):
                held = ", ".join(dict.fromkeys(t.dtype for t in tensors))
                found = f" (stored as {held})" if len({t.dtype for t in tensors}) > 1 else ""
                self.notes.append(
                    f"{name}: {what}{found}, no weight; it is taken from {self._label(origin)} as it is."
                )
            why = f"{what}; taken from {self._label(origin)}"
            self._drop(name, [p for p in parts if p.place != origin.place], why)
            return TensorAction("from one", origin, why)
        if kinds == {"float"}:
            return TensorAction("merged")
        if len({t.dtype for t in tensors}) == 1 and kinds <= {*COPYABLE_KINDS, "packed", "complex"}:
            return TensorAction("buffer")
        held = ", ".join(f"{self._label(p)}: {t.dtype}" for p, t in zip(parts, tensors, strict=True))
        self.problems.append(
            f"{name}: the dtypes cannot be merged ({held}); expected {', '.join(MERGEABLE)} in all models, "
            "or one integer dtype. Convert the model that differs."
        )
        return None

    def _original(
        self, name: str, holders: Sequence[ModelPart], donor: ModelPart | None, lacking: Sequence[ModelPart]
    ) -> str | None:
        """The tensor that ``name`` is a tied copy of in every model that has it, and that all models have; None if there is none.

        A model that lacks the copy takes it from there when it is loaded, unless its config says that its head is not tied.
        """
        if len(self.problems) + self.copies > MOST_COPIES:
            return None
        untied = any(self.sources[p.model].config.get("tie_word_embeddings") is False for p in lacking)
        if untied and "embed" not in name:
            return None
        having = [*holders, *([donor] if donor is not None and donor not in holders else [])]
        shared = set.intersection(*(set(p.names) for p in (*having, *lacking)))
        found = set()
        for part in having:
            named = {full: n for n, full in part.names.items() if n in shared}
            original = find_original(self.sources[part.model], part.names[name], named)
            found.add(named.get(original) if original is not None else None)
        self.copies += 1
        return found.pop() if len(found) == 1 else None

    def _drop(self, name: str, parts: Sequence[ModelPart], why: str) -> None:
        self.dropped += dict.fromkeys((p.model, p.names[name], why) for p in parts)

    def _tensor(self, part: ModelPart, name: str) -> Tensor:
        return self.sources[part.model].tensors[part.names[name]]

    def _label(self, part: ModelPart) -> str:
        return self.sources[part.model].label

    def _shapes(self, name: str, one: ModelPart, other: ModelPart) -> str:
        a, b = self._tensor(one, name).shape, self._tensor(other, name).shape
        text = f"{name}: {self._label(one)} is {a}, {self._label(other)} is {b}; "
        if all(p.names[name] in tables_of(self.sources[p.model]).rows for p in (one, other)) and _widths(
            a
        ) == _widths(b):
            size = self._shared_size(one.model, other.model)
            return different_rows(name, self._label(one), rows_of(a), self._label(other), rows_of(b), size)
        return text + "expected one shape. Use models of one architecture and size."

    def _shared_size(self, one: int, other: int) -> int | None:
        """Rows that the tokens of two models need, if their vocabularies are the same."""
        a, b = (read_vocabulary(self.sources[m].directory) for m in (one, other))
        is_same = a is not None and b is not None and a.size == b.size and difference(a, b) is None
        return a.size if a is not None and is_same else None

    def _lacks(self, name: str, lacking: Sequence[ModelPart], reference: ModelPart) -> str:
        shape, known = self._tensor(reference, name).shape, set(reference.names.values())
        tensors = self.sources[lacking[0].model].tensors
        near = difflib.get_close_matches(
            name, [n for n, t in tensors.items() if n not in known and t.shape == shape], 1, 0.8
        )
        hint = f" It has {near[0]!r}." if near else ""
        return (
            f"{name}: {self._label(reference)} has it, {self._lack(lacking)} it; expected it in all models.{hint} "
            f"Use models of one architecture{OR_MISSING}"
        )

    def _lack(self, parts: Sequence[ModelPart]) -> str:
        return self._they(parts, "lack")

    def _they(self, parts: Sequence[ModelPart], verb: str) -> str:
        """The labels with a verb: "b lacks", "b and c lack"."""
        labels = dict.fromkeys(self._label(p) for p in parts)
        return f"{' and '.join(labels)} {verb}{'' if len(labels) > 1 else 's'}"

    def vocabularies(self, models: Sequence[int]) -> None:
        """Compare the vocabularies of the models whose embeddings are used with that of the donor."""
        reference = None
        donor = self.sources[self.donor]
        for model in models:
            source = self.sources[model]
            if model == self.donor or same_files(donor.directory, source.directory):
                continue
            reference = reference or read_vocabulary(donor.directory)
            other = read_vocabulary(source.directory)
            if reference is None or other is None:
                unread = unread_file(donor.directory) or unread_file(source.directory)
                if unread is not None:
                    self.notes.append(
                        f"the vocabularies of {donor.label} and {source.label} were not compared: "
                        f"{unread} cannot be read by this version. Make sure that they are the same."
                    )
                continue
            differs = difference(reference, other)
            if differs is not None:
                self.problems.append(different_vocabularies(donor.label, source.label, differs))
            elif (count := renamed(reference, other)) > 0:
                self.notes.append(
                    f"{count} added tokens of {donor.label} have another row in {source.label}; "
                    f"the output has the tokenizer of {donor.label}."
                )


def check_factors(jobs: Iterable[Job], sources: Sequence[Source]) -> None:
    """Refuse to merge factors of an adapter that a model has beside its weights. Errors: MismatchError."""
    found = [job for job in jobs if job.is_computed and is_factor(job.name)]
    if found:
        labels = ", ".join(dict.fromkeys(sources[given.model].label for given in found[0].merged))
        raise MismatchError(
            f"{found[0].name}: is a factor of an adapter's update, and would be merged by itself ({len(found)} such tensors of {labels}); the "
            "merge of factors is not that of their products. Expected models without adapters, or with adapters that are merged into their "
            "weights. Merge each model's adapter into it first (merge_and_unload of PEFT), or take the factors from one model, by a rule "
            "of `methods` with merge_method: passthrough."
        )


def check_modules(jobs: Sequence[Job], sources: Sequence[Source], donor: int) -> list[str]:
    """Compare what lies beside the weights in the folders of the donor's modules with the other models'; return notes.

    Errors: MismatchError where a module has a vocabulary of its own, and rows of other tokens would be merged.
    """
    notes = []
    for folder in modules_of(sources[donor]):
        merged = [job for job in jobs if job.is_computed and job.name.startswith(f"{folder}/")]
        for model in sorted({given.model for job in merged for given in job.merged} - {donor}):
            roots = [sources[i].directory for i in (donor, model)]
            if roots[0] is None or roots[1] is None:
                continue
            one, other = roots[0] / folder, roots[1] / folder
            labels = f"{sources[donor].label} and {sources[model].label}"
            if (differs := _differing_words(one, other)) is not None:
                raise MismatchError(
                    f"{folder}: {labels} have different vocabularies ({differs}); expected one, as rows are merged by their place "
                    f"({merged[0].name}). Use models of one vocabulary, or take the module from one model, by a rule of `methods` with "
                    "merge_method: passthrough."
                )
            if _settings(one) != _settings(other):
                notes.append(
                    f"{folder}: the configs of {labels} differ; the output has that of {sources[donor].label}."
                )
    return notes


def _differing_words(one: Path, other: Path) -> str | None:
    """How the vocabularies of two folders differ; None if they do not, or there are none."""
    for name in WORD_LISTS:
        if (one / name).exists() or (other / name).exists():
            contents = [
                read_json(folder / name) if (folder / name).exists() else None for folder in (one, other)
            ]
            return None if contents[0] == contents[1] else f"{name} is not the same in both"
    if same_files(one, other):
        return None
    reference, others = read_vocabulary(one), read_vocabulary(other)
    if reference is None or others is None:
        unread = [name for name in (unread_file(one), unread_file(other)) if name is not None]
        return f"{unread[0]} is not the same in both, and cannot be read" if unread else None
    return difference(reference, others)


def _settings(folder: Path) -> dict[str, Any]:
    """The config of a module, but for what differs between equal ones."""
    path = folder / "config.json"
    found = read_json(path) if path.exists() else {}
    return {key: value for key, value in found.items() if key not in NO_SETTINGS}


def _widths(shape: Sequence[int]) -> tuple[int, ...]:
    """The dimensions of a table of tokens but its rows."""
    return tuple(n for n in shape if n != 1)[1:]
