"""Another local store on this machine, or one that is mounted, as a place to pull from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from alnico.checkpoint.files import check_inside
from alnico.checkpoint.task_vectors.manifest import MANIFEST
from alnico.checkpoint.task_vectors.store_folder import VECTORS, vector_folder, vector_names, versions_of
from alnico.errors import HubError, ModelError
from alnico.events import Watcher
from alnico.store.entry import Entry, entry_of
from alnico.store.file_hash import stored_file
from alnico.store.signed_names import files_beside


class StoreFolderRemote:
    """A local store. Its versions are folders with all their files; they are checked and copied."""

    is_writable = may_be_linked = False

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address

    def entries(self) -> list[Entry]:
        return [
            entry_of(self.folder / VECTORS / name / str(version), version)
            for name in vector_names(self.folder)
            for version in versions_of(self.folder, name)
        ]

    def find(self, name: str | None, version: int | None) -> Entry:
        names = vector_names(self.folder) if name is None else [name]
        if len(names) != 1:
            raise HubError(
                f"{self.address}: has {len(names)} task vectors; expected the name of one. Write `alnico store pull NAME --from "
                "ADDRESS`."
            )
        place = vector_folder(names[0] if version is None else f"{names[0]}@{version}", self.folder)
        return entry_of(place, int(place.name))

    def download(self, entry: Entry, watch: Watcher | None) -> Mapping[str, Path]:
        place = self.folder / VECTORS / entry.name / str(entry.version)
        for name, stated in entry.files.items():
            check_inside(place / name, place)
            if stored_file(place / name) != stated:
                raise ModelError(
                    f"{place / name}: is not the file that the manifest names; expected SHA-256 {stated.sha256}. It was damaged: "
                    f"`alnico store verify --store {self.address}` checks the store."
                )
        beside = files_beside(place, entry.files)
        return {name: place / name for name in (MANIFEST, *entry.files, *beside)}

    def push(
        self, folder: Path, entry: Entry, *, private: bool, message: str | None, watch: Watcher | None
    ) -> str:
        raise HubError(
            f"{self.address}: is the store of somebody on this machine; expected a folder to publish in. Pull there from this "
            f"store instead (`alnico store pull {entry.name} --from STORE`), or push to another folder."
        )

    def close(self) -> None:
        pass
