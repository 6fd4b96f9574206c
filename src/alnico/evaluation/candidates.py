"""Merges that are tried one after the other: made in memory from models that stay open, and scored where they are."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alnico.checkpoint.files import open_binary
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.memory_model import import_torch, to_torch
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.sidecars import side_files
from alnico.engine.merge_session import Resident
from alnico.engine.relatedness import IN_A_RECIPE, Caller
from alnico.engine.run import run_plan
from alnico.errors import EvaluationError, ModelError
from alnico.evaluation.loading import load_tokenizer
from alnico.evaluation.tasks import ModelKind
from alnico.folders import temporary_files
from alnico.output.hashes import READ_BYTES
from alnico.plan.job import Plan
from alnico.plan.planned_model import PlannedModel
from alnico.recipe.reference import resolve_reference
from alnico.recipe.schema import Recipe
from alnico.run_options import DEFAULT_RUN, RunOptions

if TYPE_CHECKING:
    from alnico.evaluation.live_module import LiveModule

CONFIG = "config.json"


class Candidates:
    """Models that are merged again and again, to be scored. Close it, or use it in ``with``.

    ``references`` are the models that recipes may name, as they stand there; ``folder`` is where a path is looked for that is not found
    from the working directory. They are opened once and stay in memory, what is measured of them is kept
    (:class:`alnico.engine.merge_session.Resident`), and nothing is written. Every merge has the bits that ``alnico merge`` of its recipe
    writes. ``donor`` is the model whose config and tokenizer are taken where that of a recipe is a file without any. ``run.memory_bytes`` is the
    budget of what a merge works with; beside it are the result, its modules, and the models in the system's page cache.
    ``caller`` says in whose words unrelated models are refused.
    Errors: ModelError, HubError, and those of :meth:`make`.
    """

    def __init__(
        self,
        references: Iterable[str | os.PathLike[str]],
        *,
        donor: str | os.PathLike[str] | None = None,
        folder: str | os.PathLike[str] = ".",
        run: RunOptions = DEFAULT_RUN,
        caller: Caller = IN_A_RECIPE,
    ) -> None:
        place = os.fspath(folder)
        self._resident = Resident(
            lambda reference: open_model(resolve_reference(reference, place), offline=run.offline),
            run=run,
            caller=caller,
        )
        self._donor = os.fspath(donor) if donor is not None else None
        self._modules: dict[ModelKind, LiveModule] = {}
        self._tokenizers: dict[str, Any] = {}
        self._made_like: tuple[Any, ...] = ()
        self._state: dict[str, Any] | None = None
        self._current: Candidate | None = None
        try:
            for reference in references:
                self._resident.model(os.fspath(reference))
        except BaseException:
            self.close()
            raise

    def make(self, recipe: Recipe, *, label: str | None = None) -> Candidate:
        """Merge a recipe in memory. The candidate before it is one no more.

        Its modules are those of the one before, with new values, as long as names, dtypes, shapes and config stay the same.
        Errors: as for :func:`alnico.plan`; NonFiniteError, MismatchError for models that are not of one base.
        """
        self._drop()
        plan = self._resident.plan(recipe)
        self._resident.merge(plan)
        config = self._config(plan)
        made_like = (self._resident.layout, json.dumps(config, sort_keys=True, default=str))
        if made_like != self._made_like:
            self._modules.clear()
            self._resident.unfollow()
            self._state = None
            self._made_like = made_like
        for module in self._modules.values():
            module.follow()
        self._current = Candidate(self, plan, config, label or recipe.stage or recipe.merge_method)
        return self._current

    def _config(self, plan: Plan) -> Mapping[str, Any]:
        if plan.config or self._donor is None:
            return plan.config
        return self._resident.model(self._donor).config

    def _drop(self) -> None:
        if self._current is not None:
            self._current.forget()
            self._current = None

    def close(self) -> None:
        """Close the models and let go of the modules."""
        self._drop()
        self._modules.clear()
        self._tokenizers.clear()
        self._state = None
        self._resident.close()

    def __enter__(self) -> Candidates:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state(self, candidate: Candidate) -> dict[str, Any]:
        """What :meth:`Candidate.state` gives."""
        self._check(candidate)
        if self._state is None:
            import_torch("a merge in memory")
            self._state = {
                n: to_torch(self._resident.arrays[n], dtype, shape)
                for n, dtype, shape in self._resident.layout
            }
        return self._state

    def module(self, candidate: Candidate, kind: ModelKind) -> Any:
        """What :meth:`Candidate.module` gives."""
        state = self.state(candidate)
        if kind not in self._modules:
            from alnico.evaluation.live_module import LiveModule  # with torch

            if not candidate.config:
                raise ModelError(
                    f"{candidate.label}: has no config.json; expected a transformers checkpoint. Merge directories, not single files."
                )
            bound = self._modules[kind] = LiveModule(candidate.config, state, kind, candidate.label)
            for name, arrays in bound.followers.items():
                self._resident.follow(name, arrays)
        return self._modules[kind].module

    def tokenizer(self, candidate: Candidate) -> Any:
        """What :meth:`Candidate.tokenizer` gives."""
        self._check(candidate)
        donor = candidate.plan.sources[candidate.plan.donor]
        if donor.directory is None and self._donor is not None:
            donor = self._resident.model(self._donor)
        donor.fetch(donor.absent([], True))
        planned = PlannedModel(candidate.label, candidate.plan)
        try:
            folder = planned.directory or donor.directory
            if folder is None:
                raise ModelError(
                    f"{candidate.label}: has no tokenizer; expected directories of models. Merge those, not single files."
                )
            key = _digest(folder)
            if key not in self._tokenizers:
                self._tokenizers[key] = load_tokenizer(folder, candidate.label)
            return self._tokenizers[key]
        finally:
            planned.close()

    def _check(self, candidate: Candidate) -> None:
        if candidate is not self._current:
            raise EvaluationError(
                f"{candidate.label}: was replaced by the next candidate, whose values its memory holds. Score one before making another."
            )


class Candidate:
    """A merge in memory as tasks see it (:class:`alnico.evaluation.tasks.EvaluatedModel`), until the next one is made."""

    def __init__(self, candidates: Candidates, plan: Plan, config: Mapping[str, Any], label: str) -> None:
        self.label = label
        self.plan = plan
        self.config = config
        self._candidates = candidates
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def state(self) -> dict[str, Any]:
        """The merged tensors by name, in the memory that the next candidate takes: torch tensors on the CPU."""
        return self._candidates.state(self)

    @property
    def directory(self) -> Path:
        """A checkpoint of it, written by an ordinary merge when first asked, and removed with the candidate."""
        self._candidates.state(self)
        if self._folder is None:
            with temporary_files():
                folder = tempfile.TemporaryDirectory(prefix="alnico-")
            run_plan(self.plan, Path(folder.name) / "merged")
            self._folder = folder
        return Path(self._folder.name) / "merged"

    def module(self, kind: ModelKind) -> Any:
        """The transformers module in evaluation mode and float32; its values are rounded to the dtype of the recipe's output."""
        return self._candidates.module(self, kind)

    def tokenizer(self) -> Any:
        """The transformers tokenizer: the same object for all candidates with the same tokenizer files."""
        return self._candidates.tokenizer(self)

    def forget(self) -> None:
        """Remove what was written."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _digest(folder: Path) -> str:
    """What the tokenizer of a folder is known by: the files that transformers may read for it."""
    found = hashlib.sha256()
    for path in side_files(folder)[0]:
        name = path.as_posix()
        if "/" not in name and path.suffix != ".md":
            with open_binary(folder / path) as file:
                found.update(f"{name}\0{os.fstat(file.fileno()).st_size}\0".encode())
                while data := file.read(READ_BYTES):
                    found.update(data)
    config = folder / CONFIG
    if config.exists():
        found.update(json.dumps(read_json(config).get("model_type")).encode())
    return found.hexdigest()
