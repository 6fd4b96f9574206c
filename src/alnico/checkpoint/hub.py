"""Models on the hub: headers before weights, weights into everyone's cache, finished models back.

Token, cache, endpoint and offline mode are huggingface_hub's (``hf auth login`` or HF_TOKEN, HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE). It is imported inside functions: a merge of local models never loads it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote

from alnico.checkpoint.file_model import FileModel, add_prefix, check_index, open_shard, read_shard
from alnico.checkpoint.files import open_binary
from alnico.checkpoint.json_files import MAX_JSON_BYTES, parse_json
from alnico.checkpoint.network import (
    ANSWER_BYTES,
    CONTROLS,
    SHA256,
    TIMEOUT,
    TIMEOUT_SECONDS,
    Ended,
    Exchange,
    check_sha256,
    each,
    patiently,
    seconds,
)
from alnico.checkpoint.reference import COMMIT, PICKLES
from alnico.checkpoint.sidecars import is_carried, module_folders, modules_among, unread_weights
from alnico.checkpoint.source import Shard
from alnico.checkpoint.weight_files import INDICES, holds_weights, is_inside, shard_names
from alnico.errors import AlnicoError, HubError, ModelError
from alnico.numerics.sizes import format_size

T = TypeVar("T")

REVISION = re.compile(r"(?![-/])[^\s~^:?*\[\\\x00-\x1f\x7f]+(?<!/)")
"""What git takes as the name of a branch or a tag; ``..`` is refused too."""

READ_WHILE_PLANNING = (".json", ".txt", ".model", ".jinja", "README.md")
"""Endings of the small files that are fetched before the weights: config, index, tokenizer, templates, card."""

MOST_SMALL_BYTES = 1 << 30
LONGEST_NAME = 1000
LARGEST_FILE = 1 << 64
THEIRS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "h11", "hf_xet")


@dataclass(frozen=True)
class Repository:
    """A model on the hub at one commit. Its files lie in ``folder``, in the cache, or will when they are fetched.

    ``sizes`` maps the files of the commit to their bytes; offline, those that the cache holds. ``hashes`` maps those of which the hub
    gives it to the sha256 of their content, which is compared when they are fetched.
    """

    label: str
    name: str
    commit: str
    folder: Path
    sizes: Mapping[str, int]
    is_offline: bool
    hashes: Mapping[str, str] = field(default_factory=dict)

    def absent(self, files: Iterable[str]) -> dict[str, int]:
        """Those of ``files`` that the cache does not hold, with their bytes. Errors: HubError for a file there that is another one."""
        return {file: self.sizes[file] for file in files if not self._is_held(file)}

    def _is_held(self, file: str) -> bool:
        path = self.folder / file
        if not path.exists():
            return False
        _check_held(self.label, self.folder, path)
        if (size := path.stat().st_size) != self.sizes[file]:
            raise HubError(
                f"{self.label}: {file} has {size} bytes in the cache; the hub says {self.sizes[file]}. It was damaged or changed: remove "
                f"{path.resolve()} and give the same command again."
            )
        return True

    def side_files(self) -> list[str]:
        """The files that go with the weights into an output."""
        modules = module_folders(self.folder)
        return [f for f in self.sizes if is_carried(PurePosixPath(f), modules)]

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Download files into the cache; ``report`` gets numbers of bytes, from any thread. Errors: HubError."""
        absent = self.absent(files)
        if not absent:
            return
        exchanges = [
            Exchange(
                f"{self.label}: {file}",
                limit=size,
                size=size,
                commit=self.commit,
                sha256=self.hashes.get(file),
            )
            for file, size in absent.items()
        ]
        with _explained(self.label, self.name):
            calls = [
                partial(self._download, file, exchange, report)
                for file, exchange in zip(absent, exchanges, strict=True)
            ]
            each(exchanges, calls)

    def fetch_small(self, files: Iterable[str]) -> None:
        """Download those of ``files`` that are read before the weights come. Errors: HubError; ModelError if they are not small."""
        absent = self.absent(
            f for f in files if f.endswith(READ_WHILE_PLANNING) and self.sizes[f] <= MAX_JSON_BYTES
        )
        if (total := sum(absent.values())) > MOST_SMALL_BYTES:
            raise ModelError(
                f"{self.label}: {len(absent)} files that are read while planning have {format_size(total)} in all, expected "
                f"{format_size(MOST_SMALL_BYTES)} at most: configs, tokenizers, cards. Download what belongs to the model yourself, and give its path."
            )
        self.fetch(absent)

    def _download(self, file: str, exchange: Exchange, report: Callable[[int], None] | None) -> None:
        from huggingface_hub import hf_hub_download

        meter = _meter(report, exchange.stop)
        hf_hub_download(self.name, file, revision=self.commit, tqdm_class=meter, library_name="alnico")
        path = self.folder / file
        try:
            _check_held(self.label, self.folder, path)
            if (size := path.stat().st_size) != self.sizes[file]:
                raise exchange.error(
                    f"arrived with {size} bytes; the hub says {self.sizes[file]}. Try again; nothing of it is kept."
                )
            if (
                exchange.sha256 is not None and not exchange.is_proved
            ):  # by Xet, taken up in the middle, or a blob that was there
                check_sha256(exchange, _sha256(path, exchange.stop))
        except HubError:
            _remove(path)
            raise

    def shard(self, file: str, prefix: str = "") -> Shard:
        """Read a weight file's header: from the cache, else by asking the hub for that part of the file alone."""
        path, size = self.folder / file, self.sizes[file]
        if self._is_held(file):
            return open_shard(path, prefix)
        read = read_shard(
            path, size, 0, f"{self.label}: {file}", lambda offset, count: self._part(file, offset, count)
        )
        return add_prefix(read, prefix)

    def _part(self, file: str, offset: int, count: int) -> bytes:
        """Bytes of a file on the hub. A server that sends the whole file is cut off after them."""
        if not count:
            return b""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = build_hf_headers(library_name="alnico") | {
            "Range": f"bytes={offset}-{offset + count - 1}",
            "Accept-Encoding": "identity",
        }
        url = hf_hub_url(self.name, file, revision=self.commit)
        data = bytearray()
        with (
            _explained(self.label, self.name),
            get_session().stream(
                "GET", url, headers=headers, timeout=seconds(TIMEOUT, TIMEOUT_SECONDS)
            ) as answer,
        ):
            hf_raise_for_status(answer)
            skipped = 0 if answer.status_code == 206 else offset
            for chunk in answer.iter_bytes(1 << 16):
                data += chunk
                if len(data) >= skipped + count:
                    break
        if len(data) < skipped + count:
            raise HubError(
                f"{self.label}: {file}: {len(data)} bytes came, expected {count} at {offset}. The connection was cut; try again."
            )
        return bytes(data[skipped : skipped + count])


def open_from_hub(label: str, *, offline: bool, choose: Callable[..., list[str]] = shard_names) -> FileModel:
    """Open ``owner/name`` or ``owner/name@revision``: side files and headers are fetched, weights are not.

    ``choose`` tells the files with weights, as :func:`shard_names` does. Errors: HubError; ModelError for what :func:`alnico.checkpoint.open_model.open_model` refuses.
    """
    name, revision = _split(label)
    from huggingface_hub import constants

    is_offline = offline or bool(constants.HF_HUB_OFFLINE)
    cache = (
        Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    )  # as huggingface_hub documents it
    repository = (_cached if is_offline else _resolved)(label, name, revision, cache)
    sizes = repository.sizes
    repository.fetch_small(f for f in sizes if "/" not in f)
    for path in repository.folder.rglob("*"):
        if path.exists() and not path.is_dir():
            _check_held(label, repository.folder, path)
    if not is_offline and not COMMIT.fullmatch(revision):
        _remember(cache / "refs" / revision, repository.commit)
    modules = module_folders(repository.folder) if choose is shard_names else []
    if modules:  # configs of modules, and indices
        repository.fetch_small(f for f in sizes if "/" in f and any(f.startswith(f"{m}/") for m in modules))
    try:
        found = modules_among(repository.folder, list(sizes), modules)
        top = [f for f in sizes if "/" not in f]
        names = (
            []
            if found and not holds_weights(top)
            else choose(label, top, repository.folder, sizes.__contains__)
        )
    except ModelError as error:
        if not is_offline:
            raise
        raise HubError(
            f"{label}: the cache ({repository.folder}) does not hold the whole model, and alnico is offline: {error} "
            "Go online (without --offline and HF_HUB_OFFLINE) once."
        ) from None
    folder_of = {
        f"{folder}/{name}": f"{folder}/" for folder, inside_it in found.items() for name in inside_it
    }
    pickle = next((name for name in (*names, *folder_of) if name.endswith(PICKLES)), None)
    if pickle is not None:
        raise ModelError(
            f"{label}: its weights are a pickle ({pickle}), expected .safetensors; alnico fetches no pickles. "
            "Download the model yourself, and give its path."
        )
    files = dict.fromkeys(names, "") | folder_of
    shards = each(
        [Exchange(f"{label}: {file}") for file in files],
        [partial(repository.shard, file, prefix) for file, prefix in files.items()],
    )
    model = FileModel(label, repository.folder, shards, repository)
    check_index(model)
    if choose is shard_names:
        model.notes += unread_weights(label, sizes, [s.name for s in shards])
    return model


def push(folder: Path, name: str, *, private: bool, branch: str | None, message: str, quiet: bool) -> str:
    """Upload a folder as one commit, so that nobody sees half a model; returns the address of the model.

    Weights and an index that the repository has and the folder has not are removed by the same commit: they would
    make another model of it. Hidden files stay. ``quiet`` draws no bars. Errors: HubError.
    """
    _check_name(name, name)
    if branch is not None and not _is_revision(branch):
        raise HubError(f"{branch!r} is no name of a branch. Choose another.")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{name}: HF_HUB_OFFLINE is set; a push needs the network. Unset it.")
    api = HfApi(library_name="alnico")
    paths = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    files = {p.as_posix(): folder / p for p in paths if not any(part.startswith(".") for part in p.parts)}
    url, main = f"{constants.ENDPOINT}/{name}", branch or "main"

    def exchange() -> Exchange:
        return Exchange(name, limit=ANSWER_BYTES, is_upload=True)

    with _explained(name, name, writing=True), _bars(not quiet):
        each([exchange()], [lambda: api.create_repo(name, private=private or None, exist_ok=True)])
        found = _listing(name, name, "main", writing=True)
        if found.name.lower() != name.lower():
            raise HubError(
                f"{name}: {constants.ENDPOINT} answers for {found.name!r}; nothing was uploaded. Push to the name that the model has."
            )
        if private and not found.is_private:
            raise HubError(
                f"{url}: is public, --private was said; nothing was uploaded. Make it private on the hub, or choose another name."
            )
        if branch is not None:
            each([exchange()], [partial(api.create_branch, name, branch=branch, exist_ok=True)])
            found = _listing(name, name, branch, writing=True)
        inside = tuple(f"{module}/" for module in module_folders(folder))
        stale = _stale(found.sizes, files, inside)
        additions = [
            CommitOperationAdd(path_in_repo=name_there, path_or_fileobj=path)
            for name_there, path in files.items()
        ]
        deletions = [CommitOperationDelete(path_in_repo=f) for f in stale]
        commit = partial(
            api.create_commit, name, [*additions, *deletions], commit_message=message, revision=branch
        )
        done = patiently(
            exchange(), commit, tries=3
        )  # here: while a file is sent, nothing comes, and that is as it should be
        there = _listing(
            name,
            name,
            done.oid if isinstance(done.oid, str) and COMMIT.fullmatch(done.oid) else main,
            writing=True,
        ).sizes
    lacking = [f for f, path in files.items() if there.get(f) != path.stat().st_size]
    if wrong := lacking or _stale(there, files, inside):
        raise HubError(
            f"{url}: after the upload, {wrong[0]!r} there {'is not the file of this folder' if lacking else 'is of another model'} "
            f"({len(wrong)} such). A .gitignore there leaves files out, or somebody else pushed meanwhile. Look at {url}/tree/{main}, and push again."
        )
    return url if branch is None else f"{url}/tree/{branch}"


def _stale(there: Iterable[str], files: Mapping[str, Path], inside: tuple[str, ...]) -> list[str]:
    """Weights and indices of a repository that would make another model of it than the folder is."""
    stale = [
        f for f in there if "/" not in f and f not in files and (f.endswith(".safetensors") or f in INDICES)
    ]
    return stale + [
        f for f in there if f.startswith(inside) and f not in files and f.endswith((".safetensors", *PICKLES))
    ]


@dataclass(frozen=True)
class _Listing:
    """What the hub says of a model at one revision."""

    name: str
    commit: str
    sizes: Mapping[str, int]
    hashes: Mapping[str, str]
    is_private: bool


def _listing(label: str, name: str, revision: str, *, writing: bool = False) -> _Listing:
    """Ask the hub which commit a revision is and which files it has, and believe nothing that is not of its type. Errors: HubError."""
    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/api/models/{name}/revision/{quote(revision, safe='')}?blobs=true"
    exchange = Exchange(label, limit=ANSWER_BYTES)
    with _explained(label, name, revision, writing=writing):
        ((text, came_from),) = each([exchange], [partial(_get, url)])
    try:
        answer = parse_json(text, Path(came_from))
    except ModelError:
        raise HubError(
            f"{label}: {constants.ENDPOINT} does not answer like a hub ({text[:40]!r}); expected JSON that describes a model. Check HF_ENDPOINT."
        ) from None
    found, commit, siblings = answer.get("id", name), answer.get("sha"), answer.get("siblings")

    def wrong(what: str, value: object) -> HubError:
        return HubError(
            f"{label}: the hub's answer has {what} {repr(value)[:80]}. Check HF_ENDPOINT; do not use this model."
        )

    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise wrong("the commit", commit)
    if not isinstance(found, str):
        raise wrong("the name", found)
    if not isinstance(siblings, list):
        raise wrong("the list of files", siblings)
    sizes: dict[str, int] = {}
    hashes: dict[str, str] = {}
    for entry in siblings:
        file = entry.get("rfilename") if isinstance(entry, dict) else entry
        size, lfs = (entry.get("size"), entry.get("lfs")) if isinstance(entry, dict) else (None, None)
        if (
            not isinstance(file, str)
            or not _is_file_name(file)
            or type(size) is not int
            or not 0 <= size < LARGEST_FILE
        ):
            shown = f"file {repr(file)[:200]} without a size or outside the model"
            raise HubError(
                f"{label}: the hub's answer has {shown}. Check HF_ENDPOINT; do not use this model."
            )
        if file in sizes:
            raise wrong("twice the file", file)
        sizes[file] = size
        if lfs is not None:
            sha256 = lfs.get("sha256") if isinstance(lfs, dict) else lfs
            if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
                raise wrong(f"for {file!r} the sha256", sha256)
            hashes[file] = sha256
    return _Listing(found, commit, sizes, hashes, answer.get("private") is True)


def _get(url: str) -> tuple[bytes, str]:
    """The body of an answer, which the exchange bounds, and the address."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers(library_name="alnico")
    with get_session().stream(
        "GET", url, headers=headers, timeout=seconds(TIMEOUT, TIMEOUT_SECONDS)
    ) as answer:
        hf_raise_for_status(answer)
        return b"".join(answer.iter_bytes()), url


def _is_file_name(name: str) -> bool:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:  # half a character
        return False
    parts = name.split("/")
    is_plain = (
        length <= LONGEST_NAME
        and not CONTROLS.search(name)
        and "\t" not in name
        and "." not in parts
        and "" not in parts
    )
    return is_plain and is_inside(name) and max(len(part.encode()) for part in parts) <= 255


def _resolved(label: str, name: str, revision: str, cache: Path) -> Repository:
    """Ask the hub, once, which commit a revision is and which files it has."""
    found = _listing(label, name, revision)
    if COMMIT.fullmatch(revision) and found.commit != revision:
        raise HubError(
            f"{label}: the hub answers for the commit {found.commit}. Check HF_ENDPOINT; do not use this model."
        )
    return Repository(
        label, name, found.commit, cache / "snapshots" / found.commit, found.sizes, False, found.hashes
    )


def _check_held(label: str, folder: Path, path: Path) -> None:
    """Refuse a file of the cache that is no file, or a link out of the cache. ``folder`` is the model's snapshot. Errors: HubError."""
    from huggingface_hub import constants

    place, blobs = path.resolve(), folder.parents[1] / "blobs"
    roots = [folder.parents[1], Path(constants.HF_HUB_CACHE)]
    if (
        blobs.is_symlink() and hasattr(os, "geteuid") and blobs.lstat().st_uid == os.geteuid()
    ):  # on another disk, by our own hand
        roots.append(blobs)
    if not path.is_file() or not any(place.is_relative_to(root.resolve()) for root in roots):
        raise HubError(
            f"{label}: {path} in the cache leads to {place}; expected a file of the cache. Remove it, and give the same command again."
        )


def _sha256(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with open_binary(path) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            if stop.is_set():
                raise Ended
    return digest.hexdigest()


def _remove(path: Path) -> None:
    """Remove a file from the cache: its name in the snapshot, and the blob that this leads to."""
    with contextlib.suppress(OSError):
        blob = path.parent / os.readlink(path) if path.is_symlink() else None
        path.unlink()
        if blob is not None and blob.parent.name == "blobs":
            blob.unlink()


def _cached(label: str, name: str, revision: str, cache: Path) -> Repository:
    """Look a revision up in the cache alone."""
    try:
        commit = revision if COMMIT.fullmatch(revision) else _first_line(cache / "refs" / revision)
    except (OSError, ValueError):
        commit = ""
    folder = cache / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not folder.is_dir():
        raise HubError(
            f"{label}: revision {revision!r} is not in the cache ({cache}), and alnico is offline; expected a model that was "
            "fetched before. Go online (without --offline and HF_HUB_OFFLINE) once, or give a path."
        )
    sizes = {
        p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()
    }
    return Repository(label, name, commit, folder, sizes, True)


def _first_line(path: Path) -> str:
    with open_binary(path) as file:
        return file.read(100).decode("ascii").strip()


def _remember(place: Path, commit: str) -> None:
    """Note which commit a branch was, as huggingface_hub does, so that offline finds it by its name."""
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # a cache that is read-only serves all the same
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(commit, "ascii")
        os.replace(temporary, place)


def _split(label: str) -> tuple[str, str]:
    """Return (owner/name, revision) of a reference."""
    name, at, revision = label.partition("@")
    _check_name(label, name)
    if at and not _is_revision(revision):
        raise ModelError(
            f"model {label!r}: {revision!r} is no revision; expected a branch, a tag or a commit. Write owner/name@revision."
        )
    return name, revision or "main"


def _is_revision(text: str) -> bool:
    return (
        REVISION.fullmatch(text) is not None
        and ".." not in text
        and "." not in text.split("/")
        and len(text) < 250
    )


def _check_name(label: str, name: str) -> None:
    try:
        from huggingface_hub import constants  # noqa: F401  (it reads the environment)
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ValueError as error:  # of a variable of the environment, HF_HUB_DOWNLOAD_TIMEOUT=abc
        raise HubError(
            f"{label}: huggingface_hub cannot be imported ({error}); expected numbers in its variables of the environment. Check "
            "HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT."
        ) from None

    try:
        if name.count("/") != 1:
            raise HFValidationError("it needs an owner and a name")
        validate_repo_id(name)
    except HFValidationError as error:
        why = str(error).split(f": '{name}'")[0].rstrip(".")
        raise ModelError(
            f"model {label!r}: no such directory or file, and no id of a model on the hub ({why}). Check the path or the id."
        ) from None


def _meter(report: Callable[[int], None] | None, stop: threading.Event) -> Any:
    """A progress bar for huggingface_hub that draws nothing, passes bytes on, and ends its download when ``stop`` is set."""
    from huggingface_hub.utils import tqdm

    class Meter(tqdm):  # type: ignore[type-arg, misc, unused-ignore]
        monitor_interval = 0  # no thread for each file

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call, unused-ignore]

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise Ended
            if report is not None and n:
                report(int(n))

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes on the wire, which are counted again when they are on the disk."""

        def set_transfer_postfix_str(self, *arguments: Any, **options: Any) -> None:
            """Text for a bar that is not drawn."""

    return Meter


@contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    """Let huggingface_hub draw its bars, or keep it from it."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explained(label: str, name: str, revision: str = "main", *, writing: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError with a message of four parts; mistakes of ours stay what they are."""
    try:
        yield
    except AlnicoError:
        raise
    except Exception as error:
        told = _explanation(error, name, revision, writing)
        if told is None:
            raise
        raise HubError(f"{label}: {told}") from None


def _explanation(error: BaseException, name: str, revision: str, writing: bool) -> str | None:
    from huggingface_hub import constants, errors

    theirs = _is_theirs(error)
    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{name}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explanation(error.__cause__, name, revision, writing)
    if isinstance(error, errors.GatedRepoError):
        return f"is gated, and you have no access to it; expected a model you may read. Accept its licence at {page} and {login}."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub} has no revision {revision!r} of it; expected a branch, a tag or a commit. Look at {page}/tree/main."
    if isinstance(error, errors.RepositoryNotFoundError):
        if writing:
            return f"{hub} does not let you write there. Check the name; {login} with a token that may write."
        return f"no such path here, and {hub} has no such model, or it is private. Check the name; for a private model {login}."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{hub} does not have a file that it listed ({PurePosixPath(error.response.url.path).name}). Try again."
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"{hub} refuses access (status {status}); expected a token that may {'write' if writing else 'read'} it. {login[0].upper()}{login[1:]}."
        said = "".join(c for c in error.server_message or "" if c.isprintable())[:200]
        return f"{hub} answered with status {status}{f' ({said})' if said else ''}. Try again later."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the cache does not hold it. Unset it once."
    if isinstance(error, errors.FileMetadataError):
        return f"{hub} does not answer like a hub. Check HF_ENDPOINT."
    if type(error).__name__ == "LocalProtocolError":  # whose message would show the token
        return "no request can be made of these settings; expected a token of plain characters. Check HF_TOKEN, or log in again."
    if type(error).__module__.split(".")[0].startswith("httpx"):  # httpx, or httpx2 from huggingface_hub 2 on
        return (
            f"{'' if writing else 'no such path here, and '}{hub} could not be reached or broke off ({type(error).__name__}: {str(error)[:120]}). "
            "Check the connection and try again; --offline uses what the cache holds."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space is left in the cache ({constants.HF_HUB_CACHE}). Make room, or set HF_HOME to another disk."
    if writing and (
        theirs or isinstance(error, (OSError, RuntimeError, ValueError))
    ):  # what hf_xet and the check of the card raise
        why = " ".join(f"{error} {error.__cause__ or ''}".split())[:200]
        return f"{hub} did not take the upload ({why}). Try again: what has arrived is not sent twice."
    if isinstance(error, OSError):
        return f"could not be fetched into the cache {constants.HF_HUB_CACHE} ({error.strerror or str(error)[:160]}). Try again, or set HF_HOME to a folder that can be written."
    if theirs:
        return f"{hub} does not answer like a hub ({type(error).__name__}). Check HF_ENDPOINT."
    return None


def _is_theirs(error: BaseException) -> bool:
    """Was it raised inside huggingface_hub or what it uses? What a hook of ours raises there by mistake stays a mistake of ours."""
    rooms, at = [], error.__traceback__
    while at is not None:
        rooms.append(str(at.tb_frame.f_globals.get("__name__", "")).split(".")[0])
        at = at.tb_next
    return any(room in THEIRS for room in rooms) and rooms[-1] != "alnico"
