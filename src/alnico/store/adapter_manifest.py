"""Describes a PEFT adapter as a task vector: the manifest of its folder, which stays as PEFT wrote it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from alnico._version import __version__
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.lineage import MODEL_NAME, licence_name, lineage_of
from alnico.checkpoint.lora_adapter import CONFIG, SAFE_WEIGHTS
from alnico.checkpoint.open_adapter import open_adapter
from alnico.checkpoint.reference import COMMIT
from alnico.checkpoint.task_vectors.manifest import Manifest, ModelIdentity
from alnico.errors import ModelError
from alnico.store.file_hash import stored_file


def adapter_manifest(
    folder: Path,
    *,
    name: str,
    base: ModelIdentity | None = None,
    finetuned: ModelIdentity | None = None,
    description: str = "",
    tasks: tuple[str, ...] = (),
    languages: tuple[str, ...] = (),
    licence: str | None = None,
) -> Manifest:
    """Return the manifest of a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Without ``base``, it is the one that the config names; its tensors are not measured then, so none is listed. The licence is
    that of its card unless given.
    Errors: ModelError for an adapter that alnico does not read.
    """
    for file in (CONFIG, SAFE_WEIGHTS):
        if not (folder / file).is_file():
            raise ModelError(
                f"{folder}: has no {file}; expected an adapter with its tensors in safetensors. Save it again with a newer PEFT."
            )
    with closing(open_adapter(str(folder))) as adapter:
        card = lineage_of(adapter.files) if isinstance(adapter.files, FileModel) else None
    if licence is None and card is not None:
        licence = licence_name(card.licence)
    return Manifest(
        name=name,
        base=base if base is not None else named_base(folder),
        finetuned=finetuned if finetuned is not None else ModelIdentity(),
        tensors={},
        files={file: stored_file(folder / file) for file in (CONFIG, SAFE_WEIGHTS)},
        kind="adapter",
        description=description,
        tasks=tasks,
        languages=languages,
        licence=licence,
        producer=f"alnico {__version__}",
    )


def named_base(folder: Path) -> ModelIdentity:
    """Return the base that an adapter's config names, if that is an id of the hub. Errors: ModelError."""
    config = read_json(folder / CONFIG)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    is_id = isinstance(name, str) and name.count("/") == 1 and MODEL_NAME.fullmatch(name) is not None
    is_commit = isinstance(revision, str) and COMMIT.fullmatch(revision) is not None
    return ModelIdentity(id=name if is_id else None, revision=revision if is_id and is_commit else None)
