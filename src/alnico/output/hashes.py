"""Hashes the tensors of a model, in threads, and the files next to its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash

from alnico.checkpoint.files import open_binary
from alnico.checkpoint.source import Source
from alnico.errors import ModelError
from alnico.events import Advanced, Reading
from alnico.numerics.digest import PIECE, PieceHasher, TensorDigest
from alnico.threads import Crew

CHUNK_PIECES = 4
"""Pieces that a thread hashes per call, one after the other."""

READ_BYTES = 1 << 20
"""Bytes that are read at a time."""


def hash_tensors(
    source: Source,
    names: Iterable[str],
    crew: Crew,
) -> dict[str, str]:
    """Return the digest of every tensor of ``names``, by name. The watcher of ``crew`` gets events. Errors:
    those of reading."""
    digests = {
        name: TensorDigest(t.dtype, t.shape, t.byte_size) for name in names for t in [source.tensors[name]]
    }
    crew.report(Reading(len(digests), sum(source.tensors[name].byte_size for name in digests)))

    def hash_span(name: str, start: int, end: int) -> None:
        hasher = PieceHasher(digests[name], start)
        buffer = memoryview(bytearray(min(READ_BYTES, end - start)))
        for offset in range(start, end, READ_BYTES):
            crew.check()
            part = buffer[: min(READ_BYTES, end - offset)]
            source.read_into(name, offset, part)
            hasher.update(part)
        hasher.finish()
        crew.report(Advanced(name, end - start))

    size = CHUNK_PIECES * PIECE
    sizes = {name: source.tensors[name].byte_size for name in digests}
    spans = [(n, s, min(s + size, total)) for n, total in sizes.items() for s in range(0, total, size)]
    crew.run([(hash_span, span) for span in spans])
    return {name: digest.result() for name, digest in digests.items()}


def hash_file(path: Path) -> str:
    """Return the xxh3-128 of a file's bytes. Errors: ModelError with the system's reason."""
    try:
        return hash_path(path)
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from None


def hash_path(path: Path) -> str:
    """Return the xxh3-128 of a file's bytes. Errors: OSError."""
    state = xxhash.xxh3_128()
    with open_binary(path) as file:
        while data := file.read(READ_BYTES):
            state.update(data)
    return state.hexdigest()
