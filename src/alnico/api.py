"""The public functions that need every room: recipes, plans, merges, and what alnico knows of methods."""

from __future__ import annotations

import os
from typing import Any

from alnico.checkpoint.open_model import open_model as open_checkpoint
from alnico.checkpoint.output_path import replace_mode
from alnico.checkpoint.reference import Paths
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.checkpoint.source import Model
from alnico.devices import DEFAULT_DEVICE
from alnico.engine.planner import Planner
from alnico.engine.run import MergeResult
from alnico.engine.stages import close, plan_stages
from alnico.errors import RecipeError
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.methods import find, known_methods
from alnico.methods.base import Method
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.output.remote_target import output_place
from alnico.plan.job import Plan
from alnico.recipe.json_schema import json_schema, mixture_schema
from alnico.recipe.load import RecipeLike, Recipes, load_recipe, load_recipes
from alnico.recipe.requantise import requantised, with_requantising
from alnico.recipe.stages import order_stages
from alnico.run_options import DEFAULT_BUDGET_BYTES, DEFAULT_DOWNLOAD_CACHE_BYTES, RunOptions, Size


@ieee_arithmetic()
def plan(
    recipe: RecipeLike,
    *,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    single_file: str | None = None,
    seed: int | None = None,
    offline: bool = False,
    stream: bool = False,
    download_cache: str | os.PathLike[str] | None = None,
    download_cache_size: Size = DEFAULT_DOWNLOAD_CACHE_BYTES,
    device: Any = DEFAULT_DEVICE,
    strict_license: bool = False,
    verify_inputs: Paths = (),
    allow_unsigned: Paths = (),
) -> Plan:
    """Plan a merge from the headers of its models alone.

    The plan says what is merged, copied or dropped and why, and how many bytes are read, written and held in
    memory. Licenses that conflict are notes of the plan; with ``strict_license`` they are a MismatchError, as
    is a license that is not stated or not known.

    Options:
        recipe: YAML file of the recipe; - reads standard input on the command line.
        single_file: name of the one output file, which ends in .safetensors or .gguf; default: files cut at
            max_shard_size.
        seed: Seed of random methods; default: the recipe's, or 0.
    Errors: RecipeError, ModelError, MismatchError, ResourceError, HubError; VerificationError and
        UncheckedError for signatures.
    """
    planner = Planner.of(
        RunOptions.of(
            memory=memory,
            threads=threads,
            offline=offline,
            stream=stream,
            download_cache=download_cache,
            download_cache_size=download_cache_size,
            device=device,
        ),
        max_shard_size,
        strict_license,
        verify_inputs,
        allow_unsigned,
    )
    documents = with_requantising((load_recipe(recipe, seed=seed),))
    if len(documents) == 1:
        return planner.plan(documents[0], single_file=single_file)
    plans = plan_stages(order_stages(documents), planner.plan, single_file)
    close(plans[:-1])
    return plans[-1]


@counts_compiling
@ieee_arithmetic()
def merge(
    recipe: RecipeLike,
    out: str | os.PathLike[str],
    *,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    seed: int | None = None,
    requantise: str | None = None,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    restart: bool = False,
    offline: bool = False,
    stream: bool = False,
    download_cache: str | os.PathLike[str] | None = None,
    download_cache_size: Size = DEFAULT_DOWNLOAD_CACHE_BYTES,
    device: Any = DEFAULT_DEVICE,
    strict_license: bool = False,
    verify_inputs: Paths = (),
    allow_unsigned: Paths = (),
    require_signed: bool = False,
    factor_cache: str | os.PathLike[str] | None = None,
    ray: bool | str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    watch: Watcher | None = None,
) -> MergeResult:
    """Merge the models of a recipe into a directory, or into one file.

    The same call resumes an interrupted merge of the same recipe and inputs. ``verify_inputs`` checks the
    signature of every model, adapter, vocabulary and statistics folder before its tensors are read. ``watch``
    receives the events of ``alnico.events``, from any thread but one at a time.

    Options:
        recipe: YAML file of the recipe; - reads standard input on the command line.
        out: Directory to create, or a URL such as s3://bucket/model; a name that ends in .safetensors or .gguf makes one file.
        seed: Seed of random methods; default: the recipe's, or 0.
    Errors: all of ``alnico.errors``.
    """
    planner = Planner.of(
        RunOptions.of(
            memory=memory,
            threads=threads,
            offline=offline,
            stream=stream,
            download_cache=download_cache,
            download_cache_size=download_cache_size,
            watch=watch,
            factor_cache=factor_cache,
            device=device,
            ray=ray,
        ),
        max_shard_size,
        strict_license,
        verify_inputs,
        allow_unsigned,
        require_signed,
    )
    may_replace = replace_mode(overwrite, overwrite_anything)
    one = requantised(load_recipe(recipe, seed=seed), requantise)
    return planner.merge_one(one, output_place(out, work_dir), overwrite=may_replace, restart=restart)


@counts_compiling
@ieee_arithmetic()
def merge_documents(
    recipe: Recipes,
    out: str | os.PathLike[str],
    *,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    seed: int | None = None,
    requantise: str | None = None,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    restart: bool = False,
    offline: bool = False,
    stream: bool = False,
    download_cache: str | os.PathLike[str] | None = None,
    download_cache_size: Size = DEFAULT_DOWNLOAD_CACHE_BYTES,
    device: Any = DEFAULT_DEVICE,
    strict_license: bool = False,
    verify_inputs: Paths = (),
    allow_unsigned: Paths = (),
    require_signed: bool = False,
    factor_cache: str | os.PathLike[str] | None = None,
    ray: bool | str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    watch: Watcher | None = None,
) -> tuple[MergeResult, ...]:
    """Merge all documents of a recipe file: stages that use each other's outputs, or independent merges.

    A stage has a ``name``, by which other documents use its output.

    The output is every document that no other document uses. One goes to ``out``, several go to ``out/NAME``,
    or to ``out/NUMBER-METHOD`` if they have no name. Intermediate stages are removed at the end.

    Options:
        recipe: YAML file of the recipe; - reads standard input on the command line.
        out: Directory to create, or a URL such as s3://bucket/model; a name that ends in .safetensors or .gguf makes one file.
        seed: Seed of random methods; default: the recipe's, or 0.
    Errors: as for :func:`merge`.
    """
    planner = Planner.of(
        RunOptions.of(
            memory=memory,
            threads=threads,
            offline=offline,
            stream=stream,
            download_cache=download_cache,
            download_cache_size=download_cache_size,
            watch=watch,
            factor_cache=factor_cache,
            device=device,
            ray=ray,
        ),
        max_shard_size,
        strict_license,
        verify_inputs,
        allow_unsigned,
        require_signed,
    )
    recipes = [requantised(one, requantise) for one in load_recipes(recipe, seed=seed)]
    may_replace = replace_mode(overwrite, overwrite_anything)
    return planner.merge_all(recipes, output_place(out, work_dir), overwrite=may_replace, restart=restart)


@ieee_arithmetic()
def plan_documents(
    recipe: Recipes,
    *,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    single_file: str | None = None,
    seed: int | None = None,
    requantise: str | None = None,
    offline: bool = False,
    stream: bool = False,
    download_cache: str | os.PathLike[str] | None = None,
    download_cache_size: Size = DEFAULT_DOWNLOAD_CACHE_BYTES,
    device: Any = DEFAULT_DEVICE,
    strict_license: bool = False,
    verify_inputs: Paths = (),
    allow_unsigned: Paths = (),
) -> tuple[Plan, ...]:
    """Plan what :func:`merge_documents` would do: one plan per document, in the order in which they run.

    Options:
        recipe: YAML file of the recipe; - reads standard input on the command line.
        single_file: name of the one output file, which ends in .safetensors or .gguf; default: files cut at
            max_shard_size.
        seed: Seed of random methods; default: the recipe's, or 0.
    Errors: as for :func:`plan`.
    """
    planner = Planner.of(
        RunOptions.of(
            memory=memory,
            threads=threads,
            offline=offline,
            stream=stream,
            download_cache=download_cache,
            download_cache_size=download_cache_size,
            device=device,
        ),
        max_shard_size,
        strict_license,
        verify_inputs,
        allow_unsigned,
    )
    recipes = [requantised(one, requantise) for one in load_recipes(recipe, seed=seed)]
    return plan_stages(order_stages(with_requantising(recipes)), planner.plan, single_file)


@ieee_arithmetic()
def open_model(
    model: str | os.PathLike[str],
    *,
    offline: bool = False,
    stream: bool = False,
    download_cache: str | os.PathLike[str] | None = None,
    download_cache_size: Size = DEFAULT_DOWNLOAD_CACHE_BYTES,
) -> Model:
    """Open a model and read its headers; tensors are read when you ask for them.

    ``model.tensors`` maps names to dtype and shape, ``model.read(name)`` returns a numpy array,
    ``model.config`` is the config. Close the model, or use it in ``with``. The tensors of a LoRA adapter are
    read as they are stored; functions that merge or compare models refuse adapter files.

    Options:
        model: A model directory, a .safetensors file, the URL of one, or owner/name@revision on the hub.
    Errors: ModelError, HubError.
    """
    run = RunOptions.of(
        offline=offline, stream=stream, download_cache=download_cache, download_cache_size=download_cache_size
    )
    return open_checkpoint(model, access=run.access, may_be_adapter=True)


@ieee_arithmetic()
def schema(*, search: bool = False, mixture: bool = False, task_vector: bool = False) -> dict[str, Any]:
    """Return the JSON Schema of recipes, for editors: keys, methods, options with their ranges and defaults.

    Options:
        search: The schema of the recipes that `alnico search` takes, with ranges in place of values.
        mixture: The schema of the recipes that build a mixture of experts.
        task_vector: The schema of taskvector.json, the manifest of a stored task vector.
    Errors: RecipeError for several at once.
    """
    given = [
        n
        for n, is_given in (("search", search), ("mixture", mixture), ("task_vector", task_vector))
        if is_given
    ]
    if len(given) > 1:
        raise RecipeError(f"{given[0]} and {given[1]} are both given; expected one of them. Leave one out.")
    if task_vector:
        from alnico.checkpoint.task_vectors.manifest_schema import manifest_schema

        return manifest_schema()
    from alnico.tune.search.json_schema import search_schema

    if mixture:
        return mixture_schema()
    return search_schema() if search else json_schema()


def methods(name: str | None = None) -> dict[str, Method]:
    """Return the merge methods by name, with their options and documentation.

    Methods that this process has made are among them.

    Options:
        name: Name of the only method to show; default: all.
    Errors: MethodError for an unknown name.
    """
    found = None if name is None else find(name)
    return known_methods() if found is None else {found.name: found}
