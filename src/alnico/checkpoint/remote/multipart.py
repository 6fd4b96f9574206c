"""Sends a file to a folder at a URL in parts, and says which tag S3 gives to it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import BinaryIO

from alnico.checkpoint.remote.folder import FileVersion, RemoteFolder

MAX_PARTS = 10_000
"""Parts of a file that object stores accept."""

MD5 = re.compile(r'"?([0-9a-f]{32})"?')


def send_in_parts(
    folder: RemoteFolder, name: str, upload: str, file: BinaryIO, part_bytes: int
) -> FileVersion:
    """Send the rest of a file as an upload that was begun, and complete it. Errors: HubError."""
    tags: dict[int, str] = {}
    while data := file.read(part_bytes):
        number = len(tags) + 1
        tags[number] = folder.upload_part(name, upload, number, memoryview(data))
    return folder.complete_upload(name, upload, tags)


def tag_of_parts(tags: Mapping[int, str]) -> str | None:
    """Return the tag that S3 gives to a file of parts with these tags; None if they are not MD5 digests.

    >>> tag_of_parts({1: '"d41d8cd98f00b204e9800998ecf8427e"'})
    '"59adb24ef3cdbe0297f05b395827453f-1"'
    """
    digests = [found[1] for number in sorted(tags) if (found := MD5.fullmatch(tags[number]))]
    if not digests or len(digests) < len(tags):
        return None
    joined = b"".join(map(bytes.fromhex, digests))
    return f'"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(digests)}"'
