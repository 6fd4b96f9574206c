"""The files of a repository on the hub at one commit, read by ranges without a copy in the cache."""

from __future__ import annotations

import threading

from alnico.checkpoint.hub import Repository, hub_errors
from alnico.checkpoint.network import Exchange, guard_requests
from alnico.checkpoint.remote.folder import FileVersion
from alnico.checkpoint.remote.ranges import changed, check_name, check_same
from alnico.checkpoint.remote.read_only_folder import ReadOnlyFolder
from alnico.checkpoint.remote.retries import Again, again_after, repeat
from alnico.errors import HubError


class HubFolder(ReadOnlyFolder):
    """A repository that was found online. A commit never changes, so the version of a file is its size and its SHA-256 where
    the hub states it, else the commit."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.address = repository.label
        self._stop = threading.Event()

    def names(self) -> list[str]:
        return sorted(self.repository.sizes)

    def state(self, name: str) -> FileVersion | None:
        check_name(self.address, name)
        size = self.repository.sizes.get(name)
        return (
            None
            if size is None
            else FileVersion(size, self.repository.hashes.get(name, self.repository.commit))
        )

    def read_into(self, name: str, offset: int, buffer: memoryview, state: FileVersion) -> None:
        where = f"{self.address}: {name}"
        found = self.state(name)
        if found is None:
            raise changed(where, f"commit {self.repository.commit} does not have it")
        check_same(where, found, state)
        exchange = Exchange(
            where, limit=state.size, size=state.size, commit=self.repository.commit, stop=self._stop
        )
        done, total = 0, len(buffer)

        def read_rest() -> None:
            nonlocal done
            try:
                with guard_requests(exchange):
                    for data in self.repository.receive(name, offset + done, total - done):
                        buffer[done : done + len(data)] = data
                        done += len(data)
            except Exception as error:
                again = again_after(error, has_answered=True)  # with the list of its files
                if again is None:
                    raise
                raise again from None
            if done < total:
                raise Again(f"cut off the connection after {done} of {total} bytes")

        if total:
            with hub_errors(self.address, self.repository.name):
                repeat(where, read_rest, self._stop)

    def close(self) -> None:
        self._stop.set()

    def _cannot_write(self, name: str) -> HubError:
        return HubError(
            f"{self.address}: is only read this way; {name} was not written. Merge into a folder, and `alnico push` it."
        )
