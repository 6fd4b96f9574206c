"""Indexes a store and its remotes by SQLite for fast searches; a damaged index is made again from the files."""

from __future__ import annotations

import os
import sqlite3
import threading
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from alnico.errors import ModelError, RunError
from alnico.store.entry import Entry, parse_entry

SCHEMA_VERSION = 2
"""Changes when the tables do; an index of another version is made again."""

WAIT_SECONDS = 20.0
"""How long one process waits for another that writes the index."""

TABLES = """
CREATE TABLE vectors (
    id INTEGER PRIMARY KEY, source TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, is_latest INTEGER NOT NULL,
    base TEXT NOT NULL, base_root TEXT NOT NULL, tasks TEXT NOT NULL, languages TEXT NOT NULL, licence TEXT NOT NULL, sha256 TEXT NOT NULL,
    line TEXT NOT NULL,
    UNIQUE (source, name, version)
);
CREATE INDEX bases ON vectors (base);
CREATE INDEX roots ON vectors (base_root);
CREATE INDEX contents ON vectors (sha256, source);
CREATE VIRTUAL TABLE words USING fts5 (name, description, tasks, languages, base, tokenize = 'unicode61 remove_diacritics 2');
CREATE TABLE seen (source TEXT NOT NULL, path TEXT NOT NULL, stamp INTEGER NOT NULL, PRIMARY KEY (source, path)) WITHOUT ROWID;
"""

ALL = (1 << 63) - 1
"""A limit that nothing reaches."""

NOTE = "INSERT OR REPLACE INTO seen VALUES (?, ?, ?)"

Stamp = tuple[str, int]
"""A file or folder of the store, and what changes when it does."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class IndexedEntry:
    """An entry with its source: empty for the local store, otherwise the address of a remote."""

    source: str
    entry: Entry


@dataclass(frozen=True)
class Query:
    """What is searched: words that all occur, and values that must be equal, without regard to case.

    ``bases`` are the ids and ``roots`` the root hashes of the base, and ``rootless`` its ids where no root hash is recorded; one of
    all of them is enough.
    """

    text: str = ""
    bases: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    rootless: tuple[str, ...] = ()
    task: str | None = None
    language: str | None = None
    licence: str | None = None
    source: str | None = None
    all_versions: bool = False
    limit: int = 50


class Index:
    """The index of a store. Use it in ``with``.

    It has nothing that the files of the store do not say. ``fill`` reads them: it is called after an index that is damaged or of
    another version was removed. Where the disk does not let it be written, or ``path`` is None, the index is in memory. Safe for
    threads and processes.
    """

    def __init__(self, path: Path | None, fill: Callable[[Index], None] = lambda _: None) -> None:
        self.path = path
        self._fill = fill
        self._failures = 0
        self._lock = threading.RLock()
        self._database: sqlite3.Connection | None = None

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    def replace(self, source: str, entries: Iterable[Entry], stamp: Stamp | None = None) -> None:
        """Make these the entries of a source, and note the ``stamp`` of the file that they are from."""

        def write(database: sqlite3.Connection) -> None:
            _forget(database, "source = ?", (source,))
            _insert(database, source, entries)
            database.executemany(NOTE, [(source, *stamp)] if stamp is not None else [])

        self._write(write)

    def replace_names(
        self, names: Iterable[tuple[str, Sequence[Entry], Stamp | None]], source: str = ""
    ) -> None:
        """Make these the versions of some names in a source, and note the stamps of the folders that they are from."""

        def write(database: sqlite3.Connection) -> None:
            for name, entries, stamp in names:
                _forget(database, "source = ? AND name = ?", (source, name))
                _insert(database, source, entries)
                database.executemany(NOTE, [(source, *stamp)] if stamp is not None else [])

        self._write(write)

    def add(self, entry: Entry, source: str = "") -> None:
        """Add or replace one version."""

        def write(database: sqlite3.Connection) -> None:
            where = "source = ? AND name = ? AND version = ?"
            _forget(database, where, (source, entry.name, entry.version))
            _insert(database, source, [entry])

        self._write(write)

    def remove(self, source: str, name: str | None = None, version: int | None = None) -> None:
        """Remove a version, all versions of a name, or a whole source."""
        conditions = {"source": source, "name": name, "version": version}
        given = {k: v for k, v in conditions.items() if v is not None}

        def write(database: sqlite3.Connection) -> None:
            _forget(database, " AND ".join(f"{k} = ?" for k in given), tuple(given.values()))
            if name is not None:
                _mark_latest(database, source, [name])

        self._write(write)

    def stamps(self, source: str) -> dict[str, int]:
        """Return the stamps of the files and folders that the entries of a source are from, by name."""
        return self._read(
            lambda database: dict(
                database.execute("SELECT path, stamp FROM seen WHERE source = ?", (source,))
            )
        )

    def remote_stamps(self) -> dict[str, tuple[str, int]]:
        """Return the remotes, each with its file's name and stamp, by name."""
        rows = "SELECT path, source, stamp FROM seen WHERE source != ''"
        return self._read(lambda database: {p: (s, n) for p, s, n in database.execute(rows)})

    def forget_stamps(self, source: str, names: Iterable[str]) -> None:
        """Forget the stamps of files and folders of a source that are gone."""
        rows = [(source, name) for name in names]
        self._write(
            lambda database: database.executemany("DELETE FROM seen WHERE source = ? AND path = ?", rows)
        )

    def sources(self) -> list[str]:
        """Return all sources that have entries, sorted."""
        return self._read(
            lambda database: [
                s for (s,) in database.execute("SELECT DISTINCT source FROM vectors ORDER BY source")
            ]
        )

    def versions(self, source: str, name: str) -> list[Entry]:
        """Return the versions of a name in a source, the oldest first."""
        statement = "SELECT line FROM vectors WHERE source = ? AND name = ? ORDER BY version"
        return self._read(
            lambda database: [_entry(line) for (line,) in database.execute(statement, (source, name))]
        )

    def search(self, query: Query) -> tuple[list[IndexedEntry], int]:
        """Return what a query finds, the best first, up to its limit; and how many there are in all.

        With a text, order is by the words' weight (BM25), else by name; what is in the local store comes first among equals.
        """
        statement, values, order = _statement(query)

        def read(database: sqlite3.Connection) -> tuple[list[IndexedEntry], int]:
            rows = database.execute(
                f"SELECT v.source, v.line {statement} ORDER BY {order} LIMIT ?", (*values, query.limit)
            )
            found = [IndexedEntry(source, _entry(line)) for source, line in rows]
            if len(found) < query.limit:
                return found, len(found)
            return found, int(database.execute(f"SELECT count(*) {statement}", values).fetchone()[0])

        return self._read(read)

    # Reading and writing

    def _write(self, work: Callable[[sqlite3.Connection], object]) -> None:
        def in_one_step(database: sqlite3.Connection) -> None:
            database.execute("BEGIN IMMEDIATE")
            try:
                work(database)
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

        self._read(in_one_step)

    def _read(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        with self._lock:
            while True:
                try:
                    return work(self._opened())
                except sqlite3.DatabaseError as error:
                    if _is_busy(error):
                        raise self._busy() from None
                    if self._failures > 1:
                        raise RunError(
                            f"{self.path or 'the index in memory'}: cannot be used ({error}); expected SQLite with full-text search "
                            "(FTS5) and some memory. Install a Python that has it."
                        ) from None
                    self._failures += 1
                    self._discard()
                    self._fill(self)

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            self._database = self._connect(self.path if self._failures < 2 else None)
        return self._database

    def _connect(self, path: Path | None) -> sqlite3.Connection:
        if path is not None and os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise sqlite3.DatabaseError("it is not a file")
        # Statements begin their transactions themselves. The lock of this object lets several threads use it.
        database = sqlite3.connect(
            path or ":memory:", WAIT_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            database.execute("PRAGMA trusted_schema = OFF")
            if path is not None:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = NORMAL")
            if not _version(database):
                database.execute("BEGIN IMMEDIATE")
                if not _version(database):  # another process may have been faster
                    for statement in TABLES.split(";"):
                        database.execute(statement)
                    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                database.execute("COMMIT")
            if (found := _version(database)) != SCHEMA_VERSION:
                raise sqlite3.DatabaseError(f"it has version {found}")
        except BaseException:
            database.close()
            raise
        return database

    def _discard(self) -> None:
        """Remove a damaged index; what it had is read again from the files."""
        self.close()
        if self.path is not None:
            # The log first: SQLite would apply it to a new index.
            for end in ("-wal", "-shm", "-journal", ""):
                with suppress(OSError):
                    os.unlink(f"{self.path}{end}")

    def _busy(self) -> ModelError:
        return ModelError(
            f"{self.path}: another process has been writing it for {WAIT_SECONDS:.0f} seconds; expected it to end. Wait for it; if there "
            "is none, remove the file: it is made again from the task vectors."
        )


def _insert(database: sqlite3.Connection, source: str, entries: Iterable[Entry]) -> None:
    names = set()
    for e in entries:
        names.add(e.name)
        row = database.execute(
            "INSERT OR REPLACE INTO vectors (source, name, version, is_latest, base, base_root, tasks, languages, licence, sha256, line) "
            "VALUES (?, ?, ?, 0, ?, ?, ?, ?, ?, ?, ?)",
            (
                source, e.name, e.version, _plain(e.base), _plain(e.base_root), _listed(e.tasks), _listed(e.languages),
                _plain(e.licence), e.sha256, _storable(e.line()),
            ),
        )  # fmt: skip
        database.execute(
            "INSERT OR REPLACE INTO words (rowid, name, description, tasks, languages, base) VALUES (?, ?, ?, ?, ?, ?)",
            (
                row.lastrowid,
                *map(
                    _storable, (e.name, e.description, " ".join(e.tasks), " ".join(e.languages), e.base or "")
                ),
            ),
        )
    _mark_latest(database, source, names)


def _mark_latest(database: sqlite3.Connection, source: str, names: Iterable[str]) -> None:
    database.executemany(
        "UPDATE vectors SET is_latest = (version = (SELECT max(version) FROM vectors WHERE source = ?1 AND name = ?2)) "
        "WHERE source = ?1 AND name = ?2",
        [(source, name) for name in names],
    )


def _forget(database: sqlite3.Connection, where: str, values: Sequence[object]) -> None:
    database.execute(f"DELETE FROM words WHERE rowid IN (SELECT id FROM vectors WHERE {where})", values)
    database.execute(f"DELETE FROM vectors WHERE {where}", values)


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def _entry(line: str) -> Entry:
    try:
        return parse_entry(line, "the index")
    except ModelError as error:
        raise sqlite3.DatabaseError("an entry is damaged") from error


def _is_busy(error: sqlite3.DatabaseError) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _plain(text: str | None) -> str:
    return _storable((text or "").casefold())


def _storable(text: str) -> str:
    """Return a text that SQLite takes: halves of characters, which JSON may hold, become JSON's escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _listed(words: Sequence[str]) -> str:
    """Return words as one text in which each stands on its own line."""
    return "".join(f"\n{_plain(w)}" for w in words) + "\n"


def has_no_spaces(word: str) -> bool:
    """Is a word of a script that is written without spaces, so that it may be found inside of a longer run of letters?

    >>> [has_no_spaces(w) for w in ("sql", "café", "हिन्दी", "ベクトル", "ไทย")]
    [False, False, False, True, True]
    """
    return any(c >= "\u0e00" and unicodedata.category(c) == "Lo" for c in word)


def _statement(query: Query) -> tuple[str, list[object], str]:
    """Return the part of the statement from FROM on, its values, and the order."""
    tables = "FROM vectors AS v"
    conditions: list[str] = []
    values: list[object] = []
    if not query.all_versions:
        conditions.append("v.is_latest")
    is_ranked = False
    if typed := query.text.split():
        tables = "FROM words JOIN vectors AS v ON v.id = words.rowid"
        words = [_storable(word).replace("\0", "") for word in typed if any(map(str.isalnum, word))]
        if spaced := [word for word in words if not has_no_spaces(word)]:
            is_ranked = True
            conditions.append("words MATCH ?")
            # In quotes nothing is an operator; the star lets each word be a beginning.
            values.append(" ".join('"' + word.replace('"', '""') + '"*' for word in spaced))
        for inner in filter(has_no_spaces, words):
            conditions.append(
                "instr(words.name || ' ' || words.description || ' ' || words.tasks || ' ' || words.languages || ' ' || words.base, ?)"
            )
            values.append(inner)
        if not words:
            conditions.append("0")
    either = []
    for wanted, condition in (
        (query.bases, "v.base IN"),
        (query.roots, "v.base_root IN"),
        (query.rootless, "v.base_root = '' AND v.base IN"),
    ):
        if wanted:
            either.append(f"({condition} ({', '.join('?' * len(wanted))}))")
            values += map(_plain, wanted)
    if either:
        conditions.append(f"({' OR '.join(either)})")
    for column, word in (("tasks", query.task), ("languages", query.language)):
        if word is not None:
            conditions.append(f"instr(v.{column}, ?)")
            values.append(f"\n{_plain(word)}\n")
    if query.licence is not None:
        conditions.append("v.licence = ?")
        values.append(_plain(query.licence))
    if query.source is None:  # what a remote has and the store has, too, is found here
        conditions.append(
            "(v.source = '' OR NOT EXISTS (SELECT 1 FROM vectors AS mine WHERE mine.sha256 = v.sha256 AND mine.source = ''))"
        )
    else:
        conditions.append("v.source = ?")
        values.append(query.source)
    order = "rank, v.source, v.name, v.version DESC" if is_ranked else "v.name, v.source, v.version DESC"
    return f"{tables} WHERE {' AND '.join(conditions) or '1'}", values, order
