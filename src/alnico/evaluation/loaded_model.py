"""Models for tasks: checkpoints on disk, loaded on first use, and modules in memory."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.memory_model import unwrap_module
from alnico.checkpoint.open_model import open_headers, open_model
from alnico.checkpoint.quantised.dequantised_model import DequantisedModel, may_be_quantised
from alnico.checkpoint.quantised.stored_tensors import quantisation_of
from alnico.checkpoint.reference import is_at_url, is_path, split_adapter
from alnico.checkpoint.sidecars import check_kinds
from alnico.checkpoint.training.recognise import training_folder
from alnico.checkpoint.weight_files import gguf_path
from alnico.engine.fetch import fetch_weights
from alnico.engine.run import run_plan
from alnico.engine.stages import close
from alnico.errors import EvaluationError, ModelError, first_line
from alnico.evaluation.extras import quiet_transformers
from alnico.evaluation.loading import (
    article,
    load_module,
    load_tokenizer,
    refuse_not_finite,
    torch_state,
)
from alnico.evaluation.module_kinds import given_kind, kind_of_config, part_of_kind
from alnico.evaluation.placement import ON_THE_PROCESSOR, ModulePlacement
from alnico.evaluation.tasks import EvaluatedModel, ModelKind
from alnico.events import Watcher
from alnico.folders import temporary_files
from alnico.plan.build import build_plan
from alnico.recipe.load import load_recipe
from alnico.run_options import OFFLINE, Access, RunOptions


def open_subject(
    reference: str | os.PathLike[str],
    *,
    label: str | None = None,
    offline: bool = False,
    may_be_plain: bool = False,
    placement: ModulePlacement = ON_THE_PROCESSOR,
    watch: Watcher | None = None,
) -> EvaluatedModel:
    """Open a transformers checkpoint for scoring: a directory, a hub model, ``base+adapter``, or a GGUF model.

    A hub model is downloaded; ``base+adapter``, a GGUF model and a quantised model are written as a temporary checkpoint that lives
    as long as the result.
    Modules are loaded on first use and cached: where and in the dtype that ``placement`` says, by default on the
    processor in float32. No code of a model is run. With ``may_be_plain`` a file or a folder without a config is accepted,
    for tasks that are your own functions. ``label`` names the model in results; default: the reference. ``watch`` receives
    what tasks report while they score it. Errors: ModelError, HubError; ResourceError for a module that the GPUs have no
    room for.
    """
    place = os.fspath(reference)
    label = label or place
    path = Path(os.path.expanduser(place))
    is_gguf = gguf_path(label, path) is not None
    if (
        may_be_plain
        and not is_gguf
        and (path.is_file() or (path.is_dir() and not (path / "config.json").is_file()))
    ):
        return _Plain(label, place, offline, placement, watch)
    is_in_shards = path.is_dir() and training_folder(path) is not None
    is_elsewhere = not path.is_dir() and (is_at_url(place) or split_adapter(place, is_path) is not None)
    if is_gguf or is_in_shards or is_elsewhere:
        return _written(label, place, offline, placement, watch)
    if not path.is_dir():
        path = _fetched(place, offline)
    check_kinds(path)
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(
                f"{label}: is an adapter; expected a model. Give it with its base, as BASE+{place}."
            )
        raise ModelError(
            f"{label}: has no config.json; expected a transformers checkpoint. Give the directory of one."
        )
    if _is_quantised(path):  # its codes are decoded as in a merge, without the library of its format
        return _written(label, os.fspath(path), offline, placement, watch)
    return _Checkpoint(label, path, placement, watch)


def _is_quantised(path: Path) -> bool:
    """Are there codes in place of weights, by the config of a checkpoint or the names of its tensors? Errors: ModelError for codes that
    are not read."""
    if quantisation_of(read_json(path / "config.json")):
        return True
    try:
        with closing(open_headers(path)) as headers:
            may_be = may_be_quantised(headers)
    except ModelError:  # transformers reads more, and says what it does not
        return False
    if not may_be:
        return False
    with closing(open_model(path, access=OFFLINE)) as model:
        return isinstance(model, DequantisedModel)


def _written(
    label: str, place: str, offline: bool, placement: ModulePlacement, watch: Watcher | None
) -> _Checkpoint:
    """Write what transformers cannot load itself as a checkpoint, and open that. It lives as long as the result."""
    folder = _folded(place, offline)
    subject = _Checkpoint(label, folder / "model", placement, watch)
    weakref.finalize(subject, shutil.rmtree, folder, ignore_errors=True)
    return subject


def _folded(label: str, offline: bool) -> Path:
    """Write a base with its adapters, or a quantised model, as a checkpoint; returns its folder."""
    with temporary_files():
        folder = Path(tempfile.mkdtemp(prefix="alnico-"))
    try:
        plan = build_plan(
            load_recipe({"merge_method": "passthrough", "models": [label]}), run=RunOptions(offline=offline)
        )
        try:
            fetch_weights(plan)
            run_plan(plan, folder / "model")
        finally:
            close([plan])
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _fetched(label: str, offline: bool) -> Path:
    with closing(open_model(label, access=Access(offline))) as model:
        if not isinstance(model, (FileModel, DequantisedModel)) or model.directory is None:
            raise ModelError(
                f"{label}: is not a directory; tasks score transformers checkpoints. Create one with `alnico merge` first."
            )
        model.fetch(model.absent(list(model.tensors), True))
        return model.directory


class _Checkpoint:
    """A directory that transformers can load."""

    def __init__(
        self, label: str, directory: Path, placement: ModulePlacement, watch: Watcher | None
    ) -> None:
        self.label = label
        self.directory = directory
        self.watch = watch
        self._placement = placement
        self._modules: dict[ModelKind, Any] = {}
        self._tokenizer: Any = None

    def module(self, kind: ModelKind) -> Any:
        if kind not in self._modules:
            self._modules[kind] = load_module(self.directory, kind, self.label, placement=self._placement)
        return self._modules[kind]

    def model(self) -> Any:
        return self.module(kind_of_config(read_json(self.directory / "config.json")))

    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.directory, self.label)
        return self._tokenizer

    def state(self) -> dict[str, Any]:
        """Return the stored tensors by name, as torch tensors on the CPU."""
        with closing(open_model(self.directory)) as model:
            return torch_state(model)


class _Plain:
    """Weights without a config: a file or a folder. Tasks see it as a merge in memory of this model alone."""

    def __init__(
        self, label: str, place: str, offline: bool, placement: ModulePlacement, watch: Watcher | None
    ) -> None:
        self.label = label
        self.watch = watch
        self._place = place
        self._placement = placement
        self._offline = offline
        self._merged: Any = None
        open_model(
            place, access=Access(offline)
        ).close()  # an invalid model is reported before the first task

    @property
    def directory(self) -> Path:
        """A folder with the weights as safetensors and their side files, created on first use."""
        directory: Path = self._candidate().directory
        return directory

    def state(self) -> dict[str, Any]:
        """Return the tensors by name, as torch tensors on the CPU."""
        state: dict[str, Any] = self._candidate().state()
        return state

    def model(self) -> Any:
        return self._candidate().model()

    def module(self, kind: ModelKind) -> Any:
        raise ModelError(
            f"{self.label}: has no config.json, and the task needs {article(kind)}; expected a transformers checkpoint. Give the directory of "
            "one, or a task of your own function with a parameter called path or model_dir, which gets a folder with the weights."
        )

    def tokenizer(self) -> Any:
        raise ModelError(
            f"{self.label}: has no config.json; a task of texts needs a transformers checkpoint. Give the directory of one."
        )

    def _candidate(self) -> Any:
        if self._merged is None:
            from alnico.evaluation.candidates import Candidates
            from alnico.recipe.load import load_recipe

            candidates = Candidates(
                [self._place],
                run=RunOptions(offline=self._offline, watch=self.watch),
                placement=self._placement,
            )
            weakref.finalize(self, candidates.close)
            self._merged = candidates.make(
                load_recipe({"merge_method": "passthrough", "models": [self._place]}), label=self.label
            )
        return self._merged


class ModuleSubject:
    """A transformers module in memory for tasks, or one module for each kind.

    The encoder of a ``module`` with a head is its ``base_model``. A mapping of ``encoder``, ``classifier`` and ``causal``
    gives a module for each kind; a module that is not from transformers is used for any kind. Wrappers of
    ``torch.compile`` and ``DataParallel`` are removed. A PEFT module is folded into a copy, whose tensor names are those
    of its base. Modules must be in evaluation mode. ``directory`` writes the module and the tokenizer on first use and
    keeps them as long as this object exists.
    """

    def __init__(
        self, label: str, module: Any, tokenizer: Any = None, *, watch: Watcher | None = None
    ) -> None:
        self.label = label
        self.watch = watch
        if isinstance(module, Mapping):
            self._module: Any = {kind: _plain(label, one) for kind, one in module.items()}
        else:
            self._module = _plain(label, module)
        self._tokenizer = tokenizer
        self._folder: Path | None = None
        self._checked: set[int] = set()

    @property
    def directory(self) -> Path:
        if self._folder is None:
            module = next(iter(self._module.values())) if isinstance(self._module, Mapping) else self._module
            if not hasattr(module, "save_pretrained"):
                raise EvaluationError(
                    f"{self.label}: {type(module).__name__} cannot be written as a checkpoint; expected a transformers module. "
                    "Give one, or a task that takes the module."
                )
            with temporary_files():
                self._folder = Path(tempfile.mkdtemp(prefix="alnico-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            with quiet_transformers():
                module.save_pretrained(self._folder)
                if self._tokenizer is not None:
                    self._tokenizer.save_pretrained(self._folder)
        return self._folder

    def module(self, kind: ModelKind) -> Any:
        if isinstance(self._module, Mapping):
            return self._finite(given_kind(self._module.get(kind), kind, self.label))
        return self._finite(part_of_kind(self._module, kind, self.label))

    def model(self) -> Any:
        """Return the module; of several, the first one."""
        return self._finite(
            next(iter(self._module.values())) if isinstance(self._module, Mapping) else self._module
        )

    def _finite(self, module: Any) -> Any:
        if id(module) not in self._checked and hasattr(module, "named_parameters"):
            refuse_not_finite(module, self.label)
            self._checked.add(id(module))
        return module

    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise EvaluationError(
                f"{self.label}: has no tokenizer; a task of texts needs one. Give it with the module."
            )
        return self._tokenizer


def _plain(label: str, module: Any) -> Any:
    """Remove wrappers and fold adapters. Errors: EvaluationError for adapters that cannot be folded."""
    inner = unwrap_module(module)
    if not hasattr(inner, "peft_config") or not hasattr(inner, "get_base_model"):
        return inner
    try:
        return copy.deepcopy(inner).merge_and_unload()
    except (AttributeError, ValueError, NotImplementedError) as error:
        raise EvaluationError(
            f"{label}: its adapter cannot be folded into its base ({first_line(error)}); expected an adapter that can, such as LoRA. "
            "Give the module without it."
        ) from None
