"""Folds LoRA adapters into their base model, by a recipe that the engine merges."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from alnico.checkpoint.output_path import replace_mode
from alnico.checkpoint.reference import Paths, path_list
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.engine.planner import Planner
from alnico.engine.run import MergeResult
from alnico.errors import AlnicoError, ModelError
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.numbers import finite_number, quote_value
from alnico.recipe.load import load_recipe
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size


@counts_compiling
@ieee_arithmetic()
def fold(
    base: str | os.PathLike[str],
    adapters: Paths,
    out: str | os.PathLike[str],
    *,
    weights: float | Sequence[float] = 1.0,
    at_once: bool = False,
    dtype: str | None = None,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    restart: bool = False,
    offline: bool = False,
    watch: Watcher | None = None,
) -> MergeResult:
    """Fold LoRA adapters into their base and write the model: ``W + sum of weight * (the adapted W - W)``.

    An adapter adds ``s B A``, summed over the rank in index order, in float32, by row blocks, and rounded
    once to the output's dtype, so memory and threads change no bit. DoRA's norms need one more pass over a
    tensor. A tensor that no adapter changes is copied. The base is read once (with ``at_once``, once
    per adapter). The same call resumes an interrupted fold.

    Options:
        base: The model that the adapters were trained on.
        adapters: LoRA adapters: directories, or owner/name@revision on the hub.
        out: Directory to create; a name that ends in .safetensors makes one file.
        weights: Weight of each adapter, or one for all, such as 0.7,0.3; 1 applies an adapter as trained, a
            negative weight subtracts it.
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
    """
    run = RunOptions.of(memory=memory, threads=threads, offline=offline, watch=watch)
    recipe = load_recipe(fold_recipe(base, adapters, weights=weights, at_once=at_once, dtype=dtype))
    may_replace = replace_mode(overwrite, overwrite_anything)
    planner = Planner.of(run, max_shard_size)
    return planner.merge(recipe, Path(out), overwrite=may_replace, restart=restart)


def fold_recipe(
    base: str | os.PathLike[str],
    adapters: Paths,
    *,
    weights: float | Sequence[float] = 1.0,
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
    if isinstance(weights, str) or not (isinstance(weights, Real) or hasattr(weights, "__len__")):
        raise AlnicoError(
            f"weights is {quote_value(weights)}; expected a number, or a list with one number per adapter. "
            "Give those."
        )
    each: Any = [weights] * len(references) if isinstance(weights, Real) else weights
    numbers = [finite_number(w, "a weight") for w in each]
    if not references:
        raise AlnicoError("adapters: there are none; expected at least one. Give an adapter.")
    if len(numbers) != len(references):
        raise AlnicoError(
            f"weights: there are {len(numbers)} for {len(references)} adapters; expected one for all, or one "
            "for each. Change the number."
        )
    output = {"dtype": dtype} if dtype is not None else {}
    if at_once and len(references) > 1:
        models = [
            {"model": f"{start}+{a}", "parameters": {"weight": w}}
            for a, w in zip(references, numbers, strict=True)
        ]
        return {
            "merge_method": "task_arithmetic",
            "base_model": start,
            "models": models,
            "unrelated": "allow",
            **output,
        }
    chain = "".join(f"+{a}" if w == 1 else f"+{w!r}*{a}" for a, w in zip(references, numbers, strict=True))
    return {"merge_method": "passthrough", "models": [start + chain], **output}


def _is_adapter(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "adapter_config.json"))
