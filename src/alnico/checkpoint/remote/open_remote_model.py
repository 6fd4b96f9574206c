"""Opens models at URLs: ``s3://bucket/model``, ``https://host/model``, or the URL of one .safetensors file.

Side files are copied into a private temporary folder. Of weights only the headers are read, until tensors are asked for.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from alnico.checkpoint.file_model import FileModel, add_prefix, check_index, open_shard, read_shard
from alnico.checkpoint.files import MAX_ENTRIES, is_text
from alnico.checkpoint.hub import Repository
from alnico.checkpoint.json_files import MAX_JSON_BYTES
from alnico.checkpoint.reference import is_at_url
from alnico.checkpoint.remote.download_cache import PieceFiles
from alnico.checkpoint.remote.hub_folder import HubFolder
from alnico.checkpoint.remote.open_folder import checked_url, open_remote_folder
from alnico.checkpoint.remote.remote_weights import RemoteWeights
from alnico.checkpoint.sidecars import (
    MAX_SMALL_BYTES,
    MODULES,
    READ_WHILE_PLANNING,
    module_folders,
    refuse_pickles,
    unread_weights,
    weight_files_of,
)
from alnico.checkpoint.source import Shard
from alnico.checkpoint.weight_files import (
    DIFFUSERS_STEM,
    INDICES,
    PICKLE_INDICES,
    is_inside,
    shard_names,
)
from alnico.errors import HubError, ModelError
from alnico.folders import temporary_files
from alnico.numerics.sizes import format_size
from alnico.run_options import Access
from alnico.threads import Crew

T = TypeVar("T")
A = TypeVar("A")

CONNECTIONS = 8
"""Files that are read at the same time while a model is opened."""

SIDE_FILES = (
    "config.json", "generation_config.json", "model_index.json", "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "alnico.lock.json", MODULES, "sentence_bert_config.json",
    "config_sentence_transformers.json",
)  # fmt: skip
"""Side files that are looked for where a server does not list files."""

WEIGHT_FILES = (
    *INDICES, *PICKLE_INDICES, "model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin",
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors",
)  # fmt: skip
"""Names of weight files, indices and adapters that are looked for there."""

FILES_OF_A_MODULE = (
    "config.json", "model.safetensors", f"{DIFFUSERS_STEM}.safetensors", *INDICES, "pytorch_model.bin", f"{DIFFUSERS_STEM}.bin",
    "scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "spiece.model",
)  # fmt: skip


def open_remote_model(
    label: str,
    *,
    access: Access,
    choose: Callable[..., list[str]] = shard_names,
    is_whole: bool = False,
) -> FileModel:
    """Open the model at a URL. Side files and headers are read, weights are not.

    ``choose`` returns the names of the weight files, as :func:`alnico.checkpoint.weight_files.shard_names` does. With
    ``is_whole`` the weight files are copied into the private folder, too: for adapters, whose factors are all in use. Errors:
    HubError; ModelError for what :func:`alnico.checkpoint.open_model.open_model` refuses.
    """
    remote, file = open_remote_weights(label, (".safetensors",), access=access, is_whole=is_whole)
    try:
        return _open_file(label, file, remote) if file else _open_folder(label, remote, choose)
    except BaseException:
        remote.close()
        raise


def open_remote_weights(
    label: str, endings: tuple[str, ...], *, access: Access, is_whole: bool = False
) -> tuple[RemoteWeights, str]:
    """Open the folder at a URL, and return it with the name of the file that the URL is of, by its ending; an empty name for a folder.

    Errors: HubError; ModelError for a URL that is refused.
    """
    url = checked_url(label)
    if access.offline:
        raise HubError(
            f"{label}: is at a URL, and alnico is offline; expected a path, or a model of the hub that was downloaded before. Leave "
            "--offline out, or download the model and give its path."
        )
    place, _, file = url.rpartition("/")
    refuse_pickles(label, [file])
    is_file = file.endswith(endings)
    folder = open_remote_folder(place if is_file else url)
    try:
        with temporary_files():
            directory = Path(tempfile.mkdtemp(prefix="alnico-"))
        names = [file] if is_file else []
        weights = RemoteWeights(folder, directory, names, kept=download_cache(access), is_whole=is_whole)
    except BaseException:
        folder.close()
        raise
    try:
        if is_file and weights.version(file) is None:
            raise ModelError(f"{label}: there is no such file; expected the file of a model. Check the URL.")
    except BaseException:
        weights.close()
        raise
    return weights, file if is_file else ""


def is_adapter_at_url(reference: str, access: Access) -> bool:
    """Is a reference the URL of an adapter's folder, without a whole model in it? Errors: HubError; ModelError for a URL that is refused."""
    if access.offline or not is_at_url(reference) or os.path.exists(reference):
        return False
    url = checked_url(reference)
    if url.endswith(".safetensors"):
        return False
    folder = open_remote_folder(url)
    try:
        return folder.state("adapter_config.json") is not None and folder.state("config.json") is None
    finally:
        folder.close()


def stream_weights(model: FileModel, access: Access) -> None:
    """Let a model of the hub be read by ranges, unless its weights are in the hub's cache; its side files are kept there.

    Errors: OutputError for a folder of downloads that cannot be used.
    """
    repository = model.origin
    if not isinstance(repository, Repository) or repository.is_offline:
        return
    files = [shard.path.relative_to(repository.folder).as_posix() for shard in model.shards]
    if not repository.absent(files):
        return
    remote = RemoteWeights(
        HubFolder(repository),
        repository.folder,
        repository.sizes,
        kept=download_cache(access),
        owns_directory=False,
    )
    for file in files:
        remote.version(file)
    model.remote = remote


def download_cache(access: Access) -> PieceFiles | None:
    """Open the folder that keeps what is read, if there is to be one. Errors: OutputError."""
    folder = access.download_cache
    return None if folder is None else PieceFiles(folder.expanduser(), access.download_cache_bytes)


def _open_file(label: str, file: str, remote: RemoteWeights) -> FileModel:
    if remote.is_whole:
        remote.fetch([file])
    return FileModel(label, remote.directory / file, [_shard(remote, file, "")], remote=remote)


def _open_folder(label: str, remote: RemoteWeights, choose: Callable[..., list[str]]) -> FileModel:
    listed = remote.folder.names()
    if listed is not None and len(listed) > MAX_ENTRIES:
        raise ModelError(
            f"{label}: holds more than {MAX_ENTRIES} files; expected those of one model. Give the URL of the model's own folder."
        )
    remote.names = _plain(listed) if listed is not None else _there(remote, (*SIDE_FILES, *WEIGHT_FILES))
    if listed is None and choose is shard_names and not remote.names:
        raise ModelError(
            f"{label}: the server lists no files, and has none of the usual names there, such as config.json and model.safetensors; "
            "expected the folder of a model. Check the URL, or give that of the .safetensors file."
        )
    _fetch_small(label, remote, [f for f in remote.names if "/" not in f])
    if listed is None:
        folders = module_folders(remote.directory)
        remote.names += _there(remote, [f"{folder}/{f}" for folder in folders for f in FILES_OF_A_MODULE])
    prefixes = weight_files_of(
        label,
        remote.names,
        remote.directory,
        lambda files: _fetch_small(label, remote, files),
        choose,
        None if listed is not None else lambda file: remote.version(file) is not None,
    )
    refuse_pickles(label, prefixes)
    if remote.is_whole:
        _in_parallel(lambda file: remote.fetch([file]), list(prefixes))
    shards = _in_parallel(lambda file: _shard(remote, file, prefixes[file]), list(prefixes))
    model = FileModel(label, remote.directory, shards, remote=remote)
    check_index(model)
    if choose is shard_names:
        model.notes += unread_weights(label, remote.names, [s.name for s in shards])
    return model


def _plain(names: Iterable[str]) -> list[str]:
    """Leave out names that no file of a model has here: hidden ones, and those that are no path inside a folder."""
    return [n for n in names if is_inside(n) and is_text(n) and n.isprintable() and not n.endswith("/")]


def _there(remote: RemoteWeights, names: Sequence[str]) -> list[str]:
    """Those of the names that the server has."""
    found = _in_parallel(remote.version, names)
    return [name for name, version in zip(names, found, strict=True) if version is not None]


def _fetch_small(label: str, remote: RemoteWeights, files: Iterable[str]) -> None:
    """Copy those of ``files`` that are read while planning. Errors: HubError; ModelError if they are too large in total."""
    wanted = [f for f in files if f.endswith(READ_WHILE_PLANNING) and not (remote.directory / f).exists()]
    versions = dict(zip(wanted, _in_parallel(remote.version, wanted), strict=True))
    small = [f for f, version in versions.items() if version is not None and version.size <= MAX_JSON_BYTES]
    if (total := sum(remote.versions[f].size for f in small)) > MAX_SMALL_BYTES:
        raise ModelError(
            f"{label}: the {len(small)} files that are read while planning (configs, tokenizers, cards) have {format_size(total)} "
            f"in total; expected at most {format_size(MAX_SMALL_BYTES)}. Give the URL of the model's own folder."
        )
    _in_parallel(lambda file: remote.fetch([file]), small)


def _shard(remote: RemoteWeights, file: str, prefix: str) -> Shard:
    """Read and check the header of a weight file."""
    path = remote.directory / file
    if remote.is_whole:
        return open_shard(path, prefix)
    version = remote.version(file)
    assert version is not None

    def read(offset: int, count: int) -> bytes:
        data = bytearray(count)
        remote.request(file, offset, memoryview(data))
        return bytes(data)

    return add_prefix(read_shard(path, version.size, 0, f"{remote.address}/{file}", read), prefix)


def _in_parallel(call: Callable[[A], T], values: Sequence[A]) -> list[T]:
    """Call a function for each value, several at a time, and return the results in order."""
    if len(values) < 2:
        return [call(value) for value in values]
    results: dict[int, T] = {}

    def one(place: int) -> None:
        results[place] = call(values[place])

    with Crew(min(len(values), CONNECTIONS), name="alnico-open") as crew:
        crew.run([(one, (place,)) for place in range(len(values))])
    return [results[place] for place in range(len(values))]
