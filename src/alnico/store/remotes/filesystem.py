"""A file system of fsspec as a place for a remote store: ``s3://``, ``gs://``, ``hf://buckets/`` and others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alnico.checkpoint.network import TIMEOUT, TIMEOUT_SECONDS, read_seconds
from alnico.errors import AlnicoError, HubError
from alnico.installation import install_hint
from alnico.store.remotes.remote_files import MAX_LISTED, PIECE_BYTES


class SystemFiles:
    """Files below an address of fsspec. Credentials and endpoints are those of its library (for S3: AWS's variables and
    files, ``AWS_ENDPOINT_URL`` for another server)."""

    is_writable = True

    def __init__(self, address: str) -> None:
        self.address = address
        protocol = address.partition("://")[0]
        import fsspec

        seconds = read_seconds(TIMEOUT, TIMEOUT_SECONDS)
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if protocol in ("s3", "s3a"):
            options["config_kwargs"] = {
                "connect_timeout": seconds, "read_timeout": seconds, "retries": {"max_attempts": 3}
            }  # fmt: skip
        try:
            self._system, root = fsspec.core.url_to_fs(address, **options)
        except ImportError as error:
            hint = install_hint("store") if protocol in ("s3", "s3a") else "Install that package."
            raise HubError(
                f"{address}: {protocol}:// cannot be opened ({' '.join(str(error).split())[:100]}); expected the package of fsspec "
                f"for it. {hint}"
            ) from None
        except ValueError as error:
            raise HubError(
                f"{address}: {protocol}:// is no file system that fsspec knows ({str(error)[:80]}). Check the address."
            ) from None
        except Exception as error:  # some connect at once, and each library raises errors of its own
            raise HubError(
                f"{address}: could not be opened ({type(error).__name__}: {' '.join(str(error).split())[:160]}). Check the "
                "address, your credentials and the connection, and try again."
            ) from None
        self._root = str(root).rstrip("/")

    def size(self, path: str, expected: int | None = None) -> int | None:
        with self._errors(path):
            try:
                described = self._system.info(self._place(path))
            except FileNotFoundError:
                return None
            return int(described["size"]) if described.get("type") == "file" else None

    def files(self, folder: str) -> list[str]:
        with self._errors(folder):
            try:
                found = self._system.find(self._place(folder))
            except FileNotFoundError:
                return []
        if len(found) > MAX_LISTED:
            raise HubError(
                f"{self.address}: has more than {MAX_LISTED} files; expected a store. Check the address."
            )
        prefix = f"{self._root.strip('/')}/"
        names = (str(name).strip("/") for name in found)
        return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))

    def read(self, path: str, offset: int, size: int) -> Iterator[bytes]:
        place = self._place(path)
        with self._errors(path):
            there = int(self._system.info(place)["size"])
            end = min(offset + size, there)
            while offset < end:
                data = self._system.cat_file(place, start=offset, end=min(offset + PIECE_BYTES, end))
                if not data or len(data) > PIECE_BYTES:
                    raise HubError(
                        f"{self.address}: {path}: {len(data)} bytes arrived at {offset} of {there}. Try again."
                    )
                offset += len(data)
                yield bytes(data)

    def write(self, path: str, data: bytes, *, is_new: bool = False) -> bool:
        place = self._place(path)
        with self._errors(path, writing=True):
            self._make_folder(place)
            if not is_new:
                self._system.pipe_file(place, data)
                return True
            if self._system.exists(place):
                return False
            try:
                self._system.pipe_file(place, data, mode="create")
            except FileExistsError:
                return False
            return True

    def send(self, path: str, source: Path) -> None:
        place = self._place(path)
        with self._errors(path, writing=True):
            self._make_folder(place)
            self._system.put_file(str(source), place)

    def close(self) -> None:
        pass

    def _place(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _make_folder(self, place: str) -> None:
        """Make the folder of a file, where the file system has folders."""
        if self._system.protocol not in ("s3", ("s3", "s3a"), "gs", ("gs", "gcs")):
            self._system.makedirs(place.rpartition("/")[0], exist_ok=True)

    @contextmanager
    def _errors(self, path: str, *, writing: bool = False) -> Iterator[None]:
        """Turn what the libraries raise into a HubError: each raises errors of its own."""
        try:
            yield
        except (AlnicoError, FileExistsError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise HubError(
                f"{self.address}: {path} could not be {'written' if writing else 'read'} ({type(error).__name__}: {reason}). "
                "Check the address, your credentials and the connection, and try again."
            ) from None
