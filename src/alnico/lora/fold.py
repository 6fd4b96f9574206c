"""Folds LoRA adapters into their base model, by a recipe that the engine merges."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from alnico.checkpoint.lora_dialects.block_strengths import (
    BlockInput,
    BlockStrengths,
    block_list,
    with_strengths,
)
from alnico.checkpoint.lora_model import AdaptedModel
from alnico.checkpoint.memory_model import import_torch, is_torch_module, unwrap_module
from alnico.checkpoint.output_path import check_publishable, replace_mode
from alnico.checkpoint.reference import Paths, path_list
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.checkpoint.source import Source
from alnico.devices import DEFAULT_DEVICE
from alnico.engine.fetch import fetch_inputs
from alnico.engine.planner import Planner, single_file_of
from alnico.engine.relatedness import IN_PYTHON
from alnico.engine.remote_run import run_plan_to
from alnico.errors import AlnicoError, ModelError
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.lora.triples import adapter_list, effect_on, open_adapters
from alnico.models.open_models import OpenModels, fill, merge_open_models, open_models, path_of, plain_copy
from alnico.models.peft_modules import has_adapters, without_adapters
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.numbers import finite_number, quote_value
from alnico.numerics.sizes import bytes_of
from alnico.output.remote_target import output_place
from alnico.output.shard_uploads import UPLOAD_BYTES
from alnico.recipe.from_options import dtype_name
from alnico.recipe.load import load_recipe
from alnico.recipe.requantise import requantised
from alnico.run_options import DEFAULT_BUDGET_BYTES, DEFAULT_DOWNLOAD_CACHE_BYTES, Access, RunOptions, Size


@counts_compiling
@ieee_arithmetic()
def fold(
    base: Any,
    adapters: Paths | Any = None,
    out: str | os.PathLike[str] | None = None,
    *,
    weights: float | Sequence[float] = 1.0,
    blocks: BlockInput | None = None,
    config: Any = None,
    at_once: bool = False,
    dtype: Any = None,
    requantise: str | None = None,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    restart: bool = False,
    offline: bool = False,
    stream: bool = False,
    download_cache: str | os.PathLike[str] | None = None,
    download_cache_size: Size = DEFAULT_DOWNLOAD_CACHE_BYTES,
    device: Any = DEFAULT_DEVICE,
    work_dir: str | os.PathLike[str] | None = None,
    watch: Watcher | None = None,
) -> Any:
    """Fold LoRA adapters into their base and write the model: ``W + sum of weight * (the adapted W - W)``.

    An adapter adds ``s B A``, summed over the rank in index order, in float32, by row blocks, and rounded
    once to the output's dtype, so memory and threads change no bit. DoRA's norms need one more pass over a
    tensor. A tensor that no adapter changes is copied. The base is read once (with ``at_once``, once
    per adapter). The same call resumes an interrupted fold.

    In Python base and adapters may be in memory: the base a dict of tensors or a module, an adapter a PEFT
    module, a dict of triples (A, B, scale) by the names of the base's tensors, or a dict of LoRA tensors with
    ``config``. A PEFT module alone is folded into its own base. Without ``out`` the model is returned: a
    module if the base is one, otherwise a dict of tensors. It has the bits of the fold on disk. With ``out``
    the result is a ``MergeResult``.

    Options:
        base: The model that the adapters were trained on.
        adapters: LoRA adapters: directories, files of kohya, ComfyUI, diffusers and others, URLs, or owner/name@revision on the hub.
        out: Directory to create, or a URL such as s3://bucket/model; a name that ends in .safetensors or .gguf makes one file.
        weights: Weight of each adapter, or one for all, such as 0.7,0.3; 1 applies an adapter as trained, a
            negative weight subtracts it.
        blocks: Strengths by block of an image model, for all adapters or one each: IN04-IN08=0.5,MID=0, or the usual list of 12, 17, 20 or 26
            numbers.
        config: Config of a dict of LoRA tensors, with r and lora_alpha; a list has one per adapter.
        at_once: Apply every adapter to the base itself. Without it each adapter changes the result of the
            ones before it, as PEFT's merge_and_unload does; this differs for DoRA and for tensors that
            several adapters replace.
        dtype: Dtype of the output; default: the base's.
    Errors: ModelError for something that is not an adapter, or an adapter of another base (names or shapes do
        not fit), AlnicoError for a wrong number of weights; NonFiniteError; all others of
        :func:`alnico.merge`.
    Differs from the source: PEFT rounds to the base's dtype after each adapter; here everything is rounded
        once.
    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; PEFT's format.

    >>> import numpy as np
    >>> update = {"fc.weight": (np.float32([[1, 2]]), np.float32([[1], [0]]), 0.5)}
    >>> fold({"fc.weight": np.zeros((2, 2), np.float32)}, update)["fc.weight"].tolist()
    [[0.5, 1.0], [0.0, 0.0]]
    """
    run = RunOptions.of(
        memory=memory,
        threads=threads,
        offline=offline,
        stream=stream,
        download_cache=download_cache,
        download_cache_size=download_cache_size,
        watch=watch,
        device=device,
    )
    if adapters is None and path_of(base) is not None:
        raise AlnicoError("adapters: there are none; expected at least one. Give an adapter.")
    listed = None if adapters is None else adapter_list(adapters)
    in_memory = path_of(base) is None or listed is None or any(path_of(a) is None for a in listed)
    may_replace = replace_mode(overwrite, overwrite_anything)
    if out is not None and not in_memory:
        paths = [path_of(a) or "" for a in listed or ()]
        start = path_of(base) or ""
        recipe = load_recipe(
            fold_recipe(start, paths, weights=weights, blocks=blocks, at_once=at_once, dtype=dtype)
        )
        planner = Planner.of(run, max_shard_size)
        recipe = requantised(recipe, requantise)
        return planner.merge_one(recipe, output_place(out, work_dir), overwrite=may_replace, restart=restart)
    if requantise is not None:
        raise AlnicoError(
            "requantise is given for models in memory; expected paths of files, and out. Save the models, or leave it out."
        )
    inner, listed = _own_base(base, listed)
    numbers = _numbers(weights, len(listed))
    opened = _open_folded(
        inner,
        listed,
        numbers,
        block_list(blocks, len(listed)),
        config,
        at_once=at_once,
        dtype=dtype,
        access=run.access,
    )
    if out is None:
        return _returned(inner, opened, run)
    target = output_place(out, work_dir)
    if isinstance(target, Path):
        check_publishable(target, may_be_gguf=True)
    else:
        run = replace(run, reserved_bytes=UPLOAD_BYTES)
    try:
        plan = opened.models.plan(
            opened.recipe,
            run=run,
            max_shard_bytes=bytes_of(max_shard_size),
            single_file=single_file_of(target),
        )
        fetch_inputs(plan, target, overwrite=may_replace, watch=watch)
        return run_plan_to(plan, target, overwrite=may_replace, restart=True, watch=watch, caller=IN_PYTHON)
    finally:
        opened.models.close()


@dataclass(frozen=True)
class _OpenFold:
    """Models whose reading applies the adapters, and the recipe that merges them."""

    models: OpenModels
    recipe: Mapping[str, Any]


def _own_base(base: Any, adapters: list[Any] | None) -> tuple[Any, list[Any]]:
    """Return a base and its adapters, where a PEFT module alone is both. Errors: ModelError."""
    wrapped = is_torch_module(base) and has_adapters(unwrap_module(base))
    if not wrapped:
        return base, adapters if adapters is not None else [base]
    return without_adapters(unwrap_module(base), "base", merge=False), [
        base
    ] if adapters is None else adapters


def _open_folded(
    base: Any,
    adapters: list[Any],
    weights: Sequence[float],
    blocks: Sequence[BlockStrengths | None],
    config: Any,
    *,
    at_once: bool,
    dtype: Any,
    access: Access,
) -> _OpenFold:
    """Open a base with its adapters: one model of all, or with ``at_once`` one of each. Errors: ModelError."""
    opened = open_models({"base": base}, access=access)
    try:
        start: Any = opened.sources["base"]
        kind = getattr(getattr(base, "config", None), "model_type", None) if is_torch_module(base) else None
        if isinstance(kind, str):
            start.config = {"model_type": kind}  # decides how square matrices are stored
        found = open_adapters(adapters, config, access=access)
        each = [w for w, n in zip(weights, found.counts, strict=True) for _ in range(n)]
        strengths = [s for s, n in zip(blocks, found.counts, strict=True) for _ in range(n)]
        models: dict[str, Source] = {}
        source = start
        parts = zip(found.adapters, found.keys, each, strengths, strict=True)
        for number, (opened_adapter, keys, weight, strength) in enumerate(parts):
            adapter = opened_adapter if strength is None else with_strengths(opened_adapter, strength)
            effect = effect_on(start, adapter, keys, opened.tied)
            part = start if at_once else source
            factor = 1.0 if at_once else weight
            source = AdaptedModel(f"base+{adapter.label}", part, adapter, factor, effect)
            models[f"base with adapter {number + 1}"] = source
    except BaseException:
        opened.close()
        raise
    output = {"dtype": dtype_name(dtype)} if dtype is not None else {}
    if at_once and len(models) > 1:
        recipe: dict[str, Any] = {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [
                {"model": name, "parameters": {"weight": w}} for name, w in zip(models, each, strict=True)
            ],
            "unrelated": "allow",
            **output,
        }
        return _OpenFold(replace(opened, sources={"base": start, **models}), recipe)
    if at_once:
        source = AdaptedModel(source.label, start, source.adapter, each[0], source._effect)
    recipe = {"merge_method": "passthrough", "models": ["base with adapters"], **output}
    return _OpenFold(replace(opened, sources={"base with adapters": source}), recipe)


def _returned(base: Any, opened: _OpenFold, run: RunOptions) -> Any:
    """Merge in memory: a module if the base is one, otherwise a dict of tensors."""
    if is_torch_module(base):
        import_torch("a fold of a module")
    state = merge_open_models(opened.models, opened.recipe, run)
    if not is_torch_module(base):
        return state
    module = plain_copy(base)
    fill(module, state)
    return module


def fold_recipe(
    base: str | os.PathLike[str],
    adapters: Paths,
    *,
    weights: float | Sequence[float] = 1.0,
    blocks: BlockInput | None = None,
    at_once: bool = False,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Return the recipe that folds adapters into a base, as plain data. Arguments and errors: as for
    :func:`fold`.

    >>> fold_recipe("base", ["a", "b"], weights=[0.5, 1])["models"]
    ['base+0.5*a+b']
    >>> fold_recipe("base", ["a", "b"], at_once=True)["models"][1]
    {'model': 'base+b', 'parameters': {'weight': 1.0}}
    """
    start = os.fspath(base)
    references = path_list(adapters)
    if references and _is_adapter(start) and os.path.isdir(references[0]) and not _is_adapter(references[0]):
        raise ModelError(
            f"{start}: is a LoRA adapter, and {references[0]} is none; expected the base first, then its adapters. "
            "Exchange them."
        )
    numbers = _numbers(weights, len(references))
    strengths = [f"[{s.text}]" if s is not None else "" for s in block_list(blocks, len(references))]
    output = {"dtype": dtype_name(dtype)} if dtype is not None else {}
    if at_once and len(references) > 1:
        models = [
            {"model": f"{start}+{_written(a, 1.0, s)}", "parameters": {"weight": w}}
            for a, w, s in zip(references, numbers, strengths, strict=True)
        ]
        return {
            "merge_method": "task_arithmetic",
            "base_model": start,
            "models": models,
            "unrelated": "allow",
            **output,
        }
    chain = "".join(f"+{_written(*part)}" for part in zip(references, numbers, strengths, strict=True))
    return {"merge_method": "passthrough", "models": [start + chain], **output}


def _written(adapter: str, weight: float, blocks: str) -> str:
    """Write an adapter with its weight and strengths as a reference does.

    >>> _written("a", 1.0, ""), _written("a", 0.5, ""), _written("a", 1.0, "[MID=0.0]")
    ('a', '0.5*a', '1.0[MID=0.0]*a')
    """
    return f"{weight!r}{blocks}*{adapter}" if blocks or weight != 1 else adapter


def _numbers(weights: Any, adapters: int) -> list[float]:
    """Return a weight for each adapter. Errors: AlnicoError."""
    if isinstance(weights, str) or not (isinstance(weights, Real) or hasattr(weights, "__len__")):
        raise AlnicoError(
            f"weights is {quote_value(weights)}; expected a number, or a list with one number per adapter. "
            "Give those."
        )
    each: Any = [weights] * adapters if isinstance(weights, Real) else weights
    numbers = [finite_number(w, "a weight") for w in each]
    if not adapters:
        raise AlnicoError("adapters: there are none; expected at least one. Give an adapter.")
    if len(numbers) != adapters:
        raise AlnicoError(
            f"weights: there are {len(numbers)} for {adapters} adapters; expected one for all, or one "
            "for each. Change the number."
        )
    return numbers


def _is_adapter(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "adapter_config.json"))
