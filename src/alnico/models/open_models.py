"""Opens whatever represents a model (path, dict, module, task vector), and returns merges as tensors."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from alnico.checkpoint.factors import adapter_factors, is_factor
from alnico.checkpoint.memory_model import (
    COMPILE_PREFIX,
    MemoryModel,
    import_torch,
    is_torch_module,
    is_torch_tensor,
    shared_tensors,
    state_dict_of,
    strip_parallel_prefix,
    to_numpy,
    to_torch,
    unwrap_module,
    why_unreadable,
)
from alnico.checkpoint.open_model import is_opened_model, open_model
from alnico.checkpoint.source import Source
from alnico.engine.in_memory import run_in_memory
from alnico.errors import AlnicoError, MismatchError, ModelError, RecipeError, visible
from alnico.models.peft_modules import has_adapters, state_without_adapters, without_adapters
from alnico.plan.build import build_plan
from alnico.plan.job import Plan
from alnico.recipe.load import load_recipe
from alnico.recipe.reference import resolve_reference
from alnico.recipe.schema import Recipe
from alnico.run_options import ONLINE, Access, RunOptions

LOG = logging.getLogger("alnico")
"""Gets the notes of merges in memory, whose results cannot hold them: ``logging.basicConfig(level="INFO")`` shows them."""


@dataclass(frozen=True)
class OpenModels:
    """The models of one merge, by their references in its recipe.

    ``names`` are those of the tensors in memory, in order; ``tied`` maps a tensor that shares
    another's memory to that tensor.
    """

    sources: Mapping[str, Source]
    names: tuple[str, ...]
    tied: Mapping[str, str]
    gives_torch: bool

    def plan(self, recipe: Mapping[str, Any] | Recipe, **arguments: Any) -> Plan:
        """Plan a recipe that names these models. Errors: as for :func:`build_plan`; RecipeError."""
        return build_plan(load_recipe(recipe), open_source=self.sources.__getitem__, **arguments)

    def close(self) -> None:
        for source in self.sources.values():
            source.close()

    def __enter__(self) -> OpenModels:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def path_of(model: Any) -> str | None:
    """Return the path or hub id of a model, or None for a model in memory."""
    if is_opened_model(model):
        return str(model.label)
    return os.fspath(model) if isinstance(model, (str, os.PathLike)) else None


def is_lazy_model(value: object) -> bool:
    """Is a value a :class:`alnico.LazyModel`, or another object that returns its tensors on request?"""
    return (
        not isinstance(value, type)
        and not is_torch_module(value)
        and not is_task_vector(value)
        and callable(getattr(value, "state_dict", None))
    )


def is_task_vector(value: object) -> bool:
    return not isinstance(value, type) and callable(getattr(value, "on", None)) and hasattr(value, "terms")


def is_model(value: object) -> bool:
    """Can a value represent a model?"""
    return (
        isinstance(value, (str, os.PathLike, Mapping))
        or is_opened_model(value)
        or is_torch_module(value)
        or is_lazy_model(value)
        or is_task_vector(value)
    )


AnyModel = str | os.PathLike[str] | Any
"""A model of any kind, see :data:`KINDS`."""

AnyModels = AnyModel | Sequence[AnyModel]
"""Models of any kind; a single path needs no list."""

KINDS = "a path, a hub id, a dict of tensors, an nn.Module, a TaskVector or a LazyModel"
"""The kinds of models, for messages."""


def name_models(
    models: Any, argument: str = "models", *, names: Iterable[str] | None = None
) -> dict[str, Any]:
    """Return models by their labels, in order.

    The label of a path is its text, and that of an object is the argument with its position; ``names``
    replaces them. One path counts as a list of one. Errors: RecipeError for what is not a list of models,
    with what to pass, and for names that do not fit; ModelError for an element that is not a model.

    >>> list(name_models(["a", {"w": 1}])), list(name_models("a", names=["first"]))
    (['a', 'models[1]'], ['first'])
    """
    listed = list_models(models, argument)
    for position, model in enumerate(listed):
        if not is_model(model):
            raise ModelError(
                f"{argument}[{position}] is {_kind_of(model)}; expected {KINDS}. Pass the model itself."
            )
    if names is None:
        labels = [path_of(model) or f"{argument}[{i}]" for i, model in enumerate(listed)]
        advice = "Pass each model once, or give each a name with names=."
    else:
        labels = _checked_names(names, len(listed), argument)
        advice = "Give each model its own name."
    first: dict[str, int] = {}
    for position, label in enumerate(labels):
        if first.setdefault(label, position) != position:
            raise RecipeError(
                f"{argument}[{first[label]}] and {argument}[{position}] have the same name, {label!r}; "
                f"expected different names. {advice}"
            )
    return dict(zip(labels, listed, strict=True))


def name_model(model: Any, argument: str, others: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the label of one model: the text of a path, or the argument.

    Errors: RecipeError for several models, and for a label that one of the ``others`` has; ModelError for
    what is not a model.
    """
    label = path_of(model) or argument
    if label in others and path_of(others[label]) is None:
        raise RecipeError(
            f"names: {label!r} is the name of {argument}, too; expected different names. Give that model "
            "another name."
        )
    if path_of(model):
        return label
    if isinstance(model, Mapping) and model and all(map(is_model, model.values())):
        raise RecipeError(
            f"{argument} is a dict of models; expected one model. Choose one, such as "
            f"{argument}[{next(iter(model))!r}]."
        )
    if isinstance(model, (list, tuple)):
        only = f" Pass {argument}[0]." if len(model) == 1 else ""
        raise RecipeError(
            f"{argument} is a {type(model).__name__} of {len(model)} values; expected one model: {KINDS}.{only}"
        )
    if not is_model(model) or path_of(model) == "":
        raise ModelError(f"{argument} is {_kind_of(model)}; expected {KINDS}.")
    return label


def _kind_of(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def list_models(models: Any, argument: str) -> list[Any]:
    """Return the models in a list, a tuple, another iterable, or one path. Errors: RecipeError."""
    if path_of(models) is not None:
        return [models]
    if isinstance(models, Mapping):
        if any(is_model(value) for value in models.values()):
            raise RecipeError(
                f"{argument} is a dict of models; expected a list of models. Pass list({argument}.values())."
            )
        if models:
            raise RecipeError(
                f"{argument} is one dict of tensors; expected a list of models. Pass [{argument}] for one "
                "model."
            )
        raise RecipeError(f"{argument} is an empty dict; expected a list of models. Pass at least one model.")
    if is_torch_module(models):
        parts = dict(models.named_children())
        if type(models).__name__ in ("ModuleList", "ModuleDict") and parts:
            values = f"{argument}.values()" if type(models).__name__ == "ModuleDict" else argument
            raise RecipeError(
                f"{argument} is one module of type {type(models).__name__}; expected a list of models. Pass "
                f"list({values}) if each of its modules is a model."
            )
        raise RecipeError(
            f"{argument} is one module of type {type(models).__name__}; expected a list of models. Pass "
            f"[{argument}] for one model."
        )
    if is_task_vector(models) or is_lazy_model(models):
        raise RecipeError(
            f"{argument} is one {type(models).__name__}; expected a list of models. Pass [{argument}] for one "
            "model."
        )
    is_numbers = is_torch_tensor(models) or (isinstance(models, np.ndarray) and models.dtype != object)
    if is_numbers or isinstance(models, (bytes, bytearray, Set)) or not isinstance(models, Iterable):
        order = ", in order" if isinstance(models, Set) else ""
        raise RecipeError(
            f"{argument} is {_kind_of(models)}; expected a list of models{order}. Each is {KINDS}."
        )
    listed = list(models)
    if not listed:
        raise RecipeError(f"{argument} is empty; expected at least one model. Each is {KINDS}.")
    return listed


def _checked_names(names: Any, count: int, argument: str) -> list[str]:
    if isinstance(names, (bytes, Mapping)) or not isinstance(names, Iterable):
        raise RecipeError(
            f"names is {_kind_of(names)}; expected a list of names, one for each of {argument}."
        )
    listed = [names] if isinstance(names, str) else list(names)
    for position, name in enumerate(listed):
        if not isinstance(name, str) or not name.strip():
            what = "empty" if isinstance(name, str) else _kind_of(name)
            raise RecipeError(f"names[{position}] is {what}; expected a text that names the model.")
    if len(listed) != count:
        raise RecipeError(
            f"names has {len(listed)} {'name' if len(listed) == 1 else 'names'} and {argument} has {count} "
            f"{'model' if count == 1 else 'models'}; expected one name for each model."
        )
    return listed


def open_source(
    model: Any, label: str, *, base: Any = None, access: Access = ONLINE, may_be_adapter: bool = False
) -> Source:
    """Open one model of any kind; tensors in memory are read in place. Close it after use.

    A task vector counts as ``tau.on(base)``. A lazy model is computed, as a dict of tensors. With
    ``may_be_adapter`` the factors of an adapter are opened as plain tensors. Errors: ModelError, HubError;
    those of merging for a lazy model.
    """
    path = path_of(model)
    if path is not None:
        return open_model(path, access=access, may_be_adapter=may_be_adapter)
    state, nominal = _state_of(model, label, base=base, may_be_adapter=may_be_adapter)
    return MemoryModel(label, state, nominal)


def template_of(models: Iterable[Any]) -> Any:
    """Return the first module among models, also one in a lazy model or task vector; None if there is none.

    ``plain_copy`` of it is a module that a merge can fill.
    """
    for model in models:
        if is_torch_module(model):
            return model
        inside: list[Any] = []
        if is_lazy_model(model):
            inside = list(getattr(model, "models", ()))
        elif is_task_vector(model):
            inside = [side.value for _, tuned, base in model.terms for side in (base, tuned)]
        found = next((value for value in inside if is_torch_module(value)), None)
        if found is not None:
            return found
    return None


def open_models(models: Mapping[str, Any], *, base: Any = None, access: Access = ONLINE) -> OpenModels:
    """Open the models of a merge together, by their references. Errors: as for :func:`open_source`.

    A tensor that shares another's memory in every model is opened once. MismatchError for modules that are
    pruned with different masks.
    """
    opened, states, tied = _open_together(list(models.items()), base=base, access=access)
    try:
        _refuse_other_masks(states)
    except BaseException:
        for source in opened:
            source.close()
        raise
    names = tuple(dict.fromkeys(n for state in states.values() for n in state))
    has_torch = any(is_torch_tensor(v) for state in states.values() for v in state.values())
    sources = dict(zip(models, opened, strict=True))
    return OpenModels(sources, names, tied, has_torch or not states)


def open_sources(
    models: Sequence[tuple[str, Any]],
    *,
    base: Any = None,
    access: Access = ONLINE,
    may_be_adapter: bool = False,
) -> list[Source]:
    """Open models that are compared, each with its label. Errors: as for :func:`open_source`.

    They are opened together, as for a merge: see :func:`open_models`.
    """
    return _open_together(models, base=base, access=access, may_be_adapter=may_be_adapter)[0]


def _open_together(
    models: Sequence[tuple[str, Any]], *, base: Any, access: Access, may_be_adapter: bool = False
) -> tuple[list[Source], dict[str, dict[str, Any]], dict[str, str]]:
    """Open models; return their sources, the tensors of those in memory by label, and which of these are tied.

    The prefix ``module.`` is removed from the names of a model, with a warning, if the other models do not
    have it.
    """
    sources: dict[int, Source] = {}
    states: dict[int, dict[str, Any]] = {}
    nominal: dict[int, dict[str, str]] = {}
    for place, (label, model) in enumerate(models):
        if path_of(model) is None:
            states[place], nominal[place] = _state_of(model, label, base=base, may_be_adapter=may_be_adapter)
    try:
        for place, (_, model) in enumerate(models):
            if (path := path_of(model)) is not None:
                path = resolve_reference(path, ".")
                sources[place] = open_model(path, access=access, may_be_adapter=may_be_adapter)
        files = [source.tensors for source in sources.values()]
        for place, state in zip(
            list(states), strip_parallel_prefix(list(states.values()), files), strict=True
        ):
            if state.keys() != states[place].keys():
                warnings.warn(
                    f"{visible(models[place][0])}: `module.` is removed from its names, because the other models "
                    "do not have it.",
                    stacklevel=5,
                )
            states[place] = state
        tied = shared_tensors(list(states.values()), files)
        for place, state in states.items():
            own = {name: value for name, value in state.items() if name not in tied}
            sources[place] = MemoryModel(models[place][0], own, nominal[place])
    except BaseException:
        for source in sources.values():
            source.close()
        raise
    by_label = {models[place][0]: state for place, state in states.items()}
    return [sources[place] for place in range(len(models))], by_label, tied


def _refuse_other_masks(states: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse modules that torch prunes with different masks. Errors: MismatchError.

    The mean of the masks times the mean of the weights is not the mean of the pruned weights.
    """
    first: dict[str, tuple[str, np.ndarray]] = {}
    for reference, state in states.items():
        for name, mask in state.items():
            if not name.endswith("_mask") or f"{name.removesuffix('_mask')}_orig" not in state:
                continue
            array = np.asarray(mask.detach().cpu().double().numpy() if is_torch_tensor(mask) else mask)
            other, values = first.setdefault(name, (reference, array))
            if not np.array_equal(values, array):
                raise MismatchError(
                    f"{name}: {other} and {reference} are pruned with different masks; expected one mask, or "
                    "permanently pruned weights. Call torch.nn.utils.prune.remove(layer, "
                    f"{name.removesuffix('_mask').rpartition('.')[2]!r}) in each model."
                )


def _state_of(
    model: Any, reference: str, *, base: Any = None, may_be_adapter: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tensors of a model, and the dtypes that some of them count as.

    A module with PEFT adapters counts as its merged weights, a task vector as ``tau.on(base)``. Errors:
    ModelError, also for the factors of an adapter alone, unless it ``may_be_adapter``: their means do not
    give the mean of their products.
    """
    if is_task_vector(model):
        if base is None or base is model or is_task_vector(base):
            raise ModelError(
                f"{reference}: is a task vector, a difference of models; expected a model. Pass the model "
                "that it gives on a base: tau.on(base)."
            )
        model = model.on(base)
    if isinstance(model, Mapping) and model and all(map(is_model, model.values())):
        name_model(model, reference)
    if is_lazy_model(model):
        model = model.state_dict()
    if is_torch_module(model) and has_adapters(unwrap_module(model)):
        return state_without_adapters(unwrap_module(model), reference)
    state = state_dict_of(model, reference)
    if not may_be_adapter and (
        factors := adapter_factors(state)
        or [name for name in state if ".base_layer." in name and any(map(is_factor, state))]
    ):
        raise ModelError(
            f"{reference}: has the factors of an adapter, such as {next(n for n in state if is_factor(n))}, "
            f"not merged into {'weights' if is_factor(factors[0]) else factors[0]}; expected a whole model. "
            "The mean of factors does not give the mean of their products. Pass the PEFT module itself, "
            "which counts as its merged weights, or the result of its merge_and_unload(); or combine the "
            "adapters' folders with alnico.lora.combine."
        )
    return state, {}


def plain_copy(module: Any) -> Any:
    """Copy a module to fill, without ``torch.compile``, ``DataParallel`` and PEFT adapters around it."""
    inner = unwrap_module(module)
    if has_adapters(inner):
        return without_adapters(inner, type(inner).__name__, merge=False)
    # Weights that a module computes from its parameters (weight_norm, pruning) have a graph, which torch does
    # not copy. Hooks compute them again.
    computed = {
        id(v): v.detach().clone()
        for m in inner.modules()
        for v in vars(m).values()
        if is_torch_tensor(v) and v.grad_fn is not None
    }
    try:
        return copy.deepcopy(inner, computed)
    except Exception as error:  # the caller's classes may raise anything
        raise ModelError(
            f"the module ({type(inner).__name__}) cannot be copied ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:200]}); expected one that copy.deepcopy can copy. "
            "Remove locks, open files and tensors with a graph from its attributes, or merge with "
            "merge_state_dicts and load the result into your own module."
        ) from None


def merge_open_models(
    opened: OpenModels, recipe: Mapping[str, Any] | Recipe, run: RunOptions
) -> dict[str, Any]:
    """Merge a recipe over open models into a dict of torch tensors, or of numpy arrays. Tensors are on the CPU, and on the GPU of
    ``run`` where an input lives there.

    Closes the models.
    """
    try:
        if opened.gives_torch:
            import_torch("a dict of torch tensors")
        plan = opened.plan(recipe, run=run)
        for note in plan.notes:
            LOG.info(note)
        for job in plan.jobs:
            if not opened.gives_torch:
                to_numpy(
                    np.empty(0, np.uint8), job.dtype, (0,)
                )  # refuses dtypes that numpy lacks before the work
        return name_tensors(opened, plan, run_in_memory(plan))
    finally:
        opened.close()


def name_tensors(opened: OpenModels, plan: Plan, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """View the bytes of a plan's tensors as torch tensors or numpy arrays, under the names in the models.

    A tied tensor has all its names. The order is that of the models.
    """
    view = to_torch if opened.gives_torch else to_numpy
    tensors = {job.name: view(arrays[job.name], job.dtype, job.shape) for job in plan.jobs}
    in_models = [name for name in opened.names if opened.tied.get(name, name) in tensors]
    order = dict.fromkeys(
        [*in_models, *tensors] if set(tensors) <= set(in_models) else [*tensors, *in_models]
    )
    return {name: tensors[opened.tied.get(name, name)] for name in order}


def fill(module: Any, state: Mapping[str, Any], *, partly: bool = False) -> None:
    """Put tensors or arrays into the parameters and buffers of a module, with their dtype, on its devices.

    Buffers that the module does not save are filled if ``state`` has them: files by other programs may hold
    them. Errors: MismatchError, before anything changes, for a name that the module lacks, for another shape
    and, unless ``partly``, for a name that the module saves and ``state`` lacks.
    """
    inner = unwrap_module(module)
    if any(isinstance(v, np.ndarray) for v in state.values()):
        torch = import_torch("a module with the merge")
        state = {n: torch.tensor(v) if isinstance(v, np.ndarray) else v for n, v in state.items()}
    needed = {
        n.replace(COMPILE_PREFIX, ""): v
        for n, v in inner.state_dict(keep_vars=True).items()
        if is_torch_tensor(v)
    }
    held = {n.replace(COMPILE_PREFIX, ""): v for n, v in inner.named_buffers()} | needed
    kind = type(inner).__name__
    if wrong := next(
        ((n, why) for n, v in held.items() if n in state and (why := why_unreadable(v)) is not None), None
    ):
        raise ModelError(f"the module to fill ({kind}): {wrong[0]}: {wrong[1]}")
    problems = [
        f"{n}: is not in the module ({kind}); expected the names of the merged models."
        for n in state
        if n not in held
    ]
    problems += [
        f"{n}: the module ({kind}) has it, the merged models do not."
        for n in needed
        if n not in state and not partly
    ]
    problems += [
        f"{n}: is {tuple(v.shape)} in the merge, {tuple(held[n].shape)} in the module ({kind}); expected one "
        "shape."
        for n, v in state.items()
        if n in held and v.shape != held[n].shape
    ]
    if not problems:
        problems = _tie_problems(state, held, kind)
    if problems:
        rest = f" There are {len(problems)} such tensors." if len(problems) > 1 else ""
        raise MismatchError(f"{problems[0]} Pass a module of the models' architecture.{rest}")
    for name, value in state.items():
        target = held[name]
        if target.dtype == value.dtype and all(
            stride or size < 2 for stride, size in zip(target.stride(), target.shape, strict=True)
        ):
            target.data.copy_(value)  # in place: recurrent layers keep views of their parameters
        else:
            target.data = value.to(target.device)


def _tie_problems(state: Mapping[str, Any], held: Mapping[str, Any], kind: str) -> list[str]:
    """Return a problem for each tensor that a module ties and that differs in what fills it."""
    first: dict[int, str] = {}
    problems = []
    for name, value in state.items():
        other = first.setdefault(id(held[name]), name)
        if other != name and value is not state[other] and not bool((value == state[other]).all()):
            problems.append(
                f"{name}: is tied to {other} in the module ({kind}), but differs from it in the merge; "
                "expected separate tensors."
            )
    return problems


def check_module(model: Any, where: str) -> None:
    """Check that a model is an ``nn.Module``. Errors: AlnicoError."""
    if not is_torch_module(model):
        raise AlnicoError(f"{where} is of type {type(model).__name__}; expected an nn.Module.")
