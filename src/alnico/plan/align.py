"""Which input tensors make which output tensor: by names and shapes in the headers, never by a template of a family."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from alnico.checkpoint.model import Source
from alnico.errors import MismatchError
from alnico.numerics.dtypes import COPYABLE_KINDS, DTYPES, MERGEABLE
from alnico.plan.batchnorm import is_count, statistics_note
from alnico.recipe.schema import Missing
from alnico.vocabulary.compare import difference, read_vocabulary, renamed, same_files, unread_file

TIED = {"lm_head.weight": "model.embed_tokens.weight", "decoder.weight": "embeddings.word_embeddings.weight"}
"""Heads that a config with ``tie_word_embeddings`` takes from the embedding. Matched at the end of a name."""

EMBEDDING_ENDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "lm_head.weight", "embed_out.weight")
MAX_SHOWN = 5


@dataclass(frozen=True)
class Alignment:
    """Names of the output in order, those that only the donor gives, and what is dropped (model, name, why)."""

    merged: tuple[str, ...]
    buffers: tuple[str, ...]
    from_one: tuple[tuple[str, int, str], ...]
    dropped: tuple[tuple[int, str, str], ...]
    notes: tuple[str, ...]


@dataclass
class _Findings:
    merged: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    from_one: list[tuple[str, int, str]] = field(default_factory=list)
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def align(sources: Sequence[Source], needed: Sequence[int], donor: int, missing: Missing) -> Alignment:
    """Match the tensors of all models by name; ``needed`` are the models whose values are merged.

    The output has the donor's tensors in the donor's order, then those that ``missing: copy`` takes from others.
    Errors: MismatchError, listing what does not fit: shapes, dtypes, float tensors that a model lacks, vocabularies.
    """
    found = _Findings()
    order = list(dict.fromkeys([*sources[donor].tensors, *(n for m in needed for n in sources[m].tensors)]))
    heads = _tied_heads(sources, donor)
    for name in order:
        holders = [m for m in needed if name in sources[m].tensors]
        lacking = [m for m in needed if name not in sources[m].tensors]
        reference = sources[donor] if name in sources[donor].tensors else sources[holders[0]]
        dtype = reference.tensors[name].dtype
        if not lacking:
            _all_have_it(name, sources, needed, donor, found)
        elif DTYPES[dtype].kind in COPYABLE_KINDS:
            _buffer_missing(name, sources, holders, lacking, donor, found)
        elif name in heads:
            why = f"tied to {heads[name]} in the config, and {_lack(sources, lacking)} it"
            found.dropped += [(m, name, why) for m in {*holders, *([donor] if name in sources[donor].tensors else [])}]
        elif missing == "drop":
            why = f"{_lack(sources, lacking)} it, and the recipe says missing: drop"
            found.dropped += [(m, name, why) for m in holders or [donor]]
        elif missing == "copy":
            origin = donor if name in sources[donor].tensors else holders[0]
            why = f"{_lack(sources, lacking)} it, and the recipe says missing: copy"
            found.from_one.append((name, origin, why))
            found.dropped += [(m, name, f"taken from {sources[origin].label}: {why}") for m in holders if m != origin]
        else:
            # Messages are made for those that are shown only: looking for near names among 10,000 takes its time.
            found.problems.append(_lacks(name, sources, lacking, reference) if len(found.problems) < MAX_SHOWN else "")
    if not found.problems:
        _vocabularies(sources, needed, donor, found)
    found.notes += statistics_note(found.merged) if len(needed) > 1 else []
    if found.problems:
        more = len(found.problems) - MAX_SHOWN
        rest = [f"... and {more} more tensors that do not fit."] if more > 0 else []
        raise MismatchError("\n".join(found.problems[:MAX_SHOWN] + rest))
    return Alignment(*(tuple(getattr(found, n)) for n in ("merged", "buffers", "from_one", "dropped", "notes")))


def _all_have_it(name: str, sources: Sequence[Source], needed: Sequence[int], donor: int, found: _Findings) -> None:
    tensors = [sources[m].tensors[name] for m in needed]
    first = tensors[0]
    for model, tensor in zip(needed[1:], tensors[1:], strict=True):
        if tensor.shape != first.shape:
            found.problems.append(_shapes(name, sources, needed[0], model))
            return
    kinds = {DTYPES[t.dtype].kind for t in tensors}
    if kinds == {"float"}:
        found.merged.append(name)
    elif is_count(name) and len(needed) > 1:
        origin = donor if name in sources[donor].tensors else needed[0]
        why = f"a count of batches; taken from {sources[origin].label}"
        found.from_one.append((name, origin, why))
        found.dropped += [(m, name, why) for m in needed if m != origin]
    elif len({t.dtype for t in tensors}) == 1 and kinds <= {*COPYABLE_KINDS, "packed", "complex"}:
        found.buffers.append(name)
    else:
        held = ", ".join(f"{sources[m].label}: {t.dtype}" for m, t in zip(needed, tensors, strict=True))
        found.problems.append(
            f"{name}: the dtypes cannot be merged ({held}); expected {', '.join(MERGEABLE)} in all models, "
            "or one integer dtype. Convert the model that differs."
        )


def _buffer_missing(
    name: str, sources: Sequence[Source], holders: list[int], lacking: list[int], donor: int, found: _Findings
) -> None:
    if name in sources[donor].tensors:
        found.from_one.append((name, donor, f"a buffer that {_lack(sources, lacking)}; taken from {sources[donor].label}"))
        others = [m for m in holders if m != donor]
    else:
        others = holders
    found.dropped += [(m, name, f"a buffer that {_lack(sources, lacking)}") for m in others]


def _shapes(name: str, sources: Sequence[Source], one: int, other: int) -> str:
    a, b = sources[one].tensors[name].shape, sources[other].tensors[name].shape
    text = f"{name}: {sources[one].label} is {a}, {sources[other].label} is {b}; "
    if name.endswith(EMBEDDING_ENDINGS) and a[1:] == b[1:]:
        return text + (
            "the models have different vocabularies; expected one. "
            "Merging vocabularies is planned for 0.3: use models with the same tokenizer."
        )
    return text + "expected one shape. Use models of one architecture and size."


def _lacks(name: str, sources: Sequence[Source], lacking: list[int], reference: Source) -> str:
    shape = reference.tensors[name].shape
    others = [n for n, t in sources[lacking[0]].tensors.items() if n not in reference.tensors and t.shape == shape]
    near = difflib.get_close_matches(name, others, 1, 0.8)
    hint = f" It has {near[0]!r}." if near else ""
    return (
        f"{name}: {reference.label} has it, {_lack(sources, lacking)} it; expected it in all models.{hint} "
        "Use models of one architecture, or say missing: copy or missing: drop in the recipe."
    )


def _labels(sources: Sequence[Source], models: Sequence[int]) -> str:
    return " and ".join(dict.fromkeys(sources[m].label for m in models))


def _lack(sources: Sequence[Source], models: Sequence[int]) -> str:
    """The labels with the verb: "b lacks", "b and c lack"."""
    labels = _labels(sources, models)
    return f"{labels} lack{'' if len({sources[m].label for m in models}) > 1 else 's'}"


def _tied_heads(sources: Sequence[Source], donor: int) -> dict[str, str]:
    """Names of heads that the donor's config ties to an embedding that the donor stores."""
    if not sources[donor].config.get("tie_word_embeddings", False):
        return {}
    stored = list(sources[donor].tensors)
    everything = {n for s in sources for n in s.tensors}
    return {
        name: next(e for e in stored if e.endswith(embedding))
        for head, embedding in TIED.items()
        for name in everything
        if name.endswith(head) and any(e.endswith(embedding) for e in stored)
    }


def _vocabularies(sources: Sequence[Source], needed: Sequence[int], donor: int, found: _Findings) -> None:
    reference = None
    for model in needed:
        if model == donor or same_files(sources[donor].directory, sources[model].directory):
            continue
        reference = reference or read_vocabulary(sources[donor].directory)
        other = read_vocabulary(sources[model].directory)
        if reference is None or other is None:
            unread = unread_file(sources[donor].directory) or unread_file(sources[model].directory)
            if unread is not None:
                found.notes.append(
                    f"the vocabularies of {sources[donor].label} and {sources[model].label} were not compared: "
                    f"{unread} cannot be read by this version. Make sure that they are the same."
                )
            continue
        differs = difference(reference, other)
        if differs is not None:
            found.problems.append(
                f"{sources[donor].label} and {sources[model].label} have different vocabularies: {differs}; expected one. "
                "Merging vocabularies is planned for 0.3: use models with the same tokenizer."
            )
        elif (count := renamed(reference, other)) > 0:
            found.notes.append(
                f"{count} added tokens of {sources[donor].label} have another row in {sources[model].label}; "
                f"the output has the tokenizer of {sources[donor].label}."
            )
