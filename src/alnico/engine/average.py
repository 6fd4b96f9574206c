"""Averages the checkpoints of a training run, with weights that follow a schedule."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from alnico.checkpoint.file_arguments import model_path
from alnico.checkpoint.output_path import replace_mode
from alnico.checkpoint.reference import Paths, path_list
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.devices import DEFAULT_DEVICE
from alnico.engine.planner import Planner
from alnico.engine.run import MergeResult
from alnico.errors import RecipeError
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.output.remote_target import output_place
from alnico.recipe.from_options import dtype_name, plain_list
from alnico.recipe.load import load_recipe
from alnico.recipe.schema import Recipe
from alnico.run_options import DEFAULT_BUDGET_BYTES, DEFAULT_DOWNLOAD_CACHE_BYTES, RunOptions, Size

IN_MEMORY = "alnico.merge_models and alnico.merge_state_dicts merge models in memory."


@counts_compiling
@ieee_arithmetic()
def average(
    run: Paths,
    out: str | os.PathLike[str],
    *,
    last: int | None = None,
    every: int = 1,
    steps: Sequence[int] | None = None,
    shape: str | Sequence[float] = "uniform",
    decay: float | None = None,
    ema: bool = False,
    dtype: Any = None,
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
) -> MergeResult:
    """Average the checkpoints of a training run, and write the model.

    The checkpoints are the folders or files of the run that have a step in their names, such as ``checkpoint-500``,
    ``global_step500`` or ``epoch=3-step=500.ckpt``: safetensors, pickles, or the shards of FSDP and DeepSpeed.
    Optimizer states and other files of the trainer are left out. So is the newest checkpoint, if it is half-written:
    the notes of the result name it. Nothing is deleted.

    ``shape`` is the decay of a learning rate that the average emulates. If w_j is its factor at checkpoint j, from 1
    at the oldest to 0 after the newest, the checkpoint has the weight w_j - w_{j+1} (Tian et al. 2025, WSM,
    https://arxiv.org/abs/2507.17634).

    The output is that of the recipe ``{merge_method: linear, checkpoints: {run: ...}, parameters: {weight: {from:
    schedule, shape: ...}}}``. The same call resumes an interrupted average while the run has the same checkpoints.

    Options:
        run: Folder of the run; a glob, such as run/checkpoint-*; or checkpoints.
        out: Directory to create, or a URL such as s3://bucket/model; a name that ends in .safetensors makes one file.
        last: How many of the newest checkpoints are averaged; default: all.
        every: Take each Nth checkpoint, counted back from the newest.
        steps: First and last step, as 1000,8000, or steps that must all be there, as 1000,8000,500.
        shape: Weights: uniform or linear (equal ones), cosine (most for the middle), 1-sqrt (most for the oldest),
            ema (most for the newest), wma (rising evenly); or the factor of the learning rate at each checkpoint,
            the oldest first, as 1,0.8,0.3.
        decay: What the moving average of ema keeps with each checkpoint, in (0, 1); default: 0.8.
        ema: Take the averaged weights that the trainer kept, in files of their own or inside each checkpoint.
        dtype: Dtype of the output, such as bfloat16; default: that of the checkpoints.
    Errors: RecipeError for a run without steps, or without what is asked for; MismatchError for checkpoints with tensors of
        different shapes; all others of :func:`alnico.merge`.
    """
    options = RunOptions.of(
        memory=memory,
        threads=threads,
        offline=offline,
        stream=stream,
        download_cache=download_cache,
        download_cache_size=download_cache_size,
        device=device,
        watch=watch,
    )
    recipe = average_recipe(
        run, last=last, every=every, steps=steps, shape=shape, decay=decay, ema=ema, dtype=dtype
    )
    may_replace = replace_mode(overwrite, overwrite_anything)
    planner = Planner.of(options, max_shard_size)
    return planner.merge(recipe, output_place(out, work_dir), overwrite=may_replace, restart=restart)


def average_recipe(
    run: Paths,
    *,
    last: int | None = None,
    every: int = 1,
    steps: Sequence[int] | None = None,
    shape: str | Sequence[float] = "uniform",
    decay: float | None = None,
    ema: bool = False,
    dtype: Any = None,
) -> Recipe:
    """Return the recipe of :func:`average`. Errors: RecipeError, in the words of its arguments."""
    is_one = isinstance(run, (str, os.PathLike))
    runs: Any = (
        model_path(run, "run", in_memory=IN_MEMORY) if is_one else path_list(run, "run", in_memory=IN_MEMORY)
    )
    asked: dict[str, Any] = {"run": runs if is_one or len(runs) > 1 else runs[0]}
    asked |= {"last": last} if last is not None else {}
    asked |= {"every": every} if every != 1 else {}
    asked |= {"steps": plain_list(steps)} if steps is not None else {}
    asked |= {"ema": ema} if ema else {}
    schedule: dict[str, Any] = {"from": "schedule", "shape": plain_list(shape)}
    schedule |= {"decay": decay} if decay is not None else {}
    document: dict[str, Any] = {
        "merge_method": "linear",
        "checkpoints": asked,
        "parameters": {"weight": schedule},
        **({"dtype": dtype_name(dtype)} if dtype is not None else {}),
    }
    try:
        recipe = load_recipe(document)
    except RecipeError as error:
        raise RecipeError(*map(in_own_words, error.args)) from None
    idle = next((note for note in recipe.notes if "decay has no effect" in note), None)
    if idle is not None:
        raise RecipeError(
            f"decay is {decay:g}, and shape is {shape}; expected decay with shape ema alone. Leave it out, or write shape ema."
        )
    return dataclasses.replace(recipe, notes=tuple(map(in_own_words, recipe.notes)))


PLACES = ("checkpoints.", "checkpoints: ", "parameters.weight.", "weight.")
"""Places in the recipe that a caller does not know."""


def in_own_words(line: str) -> str:
    """A line about the recipe as one about the arguments.

    >>> in_own_words("recipe: checkpoints.last is 0; expected a whole number of at least 1.")
    'last is 0; expected a whole number of at least 1.'
    """
    line = line.removeprefix("recipe: ")
    start = next((place for place in PLACES if line.startswith(place)), "")
    return line.removeprefix(start)
