"""Opens the models of a command again on nodes of a cluster, and checks that their files are the same ones."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass

from alnico.checkpoint.memory_model import MemoryModel
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.reference import is_path
from alnico.checkpoint.source import Source, unwrap
from alnico.devices import devices_for
from alnico.errors import AlnicoError, ModelError
from alnico.run_options import ONLINE, Access, RunOptions

EVERYWHERE = "Use a file system that all nodes see, or the model's URL."


@dataclass(frozen=True)
class NodeModels:
    """Models of a command as its nodes open them, and what identifies their files. It is pickled.

    ``place`` is the working directory, to which references are relative; ``are_here`` says which of them are paths.
    """

    references: tuple[str, ...]
    are_here: tuple[bool, ...]
    identities: tuple[str, ...]
    place: str
    access: Access = ONLINE

    @classmethod
    def of(cls, sources: Sequence[Source], run: RunOptions) -> NodeModels:
        """Describe opened models, whose labels are their references.

        Errors: AlnicoError for a model in memory, which no other process can read, and for a device that is not the processor.
        """
        for source in sources:
            if isinstance(unwrap(source), MemoryModel):
                raise AlnicoError(
                    f"{source.label} is in memory, and nodes of a cluster read models themselves; expected a path, an id of the hub or a "
                    "URL. Save the model, or leave out ray."
                )
        device = devices_for("merging", run.device)[0]
        if device.is_gpu:
            raise AlnicoError(
                f"the device is {device}, and nodes of a cluster compute on their processors. Leave out --device, or --ray."
            )
        return cls(
            tuple(source.label for source in sources),
            tuple(is_path(source.label) for source in sources),
            tuple(_identity(source) for source in sources),
            os.getcwd(),
            run.access,
        )

    def open(self) -> list[Source]:
        """Open the models on this machine. Errors: ModelError for one that is not here, or is another one here; HubError."""
        with suppress(OSError):  # then paths are absolute, or are not found
            os.chdir(self.place)
        with ExitStack() as opened:
            sources: list[Source] = []
            for reference, is_here, identity in zip(
                self.references, self.are_here, self.identities, strict=True
            ):
                if is_here and not is_path(reference):
                    raise ModelError(
                        f"{reference}: no such directory or file there; expected one path for all nodes. {EVERYWHERE}"
                    )
                source = open_model(reference, access=self.access)
                opened.enter_context(closing(source))
                if _identity(source) != identity:
                    raise ModelError(
                        f"{reference}: is another model there: names, sizes, times or headers of its files differ; expected the files that "
                        f"the command sees. {EVERYWHERE}"
                    )
                sources.append(source)
            opened.pop_all()
        return sources


def node_threads(run: RunOptions) -> int | None:
    """Return how many threads a caller wants on each node; None for those of its processors."""
    return None if run.has_default_threads else run.threads


def _identity(source: Source) -> str:
    return json.dumps(source.identity(), sort_keys=True)
