"""Writes the card of a published task vector: what hubs read of it, and how people use it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

from alnico._version import __version__
from alnico.checkpoint.lineage import MODEL_NAME
from alnico.checkpoint.lora_adapter import CONFIG
from alnico.checkpoint.task_vectors.manifest import MANIFEST, Manifest
from alnico.errors import visible
from alnico.installation import public_requirement
from alnico.numerics.sizes import format_size
from alnico.plan.licences import LICENCES

TAG = "task-vector"
"""The tag by which task vectors are found on the hub."""

ADAPTER_ENCODINGS = {"absent", "low_rank", "adapter"}

VECTOR_CARD = """\
---
{front_matter}
---
# {name}

{description}A task vector: what a fine-tune of {base} changed. It is not a model of its own.

| | |
|---|---|
{facts}

## Use

```sh
{install}alnico store pull {repository}
alnico equip {base_word} {name}:{scale} -o OUT
```

It fits the base whose tensors have the hashes in `{manifest}`, and alnico applies it to no other.
The files are safetensors and JSON; no code of this repository is run.
{notes}"""


def base_relation(manifest: Manifest) -> str:
    """Return how hubs call the relation to the base: ``adapter`` where PEFT loads the folder, otherwise ``finetune``."""
    encodings = {t.encoding for t in manifest.tensors.values()}
    is_adapter = manifest.kind == "adapter" or ("low_rank" in encodings and encodings <= ADAPTER_ENCODINGS)
    return "adapter" if is_adapter and CONFIG in manifest.files else "finetune"


def format_vector_card(manifest: Manifest, repository: str) -> str:
    """Return the text of README.md for a repository of the hub, ``owner/name``."""
    base = manifest.base.id if is_hub_name(manifest.base.id) else None
    install = public_requirement()
    return VECTOR_CARD.format(
        front_matter=_card_front_matter(manifest, base),
        name=manifest.name,
        description=f"{_text(manifest.description)}\n\n" if manifest.description else "",
        base=f"[{base}](https://huggingface.co/{base})" if base else "a model that is not on the hub",
        facts="\n".join(f"| {name} | {value} |" for name, value in _facts(manifest) if value),
        install="" if install is None else f"pip install '{install}'\n",
        repository=repository,
        base_word=base or "BASE",
        scale=f"{manifest.scale.suggested:g}",
        manifest=MANIFEST,
        notes=_notes(manifest),
    )


def is_hub_name(text: str | None) -> bool:
    """Is a text ``owner/name``?"""
    return text is not None and text.count("/") == 1 and MODEL_NAME.fullmatch(text) is not None


def licence_lines(licence: str | None) -> dict[str, str]:
    """Return what a card says of a licence: an id of the hub, or ``other`` with its name."""
    if licence is None:
        return {}
    known = licence.lower() in LICENCES
    return {"license": licence.lower()} if known else {"license": "other", "license_name": visible(licence)}


def _card_front_matter(manifest: Manifest, base: str | None) -> str:
    words = [visible(word) for word in manifest.tasks]
    relation = base_relation(manifest)
    entries: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": relation} if base else {}),
        **({"library_name": "peft"} if relation == "adapter" else {}),
        "tags": list(dict.fromkeys([TAG, "alnico", *words])),
        **({"language": [visible(word) for word in manifest.languages]} if manifest.languages else {}),
        **licence_lines(manifest.licence),
    }
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True).strip()


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    counts = Counter(t.encoding for t in manifest.tensors.values())
    scale = manifest.scale
    limits = [f"{value:g}" for value in (scale.least, scale.most) if value is not None]
    exact = "exact: every bit of the fine-tune comes back"
    error = exact if manifest.is_exact else f"{manifest.error:.3g}, measured"
    return [
        ("base", f"{manifest.base.id} at `{manifest.base.revision}`" if manifest.base.revision else ""),
        ("tasks", ", ".join(_text(word) for word in manifest.tasks)),
        ("languages", ", ".join(_text(word) for word in manifest.languages)),
        ("licence", _text(manifest.licence or "not stated")),
        ("licence of the base", _text(manifest.base.licence or "not stated")),
        ("size", format_size(manifest.byte_size)),
        ("tensors", ", ".join(f"{count} {encoding}" for encoding, count in sorted(counts.items()))),
        ("relative error", error if manifest.tensors else ""),
        (
            "scale",
            f"{scale.suggested:g}" + (f", tried from {' to '.join(limits)}" if len(limits) == 2 else ""),
        ),
    ]


def _notes(manifest: Manifest) -> str:
    lines: list[str] = []
    if manifest.evaluations:
        lines += [
            "",
            "## Evaluations",
            "",
            "| task | metric | base | with the vector | scale |",
            "|---|---|---|---|---|",
        ]
        for one in manifest.evaluations:
            before = "" if one.base is None else f"{one.base:.4g}"
            lines.append(
                f"| {_text(one.task)} | {_text(one.metric)} | {before} | {one.value:.4g} | {one.scale:g} |"
            )
    if manifest.training:
        lines += ["", "## Training", "", _text(manifest.training)]
    lines += ["", f"Published with alnico {__version__}.", ""]
    return "\n".join(lines)


def _text(text: str) -> str:
    """Return text of its author as one line that cannot end a table."""
    return visible(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")
