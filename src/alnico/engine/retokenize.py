"""Gives a model the vocabulary of another: the rows of new tokens are made of the model's own."""

from __future__ import annotations

import os
from typing import Any

from alnico.checkpoint.file_arguments import model_path
from alnico.checkpoint.output_path import replace_mode
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.engine.planner import Planner
from alnico.engine.run import MergeResult
from alnico.errors import AlnicoError
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.numbers import quote_value, whole_number
from alnico.output.remote_target import output_place
from alnico.recipe.load import load_recipe
from alnico.recipe.scalars import nearest
from alnico.recipe.schema import APPROXIMATIONS, ATOMS, Approximate
from alnico.run_options import DEFAULT_BUDGET_BYTES, DEFAULT_DOWNLOAD_CACHE_BYTES, RunOptions, Size

IN_MEMORY = "Save the model first, and give its folder."


@counts_compiling
@ieee_arithmetic()
def retokenize(
    model: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    approximate: Approximate = "omp",
    atoms: int = ATOMS,
    dtype: str | None = None,
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
    """Give a model the vocabulary of another, without training, and write the model.

    The output has the tokenizer, the chat template, the ids of marks and the number of rows of ``tokenizer``; everything else is the
    model's. A row of a token that the model knows is copied. Tokens are compared by the bytes of text that they stand for, whatever kind
    of tokenizer writes them; marks by their names, then by their roles (the end of a text, say). The rows of other tokens are made of the
    model's own, in embeddings and heads.

    With ``omp`` orthogonal matching pursuit writes the token's row in the other model as a combination of up to ``atoms`` rows of tokens
    that both models know; the same combination of the model's own rows is the new row, so the two models may have any widths. With
    ``subword`` a row is the mean of the rows of the tokens into which the model's tokenizer divides the text; with ``mean`` it is the mean
    of all rows. The result says how many rows are known and made, and how well 256 known rows would have been made if they were unknown.

    The output is that of the recipe ``{merge_method: passthrough, models: [model], tokenizer: {source: tokenizer, approximate: omp}}``:
    with a lock and a card, and checked against its plan. The same call resumes what was interrupted.

    Options:
        model: The model that gets another vocabulary.
        tokenizer: The model whose vocabulary it gets. For subword and mean the folder of a tokenizer is enough.
        out: Directory to create, or a URL such as s3://bucket/model; a name that ends in .safetensors makes one file.
        approximate: How rows of tokens are made that the model does not know: omp, subword or mean.
        atoms: The most rows that omp combines, from 1 on.
        dtype: Dtype of the output; default: the model's.
    Errors: AlnicoError for an option that has no such value; MismatchError for omp with a tokenizer without embeddings, and where no token
        is shared; all others of :func:`alnico.merge`.
    Source: Goddard and Fernandes 2025, https://arxiv.org/abs/2506.06607, and mergekit-tokensurgeon.
    Differs from the source: omp compares rows by their cosine, not by their product; byte tokens are matched; there are no other ways.
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
    if approximate not in APPROXIMATIONS:
        raise AlnicoError(
            f"approximate is {quote_value(approximate)}; expected omp, subword or mean. "
            f"{nearest(str(approximate), APPROXIMATIONS)}"
        )
    setting: dict[str, Any] = {
        "source": model_path(tokenizer, "tokenizer", in_memory=IN_MEMORY),
        "approximate": approximate,
    }
    if approximate == "omp":
        setting["atoms"] = whole_number(atoms, "atoms", 1)
    recipe = load_recipe(
        {
            "merge_method": "passthrough",
            "models": [model_path(model, "model", in_memory=IN_MEMORY)],
            "tokenizer": setting,
            **({"dtype": dtype} if dtype is not None else {}),
        }
    )
    may_replace = replace_mode(overwrite, overwrite_anything)
    planner = Planner.of(run, max_shard_size)
    return planner.merge(recipe, output_place(out, work_dir), overwrite=may_replace, restart=restart)
