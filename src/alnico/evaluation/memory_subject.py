"""Models in memory for tasks: copies of modules, dicts of tensors, task vectors on a base."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alnico.checkpoint.memory_model import is_torch_module, unwrap_module
from alnico.checkpoint.source import Source
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.loaded_model import ModuleSubject, open_subject
from alnico.evaluation.module_places import moved
from alnico.evaluation.placement import ON_THE_PROCESSOR, ModulePlacement
from alnico.evaluation.scorecard import check_once
from alnico.evaluation.tasks import EvaluatedModel, ModelKind
from alnico.events import Watcher
from alnico.models.open_models import (
    is_model,
    name_models,
    open_source,
    path_of,
    plain_copy,
    template_of,
)
from alnico.models.peft_modules import has_adapters
from alnico.recipe.load import load_recipe
from alnico.run_options import Access, RunOptions


class MemorySubject:
    """A model in memory, or a file next to modules in memory. It is copied or computed on first use.

    Functions receive a module, in evaluation mode: a copy of the model, or of the ``template`` with its tensors. Without
    a module they receive the dict of tensors. A task vector counts as ``tau.on(base)``. The copy of a module moves to the
    GPU of the ``placement``, if it has one, and keeps its dtype unless the placement names another.
    """

    def __init__(
        self,
        label: str,
        model: Any,
        *,
        template: Any = None,
        base: Any = None,
        offline: bool = False,
        placement: ModulePlacement = ON_THE_PROCESSOR,
        watch: Watcher | None = None,
    ) -> None:
        self.label = label
        self.watch = watch
        self._placement = placement
        self._model = model
        self._template = template
        self._base = base
        self._offline = offline
        self._subject: Any = None

    @property
    def directory(self) -> Path:
        """A folder with the weights, written on first use."""
        folder: Path = self._made().directory
        return folder

    def source(self) -> Source:
        """Open its tensors. Errors: as for :func:`alnico.models.open_models.open_source`."""
        return open_source(self._model, self.label, base=self._base, access=Access(self._offline))

    def model(self) -> Any:
        """Return what a function receives."""
        return self._made().model()

    def module(self, kind: ModelKind) -> Any:
        """Return the part of the module that a task needs. Errors: ModelError, EvaluationError if it has none."""
        return self._made().module(kind)

    def tokenizer(self) -> Any:
        """Return the tokenizer of a file's folder. Errors: EvaluationError, ModelError for a model without one."""
        return self._made().tokenizer()

    def _made(self) -> Any:
        if self._subject is not None:
            return self._subject
        if is_torch_module(self._model) and not has_adapters(unwrap_module(self._model)):
            own = moved(plain_copy(self._model).eval(), self._placement, self.label)
            self._subject = ModuleSubject(self.label, own)
            return self._subject
        candidates = Candidates(
            {self.label: self._model},
            template=self._template,
            base=self._base,
            run=RunOptions(offline=self._offline, watch=self.watch),
            placement=self._placement,
        )
        weakref.finalize(self, candidates.close)
        recipe = load_recipe({"merge_method": "passthrough", "models": [self.label]})
        self._subject = candidates.make(recipe, label=self.label)
        return self._subject


def is_subject(value: Any) -> bool:
    """Is a value a model as tasks see it (:class:`alnico.evaluation.tasks.EvaluatedModel`)?"""
    return not is_model(value) and hasattr(value, "label") and hasattr(value, "module")


def label_models(models: Any, argument: str, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return models or subjects by their labels, as :func:`alnico.models.open_models.name_models` does.

    The label of a subject is its own. Errors: RecipeError, ModelError; EvaluationError for a path given twice.
    """
    if is_subject(models):
        models = [models]
    listed = list(models) if isinstance(models, (list, tuple)) else None
    if names is None and listed is not None:
        own = [model.label if is_subject(model) else path_of(model) for model in listed]
        check_once([label for label in own if label is not None])
    if listed is None or not any(map(is_subject, listed)):
        return name_models(models, argument, names=names)
    stand_ins = [model.label if is_subject(model) else model for model in listed]
    return dict(zip(name_models(stand_ins, argument, names=names), listed, strict=True))


def label_one(model: Any, argument: str, known: Mapping[str, Any]) -> str:
    """Return the label of one model: its own among ``known`` ones if it is the same object, its path, or the argument."""
    same = next((label for label, other in known.items() if other is model), None)
    return same or (model.label if is_subject(model) else path_of(model)) or argument


def subjects_of(
    models: Mapping[str, Any],
    *,
    template: Any = None,
    base: Any = None,
    offline: bool = False,
    placement: ModulePlacement = ON_THE_PROCESSOR,
    watch: Watcher | None = None,
) -> list[EvaluatedModel]:
    """Return models by label as tasks see them. A ``template`` is the module that stands for files, too.

    Modules lie where ``placement`` says; a model that is a subject stays where its module is. ``watch`` receives what tasks
    report while they score.
    """
    where: dict[str, Any] = {"offline": offline, "placement": placement, "watch": watch}

    def subject(label: str, model: Any) -> EvaluatedModel:
        if is_subject(model):
            return model  # type: ignore[no-any-return]
        path = path_of(model)
        if path is None or template is not None:
            return MemorySubject(label, model, template=template, base=base, **where)
        return open_subject(path, label=label, may_be_plain=True, **where)

    return [subject(label, model) for label, model in models.items()]


def template_among(models: Mapping[str, Any]) -> Any:
    """Return the first module among models by label, or None."""
    return template_of(model for model in models.values() if not is_subject(model))


def is_alone(models: Any) -> bool:
    """Is a value one model, and not several?"""
    return is_model(models) or is_subject(models)
