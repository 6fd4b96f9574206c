"""Models as tasks see them: checkpoints on disk, loaded when a task first asks; and modules in memory."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.memory import torch_of, unwrapped
from alnico.checkpoint.model import FileModel, is_path, open_model, split_adapter
from alnico.checkpoint.sidecars import check_kinds
from alnico.engine.fetch import fetch_weights
from alnico.engine.run import run_plan
from alnico.engine.stages import close
from alnico.errors import EvaluationError, ModelError, NonFiniteError
from alnico.plan.build import build_plan
from alnico.recipe.load import load_recipe
from alnico.tune.extras import import_extra, quiet_transformers
from alnico.tune.placed import MAY_BE_MISSING
from alnico.tune.tasks import Kind, Subject


def open_subject(reference: str | os.PathLike[str], *, offline: bool = False, may_be_plain: bool = False) -> Subject:
    """Open a transformers checkpoint to be scored: a directory, a model of the hub, which is fetched, or ``base+adapter``, which is
    folded into a checkpoint among the system's temporary files, for as long as this lives.

    Modules are loaded when they are first asked for, in float32, and kept. No code of a model is run. With ``may_be_plain`` weights alone
    do: a file, or a folder without a config, for tasks that are functions of one's own. Errors: ModelError, HubError.
    """
    label = os.fspath(reference)
    path = Path(label).expanduser()
    if may_be_plain and (path.is_file() or (path.is_dir() and not (path / "config.json").is_file())):
        return _Plain(label, offline)
    if not path.is_dir() and split_adapter(label, is_path) is not None:
        folder = _folded(label, offline)
        subject = _Checkpoint(label, folder / "model")
        weakref.finalize(subject, shutil.rmtree, folder, ignore_errors=True)
        return subject
    if not path.is_dir():
        path = _fetched(label, offline)
    check_kinds(path)
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(f"{label}: is an adapter; expected a model. Give it with its base, as BASE+{label}.")
        raise ModelError(f"{label}: has no config.json; expected a transformers checkpoint. Give the directory of one.")
    return _Checkpoint(label, path)


def _folded(label: str, offline: bool) -> Path:
    """Write a base with its adapters as a checkpoint; returns the folder that it lies in."""
    from alnico import __version__

    folder = Path(tempfile.mkdtemp(prefix="alnico-"))
    try:
        plan = build_plan(load_recipe({"merge_method": "passthrough", "models": [label]}), offline=offline)
        try:
            fetch_weights(plan)
            run_plan(plan, folder / "model", __version__)
        finally:
            close([plan])
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _fetched(label: str, offline: bool) -> Path:
    with closing(open_model(label, offline=offline)) as model:
        if not isinstance(model, FileModel) or model.directory is None:
            raise ModelError(
                f"{label}: is no directory; tasks score transformers checkpoints. Make one of it with `alnico merge` first."
            )
        model.fetch(model.absent(list(model.tensors), True))
        return model.directory


class _Checkpoint:
    """A directory that transformers can load."""

    def __init__(self, label: str, directory: Path) -> None:
        self.label = label
        self.directory = directory
        self._modules: dict[Kind, Any] = {}
        self._tokenizer: Any = None

    def module(self, kind: Kind) -> Any:
        if kind not in self._modules:
            self._modules[kind] = load_module(self.directory, kind, self.label)
        return self._modules[kind]

    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.directory, self.label)
        return self._tokenizer

    def state(self) -> dict[str, Any]:
        """The tensors by name, as they are stored: torch tensors on the CPU."""
        with closing(open_model(self.directory)) as model:
            found = {}
            for name, tensor in model.tensors.items():
                raw = np.empty(tensor.byte_size, np.uint8)
                model.read_into(name, 0, memoryview(raw))
                found[name] = torch_of(raw, tensor.dtype, tensor.shape)
            return found


class _Plain:
    """Weights without a config: a file, or a folder of them. It is to tasks what a merge in memory of it alone is."""

    def __init__(self, label: str, offline: bool) -> None:
        self.label = label
        self._offline = offline
        self._made: Any = None
        open_model(label, offline=offline).close()  # what is no model is told before the first task

    @property
    def directory(self) -> Path:
        """A folder with the weights as safetensors, and what lies beside them; it is made when first asked for."""
        found: Path = self._candidate().directory
        return found

    def state(self) -> dict[str, Any]:
        """The tensors by name: torch tensors on the CPU."""
        found: dict[str, Any] = self._candidate().state()
        return found

    def module(self, kind: Kind) -> Any:
        raise ModelError(
            f"{self.label}: has no config.json, and the task needs {_article(kind)}; expected a transformers checkpoint. Give the directory of "
            "one, or a task of your own function with a parameter called path or model_dir, which gets a folder with the weights."
        )

    def tokenizer(self) -> Any:
        raise ModelError(
            f"{self.label}: has no config.json; a task of texts needs a transformers checkpoint. Give the directory of one."
        )

    def _candidate(self) -> Any:
        if self._made is None:
            from alnico.recipe.load import load_recipe
            from alnico.tune.candidates import Candidates

            candidates = Candidates([self.label], offline=self._offline)
            weakref.finalize(self, candidates.close)
            self._made = candidates.make(load_recipe({"merge_method": "passthrough", "models": [self.label]}), label=self.label)
        return self._made


def load_module(directory: Path, kind: Kind, label: str) -> Any:
    """Load a checkpoint's module in evaluation mode and float32. Errors: ModelError, also for tensors that the checkpoint lacks."""
    torch = import_extra("torch", "a transformers checkpoint", "eval")
    with quiet_transformers() as transformers:
        try:
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
            module, told = auto_class(transformers, config, kind).from_pretrained(
                directory, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise _unloadable(label, kind, error) from None
    _refuse_missing(told["missing_keys"], kind, label)
    refuse_not_finite(module, label)
    return module.eval()


def refuse_not_finite(module: Any, label: str) -> None:
    """Refuse a module with a NaN or an infinity before it is scored or measured. Errors: NonFiniteError, naming tensor and index."""
    for name, value in module.named_parameters():
        if not value.is_floating_point() or value.is_meta or bool(value.isfinite().all()):
            continue
        place = (~value.isfinite()).nonzero()[0].tolist()
        found = "NaN" if bool(value[tuple(place)].isnan()) else "an infinity"
        raise NonFiniteError(f"{name}{place or ''}: {label} has {found}; expected finite numbers. Mend or leave out this model.")


def load_state(config: Mapping[str, Any], state: Mapping[str, Any], kind: Kind, label: str) -> tuple[Any, frozenset[str]]:
    """Load a module as :func:`load_module` does, from a config and tensors in memory; return it with the names that no task needs
    and the state lacks. It may hold tensors of the state themselves. Errors: as there."""
    torch = import_extra("torch", "a transformers checkpoint", "eval")
    with quiet_transformers() as transformers, tempfile.TemporaryDirectory(prefix="alnico-") as folder:
        try:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            made = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            with torch.device("meta"):  # for the class alone: no memory is taken
                class_ = type(auto_class(transformers, made, kind).from_config(made))
            module, told = class_.from_pretrained(
                None, config=made, state_dict=dict(state), dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise _unloadable(label, kind, error) from None
    _refuse_missing(told["missing_keys"], kind, label)
    return module.eval(), frozenset(told["missing_keys"])


def _unloadable(label: str, kind: Kind, error: BaseException) -> ModelError:
    return ModelError(
        f"{label}: transformers cannot load it as {_article(kind)} ({_first_line(error)}). Check its config.json and files."
    )


def _refuse_missing(absent: Iterable[str], kind: Kind, label: str) -> None:
    missing = sorted(name for name in absent if kind != "encoder" or not name.startswith(MAY_BE_MISSING))
    if missing:
        raise ModelError(
            f"{label}: lacks {len(missing)} tensors of {_article(kind)}, {missing[0]} first; they would be random. "
            "Give a checkpoint that has them, or a task that needs none of them."
        )


def auto_class(transformers: Any, config: Any, kind: Kind) -> Any:
    if kind == "encoder":
        return transformers.AutoModel
    if kind == "causal":
        return transformers.AutoModelForCausalLM
    if any("ImageClassification" in name for name in config.architectures or ()):
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForSequenceClassification


def load_tokenizer(directory: Path, label: str) -> Any:
    """Load a checkpoint's tokenizer. Errors: ModelError."""
    with quiet_transformers() as transformers:
        try:
            return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # the tokenizers package raises Exception itself
            raise ModelError(
                f"{label}: transformers cannot load its tokenizer ({_first_line(error)}). Check its tokenizer files."
            ) from None


class ModuleSubject:
    """A transformers module in memory as tasks see it, or one module for each kind.

    ``module`` is what tasks call; the encoder of a model with a head is its ``base_model``. A mapping of ``encoder``, ``classifier``
    and ``causal`` to modules says it outright, and so does a module that is none of transformers': it is given for any kind. Modules inside
    of ``torch.compile`` and ``DataParallel`` are taken out. A module of PEFT is folded into a copy, once, when this is made: the names are then those of
    its base. Modules must be in evaluation mode. ``directory`` writes the module and the tokenizer once, when first asked, and keeps them as
    long as this lives.
    """

    def __init__(self, label: str, module: Any, tokenizer: Any = None) -> None:
        self.label = label
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
                    f"{self.label}: {type(module).__name__} cannot be written as a checkpoint; expected a module of transformers. "
                    "Give one, or a task that takes the module."
                )
            self._folder = Path(tempfile.mkdtemp(prefix="alnico-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            with quiet_transformers():
                module.save_pretrained(self._folder)
                if self._tokenizer is not None:
                    self._tokenizer.save_pretrained(self._folder)
        return self._folder

    def module(self, kind: Kind) -> Any:
        found = self._module.get(kind) if isinstance(self._module, Mapping) else _part(self._module, kind)
        if found is None:
            raise EvaluationError(f"{self.label}: holds no {kind}; a task needs {_article(kind)}. Give a module that is one.")
        if id(found) not in self._checked and hasattr(found, "named_parameters"):
            refuse_not_finite(found, self.label)
            self._checked.add(id(found))
        return found

    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise EvaluationError(f"{self.label}: has no tokenizer; a task of texts needs one. Give it with the module.")
        return self._tokenizer


def _plain(label: str, module: Any) -> Any:
    """A module without wrappers, and with its adapters folded. Errors: EvaluationError for adapters that cannot be."""
    inner = unwrapped(module)
    if not hasattr(inner, "peft_config") or not hasattr(inner, "get_base_model"):
        return inner
    try:
        return copy.deepcopy(inner).merge_and_unload()
    except (AttributeError, ValueError, NotImplementedError) as error:
        raise EvaluationError(
            f"{label}: its adapter cannot be folded into its base ({_first_line(error)}); expected one that can, as LoRA. "
            "Give the module that it changes."
        ) from None


def _part(module: Any, kind: Kind) -> Any:
    """The part of a module that is of a kind; None where there is none."""
    name = type(module).__name__
    if not hasattr(module, "base_model"):
        return module
    if kind == "encoder":
        return module.base_model
    words = ("Classification",) if kind == "classifier" else ("CausalLM", "LMHead")
    return module if any(word in name for word in words) else None


def _article(kind: Kind) -> str:
    return {"encoder": "an encoder", "classifier": "a classifier", "causal": "a causal language model"}[kind]


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")
