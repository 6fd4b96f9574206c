"""Publishes a finished model at a URL: weights first, its config last, so that nobody finds half a model."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alnico.checkpoint.durable import replace_file
from alnico.checkpoint.files import files_below
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.lineage import LOCK
from alnico.checkpoint.output_path import SHOWN, Replace
from alnico.checkpoint.remote.folder import FileVersion, RemoteFolder
from alnico.checkpoint.remote.multipart import send_in_parts, tag_of_parts
from alnico.checkpoint.shards import OutputShard
from alnico.errors import ModelError, OutputError, RunError, VerificationError
from alnico.output.journal import NAME as JOURNAL
from alnico.output.journal import with_device
from alnico.output.remote_target import (
    CONNECTIONS,
    MARKER,
    RemoteTarget,
    check_replaceable_at,
    files_at,
    opened_target,
    read_whole,
    versions_of,
)
from alnico.output.shard_uploads import PART_BYTES, ShardUpload
from alnico.output.staging import Hold
from alnico.threads import Crew

PUBLICATION = "publication.json"

CONFIGS = ("modules.json", "model_index.json", "adapter_config.json", "config.json")
"""Files by which programs find a model, in the order in which they are put."""

MOST_PUT_BYTES = PART_BYTES
"""The largest file that is sent in one step, with others at the same time."""


class UploadDirectory(Hold):
    """The private folder of this machine in which a model for a URL is made, held by one process. Use it in ``with``."""

    def __init__(self, target: RemoteTarget) -> None:
        super().__init__(target.unfinished, target)
        self.model = self.path / "model"

    def __enter__(self) -> UploadDirectory:
        super().__enter__()
        return self

    def _cannot_be_made(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path}: cannot be made ({error.strerror}). Choose another --work-dir.")

    @property
    def journal(self) -> Path:
        return self.path / JOURNAL

    def used_bytes(self) -> int:
        """Return the bytes on the disk that an interrupted merge uses."""
        return sum(p.lstat().st_blocks * 512 for p in self.model.rglob("*")) if self.model.exists() else 0

    def clear(self) -> None:
        """Discard an unfinished merge, except for what is known of an interrupted publication. Errors: RunError."""
        try:
            self.folder.remove_contents(lambda name: name in ("lock", PUBLICATION))
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be emptied ({error.strerror}). Check the disk, or choose another --work-dir."
            ) from None


@dataclass(frozen=True)
class Publication:
    """What a run that began to publish wrote down: its id, the files that it found, the names of those that it writes, and the
    uploads of large ones other than weights."""

    id: str
    before: Mapping[str, FileVersion]
    names: frozenset[str]
    uploads: Mapping[str, str] = field(default_factory=dict)


def read_publication(part: UploadDirectory) -> Publication | None:
    """Return the publication that an earlier run began; None if there is none. Errors: RunError."""
    path = part.path / PUBLICATION
    if not path.exists():
        return None
    try:
        data = read_json(path)
        before = {str(name): FileVersion(int(size), str(tag)) for name, (size, tag) in data["before"].items()}
        uploads = {str(name): str(upload) for name, upload in data["uploads"].items()}
        return Publication(str(data["id"]), before, frozenset(map(str, data["names"])), uploads)
    except (ModelError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path}: is damaged ({str(error)[:80]}); expected what a run wrote that began to publish. Remove {part.path}, and give "
            "the command --overwrite."
        ) from None


def check_target_at(
    folder: RemoteFolder, target: RemoteTarget, overwrite: Replace, begun: Publication | None
) -> dict[str, FileVersion]:
    """Return the files that are at a target, which must be free, replaceable, or half published by this very merge.

    Errors: OutputError, HubError.
    """
    files = files_at(folder, target)
    if begun is None:
        check_replaceable_at(folder, target, files, overwrite)
        return files
    strange = [
        name
        for name, version in files.items()
        if name != MARKER and name not in begun.names and begun.before.get(name) != version
    ]
    if strange or not _is_marked(folder, files, begun.id):
        what = f"{', '.join(strange[:SHOWN])}" if strange else "the mark of another run"
        raise OutputError(
            f"{target}: has {what}, which came after this merge began to publish there; expected only its own files. "
            f"Another run may write there. If none does, remove {target} and {target.unfinished}, and merge again."
        )
    return files


def _is_marked(folder: RemoteFolder, files: Mapping[str, FileVersion], run: str) -> bool:
    """Is there no mark of a publication, or that of this run?"""
    marker = files.get(MARKER)
    return marker is None or read_whole(folder, MARKER, marker, 100) == run.encode()


def _has_mark(folder: RemoteFolder, run: str) -> bool:
    """Is the mark of this run there? It is read, as servers that state no tags have none for its version."""
    there = versions_of(folder, [MARKER])
    return bool(there) and _is_marked(folder, there, run)


def completed_shards(
    folder: RemoteFolder,
    uploads: Mapping[str, ShardUpload],
    shards: Sequence[OutputShard],
    begun: Publication | None,
) -> dict[str, FileVersion]:
    """Return the shards that an earlier run has published already: their upload is gone, and their file is there. Errors: HubError.

    The file has the tag of the parts that were sent; on servers with other tags, it is a new file, and the run's mark is still there,
    so that no other run has published since.
    """
    if begun is None:
        return {}
    is_ours = _has_mark(folder, begun.id)
    sizes = {shard.name: shard.byte_size for shard in shards}
    names = [name for name, upload in uploads.items() if upload.is_sent and name in sizes]
    found: dict[str, FileVersion] = {}
    for name, version in versions_of(folder, names).items():
        upload = uploads[name]
        is_sent = version.tag == tag_of_parts(upload.tags)
        is_sent |= is_ours and begun.before.get(name) != version
        if version.size == sizes[name] and is_sent and folder.uploaded_parts(name, upload.id) is None:
            found[name] = version
    return found


def publish_model(
    target: RemoteTarget,
    folder: RemoteFolder,
    part: UploadDirectory,
    shards: Sequence[OutputShard],
    uploads: Mapping[str, ShardUpload],
    completed: Mapping[str, FileVersion],
    before: Mapping[str, FileVersion],
    begun: Publication | None,
) -> FileVersion:
    """Publish the model in ``part``, whose shards are sent. Returns the version of what identifies it: its lock, or its one file.

    A folder has no config from the first change to the last, and files of others are not removed. ``before`` are the files that were
    found when the merge began, ``begun`` is the publication that an earlier run began. Errors: OutputError if somebody else wrote
    there meanwhile; VerificationError if the server has files of other sizes; HubError.
    """
    part.check_still_there()
    weights = {shard.name: shard.byte_size for shard in shards}
    beside = {} if target.single_file else _files_beside(part.model, weights)
    sizes = weights | {name: path.stat().st_size for name, path in beside.items()}
    if begun is not None:
        check_target_at(folder, target, False, begun)  # again: the tensors may have been made in between
    elif files_at(folder, target) != dict(before):
        raise OutputError(
            f"{target}: was changed while merging; expected what was there when the merge began. Look at what is there now. The same "
            "command publishes the finished model if the target is as before, or free; otherwise give it --overwrite."
        )
    publication = Publication(
        begun.id if begun else secrets.token_hex(8),
        begun.before if begun else before,
        frozenset(sizes) | (begun.names if begun else frozenset()),
    )
    _write_publication(part, publication)
    for name, upload in begun.uploads.items() if begun else ():
        folder.abort_upload(name, upload)
    sent = dict(completed)

    def complete(name: str) -> None:
        sent[name] = folder.complete_upload(name, uploads[name].id, uploads[name].tags)

    def put(name: str) -> None:
        sent[name] = folder.put(name, beside[name].read_bytes())

    if target.single_file is not None:
        (name,) = weights
        if not completed:
            complete(name)
        _check_sent(target, sizes, sent, sent)
        return sent[name]
    last = sorted((name for name in beside if _is_last(name)), key=_rank)
    now = files_at(folder, target)
    if begun is not None:
        # The lock is put before the config, and after the old config is removed.
        is_whole = completed.keys() >= weights.keys() and now.keys() - {MARKER} == sizes.keys()
        if is_whole and now[LOCK] != begun.before.get(LOCK):
            return _end(target, folder, sizes, sent)
        if MARKER not in now and any(begun.before.get(name) != now[name] for name in now if _is_last(name)):
            raise OutputError(
                f"{target}: has a model that another run published after this one began to; expected what this one left. Choose another "
                f"output; or, to replace that model, remove {target.unfinished} and give the command --overwrite."
            )
    folder.put(MARKER, publication.id.encode())
    now = files_at(folder, target)
    ours = {name for name in now if name in publication.before or name in publication.names}
    for name in sorted(filter(_is_last, ours), key=_rank, reverse=True):
        folder.delete(name)
    _at_once(complete, [name for name in weights if name not in completed])
    large = [name for name in beside if sizes[name] > MOST_PUT_BYTES and name not in last]
    uploads_of_large = {name: folder.start_upload(name) for name in large}
    # Parts of uploads that nothing on the disk names would stay on the server.
    _write_publication(part, replace(publication, uploads=uploads_of_large))
    for name in large:
        with beside[name].open("rb") as file:
            sent[name] = send_in_parts(folder, name, uploads_of_large[name], file, PART_BYTES)
    _at_once(put, [name for name in beside if name not in last and name not in large])
    _at_once(folder.delete, [n for n in ours if n not in sizes and n != MARKER and not _is_last(n)])
    _check_sent(target, {n: s for n, s in sizes.items() if n not in last}, versions_of(folder, sizes), sent)
    if not _has_mark(folder, publication.id):
        raise OutputError(
            f"{target}: another run began to publish there; expected this one alone. Wait for it, or choose another output."
        )
    for name in last:
        put(name)
    return _end(target, folder, sizes, sent)


def _end(
    target: RemoteTarget, folder: RemoteFolder, sizes: Mapping[str, int], sent: Mapping[str, FileVersion]
) -> FileVersion:
    """Compare what the server has with what was sent, and remove the mark."""
    found = versions_of(folder, sizes)
    _check_sent(target, sizes, found, sent)
    folder.delete(MARKER)
    return found[LOCK]


def _files_beside(model: Path, weights: Iterable[str]) -> dict[str, Path]:
    """The files of a model other than its weights, by name."""
    names = {path.relative_to(model).as_posix(): path for path in files_below(model)}
    return {name: path for name, path in sorted(names.items()) if name not in set(weights)}


def _is_last(name: str) -> bool:
    """Is a file one by which programs find the weights?"""
    return name.rpartition("/")[2] in CONFIGS or name.endswith(".index.json")


def _rank(name: str) -> tuple[int, int, str]:
    """The place of such a file in the order: indices, configs of modules, and those of the model, with config.json the last."""
    folder, _, base = name.rpartition("/")
    return (
        0 if base not in CONFIGS else 1 if folder else 2,
        CONFIGS.index(base) if base in CONFIGS else 0,
        name,
    )


def _at_once(call: Callable[[str], Any], names: Sequence[str]) -> None:
    """Make a call for each name, several at a time."""
    with Crew(min(CONNECTIONS, max(len(names), 1))) as crew:
        crew.run([(call, (name,)) for name in names])


def _check_sent(
    target: RemoteTarget,
    sizes: Mapping[str, int],
    found: Mapping[str, FileVersion],
    sent: Mapping[str, FileVersion],
) -> None:
    """Compare the files on the server with those that were sent: ``sizes``, and their versions where ``sent`` says them.

    Errors: VerificationError for another size; OutputError for another version.
    """
    for name, size in sizes.items():
        version = found.get(name)
        if version is None or version.size != size:
            there = "is not there" if version is None else f"has {version.size} bytes"
            raise VerificationError(
                f"{target.folder_url}/{name}: {there}, {size} bytes were sent; the server or what is before it is at fault, or somebody "
                "else writes there. Check the server; the same command publishes again."
            )
        tag = sent[name].tag if name in sent else ""
        if tag and version.tag and tag != version.tag:
            raise OutputError(
                f"{target.folder_url}/{name}: was replaced while the model was published; expected the file that was sent. Another run "
                "writes there: wait for it, or choose another output."
            )


def _write_publication(part: UploadDirectory, publication: Publication) -> None:
    text = json.dumps(
        {
            "id": publication.id,
            "before": {name: [v.size, v.tag] for name, v in publication.before.items()},
            "names": sorted(publication.names),
            "uploads": dict(publication.uploads),
        }
    )
    replace_file(part.path / PUBLICATION, text, part.folder)


def mark_published(mark: Path, fingerprint: Mapping[str, Any], version: FileVersion) -> None:
    """Record in a file which model was published at a URL."""
    replace_file(mark, json.dumps({"fingerprint": fingerprint, "version": [version.size, version.tag]}))


def is_published_at(target: RemoteTarget, mark: Path, fingerprint: Mapping[str, Any] | None = None) -> bool:
    """Is what is at a URL the model that a run (of this fingerprint) recorded in ``mark``? Unknown, so False, where the server states
    no tags. Errors: HubError."""
    try:
        recorded = read_json(mark)
        size, tag = recorded["version"]
        if fingerprint is not None and with_device(recorded["fingerprint"]) != with_device(
            json.loads(json.dumps(fingerprint))
        ):
            return False
    except (ModelError, RunError, OSError, ValueError, KeyError, TypeError):
        return False
    if not tag:  # a file of the same size may be another one
        return False
    with opened_target(target) as folder:
        return folder.state(target.single_file or LOCK) == FileVersion(size, tag)
