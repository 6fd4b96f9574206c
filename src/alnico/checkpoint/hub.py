"""Reads models from the Hugging Face hub, headers before weights, and uploads finished models.

Token, cache, endpoint and offline mode are those of huggingface_hub (``hf auth login`` or HF_TOKEN, HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE). It is imported inside functions, so that a merge of local models never loads it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from alnico.checkpoint.file_model import FileModel, add_prefix, check_index, open_shard, read_shard
from alnico.checkpoint.files import open_binary
from alnico.checkpoint.json_files import MAX_JSON_BYTES, parse_json
from alnico.checkpoint.near_paths import near_path
from alnico.checkpoint.network import (
    CONTROLS,
    MAX_RESPONSE_BYTES,
    SHA256,
    TIMEOUT,
    TIMEOUT_SECONDS,
    Exchange,
    TransferStopped,
    call_all,
    call_with_retries,
    check_sha256,
    read_seconds,
)
from alnico.checkpoint.reference import COMMIT, PICKLES, may_hold_model, refuse_misspelt
from alnico.checkpoint.sidecars import (
    MAX_SMALL_BYTES,
    READ_WHILE_PLANNING,
    is_carried,
    module_folders,
    refuse_pickles,
    unread_weights,
    weight_files_of,
)
from alnico.checkpoint.source import Shard
from alnico.checkpoint.weight_files import INDICES, is_inside, shard_names
from alnico.errors import AlnicoError, HubError, ModelError
from alnico.numerics.sizes import format_size
from alnico.run_options import Access

T = TypeVar("T")

REVISION = re.compile(r"(?![-/])[^\s~^:?*\[\\\x00-\x1f\x7f]+(?<!/)")
"""Names that git accepts for a branch or a tag; ``..`` is refused too."""

NEXT_PAGE = re.compile(r'<([^<>]{1,4000})>\s*;\s*rel="next"')
"""The header Link of a list that has another page."""

MAX_SKIPPED_BYTES = 1 << 20
"""Most bytes that are received in vain, from a server that takes no ranges."""
MAX_NAME_BYTES = 1000
MAX_FILE_BYTES = 1 << 64
HUB_LIBRARIES = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "h11", "hf_xet")


@dataclass(frozen=True)
class Repository:
    """A model on the hub at one commit. ``folder`` is its snapshot in the cache, filled by downloads.

    ``sizes`` maps the files of the commit (offline: those in the cache) to their sizes in bytes. ``hashes``
    maps files to the sha256 of their content, where the hub states it; downloads are compared with it.
    """

    label: str
    name: str
    commit: str
    folder: Path
    sizes: Mapping[str, int]
    is_offline: bool
    hashes: Mapping[str, str] = field(default_factory=dict)

    def absent(self, files: Iterable[str]) -> dict[str, int]:
        """Return those of ``files`` that are not in the cache, with their sizes.

        Errors: HubError for a file in the cache that is not the hub's.
        """
        return {file: self.sizes[file] for file in files if not self._is_cached(file)}

    def _is_cached(self, file: str) -> bool:
        path = self.folder / file
        if not path.exists():
            return False
        _check_cached(self.label, self.folder, path)
        if (size := path.stat().st_size) != self.sizes[file]:
            raise HubError(
                f"{self.label}: {file} has {size} bytes in the cache; the hub states {self.sizes[file]}. It "
                f"was damaged or changed: remove {path.resolve()} and run the same command again."
            )
        return True

    def side_files(self) -> list[str]:
        """Return the files that are copied to an output with the weights."""
        modules = module_folders(self.folder)
        return [f for f in self.sizes if is_carried(PurePosixPath(f), modules)]

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Download files into the cache; ``report`` is called with numbers of bytes, from any thread.

        Errors: HubError.
        """
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
        with hub_errors(self.label, self.name):
            calls = [
                partial(self._download, file, exchange, report)
                for file, exchange in zip(absent, exchanges, strict=True)
            ]
            call_all(exchanges, calls)

    def fetch_small(self, files: Iterable[str]) -> None:
        """Download those of ``files`` that are read before the weights.

        Errors: HubError; ModelError if they are too large in total.
        """
        absent = self.absent(
            f for f in files if f.endswith(READ_WHILE_PLANNING) and self.sizes[f] <= MAX_JSON_BYTES
        )
        if (total := sum(absent.values())) > MAX_SMALL_BYTES:
            raise ModelError(
                f"{self.label}: the {len(absent)} files that are read while planning (configs, tokenizers, "
                f"cards) have {format_size(total)} in total; expected at most "
                f"{format_size(MAX_SMALL_BYTES)}. Download the model's own files yourself, and give their "
                "path."
            )
        self.fetch(absent)

    def _download(self, file: str, exchange: Exchange, report: Callable[[int], None] | None) -> None:
        from huggingface_hub import hf_hub_download

        progress = _progress_class(report, exchange.stop)
        hf_hub_download(self.name, file, revision=self.commit, tqdm_class=progress, library_name="alnico")
        path = self.folder / file
        try:
            _check_cached(self.label, self.folder, path)
            if (size := path.stat().st_size) != self.sizes[file]:
                raise exchange.error(
                    f"arrived with {size} bytes; the hub states {self.sizes[file]}. It was deleted; try "
                    "again."
                )
            # Not proved while it arrived: from Xet, resumed in the middle, or already a blob of the cache.
            if exchange.sha256 is not None and not exchange.is_proved:
                check_sha256(exchange, _sha256(path, exchange.stop))
        except HubError:
            _remove(path)
            raise

    def shard(self, file: str, prefix: str = "") -> Shard:
        """Read a weight file's header, from the cache or by requesting only that part of the file."""
        path, size = self.folder / file, self.sizes[file]
        if self._is_cached(file):
            return open_shard(path, prefix)
        shard = read_shard(
            path, size, 0, f"{self.label}: {file}", lambda offset, count: self._part(file, offset, count)
        )
        return add_prefix(shard, prefix)

    def _part(self, file: str, offset: int, count: int) -> bytes:
        """Return bytes of a file on the hub."""
        with hub_errors(self.label, self.name):
            data = b"".join(self.receive(file, offset, count))
        if len(data) < count:
            raise HubError(
                f"{self.label}: {file}: received {len(data)} bytes, expected {count} at {offset}. "
                "The connection was cut off; try again."
            )
        return data

    def receive(self, file: str, offset: int, count: int) -> Iterator[bytes]:
        """Yield bytes of a file on the hub as they arrive, fewer than ``count`` if the connection is closed.

        If the server sends the whole file, the rest is not read.
        Errors: HubError; those of huggingface_hub, which :func:`hub_errors` explains.
        """
        if not count:
            return
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = build_hf_headers(library_name="alnico") | {
            "Range": f"bytes={offset}-{offset + count - 1}",
            "Accept-Encoding": "identity",
        }
        url = hf_hub_url(self.name, file, revision=self.commit)
        seconds = read_seconds(TIMEOUT, TIMEOUT_SECONDS)
        with get_session().stream("GET", url, headers=headers, timeout=seconds) as response:
            hf_raise_for_status(response)
            skipped = 0 if response.status_code == 206 else offset
            if skipped > MAX_SKIPPED_BYTES:
                raise HubError(
                    f"{self.label}: {file}: the server sends the whole file where the part from {offset} on is asked for; expected "
                    "one that takes ranges. Check HF_ENDPOINT and your proxies, or merge without --stream."
                )
            for chunk in response.iter_raw():
                data = chunk[skipped:][:count]
                skipped -= min(skipped, len(chunk))
                count -= len(data)
                if data:
                    yield data
                if not count:
                    return


def open_from_hub(label: str, *, access: Access, choose: Callable[..., list[str]] = shard_names) -> FileModel:
    """Open ``owner/name`` or ``owner/name@revision``. Side files and headers are downloaded, weights are not.

    ``choose`` returns the names of the weight files, as :func:`shard_names` does. A misspelt path is named
    before anything is requested. Errors: HubError; ModelError for what
    :func:`alnico.checkpoint.open_model.open_model` refuses.
    """
    name, revision = _split(label)
    from huggingface_hub import constants

    is_offline = access.offline or bool(constants.HF_HUB_OFFLINE)
    # The folder's name is documented by huggingface_hub.
    cache = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    if not cache.is_dir():
        refuse_misspelt(label)
    try:
        return _open_repository(label, name, revision, cache, choose, is_offline=is_offline)
    except HubError as error:
        near = near_path(name, accepts=may_hold_model)
        if near is None:
            raise
        rest = [
            line.removeprefix(f"{label}: ").removeprefix("no such path here, and ") for line in error.args
        ]
        raise HubError(f"{label}: no such path here. Did you mean {near}? {rest[0]}", *rest[1:]) from None


def _open_repository(
    label: str,
    name: str,
    revision: str,
    cache: Path,
    choose: Callable[..., list[str]],
    *,
    is_offline: bool,
) -> FileModel:
    repository = (_find_in_cache if is_offline else _find_on_hub)(label, name, revision, cache)
    sizes = repository.sizes
    repository.fetch_small(f for f in sizes if "/" not in f)
    for path in repository.folder.rglob("*"):
        if path.exists() and not path.is_dir():
            _check_cached(label, repository.folder, path)
    if not is_offline and not COMMIT.fullmatch(revision):
        _write_ref(cache / "refs" / revision, repository.commit)
    try:
        prefixes = weight_files_of(label, list(sizes), repository.folder, repository.fetch_small, choose)
    except ModelError as error:
        if not is_offline:
            raise
        raise HubError(
            f"{label}: the cache ({repository.folder}) does not hold the whole model, and alnico is offline: "
            f"{error} Run once online (without --offline and HF_HUB_OFFLINE)."
        ) from None
    refuse_pickles(label, prefixes)
    shards = call_all(
        [Exchange(f"{label}: {file}") for file in prefixes],
        [partial(repository.shard, file, prefix) for file, prefix in prefixes.items()],
    )
    model = FileModel(label, repository.folder, shards, repository)
    check_index(model)
    if choose is shard_names:
        model.notes += unread_weights(label, sizes, [s.name for s in shards])
    return model


def find_repository(label: str, *, offline: bool) -> Repository:
    """Find ``owner/name`` or ``owner/name@revision``, its commit and files; nothing is downloaded.

    Offline, the files are those of the cache. Errors: HubError; ModelError for text that is no id.
    """
    name, revision = _split(label)
    from huggingface_hub import constants

    is_offline = offline or bool(constants.HF_HUB_OFFLINE)
    cache = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    repository = (_find_in_cache if is_offline else _find_on_hub)(label, name, revision, cache)
    if not is_offline and not COMMIT.fullmatch(revision):
        _write_ref(cache / "refs" / revision, repository.commit)
    return repository


def is_repository_id(label: str) -> bool:
    """Is it ``owner/name`` or ``owner/name@revision``, whether or not the hub has it?

    >>> [is_repository_id(text) for text in ("org/model@v1", "model", "a/b/c", "../model")]
    [True, False, False, False]
    """
    try:
        _split(label)
    except ModelError:
        return False
    return True


def latest_commit(name: str) -> str:
    """Return the commit that ``owner/name`` is at now. Errors: HubError; ModelError for text that is no id."""
    _check_name(name, name)
    return _fetch_listing(name, name, "main").commit


@dataclass(frozen=True)
class ListedModel:
    """A repository as a search of the hub lists it. What the hub does not state, or states as another type, is absent."""

    name: str
    commit: str | None
    tags: tuple[str, ...]
    card: Mapping[str, Any]
    downloads: int
    likes: int


LISTED_PROPERTIES = ("cardData", "downloads", "likes", "sha", "tags")
PAGE = 100
"""Repositories of a page of a search."""
MAX_PAGES = 100


def list_models(tags: Iterable[str], *, search: str = "", limit: int = PAGE) -> list[ListedModel]:
    """List repositories that have all ``tags`` and whose name has the text ``search``, most downloaded first.

    At most ``limit`` of them, page by page. Errors: HubError.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"{constants.ENDPOINT}: HF_HUB_OFFLINE is set, but a search needs the network. Unset it."
        )
    query = [("filter", tag) for tag in tags] + ([("search", search)] if search else [])
    query += [("sort", "downloads"), ("limit", str(min(limit, PAGE)))]
    query += [("expand", one) for one in LISTED_PROPERTIES]
    url: str | None = f"{constants.ENDPOINT}/api/models?{urlencode(query)}"
    label, found = f"{constants.ENDPOINT}: search", dict[str, ListedModel]()
    for _ in range(MAX_PAGES):
        if url is None or len(found) >= limit:
            break
        exchange = Exchange(label, limit=MAX_RESPONSE_BYTES)
        with hub_errors(label, label):
            ((text, following),) = call_all([exchange], [partial(_get_page, url)])
        try:
            models = parse_json(b'{"models": ' + text + b"}", Path(url))["models"]
        except ModelError:
            models = None
        if not isinstance(models, list):
            raise HubError(
                f"{label}: the answer is not a list of models ({text[:40]!r}); expected JSON. Check HF_ENDPOINT."
            )
        for model in map(_listed_model, models):
            if model is not None:
                found.setdefault(model.name, model)
        if following is not None and not following.startswith(f"{constants.ENDPOINT}/api/models?"):
            raise HubError(
                f"{label}: the next page is at {following[:80]!r}; expected one of {constants.ENDPOINT}. Check HF_ENDPOINT."
            )
        url = following
    return list(found.values())[:limit]


def _listed_model(data: Any) -> ListedModel | None:
    """Read an entry of a search; None for one without the name of a model."""
    if (
        not isinstance(data, dict)
        or not isinstance(name := data.get("id"), str)
        or not is_repository_id(name)
    ):
        return None
    commit, tags, card = data.get("sha"), data.get("tags"), data.get("cardData")
    counts = [
        n if type(n := data.get(key)) is int and 0 <= n < 1 << 60 else 0 for key in ("downloads", "likes")
    ]
    return ListedModel(
        name,
        commit if isinstance(commit, str) and COMMIT.fullmatch(commit) else None,
        tuple(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else (),
        card if isinstance(card, dict) else {},
        *counts,
    )


def _get_page(url: str) -> tuple[bytes, str | None]:
    """Return the body of a page of a list, and the address of the next page."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers(library_name="alnico")
    seconds = read_seconds(TIMEOUT, TIMEOUT_SECONDS)
    with get_session().stream("GET", url, headers=headers, timeout=seconds) as response:
        hf_raise_for_status(response)
        following = NEXT_PAGE.search(response.headers.get("Link", "")[:10_000])
        return b"".join(response.iter_bytes()), following[1] if following else None


def upload(
    folder: Path,
    name: str,
    *,
    private: bool,
    branch: str | None,
    message: str,
    quiet: bool,
    replaced: Collection[str] = (),
) -> str:
    """Upload a folder as one commit, so that nobody sees half a model; returns the model's address.

    The same commit removes weights and an index that the repository has but the folder does not: with them it
    would be another model; also files called as in ``replaced``. Hidden files are not uploaded. ``quiet`` draws
    no progress bars. Errors: HubError.
    """
    _check_name(name, name)
    if branch is not None and not _is_revision(branch):
        raise HubError(f"{branch!r} is not a name for a branch. Choose another.")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{name}: HF_HUB_OFFLINE is set, but a push needs the network. Unset it.")
    api = HfApi(library_name="alnico")
    paths = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    files = {p.as_posix(): folder / p for p in paths if not any(part.startswith(".") for part in p.parts)}
    url, main = f"{constants.ENDPOINT}/{name}", branch or "main"

    def exchange() -> Exchange:
        return Exchange(name, limit=MAX_RESPONSE_BYTES, is_upload=True)

    with hub_errors(name, name, writing=True), _progress_bars(not quiet):
        call_all([exchange()], [lambda: api.create_repo(name, private=private or None, exist_ok=True)])
        listing = _fetch_listing(name, name, "main", writing=True)
        if listing.name.lower() != name.lower():
            raise HubError(
                f"{name}: {constants.ENDPOINT} answers for {listing.name!r}; nothing was uploaded. "
                "Push to the name that the model has."
            )
        if private and not listing.is_private:
            raise HubError(
                f"{url}: is public, but --private was used; nothing was uploaded. "
                "Make it private on the hub, or choose another name."
            )
        if branch is not None:
            call_all([exchange()], [partial(api.create_branch, name, branch=branch, exist_ok=True)])
            listing = _fetch_listing(name, name, branch, writing=True)
        modules = tuple(f"{module}/" for module in module_folders(folder))
        stale = _stale_files(listing.sizes, files, modules, replaced)
        additions = [
            CommitOperationAdd(path_in_repo=file, path_or_fileobj=path) for file, path in files.items()
        ]
        deletions = [CommitOperationDelete(path_in_repo=f) for f in stale]
        commit = partial(
            api.create_commit, name, [*additions, *deletions], commit_message=message, revision=branch
        )
        # Not with call_all, which limits silence: the hub sends nothing while a file is uploaded.
        done = call_with_retries(exchange(), commit, tries=3)
        new_revision = done.oid if isinstance(done.oid, str) and COMMIT.fullmatch(done.oid) else main
        uploaded = _fetch_listing(name, name, new_revision, writing=True).sizes
    missing = [f for f, path in files.items() if uploaded.get(f) != path.stat().st_size]
    if wrong := missing or _stale_files(uploaded, files, modules, replaced):
        raise HubError(
            f"{url}: after the upload, {wrong[0]!r} on the hub "
            f"{'is not the file of this folder' if missing else 'belongs to another model'} ({len(wrong)} "
            "such). Either a .gitignore there excludes files, or somebody else pushed at the same time. "
            f"Check {url}/tree/{main}, and push again."
        )
    return url if branch is None else f"{url}/tree/{branch}"


def _stale_files(
    names: Iterable[str], files: Mapping[str, Path], modules: tuple[str, ...], replaced: Collection[str]
) -> list[str]:
    """Return weights and indices of a repository that do not belong to the model of the folder, and files of
    ``replaced`` that are not in it."""
    stale = [
        f
        for f in names
        if "/" not in f and f not in files and (f.endswith(".safetensors") or f in INDICES or f in replaced)
    ]
    return stale + [
        f
        for f in names
        if f.startswith(modules) and f not in files and f.endswith((".safetensors", *PICKLES))
    ]


@dataclass(frozen=True)
class _Listing:
    """The hub's description of a model at one revision."""

    name: str
    commit: str
    sizes: Mapping[str, int]
    hashes: Mapping[str, str]
    is_private: bool


def _fetch_listing(label: str, name: str, revision: str, *, writing: bool = False) -> _Listing:
    """Ask the hub for the commit of a revision and its files, and check every type. Errors: HubError."""
    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/api/models/{name}/revision/{quote(revision, safe='')}?blobs=true"
    exchange = Exchange(label, limit=MAX_RESPONSE_BYTES)
    with hub_errors(label, name, revision, writing=writing):
        ((text, address),) = call_all([exchange], [partial(_get, url)])
    try:
        answer = parse_json(text, Path(address))
    except ModelError:
        raise HubError(
            f"{label}: {constants.ENDPOINT} does not answer like a hub ({text[:40]!r}); expected JSON that "
            "describes a model. Check HF_ENDPOINT."
        ) from None
    actual_name, commit, siblings = answer.get("id", name), answer.get("sha"), answer.get("siblings")

    def wrong(what: str, value: object) -> HubError:
        return HubError(
            f"{label}: the hub's answer has {what} {repr(value)[:80]}. Check HF_ENDPOINT; do not use this "
            "model."
        )

    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise wrong("the commit", commit)
    if not isinstance(actual_name, str):
        raise wrong("the name", actual_name)
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
            or not 0 <= size < MAX_FILE_BYTES
        ):
            raise HubError(
                f"{label}: the hub's answer has file {repr(file)[:200]} without a size or outside the model. "
                "Check HF_ENDPOINT; do not use this model."
            )
        if file in sizes:
            raise wrong("the duplicate file", file)
        sizes[file] = size
        if lfs is not None:
            sha256 = lfs.get("sha256") if isinstance(lfs, dict) else lfs
            if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
                raise wrong(f"for {file!r} the sha256", sha256)
            hashes[file] = sha256
    return _Listing(actual_name, commit, sizes, hashes, answer.get("private") is True)


def _get(url: str) -> tuple[bytes, str]:
    """Return the body of a response, limited by the exchange, and the address."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers(library_name="alnico")
    with get_session().stream(
        "GET", url, headers=headers, timeout=read_seconds(TIMEOUT, TIMEOUT_SECONDS)
    ) as response:
        hf_raise_for_status(response)
        return b"".join(response.iter_bytes()), url


def _is_file_name(name: str) -> bool:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:  # a lone surrogate
        return False
    parts = name.split("/")
    is_plain = (
        length <= MAX_NAME_BYTES
        and not CONTROLS.search(name)
        and "\t" not in name
        and "." not in parts
        and "" not in parts
    )
    return is_plain and is_inside(name) and max(len(part.encode()) for part in parts) <= 255


def _find_on_hub(label: str, name: str, revision: str, cache: Path) -> Repository:
    """Ask the hub, once, for the commit of a revision and its files."""
    listing = _fetch_listing(label, name, revision)
    commit = listing.commit
    if COMMIT.fullmatch(revision) and commit != revision:
        raise HubError(
            f"{label}: the hub answers for commit {commit}. Check HF_ENDPOINT; do not use this model."
        )
    return Repository(label, name, commit, cache / "snapshots" / commit, listing.sizes, False, listing.hashes)


def _check_cached(label: str, folder: Path, path: Path) -> None:
    """Refuse an entry of the cache that is not a file or is a link out of the cache.

    ``folder`` is the model's snapshot. Errors: HubError.
    """
    from huggingface_hub import constants

    target, blobs = path.resolve(), folder.parents[1] / "blobs"
    roots = [folder.parents[1], Path(constants.HF_HUB_CACHE)]
    # The user may have moved the blobs to another disk.
    if blobs.is_symlink() and hasattr(os, "geteuid") and blobs.lstat().st_uid == os.geteuid():
        roots.append(blobs)
    if not path.is_file() or not any(target.is_relative_to(root.resolve()) for root in roots):
        raise HubError(
            f"{label}: {path} in the cache leads to {target}; expected a file of the cache. "
            "Remove it, and run the same command again."
        )


def _sha256(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with open_binary(path) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            if stop.is_set():
                raise TransferStopped
    return digest.hexdigest()


def _remove(path: Path) -> None:
    """Remove a file from the cache: its link in the snapshot, and the blob that the link leads to."""
    with contextlib.suppress(OSError):
        blob = path.parent / os.readlink(path) if path.is_symlink() else None
        path.unlink()
        if blob is not None and blob.parent.name == "blobs":
            blob.unlink()


def _find_in_cache(label: str, name: str, revision: str, cache: Path) -> Repository:
    """Look up a revision in the cache only."""
    try:
        commit = revision if COMMIT.fullmatch(revision) else _first_line(cache / "refs" / revision)
    except (OSError, ValueError):
        commit = ""
    folder = cache / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not folder.is_dir():
        raise HubError(
            f"{label}: revision {revision!r} is not in the cache ({cache}), and alnico is offline; expected "
            "a model that was downloaded before. Run once online (without --offline and HF_HUB_OFFLINE), or "
            "give a path."
        )
    sizes = {
        p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()
    }
    return Repository(label, name, commit, folder, sizes, True)


def _first_line(path: Path) -> str:
    with open_binary(path) as file:
        return file.read(100).decode("ascii").strip()


def _write_ref(path: Path, commit: str) -> None:
    """Store the commit of a branch, as huggingface_hub does, so that the branch can be found offline."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # a read-only cache works too
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(commit, "ascii")
        os.replace(temporary, path)


def _split(label: str) -> tuple[str, str]:
    """Return (owner/name, revision) of a reference."""
    name, separator, revision = label.partition("@")
    _check_name(label, name)
    if separator and not _is_revision(revision):
        raise ModelError(
            f"model {label!r}: {revision!r} is not a revision; expected a branch, a tag or a commit. "
            "Write owner/name@revision."
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
    except ValueError as error:  # from an environment variable such as HF_HUB_DOWNLOAD_TIMEOUT=abc
        raise HubError(
            f"{label}: huggingface_hub cannot be imported ({error}); expected numbers in its environment "
            "variables. Check HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT."
        ) from None

    try:
        if name.count("/") != 1:
            raise HFValidationError("an id has an owner and a name")
        validate_repo_id(name)
    except HFValidationError as error:
        reason = str(error).split(f": '{name}'")[0].rstrip(".")
        raise ModelError(
            f"model {label!r}: no such directory or file, and not the id of a model on the hub ({reason}). "
            "Check the path or the id."
        ) from None


def _progress_class(report: Callable[[int], None] | None, stop: threading.Event) -> Any:
    """Return a progress bar class for huggingface_hub that draws nothing.

    It reports bytes to ``report``, and ends its download when ``stop`` is set.
    """
    from huggingface_hub.utils import tqdm

    class SilentProgress(tqdm):  # type: ignore[type-arg, misc, unused-ignore]
        monitor_interval = 0  # no monitor thread per file

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call, unused-ignore]

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise TransferStopped
            if report is not None and n:
                report(int(n))

        def update_transfer(self, n: float | None = 1) -> None:
            """Ignore bytes on the wire: they are counted when they are on disk."""

        def set_transfer_postfix_str(self, *arguments: Any, **options: Any) -> None:
            """Ignore text for the bar, which is not drawn."""

    return SilentProgress


@contextmanager
def _progress_bars(shows: bool) -> Iterator[None]:
    """Let huggingface_hub draw its progress bars in this block, or disable them."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shows or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def hub_errors(label: str, name: str, revision: str = "main", *, writing: bool = False) -> Iterator[None]:
    """Turn errors of huggingface_hub into a HubError with a four-part message; alnico's own bugs pass."""
    try:
        yield
    except AlnicoError:
        raise
    except Exception as error:
        explanation = _explanation(error, name, revision, writing)
        if explanation is None:
            raise
        raise HubError(f"{label}: {explanation}") from None


def _explanation(error: BaseException, name: str, revision: str, writing: bool) -> str | None:
    from huggingface_hub import constants, errors

    is_from_hub_library = _is_from_hub_library(error)
    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{name}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explanation(error.__cause__, name, revision, writing)
    if isinstance(error, errors.GatedRepoError):
        return (
            "is gated, and you have no access to it; expected a model you may read. "
            f"Accept its licence at {page} and {login}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{hub} has no revision {revision!r} of it; expected a branch, a tag or a commit. "
            f"See {page}/tree/main."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        if writing:
            return f"{hub} does not let you write there. Check the name; {login} with a token that may write."
        return (
            f"no such path here, and {hub} has no such model, or it is private. "
            f"Check the name; for a private model {login}."
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return (
            f"{hub} does not have a file that it listed ({PurePosixPath(error.response.url.path).name}). "
            "Try again."
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return (
                f"{hub} refuses access (status {status}); expected a token that may "
                f"{'write' if writing else 'read'} it. {login[0].upper()}{login[1:]}."
            )
        reason = "".join(c for c in error.server_message or "" if c.isprintable())[:200]
        return f"{hub} answered with status {status}{f' ({reason})' if reason else ''}. Try again later."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the model is not in the cache. Unset it for one run."
    if isinstance(error, errors.FileMetadataError):
        return f"{hub} does not answer like a hub. Check HF_ENDPOINT."
    if type(error).__name__ == "LocalProtocolError":  # its message would show the token
        return (
            "no request can be made with these settings; expected a token of plain characters. "
            "Check HF_TOKEN, or log in again."
        )
    if type(error).__module__.split(".")[0].startswith("httpx"):  # httpx; httpx2 since huggingface_hub 2
        return (
            f"{'' if writing else 'no such path here, and '}{hub} could not be reached or cut off the "
            f"connection ({type(error).__name__}: {str(error)[:120]}). Check the connection and try again; "
            "--offline uses only the cache."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"no space is left in the cache ({constants.HF_HUB_CACHE}). "
            "Make room, or set HF_HOME to another disk."
        )
    if writing and (
        is_from_hub_library or isinstance(error, (OSError, RuntimeError, ValueError))
    ):  # raised by hf_xet and by the check of the card
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:200]
        return (
            f"{hub} did not accept the upload ({reason}). Try again: files that arrived are not sent twice."
        )
    if isinstance(error, OSError):
        return (
            f"could not be downloaded into the cache {constants.HF_HUB_CACHE} "
            f"({error.strerror or str(error)[:160]}). Try again, or set HF_HOME to a folder that you may "
            "write to."
        )
    if is_from_hub_library:
        return f"{hub} does not answer like a hub ({type(error).__name__}). Check HF_ENDPOINT."
    return None


def _is_from_hub_library(error: BaseException) -> bool:
    """Was it raised inside huggingface_hub or its dependencies? A bug in a hook of alnico does not count."""
    packages, traceback = [], error.__traceback__
    while traceback is not None:
        packages.append(str(traceback.tb_frame.f_globals.get("__name__", "")).split(".")[0])
        traceback = traceback.tb_next
    return any(package in HUB_LIBRARIES for package in packages) and packages[-1] != "alnico"
