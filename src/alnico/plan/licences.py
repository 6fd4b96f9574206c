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
    "free": "requires its notice and attribution, and allows derivatives under other terms",
    "share-alike": "requires derivatives to be shared under the same licence",
    "non-commercial": "prohibits commercial use of the model and of derivatives",
    "no changes": "prohibits sharing modified versions",
    "own terms": "has its own terms that also bind derivatives: prohibited uses, names, notices, user limits",
}
"""What the licences of each kind say."""

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

NO_ADVICE = "Read the licences; this is not legal advice."


@dataclass(frozen=True)
class ModelLicence:
    """A model with the name of its licence (None: none stated) and the licence's kind (None: unknown)."""

    model: str
    licence: str | None
    kind: LicenceKind | None
    has_licence_file: bool = False

    def __str__(self) -> str:
        file = ", but has a file of that name" if self.has_licence_file and not self.licence else ""
        return f"{self.model} ({self.licence or 'states no licence' + file})"


def model_licences(lineages: Iterable[Lineage]) -> list[ModelLicence]:
    """Return all models that a merge derives from, with their licences, without repetition.

    >>> [str(m) for m in model_licences([Lineage("a", {"license": "mit"}), Lineage("b", {})])]
    ['a (mit)', 'b (states no licence)']
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
    """Describe each licence conflict in one line; [] if no model states a licence."""
    if all(m.licence is None for m in models):
        return []
    licences = {m.licence for m in models}
    of = {kind: [m for m in models if m.kind == kind] for kind in KINDS}
    others = {kind: [m for m in models if m.kind not in (kind, None)] for kind in KINDS}
    lines = []
    if of["no changes"]:
        lines.append(f"{_listed(of['no changes'])}: {_why('no changes')}, and a merge is a modified version.")
    if of["non-commercial"] and others["non-commercial"]:
        lines.append(
            f"{_listed(of['non-commercial'])}: {_why('non-commercial')}; {_listed(others['non-commercial'])} "
            "may allow it, but the merge does not."
        )
    if of["share-alike"] and len({m.licence for m in models if m.kind is not None}) > 1:
        rest = [m for m in models if m.kind is not None and m.licence != of["share-alike"][0].licence]
        lines.append(
            f"{_listed(of['share-alike'])}: {_why('share-alike')}; but also merged: {_listed(rest)}."
        )
    if of["own terms"] and len({m.licence for m in models if m.kind is not None}) > 1:
        rest = [m for m in models if m.kind is not None and m.licence != of["own terms"][0].licence]
        lines.append(
            f"{_listed(of['own terms'])}: {_why('own terms')}; {_listed(rest)} does not have them, but the "
            "merge does."
        )
    unknown = [m for m in models if m.kind is None]
    if unknown and len(licences) > 1:
        classified = [m for m in models if m.kind is not None]
        others_known = f" together with {_listed(classified)}" if classified else ""
        lines.append(f"{_listed(unknown)}: the terms are unknown to alnico{others_known}.")
    return [f"licences: {line} {NO_ADVICE}" for line in lines]


def check_licences(models: Sequence[ModelLicence]) -> None:
    """Refuse licence conflicts and models with an unknown licence. Errors: MismatchError."""
    problems = licence_conflicts(models)
    unknown = [m for m in models if m.kind is None]
    if not problems and unknown:
        problems = [f"licences: {_listed(unknown)}: the terms are unknown to alnico. {NO_ADVICE}"]
    if problems:
        raise MismatchError(
            *problems, "Leave a model out, or merge without --strict-license (strict_license=False)."
        )


def _why(kind: LicenceKind) -> str:
    return f"a licence that {KINDS[kind].replace(': ', ' (') + ')' if kind == 'own terms' else KINDS[kind]}"


def _listed(models: Sequence[ModelLicence]) -> str:
    shown = [str(m) for m in models[:3]]
    return ", ".join(shown) + (f" and {len(models) - 3} more" if len(models) > 3 else "")
