"""A folder of an S3-compatible object store, over botocore: conditional reads of ranges, multipart uploads."""

from __future__ import annotations

import functools
import io
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import urlsplit

from alnico.checkpoint.network import TIMEOUT, TIMEOUT_SECONDS, Speed, TransferStopped, read_seconds
from alnico.checkpoint.remote.folder import FileVersion
from alnico.checkpoint.remote.multipart import MAX_PARTS, tag_of_parts
from alnico.checkpoint.remote.ranges import (
    CONTENT_RANGE,
    MAX_LISTED,
    bytes_to_skip,
    changed,
    check_name,
    checked_tag,
    condition_of,
    is_plain_name,
    number_of_bytes,
    range_header,
)
from alnico.checkpoint.remote.retries import Again, repeat
from alnico.checkpoint.remote.s3_errors import (
    CHANGED,
    NO_UPLOAD,
    NOT_THERE,
    TAKEN,
    Refused,
    refusal,
    s3_errors,
)
from alnico.errors import HubError
from alnico.installation import install_hint

CONNECTIONS = 64
"""Connections that are kept open: as many as threads that read or write at a time."""
PIECE_BYTES = 1 << 20
"""Bytes that are taken from the connection at a time, at most."""
SLOW_PIECE_BYTES = 1 << 14
"""The same where the HTTP library waits until all of them are there (urllib3 before 2.1), so that a slow body is noticed."""
MAX_TEXT = 2000
"""Longest id of an upload or tag of a part."""


class S3Folder:
    """Objects whose keys begin with the URL's path. The endpoint, the region, the profile and the credentials are botocore's:
    AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE, AWS_ACCESS_KEY_ID, ... and the files of the AWS command line.

    Without any credentials, requests are not signed, which buckets of public data accept.
    """

    is_writable = True

    def __init__(self, address: str) -> None:
        try:
            import botocore.session  # noqa: F401
        except ImportError as error:
            raise HubError(
                f"{address}: s3:// needs {error.name or 'botocore'}, which is not installed. {install_hint('remote')}"
            ) from None
        self.address = address
        self._bucket, _, prefix = address.partition("://")[2].partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._made: Any = None
        self._endpoint = "the server"
        self._is_signed, self._has_answered = True, False
        self._lock, self._stop = threading.Lock(), threading.Event()

    def names(self) -> list[str]:
        found: set[str] = set()
        after: dict[str, str] = {}
        while True:
            page = self._call(self.address, "list_objects_v2", "s3:ListBucket", Prefix=self._prefix, **after)
            if not isinstance(page.get("IsTruncated"), bool):
                raise _not_s3(self.address, "no list of objects")
            keys = [str(entry.get("Key", "")) for entry in page.get("Contents", ())]
            # Names that end with a slash mark folders; one with ".." would lead out of a folder of this machine.
            found.update(
                name
                for key in keys
                if key.startswith(self._prefix) and is_plain_name(name := key.removeprefix(self._prefix))
            )
            token = page.get("NextContinuationToken")
            if not page["IsTruncated"] or not token:
                return sorted(found)
            if len(found) > MAX_LISTED or not keys:
                raise HubError(
                    f"{self.address}: has more than {MAX_LISTED} files, or a list without end; expected the folder of a model. "
                    "Check the URL."
                )
            after = {"ContinuationToken": token}

    def state(self, name: str) -> FileVersion | None:
        where = check_name(self.address, name)
        key = self._prefix + name

        def ask() -> FileVersion | None:
            try:
                found = self._once(where, "head_object", Key=key)
            except Refused:
                # An answer to HEAD has no body, which would tell an absent file from an absent bucket, and expired
                # credentials from denied access.
                self._once(where, "get_object", Key=key, Range=range_header(0, 1))["Body"].close()
                raise Again("answers HEAD and GET in different ways") from None
            return FileVersion(_size(where, found.get("ContentLength")), checked_tag(found.get("ETag")))

        try:
            return repeat(where, ask, self._stop)
        except Refused as error:
            if error.code in NOT_THERE:
                return None
            raise self._refusal(where, error, "s3:GetObject") from None

    def read_into(self, name: str, offset: int, buffer: memoryview, state: FileVersion) -> None:
        where = check_name(self.address, name)
        done, total = 0, len(buffer)
        condition = condition_of(state)
        parameters = {"Key": self._prefix + name} | ({"IfMatch": condition} if condition else {})

        def read_rest() -> None:
            nonlocal done
            first, count = offset + done, total - done
            answer = self._once(where, "get_object", Range=range_header(first, count), **parameters)
            described, status = answer.get("ContentRange"), answer["ResponseMetadata"]["HTTPStatusCode"]
            sent = CONTENT_RANGE.fullmatch(described or "") if status == 206 else None
            size = (
                answer.get("ContentLength")
                if sent is None
                else state.size
                if sent[3] == "*"
                else int(sent[3])
            )
            found = FileVersion(_size(where, size), checked_tag(answer.get("ETag")))
            with answer["Body"] as body, self._errors(where):
                skipped = bytes_to_skip(where, status, described, first, count, found, state)
                for piece in self._pieces(body):
                    data = piece[skipped:]
                    skipped -= min(skipped, len(piece))
                    if status == 206 and len(data) > total - done:
                        raise HubError(
                            f"{where}: the server sent more than the {count} bytes from {first} on that were asked for. Try "
                            "again; check the server and the proxies before it."
                        )
                    data = data[: total - done]
                    buffer[done : done + len(data)] = data
                    done += len(data)
                    if done == total and status != 206:
                        return  # the rest is not read
            if done < total:
                raise Again(f"cut off the connection after {done} of {total} bytes")

        if not total:
            return
        try:
            repeat(where, read_rest, self._stop)
        except Refused as error:
            if error.code in CHANGED:
                raise changed(
                    where,
                    f"the server no longer has the version of {state.size} bytes and the tag {state.tag[:60]}",
                ) from None
            if error.code in NOT_THERE:
                raise changed(where, "it was removed") from None
            raise self._refusal(where, error, "s3:GetObject") from None

    def put(self, name: str, data: bytes) -> FileVersion:
        where = check_name(self.address, name)
        answer = self._call(where, "put_object", "s3:PutObject", Key=self._prefix + name, Body=data)
        return FileVersion(len(data), checked_tag(answer.get("ETag")))

    def put_new(self, name: str, data: bytes) -> FileVersion | None:
        where = check_name(self.address, name)
        answer = self._call(
            where, "put_object", "s3:PutObject", TAKEN, Key=self._prefix + name, Body=data, IfNoneMatch="*"
        )  # fmt: skip
        return None if answer is None else FileVersion(len(data), checked_tag(answer.get("ETag")))

    def delete(self, name: str) -> None:
        where = check_name(self.address, name)
        self._call(where, "delete_object", "s3:DeleteObject", NOT_THERE, Key=self._prefix + name)

    def start_upload(self, name: str) -> str:
        where = check_name(self.address, name)
        answer = self._call(where, "create_multipart_upload", "s3:PutObject", Key=self._prefix + name)
        return _stated(where, answer, "UploadId")

    def upload_part(self, name: str, upload: str, number: int, data: memoryview) -> str:
        where = f"{check_name(self.address, name)} (part {number})"

        def send() -> Any:
            return self._once(
                where,
                "upload_part",
                Key=self._prefix + name,
                UploadId=upload,
                PartNumber=number,
                Body=_Part(data),
            )

        try:
            return _stated(where, repeat(where, send, self._stop), "ETag")
        except Refused as error:
            raise self._refusal(where, error, "s3:PutObject") from None

    def uploaded_parts(self, name: str, upload: str) -> dict[int, tuple[int, str]] | None:
        where = check_name(self.address, name)
        found: dict[int, tuple[int, str]] = {}
        after: dict[str, int] = {}
        while True:
            page = self._call(
                where, "list_parts", "s3:ListMultipartUploadParts", NO_UPLOAD, Key=self._prefix + name, UploadId=upload, **after
            )  # fmt: skip
            if page is None:
                return None
            parts = page.get("Parts", ())
            for part in parts:
                number = _size(where, part.get("PartNumber"))
                found[number] = (_size(where, part.get("Size")), _stated(where, part, "ETag"))
            if not page.get("IsTruncated") or not parts or len(found) > MAX_PARTS:
                return found
            after = {"PartNumberMarker": max(found)}

    def complete_upload(self, name: str, upload: str, tags: Mapping[int, str]) -> FileVersion:
        where = check_name(self.address, name)
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(tags.items())]
        answer = self._call(
            where, "complete_multipart_upload", "s3:PutObject", NO_UPLOAD,
            Key=self._prefix + name, UploadId=upload, MultipartUpload={"Parts": parts},
        )  # fmt: skip
        found = self.state(name)
        # The answer to an earlier try may have been lost: the upload is gone then, and the object is there.
        if found is None or (answer is None and not _is_made_of(found.tag, tags)):
            raise HubError(
                f"{where}: the upload does not exist any more, and the object is not there as it was sent; expected the upload "
                f"{upload[:60]!r}. A rule of the bucket, or somebody, removed it. Run the same command again."
            )
        return found

    def abort_upload(self, name: str, upload: str) -> None:
        where = check_name(self.address, name)
        self._call(
            where, "abort_multipart_upload", "s3:AbortMultipartUpload", NO_UPLOAD, Key=self._prefix + name, UploadId=upload
        )  # fmt: skip

    def close(self) -> None:
        self._stop.set()
        with self._lock:
            if self._made is not None:
                self._made.close()

    def _call(
        self, where: str, method: str, rights: str, expected: Sequence[str] = (), **parameters: Any
    ) -> Any:
        """Make a request, repeated while that may help; return None for an error with a code of ``expected``.

        Errors: HubError.
        """
        try:
            return repeat(where, lambda: self._once(where, method, **parameters), self._stop)
        except Refused as error:
            if error.code in expected:
                return None
            raise self._refusal(where, error, rights) from None

    def _once(self, where: str, method: str, **parameters: Any) -> Any:
        """Make one request. Errors: Again, Refused, HubError."""
        from botocore.exceptions import ClientError

        client = self._client(where)
        with self._errors(where):
            if self._stop.is_set():
                raise TransferStopped
            try:
                answer = getattr(client, method)(Bucket=self._bucket, **parameters)
            except ClientError:
                self._has_answered = True
                raise
        self._has_answered = True
        return answer

    def _client(self, where: str) -> Any:
        with self._lock, self._errors(where):
            if self._made is None:
                import botocore
                from botocore.config import Config
                from botocore.session import Session

                session, seconds = Session(), read_seconds(TIMEOUT, TIMEOUT_SECONDS)
                session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
                self._is_signed = session.get_credentials() is not None
                config = Config(
                    connect_timeout=seconds,
                    read_timeout=seconds,
                    retries={"total_max_attempts": 1},  # they are repeated here, which can be interrupted
                    max_pool_connections=CONNECTIONS,
                    tcp_keepalive=True,
                    user_agent_extra="alnico",
                    signature_version=None if self._is_signed else botocore.UNSIGNED,
                )
                try:
                    made = session.create_client("s3", config=config)
                except ValueError:  # its text shows the address, which may have a password
                    raise HubError(
                        f"{where}: AWS_ENDPOINT_URL is not the address of a server; expected one such as https://s3.example.org. "
                        "Correct it."
                    ) from None
                made.meta.events.register("before-parse.s3", _refuse_part_of_answer)
                parts = urlsplit(made.meta.endpoint_url)
                self._endpoint = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
                self._made = made
                weakref.finalize(self, made.close)  # connections of a folder that nobody closes
            return self._made

    def _errors(self, where: str) -> AbstractContextManager[None]:
        return s3_errors(where, self._endpoint, has_answered=self._has_answered)

    def _refusal(self, where: str, error: Refused, rights: str) -> HubError:
        return refusal(
            where,
            error,
            bucket=self._bucket,
            endpoint=self._endpoint,
            rights=rights,
            is_signed=self._is_signed,
        )

    def _pieces(self, body: Any) -> Iterator[bytes]:
        """Yield a body as it arrives. Errors: Again if it stops or is too slow; what the HTTP library raises."""
        read, size = getattr(body, "read1", None), PIECE_BYTES
        if read is None:
            read, size = body.read, SLOW_PIECE_BYTES
        speed = Speed(read_seconds(TIMEOUT, TIMEOUT_SECONDS))
        while data := read(size):
            slow = speed.arrived(len(data))
            if self._stop.is_set():
                raise TransferStopped
            if slow is not None:
                raise Again(slow)
            yield data
            speed.wait()


@functools.cache
def _loader(data_path: str | None) -> Any:
    """Return botocore's reader of its descriptions of services, which it parses once: 0.02 s for a client then, not 0.25 s."""
    from botocore.loaders import create_loader

    return create_loader(data_path)


def _refuse_part_of_answer(operation_model: Any, response_dict: Mapping[str, Any], **_: Any) -> None:
    """Refuse an answer that was cut off: botocore would take the list of a folder that never arrived for an empty list.

    Errors: Again.
    """
    body, stated = response_dict.get("body"), response_dict.get("headers", {}).get("Content-Length")
    if not isinstance(body, bytes) or operation_model.http.get("method") == "HEAD":
        return
    expected = number_of_bytes(stated)
    if expected is not None and len(body) != expected:
        raise Again(f"cut off the connection after {len(body)} of {expected} bytes")


class _Part(io.RawIOBase):
    """Bytes of a caller as the file that botocore wants, without a copy of them all."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._place = data.cast("B"), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: len(self._data)}[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._data[self._place : self._place + len(view)]
        view[: len(data)] = data
        self._place += len(data)
        return len(data)


def _size(where: str, value: object) -> int:
    """Return a number that a server states. Errors: HubError."""
    if not isinstance(value, int) or not 0 <= value < 1 << 60:
        raise _not_s3(where, f"{str(value)[:40]!r} where a number is expected")
    return value


def _stated(where: str, answer: Mapping[str, Any], key: str) -> str:
    """Return a text that a server states. Errors: HubError."""
    text = answer.get(key)
    if not isinstance(text, str) or not 0 < len(text) <= MAX_TEXT:
        raise _not_s3(where, f"no {key}")
    return text


def _not_s3(where: str, what: str) -> HubError:
    return HubError(
        f"{where}: the server's answer has {what}; expected an S3-compatible server. Check AWS_ENDPOINT_URL and the proxies in the "
        "environment."
    )


def _is_made_of(tag: str, parts: Mapping[int, str]) -> bool:
    """Can an object with this ETag be made of parts with these?"""
    expected = tag_of_parts(parts)
    return tag == expected if expected is not None else tag.endswith(f'-{len(parts)}"')
