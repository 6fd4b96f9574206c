"""Completes a fine-tune by what its base has and it lacks: tensors, keys of the config and side files."""

from __future__ import annotations

import os

from alnico.checkpoint.file_arguments import model_path
from alnico.checkpoint.output_path import replace_mode
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.engine.planner import Planner
from alnico.engine.run import MergeResult
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.output.remote_target import output_place
from alnico.recipe.load import load_recipe
from alnico.run_options import DEFAULT_BUDGET_BYTES, DEFAULT_DOWNLOAD_CACHE_BYTES, RunOptions, Size

IN_MEMORY = 'alnico.merge_models merges models in memory, with missing="copy".'


@counts_compiling
@ieee_arithmetic()
def complete(
    finetune: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
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
    work_dir: str | os.PathLike[str] | None = None,
    watch: Watcher | None = None,
) -> MergeResult:
    """Add to a fine-tune what its training program left out and its base has, and write the model.

    Programs that save a model write what they loaded. Layers for multi-token prediction (``mtp.*``), a vision tower,
    buffers, a processor or a tokenizer may be missing then. Tensors of the base that the fine-tune lacks are copied, by
    name and byte for byte; so are all tensors of the fine-tune. Where the two spell names differently, the table of
    layouts says which are the same. Side files of the base are added where the fine-tune has none of their name; a
    tokenizer is added as a whole or not at all. The config is the fine-tune's, with the keys that describe what was
    added; that of the base, if the fine-tune is of the type of a part of it, such as the text decoder. The notes of the
    result name everything that was added.

    The output is that of the recipe ``{merge_method: passthrough, models: [finetune], complete_from: base}``: with a
    lock and a card, and checked against its plan. The same call resumes an interrupted completion.

    Options:
        finetune: The model that lacks something.
        base: The model that it was tuned from, which has it.
        out: Directory to create, or a URL such as s3://bucket/model; a name that ends in .safetensors makes one file.
    Errors: MismatchError where the fine-tune has a tensor that the base lacks, where shapes differ, or where nothing is
        missing; all others of :func:`alnico.merge`.
    """
    run = RunOptions.of(
        memory=memory,
        threads=threads,
        offline=offline,
        stream=stream,
        download_cache=download_cache,
        download_cache_size=download_cache_size,
        watch=watch,
    )
    recipe = load_recipe(
        {
            "merge_method": "passthrough",
            "models": [model_path(finetune, "finetune", in_memory=IN_MEMORY)],
            "complete_from": model_path(base, "base", in_memory=IN_MEMORY),
        }
    )
    may_replace = replace_mode(overwrite, overwrite_anything)
    planner = Planner.of(run, max_shard_size)
    return planner.merge(recipe, output_place(out, work_dir), overwrite=may_replace, restart=restart)
