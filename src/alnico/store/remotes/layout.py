"""Knows how the files of a remote store are laid out, and reads its index.

    index.jsonl                               one line of JSON for each version: an entry of the index
    vectors/NAME/VERSION/taskvector.json      the manifest
    vectors/NAME/VERSION/entry.json           its line of the index, so that the index can be made again
    objects/AB/ABCD...                        all other files by their SHA-256, shared by versions

Anyone can host such a folder. Nothing in it holds an address: a file is where its hash says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from alnico.checkpoint.files import is_text
from alnico.checkpoint.task_vectors.manifest import MANIFEST, is_name
from alnico.errors import ModelError
from alnico.store.entry import Entry, parse_entry

INDEX_FILE = "index.jsonl"
ENTRY_FILE = "entry.json"
VECTORS_FOLDER = "vectors"
MAX_INDEX_BYTES = 200_000_000
MAX_LINE = 1_000_000
MAX_ENTRIES = 100_000

VERSION_PATH = re.compile(
    rf"{VECTORS_FOLDER}/([^/]+)/([1-9][0-9]{{0,8}})/({re.escape(MANIFEST)}|{ENTRY_FILE})"
)


def object_path(sha256: str) -> str:
    """Return where a file is, by the SHA-256 of its content."""
    return f"objects/{sha256[:2]}/{sha256}"


def version_path(name: str, version: int, file: str) -> str:
    """Return where a file of a version is: its manifest or its entry."""
    return f"{VECTORS_FOLDER}/{name}/{version}/{file}"


def versions_among(paths: Iterable[str], file: str = MANIFEST) -> list[tuple[str, int]]:
    """Return the names and versions that have a manifest (or ``file``) among the files of a store, sorted."""
    found = (VERSION_PATH.fullmatch(path) for path in paths)
    return sorted((m[1], int(m[2])) for m in found if m and m[3] == file and is_name(m[1]))


def parse_index(data: bytes, where: str) -> list[Entry]:
    """Read the lines of an index. Errors: ModelError, which names the line."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{where}: is not UTF-8 text (byte {error.start}); {EXPECTED}") from None
    if text.lstrip()[:1] == "<":
        raise ModelError(f"{where}: is a page (HTML or XML), not an index; {EXPECTED}")
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > MAX_ENTRIES:
        raise ModelError(
            f"{where}: has {len(lines)} lines, at most {MAX_ENTRIES} are read. Tell who hosts the index."
        )
    entries: dict[tuple[str, int], Entry] = {}
    for number, line in lines:
        entry = read_entry(line, f"{where}:{number}")
        if (entry.name, entry.version) in entries:
            raise ModelError(
                f"{where}:{number}: {entry.name}@{entry.version} is there twice; expected each version once. "
                "`alnico store push` to it writes the index again; tell who hosts it."
            )
        entries[entry.name, entry.version] = entry
    return list(entries.values())


EXPECTED = "expected lines of JSON, one for each version of a task vector. Check the address: it must be that of the folder with the index."


def read_entry(line: str, where: str) -> Entry:
    """Read a line of an index, of limited length. Errors: ModelError."""
    if len(line) > MAX_LINE or not is_text(line):
        raise ModelError(f"{where}: is longer than {MAX_LINE} characters, or not text; {EXPECTED}")
    entry = parse_entry(line, where)
    if "\\u" in line and not is_text(entry.line()):
        raise ModelError(f"{where}: has half of a character (a lone surrogate) and is not text; {EXPECTED}")
    return entry
