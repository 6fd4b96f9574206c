"""All that is known of a stored task vector, for ``store show``: its manifest, versions, licences and origin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alnico.checkpoint.task_vectors.manifest import Manifest, read_manifest
from alnico.checkpoint.task_vectors.store_folder import versions_of
from alnico.notebook import ResultTable, name_text, never_fails, result_html, result_line
from alnico.numerics.sizes import count_of, format_size
from alnico.plan.licences import LICENCES, ModelLicence, licence_conflicts
from alnico.store.entry import Entry, entry_of
from alnico.store.listing import error_text
from alnico.store.local_store import LocalStore


@dataclass(frozen=True)
class VectorDetails:
    """A stored task vector in full. ``origin`` says where it was pulled from, and is empty for one that was made here.

    ``licence_conflicts`` are sentences about its licence and its base's, as in the plan of a merge.
    """

    folder: Path
    entry: Entry
    manifest: Manifest
    versions: tuple[int, ...]
    origin: Mapping[str, Any]
    licence_conflicts: tuple[str, ...] = ()

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for ``--json``; without the sketches."""
        manifest = self.manifest
        tensors = {
            name: {
                "encoding": t.encoding,
                "dtype": t.dtype,
                "shape": list(t.shape),
                "error": t.error,
                "norm": t.norm,
                "byte_size": t.byte_size,
            }
            for name, t in manifest.tensors.items()
        }
        return {
            **self.entry.data(),
            "folder": os.fspath(self.folder),
            "versions": list(self.versions),
            "origin": dict(self.origin),
            "training": manifest.training,
            "evaluations": [asdict(e) for e in manifest.evaluations],
            "scale": asdict(manifest.scale),
            "added_tokens": dict(manifest.added_tokens),
            "chat_template": manifest.chat_template,
            "left_out": dict(manifest.left_out),
            "producer": manifest.producer,
            "licence_conflicts": list(self.licence_conflicts),
            "tensors": tensors,
        }

    def facts(self) -> list[tuple[str, str]]:
        """Return what it says of itself, as pairs of a name and a text, without what it does not say."""
        e, m = self.entry, self.manifest
        base = " ".join(
            filter(None, [e.base or "not named", f"@ {e.base_revision[:12]}" if e.base_revision else ""])
        )
        scale = f"{m.scale.suggested:g}"
        if m.scale.least is not None or m.scale.most is not None:
            ends = (
                "-inf" if m.scale.least is None else f"{m.scale.least:g}",
                "inf" if m.scale.most is None else f"{m.scale.most:g}",
            )
            scale += f", known to work from {ends[0]} to {ends[1]}"
        versions = ", ".join(map(str, self.versions))
        facts = [
            ("description", e.description),
            ("base", base),
            ("base licence", e.base_licence),
            ("licence", e.licence),
            ("tasks", ", ".join(e.tasks)),
            ("languages", ", ".join(e.languages)),
            ("versions", versions if len(self.versions) > 1 else ""),
            ("from", " ".join(str(self.origin[k]) for k in ("source", "reference") if k in self.origin)),
            ("kind", "PEFT adapter" if e.kind == "adapter" else ""),
            ("tensors", ", ".join(f"{count} {encoding}" for encoding, count in e.encodings.items())),
            ("size", format_size(e.byte_size)),
            ("error", error_text(e)),
            ("norm", f"{e.norm:.4g}"),
            ("scale", scale),
            ("training", m.training),
            ("added tokens", f"{len(m.added_tokens):,}" if m.added_tokens else ""),
            ("chat template", m.chat_template),
            ("left out", count_of(len(m.left_out), "tensor") if m.left_out else ""),
            ("made by", m.producer),
            ("folder", os.fspath(self.folder)),
        ]
        return [(name, text) for name, text in facts if text]

    @property
    def label(self) -> str:
        return f"{self.entry.name}@{self.entry.version}"

    def __repr__(self) -> str:
        e = self.entry
        return result_line(
            f"task vector {name_text(self.label)}",
            f"of {name_text(e.base or 'an unnamed base')}",
            format_size(e.byte_size),
            error_text(e),
        )

    @never_fails
    def _repr_html_(self) -> str:
        scores = [[e.task, e.metric, e.base, e.value, e.scale] for e in self.manifest.evaluations]
        return result_html(
            f"Task vector {name_text(self.label)}",
            ResultTable(("", ""), self.facts()),
            *([ResultTable(SCORE_COLUMNS, scores, "Evaluations")] if scores else []),
            *self.licence_conflicts,
        )


SCORE_COLUMNS = ("task", "metric", "base", "with the vector", "scale")


def describe_vector(store: LocalStore, folder: Path) -> VectorDetails:
    """Read all that is known of a stored task vector. Errors: ModelError."""
    name, version = folder.parent.name, int(folder.name)
    manifest = read_manifest(folder)
    return VectorDetails(
        folder,
        entry_of(folder, version),
        manifest,
        tuple(versions_of(store.folder, name)),
        store.origin(name, version),
        tuple(licence_conflicts(licences_of(manifest))),
    )


def licences_of(manifest: Manifest) -> list[ModelLicence]:
    """Return the licences of the base and of the task vector, with their kinds."""
    stated = ((manifest.base.id or "the base", manifest.base.licence), (manifest.name, manifest.licence))
    return [ModelLicence(name, licence, LICENCES.get((licence or "").lower())) for name, licence in stated]
