"""Merges candidate recipes in memory, from models that stay open, so that tasks can score them.

Models are files or objects in memory. A merge of objects is scored like this, by soups, searches and curves alike:

    with Candidates({"base": base, "models[0]": first, "models[1]": second}, caller=IN_PYTHON) as candidates:
        for scale in (0.5, 1.0):
            recipe = load_recipe({"merge_method": "task_arithmetic", "base_model": "base", "models": [...]})
            candidate = candidates.make(recipe, label=f"scale {scale}")
            scores = {task.name: task.evaluate(candidate).value for task in as_tasks(tasks)}

``candidate.model()`` is what a function as a task receives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alnico.checkpoint.files import open_binary
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.memory_model import import_torch, to_torch
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.sidecars import side_files
from alnico.checkpoint.source import Source
from alnico.devices import CPU, Device
from alnico.engine.merge_session import Resident
from alnico.engine.relatedness import IN_A_RECIPE, Caller
from alnico.engine.run import run_plan
from alnico.errors import EvaluationError, MismatchError, ModelError, ResourceError
from alnico.evaluation.batches import is_out_of_memory, release_memory
from alnico.evaluation.loading import article, load_tokenizer
from alnico.evaluation.merge_place import merging_gpu
from alnico.evaluation.module_kinds import kind_of_config, part_of_kind
from alnico.evaluation.module_places import converted, moved
from alnico.evaluation.placement import ON_THE_PROCESSOR, ModulePlacement
from alnico.evaluation.tasks import ModelKind
from alnico.folders import temporary_files
from alnico.models.open_models import (
    OpenModels,
    fill,
    name_tensors,
    open_models,
    path_of,
    plain_copy,
    template_of,
)
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
    """Models that are merged repeatedly for scoring. Close it, or use it in ``with``.

    ``references`` are the models that recipes may use, as written there; relative paths are also looked up in ``folder``.
    A mapping gives the model of each reference: a path, a module, a dict of tensors, anything that stands for a model. If
    a module is among them, candidates are modules: a copy of the first one (or of ``template``) with the merged tensors.
    A task vector among them counts as ``tau.on(base)``.
    Models are opened once and stay in memory, measured facts are cached (:class:`alnico.engine.merge_session.Resident`),
    and nothing is written. Every merge on the processor has the same bits as ``alnico merge`` of its recipe. ``donor`` provides config
    and tokenizer if a recipe's own donor is a file without them. ``run.memory_bytes`` is the working memory of a merge;
    the result, its modules, and the models in the system's page cache come on top. ``caller`` selects the wording of the
    error for unrelated models. Modules lie where ``placement`` says. On a GPU that kernels run on, and that has room,
    merges are made there and are the module's tensors without a copy; else they are made on the processor and copied.
    Errors: ModelError, HubError, and those of :meth:`make`.
    """

    def __init__(
        self,
        references: Iterable[str | os.PathLike[str]] | Mapping[str, Any],
        *,
        donor: str | os.PathLike[str] | None = None,
        folder: str | os.PathLike[str] = ".",
        template: Any = None,
        base: Any = None,
        run: RunOptions = DEFAULT_RUN,
        caller: Caller = IN_A_RECIPE,
        placement: ModulePlacement = ON_THE_PROCESSOR,
    ) -> None:
        self._folder = os.fspath(folder)
        self._added: dict[str, Callable[[], Source]] = {}
        self._opened: OpenModels | None = None
        self._models: dict[str, Any] | None = None
        if isinstance(references, Mapping):
            self._models = {r: _in_folder(model, self._folder) for r, model in references.items()}
            template = template_of(references.values()) if template is None else template
        self._references = [os.fspath(reference) for reference in references]
        self._base = base
        self._run = run
        self._caller: Caller = caller
        self._donor = os.fspath(donor) if donor is not None else None
        self._template = template
        self._placement = placement
        self.watch = run.watch
        self._filled: Any = None
        self._modules: dict[ModelKind, LiveModule] = {}
        self._tokenizers: dict[str, Any] = {}
        self._signature: tuple[Any, ...] = ()
        self._state: dict[str, Any] | None = None
        self._current: Candidate | None = None
        self._start(may_use_gpu=placement.device.is_gpu)

    def _start(self, *, may_use_gpu: bool) -> None:
        """Open the models, for merges on the GPU or on the processor. Errors: ModelError, HubError."""
        if self._models is not None:
            self._opened = open_models(self._models, base=self._base, access=self._run.access)
        run = dataclasses.replace(self._run, device=CPU.name) if self._placement.device.is_gpu else self._run
        self._resident = Resident(self._open, run=run, caller=self._caller)
        self._gpu: Device | None = None
        first: dict[str, Source] = {}
        try:
            if may_use_gpu:
                first = {reference: self._open(reference) for reference in self._references}
                # A function gets a dict of tensors as it is on the processor.
                if self._template is not None or any(source.config for source in first.values()):
                    self._gpu = merging_gpu(self._placement, first.values())
                if self._gpu is not None:
                    run = dataclasses.replace(run, device=self._gpu.name)
                self._resident = Resident(
                    lambda reference: first.pop(reference) if reference in first else self._open(reference),
                    run=run,
                    caller=self._caller,
                )
            for reference in self._references:
                self._resident.model(reference)
        except BaseException:
            for source in first.values():
                source.close()
            self.close()
            raise

    def _open(self, reference: str) -> Source:
        if reference in self._added:
            return self._added[reference]()
        if self._opened is not None:
            return self._opened.sources[reference]
        return open_model(resolve_reference(reference, self._folder), access=self._run.access)

    def make(self, recipe: Recipe, *, label: str | None = None) -> Candidate:
        """Merge a recipe in memory. The previous candidate becomes invalid.

        The modules are reused with new values as long as names, dtypes, shapes and config stay the same.
        Errors: as for :func:`alnico.plan`; NonFiniteError, MismatchError for models without a common base.
        """
        self._drop()
        plan = self._merged(recipe)
        config = self._config(plan)
        signature = (self._resident.layout, json.dumps(config, sort_keys=True, default=str))
        if signature != self._signature:
            self._modules.clear()
            self._resident.unfollow()
            self._signature = signature
        self._state = None
        made = self._current = Candidate(self, plan, config, label or recipe.stage or recipe.merge_method)
        for module in self._modules.values():
            module.follow(lambda: self.state(made))
        return made

    def _merged(self, recipe: Recipe) -> Plan:
        """Plan and merge a recipe: on the processor from then on, if the GPU has too little memory."""
        try:
            plan = self._resident.plan(recipe)
            self._resident.merge(plan)
        except Exception as error:
            if self._gpu is None or not (isinstance(error, ResourceError) or is_out_of_memory(error)):
                raise
        else:
            return plan
        self._release()
        release_memory()
        self._start(may_use_gpu=False)
        plan = self._resident.plan(recipe)
        self._resident.merge(plan)
        return plan

    def source(self, reference: str) -> Source:
        """Return the open model of a reference."""
        return self._resident.model(reference)

    def add(self, reference: str, open_source: Callable[[], Source]) -> None:
        """Let recipes use a computed model under a reference: ``open_source`` makes it from models of :meth:`source`."""
        self._added[reference] = open_source

    def _config(self, plan: Plan) -> Mapping[str, Any]:
        if plan.config or self._donor is None:
            return plan.config
        return self._resident.model(self._donor).config

    def _drop(self) -> None:
        if self._current is not None:
            self._current.forget()
            self._current = None

    def close(self) -> None:
        """Close the models and release the modules."""
        self._drop()
        self._tokenizers.clear()
        self._release()

    def _release(self) -> None:
        self._modules.clear()
        self._signature = ()
        self._state = None
        self._filled = None
        self._resident.close()
        if self._opened is not None:
            self._opened.close()

    def __enter__(self) -> Candidates:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state(self, candidate: Candidate) -> dict[str, Any]:
        """Implements :meth:`Candidate.state`."""
        self.check(candidate)
        if self._state is None:
            torch = import_torch("a merge in memory")
            with torch.inference_mode(False):  # a task may ask for its module where no graph is recorded
                self._state = {
                    n: to_torch(self._resident.bytes_of(n), dtype, shape)
                    for n, dtype, shape in self._resident.layout
                }
        return self._state

    def model(self, candidate: Candidate) -> Any:
        """Implements :meth:`Candidate.model`."""
        self.check(candidate)
        if self._template is not None:
            return self._filled_copy(candidate)
        if candidate.config:
            return self.module(candidate, kind_of_config(candidate.config))
        # Copies: a function may keep or change what it gets, and the next merge reuses these arrays.
        state = self._named(candidate) if self._opened is not None else self.state(candidate)
        return {
            name: value.clone() if hasattr(value, "clone") else value.copy() for name, value in state.items()
        }

    def _named(self, candidate: Candidate) -> dict[str, Any]:
        assert self._opened is not None
        arrays = {name: self._resident.bytes_of(name) for name, _, _ in self._resident.layout}
        return name_tensors(self._opened, candidate.plan, arrays)

    def _filled_copy(self, candidate: Candidate) -> Any:
        """Return the template's copy with the tensors of the candidate, in evaluation mode."""
        if self._filled is None:
            self._filled = moved(plain_copy(self._template), self._placement, candidate.label)
        state = self._named(candidate) if self._opened is not None else self.state(candidate)
        try:
            fill(self._filled, state, partly=candidate.plan.recipe.missing == "drop")
        except MismatchError as error:
            why = str(error.args[0]).partition(" Pass a module of")[0]
            raise MismatchError(
                f"{candidate.label}: {why} Functions receive a copy of the first module among the models: pass "
                "models of its architecture."
            ) from None
        self._filled = converted(self._filled, self._placement)  # the merge brings its own dtype
        return self._filled.eval()

    def write_config(self, candidate: Candidate, folder: Path) -> None:
        """Write the config of a transformers module in memory next to its weights."""
        config = getattr(self._template, "config", None)
        if not candidate.config and callable(getattr(config, "save_pretrained", None)):
            self._filled_copy(candidate).config.save_pretrained(folder)

    def module(self, candidate: Candidate, kind: ModelKind) -> Any:
        """Implements :meth:`Candidate.module`."""
        if self._template is not None and not candidate.config:
            self.check(candidate)
            return part_of_kind(self._filled_copy(candidate), kind, candidate.label)
        self.check(candidate)
        if kind not in self._modules:
            from alnico.evaluation.live_module import LiveModule  # with torch

            if not candidate.config:
                raise ModelError(
                    f"{candidate.label}: has no config.json; expected a transformers checkpoint. Merge directories, not single files."
                    if self._opened is None
                    else f"{candidate.label}: is a dict of tensors, and the task needs {article(kind)}; expected a module. "
                    "Give modules, or a score that takes the dict."
                )
            bound = self._modules[kind] = LiveModule(
                candidate.config, self.state(candidate), kind, candidate.label, placement=self._placement
            )
            for name in bound.shared:
                self._resident.keep(name)
            for name, arrays in bound.followers.items():
                self._resident.follow(name, arrays)
        return self._modules[kind].module

    def tokenizer(self, candidate: Candidate) -> Any:
        """Implements :meth:`Candidate.tokenizer`."""
        self.check(candidate)
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
                    if self._opened is None
                    else f"{candidate.label}: has no tokenizer, as its models are in memory; a task of texts needs one. Pass "
                    "base=, the directory of a model with a tokenizer, or a function that tokenizes its own texts."
                )
            key = _digest(folder)
            if key not in self._tokenizers:
                self._tokenizers[key] = load_tokenizer(folder, candidate.label)
            return self._tokenizers[key]
        finally:
            planned.close()

    def check(self, candidate: Candidate) -> None:
        """Check that no other candidate was made since. Errors: EvaluationError."""
        if candidate is not self._current:
            raise EvaluationError(
                f"{candidate.label}: was replaced by the next candidate, which uses the same memory. Score each candidate before making another."
            )


class Candidate:
    """A merge in memory as an :class:`alnico.evaluation.tasks.EvaluatedModel`, valid until the next one is made."""

    def __init__(self, candidates: Candidates, plan: Plan, config: Mapping[str, Any], label: str) -> None:
        self.label = label
        self.plan = plan
        self.config = config
        self.watch = candidates.watch
        self._candidates = candidates
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def state(self) -> dict[str, Any]:
        """Return the merged torch tensors by name, where they were merged; the next candidate reuses their memory."""
        return self._candidates.state(self)

    @property
    def directory(self) -> Path:
        """A checkpoint, written by an ordinary merge on first use, and removed with the candidate."""
        self._candidates.check(self)
        if self._folder is None:
            with temporary_files():
                folder = tempfile.TemporaryDirectory(prefix="alnico-")
            run_plan(self.plan, Path(folder.name) / "merged")
            self._candidates.write_config(self, Path(folder.name) / "merged")
            self._folder = folder
        return Path(self._folder.name) / "merged"

    def model(self) -> Any:
        """Return the merge as a function takes it, in evaluation mode.

        The module, if one is among the models: a copy that all candidates share. For checkpoints, the module that
        their config names. Otherwise the dict of tensors.
        """
        return self._candidates.model(self)

    def module(self, kind: ModelKind) -> Any:
        """Return the transformers module in evaluation mode, with values rounded to the output dtype of the merge.

        On the processor it is in float32; on a GPU in the output dtype. A placement may name another dtype.
        """
        return self._candidates.module(self, kind)

    def tokenizer(self) -> Any:
        """Return the transformers tokenizer, one object for all candidates with the same tokenizer files."""
        return self._candidates.tokenizer(self)

    def forget(self) -> None:
        """Remove the written checkpoint."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _in_folder(model: Any, folder: str) -> Any:
    """Return a path as it is found from a folder, and any other model as it is."""
    path = path_of(model)
    return model if path is None or folder == "." else resolve_reference(path, folder)


def _digest(folder: Path) -> str:
    """Return a digest of the tokenizer of a folder: the files that transformers may read for it."""
    digest = hashlib.sha256()
    for path in side_files(folder)[0]:
        name = path.as_posix()
        if "/" not in name and path.suffix != ".md":
            with open_binary(folder / path) as file:
                digest.update(f"{name}\0{os.fstat(file.fileno()).st_size}\0".encode())
                while data := file.read(READ_BYTES):
                    digest.update(data)
    config = folder / CONFIG
    if config.exists():
        digest.update(json.dumps(read_json(config).get("model_type")).encode())
    return digest.hexdigest()
