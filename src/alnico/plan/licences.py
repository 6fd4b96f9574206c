"""Finds conflicts between the licences that model cards state. This is not legal advice.

A merge is treated as a derivative of each of its models, whatever their weights. Whether it legally is one is
not settled; this is the cautious reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from alnico.checkpoint.lineage import Lineage, licence_name
from alnico.errors import MismatchError

LicenceKind = Literal["free", "share-alike", "non-commercial", "no changes", "own terms"]

KINDS: dict[LicenceKind, str] = {
    "free": "allows other terms for models made from it",
    "share-alike": "requires models made from it to be shared under the same licence",
    "non-commercial": "forbids commercial use, also of models made from it",
    "no changes": "forbids sharing changed versions, and a merge is one",
    "own terms": "has terms of its own that also bind models made from it",
}
"""What the licences of each kind do, after "which"."""

LICENCES: dict[str, LicenceKind] = {
    # Permissive, and public domain.
    **dict.fromkeys(
        ["apache-2.0", "mit", "mit-0", "isc", "0bsd", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "zlib", "bsl-1.0", "ncsa", "postgresql",
         "afl-3.0", "artistic-2.0", "ecl-2.0", "unlicense", "wtfpl", "cc0-1.0", "pddl", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
         "odc-by", "cdla-permissive-1.0", "cdla-permissive-2.0", "ms-pl", "ofl-1.1", "openmdw-1.0", "open-mdw", "etalab-2.0"],
        "free",
    ),
    # Copyleft, of software, data and works.
    **dict.fromkeys(
        ["gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "osl-3.0", "epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2",
         "cc-by-sa-3.0", "cc-by-sa-4.0", "odbl", "cdla-sharing-1.0", "gfdl", "lppl-1.3c"],
        "share-alike",
    ),
    # For research or free use only. Creative Commons licences that are also share-alike count as non-commercial, the stricter kind.
    **dict.fromkeys(
        ["cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "fair-noncommercial-research-license",
         "intel-research", "apple-amlr", "deepfloyd-if-license", "mrl", "mnpl", "mistral-research", "qwen-research", "cc-by-nc", "stabilityai-nc-research-community",
         "sai-nc-community", "flux-1-dev-non-commercial-license", "nvidia-noncommercial", "exaone"],
        "non-commercial",
    ),
    **dict.fromkeys(["cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"], "no changes"),
    # Licences of vendors and of the RAIL family, whose use restrictions must be passed on.
    **dict.fromkeys(
        ["gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "openrail", "openrail++", "creativeml-openrail-m",
         "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bigcode-openrail-m", "deepseek", "falcon-llm-license", "falcon-180b-license", "tongyi-qianwen",
         "tongyi-qianwen-license-agreement", "qwen", "yi-license", "nvidia-open-model-license", "stabilityai-ai-community", "stabilityai-community",
         "grok2-community", "lfm1.0", "jamba-open-model-license", "hippocratic-license-3.0", "c-uda"],
        "own terms",
    ),
}  # fmt: skip
"""The kind of each licence, by its lower-case id on the hub, or by its name on cards with the id ``other``.
Others are reported as unknown."""

CONFLICTING: tuple[LicenceKind, ...] = ("no changes", "non-commercial", "share-alike", "own terms")
"""Kinds that can conflict with others, or (no changes) with merging at all."""

SHOWN = 3
"""Most models that a sentence names."""


@dataclass(frozen=True)
class ModelLicence:
    """A model with the name of its licence (None: none stated) and the licence's kind (None: unknown)."""

    model: str
    licence: str | None
    kind: LicenceKind | None
    has_licence_file: bool = False

    def __str__(self) -> str:
        file = " (it has a licence file, but no card that names it)" if self.has_licence_file else ""
        return f"{self.model} ({self.licence})" if self.licence else f"{self.model}{file}"


def model_licences(lineages: Iterable[Lineage]) -> list[ModelLicence]:
    """Return all models that a merge derives from, with their licences, without repetition.

    >>> [str(m) for m in model_licences([Lineage("a", {"license": "mit"}), Lineage("b", {})])]
    ['a (mit)', 'b']
    """
    licences: dict[ModelLicence, None] = {}
    for lineage in lineages:
        for model in lineage.stated():
            name = licence_name(model.licence)
            kind = LICENCES.get((name or "").lower()) or LICENCES.get(
                model.licence.get("license", "").lower()
            )
            licences[ModelLicence(model.name, name, kind, model.has_licence_file)] = None
    return list(licences)


def licence_conflicts(models: Sequence[ModelLicence]) -> list[str]:
    """Describe each conflict between licences whose terms are known, in one sentence; [] without one.

    A licence that is not stated or not known is no conflict: the card shows what each model states.

    >>> licence_conflicts([ModelLicence("a", "cc-by-nc-4.0", "non-commercial"), ModelLicence("b", "mit", "free")])
    ['licences: a is cc-by-nc-4.0, which forbids commercial use, also of models made from it; b is mit.']
    >>> licence_conflicts([ModelLicence("a", None, None), ModelLicence("b", "mit", "free")])
    []
    """
    known = [m for m in models if m.kind is not None]
    lines = []
    for kind in CONFLICTING:
        bound = [m for m in known if m.kind == kind]
        others = [m for m in known if m.licence != bound[0].licence] if bound else []
        if kind == "non-commercial":
            others = [m for m in known if m.kind != kind]
        if bound and (others or kind == "no changes"):
            rest = [m for m in others if m not in bound]
            each = "which" if len({m.licence for m in bound}) == 1 else "each of which"
            lines.append(f"{_stated(bound)}, {each} {KINDS[kind]}{'; ' + _stated(rest) if rest else ''}.")
    return [f"licences: {line}" for line in lines]


def check_licences(models: Sequence[ModelLicence]) -> None:
    """Refuse licence conflicts, and models whose licence is not stated or not known. Errors: MismatchError."""
    problems = licence_conflicts(models)
    silent = [m for m in models if m.licence is None]
    unknown = [m for m in models if m.licence is not None and m.kind is None]
    if silent:
        problems.append(f"licences: no licence is stated by {_listed([str(m) for m in silent])}.")
    if unknown:
        problems.append(f"licences: alnico does not know the terms of {_listed([str(m) for m in unknown])}.")
    if problems:
        raise MismatchError(
            *problems,
            "--strict-license (strict_license=True) refuses licences that conflict, are not stated or are not "
            "known. Leave a model out, or merge without it. This is not legal advice.",
        )


def _stated(models: Sequence[ModelLicence]) -> str:
    """Say which licences models have: ``a is mit``, ``a and b are llama3``.

    >>> _stated([ModelLicence("a", "mit", "free"), ModelLicence("b", "gpl", "free"), ModelLicence("c", "mit", "free")])
    'a and c are mit and b is gpl'
    """
    of: dict[str | None, list[str]] = {}
    for m in models:
        of.setdefault(m.licence, []).append(m.model)
    return _listed(
        [f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {name}" for name, names in of.items()]
    )


def _listed(words: Sequence[str]) -> str:
    if len(words) > SHOWN:
        return f"{', '.join(words[:SHOWN])} and {len(words) - SHOWN} more"
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"
