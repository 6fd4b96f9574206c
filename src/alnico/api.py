"""The public functions: each a few lines over the rooms below."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from alnico.analysis.diff import ModelDiff, diff_sources
from alnico.analysis.files import report_folder, write_analysis
from alnico.analysis.journal import AnalysisJournal, is_half_written
from alnico.analysis.measure import SUBSPACE_SIDE, analyze_sources
from alnico.analysis.plan_check import fit, fits_again, seen_from
from alnico.analysis.report import write_pages
from alnico.analysis.results import AnalysedModel, Analysis, read_analysis
from alnico.analysis.retention import Retention, base_of, keep_sources, write_kept
from alnico.analysis.retention_section import kept_section
from alnico.analysis.score_section import score_section
from alnico.analysis.scores import Estimate, Estimates, ScoreTable, read_estimates, values_of
from alnico.analysis.suggest import Suggestion, nothing_left
from alnico.analysis.suggest import suggest as suggest_recipe
from alnico.checkpoint.durable import sync_tree
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.open_model import open_model as open_checkpoint
from alnico.checkpoint.output_path import (
    Replace,
    check_new_file,
    check_publishable,
    check_twins,
    replace_mode,
)
from alnico.checkpoint.reference import Paths
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.checkpoint.signatures import SignedInputs, check_key, check_signature
from alnico.checkpoint.signatures import sign as sign_folder
from alnico.checkpoint.source import Model, Source
from alnico.checkpoint.statistics import StatisticsSource
from alnico.engine.fetch import fetch_inputs
from alnico.engine.norm_weights import NormWeights, compute_norm_weights
from alnico.engine.run import MergeResult, run_plan
from alnico.engine.stages import Planner, close, plan_stages, run_stages
from alnico.errors import AlnicoError, EvaluationError, OutputError
from alnico.events import Watcher
from alnico.methods import find, registry
from alnico.methods.base import Method
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.numbers import real, whole
from alnico.numerics.sizes import bytes_of
from alnico.output.validate import check_finished
from alnico.plan.build import build_plan
from alnico.plan.job import Plan
from alnico.plan.memory import DEFAULT_BUDGET_BYTES, threads_of
from alnico.plan.norm_weights import analysis_files
from alnico.recipe import load
from alnico.recipe.json_schema import json_schema
from alnico.recipe.reference import relative_reference, resolve_reference
from alnico.recipe.schema import Recipe
from alnico.recipe.stages import order_stages
from alnico.values.merge import merge_modules, merge_values
from alnico.verification.replan import ReplanOptions
from alnico.verification.reproduce import Reproduction
from alnico.verification.reproduce import reproduce as reproduce_output
from alnico.verification.verify import Verification, add_signature, refuse_unchecked
from alnico.verification.verify import verify as verify_output

if TYPE_CHECKING:
    from alnico.evaluation.scorecard import Scorecard
    from alnico.evaluation.tasks import Score, Task
    from alnico.tune.adamerge import AdaMergingResult, LearningStep
    from alnico.tune.search.result import SearchResult
    from alnico.tune.search.samplers.request import Trial
    from alnico.tune.soup import Soup, SoupStep
    from alnico.tune.statistics.fisher import Expectation

RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe
Recipes = RecipeLike | tuple[Recipe, ...]
Size = int | str
TasksLike = Union[str, os.PathLike[str], Mapping[str, Any], "Sequence[Task]"]
"""Tasks: a tasks file, a mapping that says the same, or tasks."""


def _listed(models: Paths) -> list[str | os.PathLike[str]]:
    return [models] if isinstance(models, (str, os.PathLike)) else list(models)


@ieee_arithmetic()
def load_recipe(source: RecipeLike, *, seed: int | None = None) -> Recipe:
    """Read and check a recipe: a YAML file, YAML text, or a mapping. ``seed`` replaces the recipe's.

    Errors: RecipeError, with a line for every mistake.

    >>> load_recipe({"merge_method": "linear", "models": ["a", "b"]}).merge_method
    'linear'
    """
    return load.load_recipe(source, seed=seed)


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
    strict_license: bool = False,
    verify_inputs: Paths = (),
    allow_unsigned: Paths = (),
) -> Plan:
    """Plan a merge from the headers of its models alone.

    The plan says what is merged, copied or dropped and why, and how many bytes are read, written and held in
    memory. Licenses that conflict are notes of the plan; with ``strict_license`` they are a MismatchError, as
    is an unknown license.

    Options:
        recipe: YAML file of the recipe; - reads standard input on the command line.
        single_file: name of the one output file, which ends in .safetensors; default: files cut at
            max_shard_size.
        seed: Seed of random methods; default: the recipe's, or 0.
    Errors: RecipeError, ModelError, MismatchError, ResourceError, HubError; VerificationError and
        UncheckedError for signatures.
    """
    signed = _signed(verify_inputs, allow_unsigned, False)
    return _planner(memory, threads, max_shard_size, offline, strict_license, signed)(
        load_recipe(recipe, seed=seed), {}, single_file
    )


@ieee_arithmetic()
def merge(
    recipe: RecipeLike,
    out: str | os.PathLike[str],
    *,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    seed: int | None = None,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    restart: bool = False,
    offline: bool = False,
    strict_license: bool = False,
    verify_inputs: Paths = (),
    allow_unsigned: Paths = (),
    require_signed: bool = False,
    watch: Watcher | None = None,
) -> MergeResult:
    """Merge the models of a recipe into a directory, or into one file.

    The same call resumes an interrupted merge of the same recipe and inputs. ``verify_inputs`` checks the
    signature of every model, adapter, vocabulary and statistics folder before its tensors are read. ``watch``
    receives the events of ``alnico.events``, from any thread but one at a time.

    Options:
        recipe: YAML file of the recipe; - reads standard input on the command line.
        out: Directory to create; a name that ends in .safetensors makes one file.
        seed: Seed of random methods; default: the recipe's, or 0.
    Errors: all of ``alnico.errors``.
    """
    planner = _planner(
        memory,
        threads,
        max_shard_size,
        offline,
        strict_license,
        _signed(verify_inputs, allow_unsigned, require_signed),
    )
    return _run(
        planner,
        load_recipe(recipe, seed=seed),
        Path(out),
        replace_mode(overwrite, overwrite_anything),
        restart,
        watch,
    )


@ieee_arithmetic()
def merge_documents(
    recipe: Recipes,
    out: str | os.PathLike[str],
    *,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    seed: int | None = None,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    restart: bool = False,
    offline: bool = False,
    strict_license: bool = False,
    verify_inputs: Paths = (),
    allow_unsigned: Paths = (),
    require_signed: bool = False,
    watch: Watcher | None = None,
) -> tuple[MergeResult, ...]:
    """Merge all documents of a recipe file: stages that use each other's outputs, or independent merges.

    A stage has a ``name``, by which other documents use its output.

    The output is every document that no other document uses. One goes to ``out``, several go to ``out/NAME``,
    or to ``out/NUMBER-METHOD`` if they have no name. Intermediate stages are removed at the end.

    Options:
        recipe: YAML file of the recipe; - reads standard input on the command line.
        out: Directory to create; a name that ends in .safetensors makes one file.
        seed: Seed of random methods; default: the recipe's, or 0.
    Errors: as for :func:`merge`.
    """
    given = load.load_recipes(recipe, seed=seed)
    planner = _planner(
        memory,
        threads,
        max_shard_size,
        offline,
        strict_license,
        _signed(verify_inputs, allow_unsigned, require_signed),
    )
    may_replace = replace_mode(overwrite, overwrite_anything)
    if len(given) == 1:
        return (_run(planner, given[0], Path(out), may_replace, restart, watch),)
    return run_stages(
        order_stages(given), planner, Path(out), overwrite=may_replace, restart=restart, watch=watch
    )


@ieee_arithmetic()
def plan_documents(
    recipe: Recipes,
    *,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    single_file: str | None = None,
    seed: int | None = None,
    offline: bool = False,
    strict_license: bool = False,
    verify_inputs: Paths = (),
    allow_unsigned: Paths = (),
) -> tuple[Plan, ...]:
    """Plan what :func:`merge_documents` would do: one plan per document, in the order in which they run.

    Options:
        recipe: YAML file of the recipe; - reads standard input on the command line.
        single_file: name of the one output file, which ends in .safetensors; default: files cut at
            max_shard_size.
        seed: Seed of random methods; default: the recipe's, or 0.
    Errors: as for :func:`plan`.
    """
    planner = _planner(
        memory,
        threads,
        max_shard_size,
        offline,
        strict_license,
        _signed(verify_inputs, allow_unsigned, False),
    )
    return plan_stages(order_stages(load.load_recipes(recipe, seed=seed)), planner, single_file)


def _signed(keys: Paths, unsigned: Paths, is_required: bool) -> SignedInputs | None:
    """What is asked of the signatures of inputs, if something is. Errors: AlnicoError; UncheckedError for a key that cannot be read."""
    listed, named = _listed(keys), tuple(os.fspath(name) for name in _listed(unsigned))
    if (is_required or named) and not listed:
        raise AlnicoError(
            "signatures are required, and no public key is given to verify them with. Give one (--verify-inputs)."
        )
    if is_required and named:
        raise AlnicoError(
            f"every input must be signed, and {named[0]} need not be. Leave out --require-signed or --allow-unsigned."
        )
    if not listed:
        return None
    for key in listed:  # also where no input turns out to be signed
        check_key(Path(key))
    return SignedInputs(tuple(Path(key) for key in listed), named)


def _planner(
    memory: Size,
    threads: int | None,
    max_shard_size: Size,
    offline: bool,
    strict_license: bool = False,
    signed: SignedInputs | None = None,
) -> Planner:
    memory_bytes, max_shard_bytes = bytes_of(memory), bytes_of(max_shard_size)
    checked: set[str] = set()

    def planned(recipe: Recipe, made: Mapping[str, Any], single_file: str | None) -> Plan:
        def opened(reference: str) -> Source:
            stage = made.get(reference)
            if stage is not None and not isinstance(stage, str):
                return stage  # type: ignore[no-any-return]
            model = open_checkpoint(stage or resolve_reference(reference, recipe.folder), offline=offline)
            if isinstance(model, FileModel) and stage is not None:
                model.label = reference  # not the folder where stages lie for the moment
            elif signed is not None and reference not in checked:
                signed.check(model, reference)
                checked.add(reference)
            return model

        found = build_plan(
            recipe,
            memory_bytes=memory_bytes,
            threads=threads,
            max_shard_bytes=max_shard_bytes,
            single_file=single_file,
            open_source=opened,
            strict_license=strict_license,
        )
        if signed is not None:
            _check_measured(signed, found, checked)
        return found

    return planned


def _check_measured(signed: SignedInputs, plan: Plan, checked: set[str]) -> None:
    """Check the signatures of what a plan has beside models: statistics, and analyses that weights are made from."""
    for source in plan.sources:
        if isinstance(source, StatisticsSource) and source.label not in checked:
            signed.check(source)
            checked.add(source.label)
    for path, place in analysis_files(plan, (".", plan.recipe.folder)).items():
        if path not in checked:
            signed.check_path(place, path)
            checked.add(path)


def _run(
    planner: Planner, recipe: Recipe, target: Path, overwrite: Replace, restart: bool, watch: Watcher | None
) -> MergeResult:
    check_publishable(target)
    made = planner(recipe, {}, target.name if target.suffix == ".safetensors" else None)
    try:
        fetch_inputs(made, target, overwrite=overwrite, watch=watch)
        return run_plan(made, target, overwrite=overwrite, restart=restart, watch=watch)
    finally:
        close([made])


@ieee_arithmetic()
def merge_state_dicts(
    state_dicts: Sequence[Any],
    method: str = "linear",
    *,
    base: Any = None,
    weights: Sequence[float] | float | Mapping[str, Any] | None = None,
    dtype: Any = None,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    missing: str = "error",
    unrelated: str = "error",
    threads: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Merge dicts of tensors in memory; the bits are those of the same merge on disk.

    Torch tensors give torch tensors on the CPU; numpy arrays give numpy arrays. A list may also contain
    modules, paths and hub ids; a module with PEFT adapters counts as its merged weights. ``options`` are
    those of the method: one value for all models, or a list with one per model. Inputs are never changed.
    Tensors that share memory in all dicts share it in the result.

    Options:
        state_dicts: The models.
        method: Name of a merge method.
        base: The model that the others were tuned from, for methods that need one.
        weights: Weight of each model, one for all, or a rule as in a recipe: ``{"from": "l2_norm"}``.
        dtype: Dtype of the output; default: the promotion of the inputs' dtypes.
        layers: Other methods for some tensors: ``{"fc1": {"method": "ties", "density": 0.7}}``. A key matches
            whole dotted components of names; the first match wins.
        seed: Seed of random methods.
        missing: What to do with tensors that some model lacks, as in recipes.
    Errors: all of ``alnico.errors``, worded as for a recipe.

    >>> import numpy as np
    >>> merge_state_dicts([{"w": np.float32([1, 2])}, {"w": np.float32([3, 6])}], weights=[1, 3])
    {'w': array([2.5, 5. ], dtype=float32)}
    """
    asked = {
        "weights": weights,
        "dtype": dtype,
        "seed": seed,
        "missing": missing,
        "unrelated": unrelated,
        "options": options,
    }
    return merge_values(state_dicts, base, "state_dicts", method, layers, threads, **asked)


@ieee_arithmetic()
def merge_models(
    models: Sequence[Any],
    method: str = "ties",
    *,
    base: Any = None,
    weights: Sequence[float] | float | Mapping[str, Any] | None = None,
    dtype: Any = None,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    missing: str = "error",
    unrelated: str = "error",
    threads: int | None = None,
    **options: Any,
) -> Any:
    """Merge modules (``nn.Module``) into a copy of the base, or of the first model if there is no base.

    The copy has the merged parameters and buffers on the devices of the original, and everything else as in
    the original, including the training mode. A module in ``torch.compile`` or ``DataParallel`` is unwrapped.
    With ``missing="drop"`` a tensor that some model lacks stays in the copy as it is. Paths and hub ids may
    be among the models. Inputs are never changed. Other arguments are those of :func:`merge_state_dicts`.

    Errors: all of ``alnico.errors``, worded as for a recipe.
    """
    asked = {
        "weights": weights,
        "dtype": dtype,
        "seed": seed,
        "missing": missing,
        "unrelated": unrelated,
        "options": options,
    }
    return merge_modules(models, base, method, layers, threads, missing == "drop", **asked)


@ieee_arithmetic()
def open_model(model: str | os.PathLike[str], *, offline: bool = False) -> Model:
    """Open a model and read its headers; tensors are read when you ask for them.

    ``model.tensors`` maps names to dtype and shape, ``model.read(name)`` returns a numpy array,
    ``model.config`` is the config. Close the model, or use it in ``with``. The tensors of a LoRA adapter are
    read as they are stored; functions that merge or compare models refuse adapter files.

    Options:
        model: A model directory, a .safetensors file, or owner/name@revision on the hub.
    Errors: ModelError, HubError.
    """
    return open_checkpoint(model, offline=offline, may_be_adapter=True)


@ieee_arithmetic()
def compare(
    parents: Paths,
    merged: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    scores: ScoreTable | Sequence[str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] | None = None,
    top_share: float = 0.2,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    watch: Watcher | None = None,
) -> Retention:
    """Measure what a merged model kept of its parents.

    Measured are distances, task vectors, signs, largest parameters and scores, by group of tensors. The base
    is the one that the merged model's recipe names, unless ``base`` is given. Without a base only distances
    are measured, and ``retention.notes`` says so. With ``out`` the folder gets ``kept.json``, ``kept.csv``
    and everything that :func:`analyze` writes about the parents and the merged model.

    Options:
        parents: The models that were merged: directories, files, or owner/name@revision on the hub.
        merged: The merged model.
        base: The model that the parents were tuned from; default: the base recorded in the merged model.
        scores: Scores to show next to the distances: a .json or .csv file, or TASK:MODEL=SCORE; may be
            repeated. In Python also a mapping of tasks to models to scores.
        out: Folder for the numbers, the tables and the page.
    Errors: ModelError, MismatchError, NonFiniteError, ResourceError, HubError, OutputError.
    """
    if not parents:
        raise AlnicoError("compare needs at least one parent beside the merged model.")
    if isinstance(scores, Mapping):
        estimates: Estimates = {
            task: {model: Estimate(value) for model, value in of.items()} for task, of in scores.items()
        }
    else:
        estimates = read_estimates(scores)
    memory_bytes, count = bytes_of(memory), threads_of(threads)
    folder = None if out is None else report_folder(out)
    with ExitStack() as opened:

        def opening(reference: str | os.PathLike[str]) -> Source:
            return opened.enter_context(closing(open_checkpoint(reference, offline=offline)))

        of_merged = opening(merged)
        of_base, notes = (opening(base), ()) if base is not None else base_of(of_merged, opening)
        found, analysis = keep_sources(
            [opening(parent) for parent in _listed(parents)],
            of_merged,
            of_base,
            scores=values_of(estimates),
            notes=notes,
            top_share=top_share,
            subspace_side=0 if folder is None else SUBSPACE_SIDE,
            memory_bytes=memory_bytes,
            threads=count,
            watch=watch,
        )
    if folder is not None:
        write_analysis(analysis, folder)
        write_kept(found, folder)
        of_scores = [score_section(estimates)] if any(estimates.values()) else []
        write_pages(analysis, folder, sections=[kept_section(found), *of_scores])
    return found


@ieee_arithmetic()
def analyze(
    models: Paths,
    *,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    top_share: float = 0.2,
    subspace_side: int = SUBSPACE_SIDE,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    restart: bool = False,
    offline: bool = False,
    watch: Watcher | None = None,
) -> Analysis:
    """Measure how far models are from their base, where, and how their task vectors relate to each other.

    Base and models are read in blocks, at most twice. With ``out`` the folder gets the numbers
    (``summary.json``, CSV files) and, if ``alnico[report]`` is installed, ``report.html`` and pictures. The
    same call resumes an interrupted analysis into ``out``.

    Options:
        models: Models: directories, files, or owner/name@revision on the hub.
        base: The model that the others were tuned from.
        out: Folder for the numbers, the tables and the page.
        subspace_side: Compare the leading singular vectors of matrices whose smaller side is at most this; 0
            compares none.
    Errors: ModelError, MismatchError, NonFiniteError, ResourceError, HubError, OutputError, RunError.
    """
    memory_bytes, count = bytes_of(memory), threads_of(threads)
    folder = None if out is None else report_folder(out, is_half_written(Path(out)))
    if folder is not None:
        given = [
            Path(part) for reference in (base, *_listed(models)) for part in os.fspath(reference).split("+")
        ]
        check_twins(folder, given, (".alnico-analysis", ".alnico-analysis-gone"))
    with ExitStack() as opened:
        unfinished = None if folder is None else opened.enter_context(AnalysisJournal(folder, restart))
        origin, *others = (
            opened.enter_context(closing(open_checkpoint(r, offline=offline)))
            for r in (base, *_listed(models))
        )
        found = analyze_sources(
            origin,
            others,
            top_share=top_share,
            subspace_side=subspace_side,
            memory_bytes=memory_bytes,
            threads=count,
            watch=watch,
            unfinished=unfinished,
        )
        if folder is not None and unfinished is not None:
            unfinished.close()
            unfinished.begin_writing()
            write_analysis(found, folder)
            advice = suggest_recipe(found, fits_again(found, offline=offline))
            write_pages(found, folder, [*advice.findings, *advice.reasons, *advice.warnings])
            sync_tree(folder)
    return found


@ieee_arithmetic()
def evaluate(
    models: Paths | Sequence[Any] = (),
    tasks: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Task] = (),
    *,
    base: Any = None,
    merged: Paths | Sequence[Any] = (),
    out: str | os.PathLike[str] | None = None,
    offline: bool = False,
    allow_code: bool = False,
    watch: Callable[[str, str, Score], None] | None = None,
) -> Scorecard:
    """Score models on tasks, with intervals; compare merges with their parents and the base.

    Models are loaded one after another. ``models`` are the parents of the ``merged`` ones and may contain the
    base and the merges again. In Python a model may also be a subject, such as
    ``alnico.evaluation.loaded_model.ModuleSubject`` for a module in memory, and ``tasks`` may be a mapping or
    a list of tasks. With ``out`` the folder gets ``evaluation.json`` and, if ``alnico[report]`` is installed,
    ``report.html``. ``watch`` receives each score (:class:`alnico.events.Scored`).

    Options:
        models: Models: transformers checkpoints, or owner/name@revision on the hub; for functions of your own
            also folders or files that hold only weights.
        tasks: YAML file of the tasks.
        base: The model that the others were tuned from.
        merged: A merge of the models, compared with each of them and with the base; may be repeated.
        out: Folder for the JSON and the page.
        allow_code: Allow the tasks file to run code: functions, and task folders of the harness. Use it only
            if you trust its author.
    Errors: EvaluationError, ModelError, HubError, OutputError.
    """
    from alnico.evaluation.loaded_model import open_subject
    from alnico.evaluation.scorecard import check_once
    from alnico.evaluation.scorecard import evaluate as score
    from alnico.evaluation.scorecard_page import scorecard_folder, write_scorecard
    from alnico.evaluation.task_file import read_tasks

    def opened(model: Any) -> Any:
        return (
            open_subject(model, offline=offline, may_be_plain=True)
            if isinstance(model, (str, os.PathLike))
            else model
        )

    read = (
        read_tasks(tasks, allow_code=allow_code)
        if isinstance(tasks, (str, os.PathLike, Mapping))
        else tuple(tasks)
    )
    folder = None if out is None else scorecard_folder(out)
    of_merged = [opened(model) for model in _listed(merged)]
    of_base = [opened(base)] if base is not None else []
    named = {subject.label for subject in (*of_base, *of_merged)}
    waiting = [*of_base, *(s for s in map(opened, _listed(models)) if s.label not in named), *of_merged]
    check_once([subject.label for subject in waiting])
    found = score(
        (waiting.pop(0) for _ in range(len(waiting))),
        read,
        base=of_base[0].label if of_base else None,
        merged=[subject.label for subject in of_merged],
        watch=watch,
    )
    if folder is not None:
        write_scorecard(found, folder)
    return found


@ieee_arithmetic()
def search(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    *,
    tasks: str | os.PathLike[str] | Sequence[Task] | None = None,
    report: str | os.PathLike[str] | Sequence[Task] | None = None,
    out: str | os.PathLike[str] | None = None,
    trials: int | None = None,
    workers: int = 1,
    engine: Literal["local", "ray"] = "local",
    threads: int | None = None,
    memory: Size = DEFAULT_BUDGET_BYTES,
    offline: bool = False,
    allow_code: bool = False,
    watch: Callable[[Trial], None] | None = None,
) -> SearchResult:
    """Search the values that a recipe leaves open for the best scores on tasks.

    Candidates are merged in memory, with the bits of ``alnico merge``, and scored. Trial 0 uses the default
    values. The same call on ``out`` resumes the search. With one worker the result depends only on the
    settings, however often the search was interrupted. ``watch`` receives each trial that ends
    (:class:`alnico.events.TrialDone`).

    Options:
        recipe: Recipe with {search: [least, greatest]} or {choice: [...]} in place of values, and settings
            under search.
        tasks: Tasks to search on; default: those of the recipe.
        report: Tasks to report on, which the search never scores; same reports on the tasks searched on.
        out: Folder of the search, with its study, the best recipe, all trials and the page.
        trials: Number of trials in all, including those of earlier runs; default: the recipe's.
        workers: Number of processes that score trials.
        engine: Where the workers run: local (this machine) or ray (a Ray cluster).
        threads: Threads of each worker; default: the processors divided by the workers.
    Errors: RecipeError, with a line for every mistake; EvaluationError for tasks that do not fit the search,
        for reported tasks that share examples with those searched on, and after too many failed trials;
        OutputError for a folder or a study of another search; ModelError, HubError, RunError.
    """
    from alnico.tune.search.search import search as searched

    return searched(
        recipe,
        tasks=tasks,
        report=report,
        out=out,
        trials=trials,
        workers=workers,
        engine=engine,
        threads=threads,
        memory=memory,
        offline=offline,
        allow_code=allow_code,
        watch=watch,
    )


@ieee_arithmetic()
def suggest(
    models: Paths = (),
    *,
    base: str | os.PathLike[str] | None = None,
    analysis: Analysis | str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] = ".",
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    watch: Watcher | None = None,
) -> Suggestion:
    """Suggest a recipe for models of one base, with reasons: the rules of docs/choosing.md.

    The models are analyzed, except those that cannot be merged with the base. Give either ``base`` and
    ``models``, or ``analysis``.

    Options:
        models: Models: directories, files, or owner/name@revision on the hub.
        base: The model that the others were tuned from.
        analysis: A finished analysis to use instead of base and models: its folder.
        folder: Folder in which the recipe will be; paths in the recipe are relative to it.
    Errors: as for :func:`analyze`.
    """
    if (base is None or not models) if analysis is None else (base is not None or bool(models)):
        raise AlnicoError("suggest needs a base and models, or an analysis alone.")
    left_out: list[str] = []
    if analysis is not None:
        found = analysis if isinstance(analysis, Analysis) else read_analysis(analysis)
        fits = fits_again(found, offline=offline)
    else:
        origin, *others = (AnalysedModel(os.fspath(m), os.fspath(m)) for m in (base or "", *_listed(models)))
        every = [fit(origin, other, offline=offline) for other in others]
        left_out = [
            f"{m.name} is left out: {f.refused}" for m, f in zip(others, every, strict=True) if f.refused
        ]
        fits = tuple(f for f in every if not f.refused)
        usable = [m.reference for m, f in zip(others, every, strict=True) if not f.refused]
        if not usable:
            return nothing_left(left_out)
        found = analyze(
            usable, base=origin.reference, memory=memory, threads=threads, offline=offline, watch=watch
        )
    return suggest_recipe(seen_from(found, Path(folder)), fits, left_out=left_out)


@ieee_arithmetic()
def fisher_statistics(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tasks: TasksLike,
    examples: int = 256,
    expectation: Expectation = "exact",
    seed: int = 0,
    offline: bool = False,
    allow_code: bool = False,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    watch: Callable[[int, int], None] | None = None,
) -> Path:
    """Measure the Fisher information of a model on tasks, as files for ``merge_method: fisher``.

    Labels are never read. Needs ``alnico[eval]``. ``watch`` receives the number of examples done
    (:class:`alnico.events.Counted`).

    Options:
        model: Model: a transformers checkpoint, or owner/name@revision on the hub.
        out: Directory to create.
        tasks: Tasks file whose inputs are measured on.
        examples: Largest number of inputs per task.
        expectation: exact weighs all classes of an input by their probability; sampled draws one class per
            input.
        seed: Seed of the classes that expectation sampled draws.
    Errors: EvaluationError, ModelError, OutputError, HubError.
    """
    from alnico.checkpoint.statistics import check_statistics_folder
    from alnico.evaluation.loaded_model import open_subject
    from alnico.tune.statistics.fisher import measure_fisher

    may_replace = replace_mode(overwrite, overwrite_anything)
    check_statistics_folder(Path(out), may_replace, _paths_among((model, tasks)))
    subject = open_subject(model, offline=offline)
    found = measure_fisher(
        subject, _tasks(tasks, allow_code), examples=examples, expectation=expectation, seed=seed, watch=watch
    )
    found.write(Path(out), subject, overwrite=may_replace)
    return Path(out)


@ieee_arithmetic()
def gram_statistics(
    models: Paths,
    out: str | os.PathLike[str],
    *,
    tasks: TasksLike | Sequence[TasksLike],
    examples: int = 256,
    plus: bool = False,
    weights: Sequence[float] | None = None,
    alpha: float = 0.9,
    ridge: float = 1e-6,
    normalize: bool = False,
    offline: bool = False,
    allow_code: bool = False,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    watch: Callable[[int, int], None] | None = None,
) -> tuple[Path, ...]:
    """Measure Gram matrices of models' linear layers on tasks, as files for ``merge_method: regmean``.

    The files of one model go to ``out``; those of several models go to one directory per model in ``out``,
    named as the model. Labels are never read. Needs ``alnico[eval]``. ``watch`` receives the number of tasks
    done, with ``plus`` of layers (:class:`alnico.events.Counted`).

    Options:
        models: Models: transformers checkpoints, or owner/name@revision on the hub.
        out: Directory to create; for several models it gets one directory per model.
        tasks: Tasks file whose inputs are measured on; for several models one for all, or one per model.
        examples: Largest number of inputs per task.
        plus: Measure for RegMean++: all models together, each layer on the outputs of the merged layers
            before it.
        weights: With plus: weight of each model; give the recipe the same.
        alpha: With plus: regmean's alpha, in [0, 1]; give the recipe the same.
        ridge: With plus: regmean's ridge, in [0, 1]; give the recipe the same.
        normalize: With plus: regmean's normalize; give the recipe the same.
    Errors: EvaluationError, ModelError, MismatchError, OutputError, HubError.
    """
    from alnico.checkpoint.statistics import check_statistics_folder
    from alnico.evaluation.loaded_model import open_subject
    from alnico.tune.statistics.gram import measure_gram, measure_gram_plus

    names = [os.fspath(model) for model in _listed(models)]
    folders = [Path(out)] if len(names) == 1 else [Path(out) / _folder_name(name) for name in names]
    if len({str(folder).casefold() for folder in folders}) < len(folders):
        raise OutputError(
            f"{out}: two models have one name ({', '.join(f.name for f in folders)}); expected names of their own. Measure them one by one."
        )
    may_replace = replace_mode(overwrite, overwrite_anything)
    for folder in folders:
        check_statistics_folder(
            folder,
            may_replace,
            _paths_among((*names, *(tasks if isinstance(tasks, (list, tuple)) else (tasks,)))),
        )
    given = _tasks_of_each(tasks, len(names), allow_code)
    subjects = [open_subject(name, offline=offline) for name in names]
    if plus:
        found = measure_gram_plus(
            subjects,
            given,
            examples=examples,
            weight=weights,
            alpha=alpha,
            ridge=ridge,
            normalize=normalize,
            watch=watch,
        )
        for one, folder, subject in zip(found, folders, subjects, strict=True):
            one.write(folder, subject, overwrite=may_replace)
    else:
        for subject, own, folder in zip(subjects, given, folders, strict=True):
            measure_gram(subject, own, examples=examples, watch=watch).write(
                folder, subject, overwrite=may_replace
            )
    return tuple(folders)


def _folder_name(model: str) -> str:
    """What the statistics of one model among several lie in: the last part of its path or id, whatever that leads to."""
    name = Path(model).name
    return name if name not in ("", ".", "..") else Path(model).resolve().name


def _paths_among(given: Iterable[Any]) -> list[Path]:
    """What of some arguments is a path, and there."""
    return [Path(one) for one in given if isinstance(one, (str, os.PathLike)) and os.path.lexists(one)]


def _tasks_of_each(
    tasks: TasksLike | Sequence[TasksLike], models: int, allow_code: bool
) -> list[Sequence[Task]]:
    """The tasks of each model: one list for all, or one for each. Errors: EvaluationError."""
    is_one = isinstance(tasks, (str, os.PathLike, Mapping)) or not isinstance(
        tasks[0], (str, os.PathLike, Mapping, Sequence)
    )
    listed: Sequence[Any] = [tasks] if is_one else tasks  # type: ignore[assignment]
    if len(listed) not in (1, models):
        raise EvaluationError(
            f"tasks: there are {len(listed)} for {models} models; expected one for all, or one for each."
        )
    return [_tasks(one, allow_code) for one in listed] * (1 if len(listed) == models else models)


def _tasks(tasks: TasksLike, allow_code: bool) -> Sequence[Task]:
    from alnico.evaluation.task_file import read_tasks

    return (
        read_tasks(tasks, allow_code=allow_code) if isinstance(tasks, (str, os.PathLike, Mapping)) else tasks
    )


@ieee_arithmetic()
def adamerge(
    models: Paths,
    *,
    base: str | os.PathLike[str],
    tasks: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Task],
    out: str | os.PathLike[str] | None = None,
    per: str = "tensor",
    plus: bool = False,
    density: float = 0.2,
    scope: str = "model",
    steps: int = 500,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    init: float = 0.3,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    seed: int = 0,
    unrelated: str = "error",
    memory: Size = DEFAULT_BUDGET_BYTES,
    offline: bool = False,
    allow_code: bool = False,
    watch: Callable[[LearningStep], None] | None = None,
) -> AdaMergingResult:
    """Learn the coefficients of task vectors from inputs without labels (AdaMerging), and return the recipe.

    Coefficients are moved so that the merge becomes certain of its answers on the inputs of ``tasks``; labels
    are never read. Needs ``alnico[eval]``. ``watch`` receives each step (:class:`alnico.events.Learned`). The
    method, its edge cases and its differences from the paper are described in
    :func:`alnico.tune.adamerge.learn`.

    Options:
        models: Models: directories, files, or owner/name@revision on the hub.
        base: The model that the others were tuned from.
        tasks: Tasks file whose inputs are learned from; its labels are never read (label: null where there
            are none).
        out: File of the recipe; its course is written next to it as NAME.course.json.
        per: What has a coefficient of its own for each model: task, layer or tensor.
        plus: AdaMerging++: trim the task vectors and elect signs first, as TIES does.
        density: With plus: share of each task vector that the trim keeps, in (0, 1].
        scope: With plus: what density is a share of: model or tensor.
        steps: Number of steps; each uses one batch of every task.
        batch_size: Number of inputs of each task in a step.
        learning_rate: Learning rate of Adam: about how far one step moves a coefficient.
        init: Value of every coefficient at the start.
        clamp: Keep coefficients in [0, 1]; in Python any range, or None.
        seed: Seed of the batches.
        memory: Memory for the task vectors, such as 2GiB; what does not fit is read again at each step.
    Errors: EvaluationError, MethodError, ModelError, MismatchError, OutputError, HubError.
    """
    from alnico.evaluation.loaded_model import open_subject
    from alnico.evaluation.task_file import read_tasks
    from alnico.tune.adamerge import course_beside, learn, write_learned

    names = [os.fspath(base), *(os.fspath(model) for model in _listed(models))]
    for path in () if out is None else (Path(out), course_beside(out)):
        check_new_file(path)
    given = (
        read_tasks(tasks, allow_code=allow_code) if isinstance(tasks, (str, os.PathLike, Mapping)) else tasks
    )
    found = learn(
        names[1:],
        names[0],
        given,
        open_subject(base, offline=offline),
        per=per,  # type: ignore[arg-type]
        plus=plus,
        density=density,
        scope=scope,  # type: ignore[arg-type]
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        init=init,
        clamp=clamp,
        seed=seed,
        unrelated=unrelated,
        written_from=[relative_reference(name, Path(out).parent) for name in names]
        if out is not None
        else None,
        memory_bytes=bytes_of(memory),
        offline=offline,
        watch=watch,
    )
    if out is not None:
        write_learned(found, out)
    return found


@ieee_arithmetic()
def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
) -> ModelDiff:
    """Compare two models: tensors by content hash and by value, configs by key, side files by content.

    Both are read in full, in blocks; files of models on the hub are downloaded. ``difference.is_equal`` is
    the short answer.

    Options:
        a: A model: a directory, a file, or owner/name@revision on the hub.
        b: The model to compare with it.
    Errors: ModelError, ResourceError, HubError.
    """
    with ExitStack() as opened:
        one, other = (
            opened.enter_context(closing(open_checkpoint(r, offline=offline, may_be_adapter=True)))
            for r in (a, b)
        )
        return diff_sources(one, other, threads=threads, memory_bytes=bytes_of(memory))


@ieee_arithmetic()
def norm_weights(
    models: Paths,
    *,
    base: str | os.PathLike[str],
    mode: str = "exp",
    beta: float = 1.0,
    alpha: float = 1.5,
    scale: float = 1.0,
    per: str = "model",
    analysis: str | os.PathLike[str] | None = None,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
) -> NormWeights:
    """Compute weights of models from the L2 norms of their task vectors.

    A recipe does the same with ``weight: {from: l2_norm}``. The norms are measured over all tensors that base
    and models share; nothing is merged. The formulas are in docs/recipes.md.

    Options:
        models: Models: directories, files, or owner/name@revision on the hub.
        base: The model that the others were tuned from.
        mode: How a norm L becomes a weight: linear, power or exp.
        beta: With mode exp: the weight is exp(-beta L / mean L).
        alpha: With mode power: the weight is 1 / L^alpha.
        scale: Sum of the weights.
        per: What a norm is measured over: model, layer or tensor.
        analysis: Folder of an analysis whose norms are used instead of measuring them.
    Errors: RecipeError, ModelError, MismatchError for a model at distance 0 in ``linear`` and ``power``,
        HubError.
    """
    key = {"exp": {"beta": beta}, "power": {"alpha": alpha}}.get(mode, {}) if isinstance(mode, str) else {}
    origin = {"from": "l2_norm"} if analysis is None else {"from": "analysis", "path": os.fspath(analysis)}
    given = {
        "merge_method": "task_arithmetic",
        "base_model": os.fspath(base),
        "models": [os.fspath(model) for model in _listed(models)],
        "parameters": {"weight": {**origin, "mode": mode, **key, "scale": scale, "per": per}},
        "missing": "drop",
        "unrelated": "allow",
    }
    made = plan(given, memory=memory, threads=threads, offline=offline)
    try:
        return compute_norm_weights(made)
    finally:
        close([made])


@ieee_arithmetic()
def soup(
    models: Paths,
    tasks: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Task],
    *,
    order: str = "sorted",
    replace: bool = False,
    strict: bool = False,
    least_gain: float = 0.0,
    objective: str = "mean",
    base: str | os.PathLike[str] | None = None,
    unrelated: str = "error",
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    allow_code: bool = False,
    report: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Task] | None = None,
    shared: bool = False,
    watch: Callable[[SoupStep], None] | None = None,
) -> Soup:
    """Find which models to average by scoring the averages, which are merged in memory.

    ``soup.recipe(folder)`` is the recipe of the result. An average is the mean of its models in float32,
    rounded once, so the model is the recipe's, bit for bit. ``watch`` receives each step
    (:class:`alnico.events.SoupTried`) and, with ``report``, each score. Needs ``alnico[eval]`` for tasks that
    do.

    Options:
        models: Models: directories, files, or owner/name@revision on the hub.
        tasks: YAML file of the tasks to choose by.
        order: sorted (the paper's greedy soup) tries each model once, the best first; all tries every model
            in each round and keeps the best average; uniform takes all models.
        replace: With order all: a model may be added more than once, which gives it more weight.
        strict: Keep a model only if the average gets better; without it, equal is enough.
        least_gain: Smallest gain for which a model is kept; a negative number allows a loss.
        objective: What to improve: mean (of all tasks, by their weights), or the name of one task.
        base: Model whose config and tokenizer the soup gets; it is not averaged in.
        report: YAML file of other tasks, on which the soup, the uniform soup and each model are scored.
        shared: Accept a report on examples that also chose the soup; its score is then too high.
    Errors: RecipeError for fewer than two models, a repeated model, and options that exclude each other;
        EvaluationError, also for an unknown objective; those of merging.
    Source: Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, algorithm 1. Differs from the source:
        nothing with ``sorted``; ``all``, ``replace`` and ``least_gain`` are not in the paper.
    """
    from alnico.evaluation.task_file import read_tasks
    from alnico.tune.soup import refuse_shared
    from alnico.tune.soup import report as report_soup
    from alnico.tune.soup import soup as find_soup

    given, others = (
        read_tasks(t, allow_code=allow_code) if isinstance(t, (str, os.PathLike, Mapping)) else t
        for t in (tasks, report or ())
    )
    if others and not shared:
        refuse_shared(others, given)
    found = find_soup(
        [os.fspath(model) for model in _listed(models)],
        given,
        order=order,  # type: ignore[arg-type]
        replace=replace,
        strict=strict,
        least_gain=least_gain,
        objective=objective,
        base=os.fspath(base) if base is not None else None,
        unrelated=unrelated,
        memory=memory,
        threads=threads,
        offline=offline,
        watch=watch,
    )
    if not others:
        return found
    return report_soup(found, others, given, shared=shared, memory=memory, threads=threads, offline=offline)


def push(
    out: str | os.PathLike[str],
    name: str,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
    quiet: bool = False,
) -> str:
    """Upload a finished merge to the hub as one commit, and return its address.

    Options:
        out: The directory of a finished merge.
        name: The model on the hub, owner/name; it is created if it does not exist.
        private: Create the repository as private.
        branch: Branch to commit to; default: main.
        message: Message of the commit.
        quiet: Draw no progress bars.
    Errors: ModelError and OutputError for a directory that is not a finished merge, HubError.
    """
    from alnico.checkpoint import hub

    folder = Path(out)
    check_finished(folder)
    said = message or f"Merge with alnico: {folder.resolve().name}"
    return hub.push(folder, name, private=private, branch=branch, message=said, quiet=quiet)


@ieee_arithmetic()
def verify(
    out: str | os.PathLike[str],
    *,
    against_inputs: bool = False,
    sample: float = 1.0,
    seed: int = 0,
    inputs: Mapping[str, str | os.PathLike[str]] | None = None,
    key: str | os.PathLike[str] | None = None,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    watch: Watcher | None = None,
) -> Verification:
    """Check every tensor and file of a finished merge against the hashes in its lock; return what passed.

    With ``against_inputs`` blocks are merged again from the inputs and compared bit for bit. A check that
    could not be made is an error, never a pass.

    Options:
        out: The directory of a finished merge.
        against_inputs: Merge blocks again from the inputs, and compare them bit for bit.
        sample: With against_inputs: share of the blocks that are merged again, in (0, 1].
        seed: Seed that chooses the blocks of a sample.
        key: Public key (a PEM file) that must verify the signature of the merge.
    Errors: VerificationError for a difference; UncheckedError, whose ``found`` is what was checked, for a
        check that could not be made; OutputError, ModelError, ResourceError, HubError.
    """
    sample = real(sample, "sample", "the share of blocks that are made again, in (0, 1]")
    seed = whole(seed, "seed", None)
    if not 0 < sample <= 1:
        raise AlnicoError(
            f"sample is {sample!r}; it is the share of blocks that are made again, in (0, 1]. Give 0.01 for a hundredth."
        )
    folder = Path(out)
    found = verify_output(
        folder,
        _again(inputs, memory, threads, offline),
        against_inputs=against_inputs,
        share=sample,
        seed=seed,
        watch=watch,
    )
    if key is not None:
        found = add_signature(found, lambda: check_signature(folder, [Path(key)]))
    refuse_unchecked(found)
    return found


@ieee_arithmetic()
def reproduce(
    out: str | os.PathLike[str],
    new: str | os.PathLike[str] | None = None,
    *,
    inputs: Mapping[str, str | os.PathLike[str]] | None = None,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    restart: bool = False,
    offline: bool = False,
    watch: Watcher | None = None,
) -> Reproduction:
    """Repeat a finished merge from the recipe in its lock, and compare every byte.

    Options:
        out: The directory of a finished merge.
        new: Directory that keeps the second merge; default: it is removed after the comparison.
    Errors: VerificationError for a difference; UncheckedError for inputs that are missing or are not those of
        the merge, and for a lock of another arithmetic; those of :func:`alnico.merge`.
    """
    again = _again(inputs, memory, threads, offline)
    return reproduce_output(
        Path(out), None if new is None else Path(new), again, restart=restart, watch=watch
    )


def sign(out: str | os.PathLike[str], key: str | os.PathLike[str]) -> Path:
    """Sign a finished merge as OpenSSF model-signing does; return the path of ``model.sig``.

    The merge is first checked against its lock. Needs the extra ``[sign]``.

    Options:
        out: The directory of a finished merge.
        key: Private key (a PEM file of the curve P-256, P-384 or P-521).
    Errors: those of :func:`verify`, except for files that the lock does not list; UncheckedError for an
        unusable key.
    """
    verify_output(Path(out), ReplanOptions())
    return sign_folder(Path(out), Path(key))


def _again(
    inputs: Mapping[str, str | os.PathLike[str]] | None, memory: Size, threads: int | None, offline: bool
) -> ReplanOptions:
    places = {name: os.fspath(place) for name, place in (inputs or {}).items()}
    return ReplanOptions(places, bytes_of(memory), threads_of(threads), offline)


def schema(*, search: bool = False) -> dict[str, Any]:
    """Return the JSON Schema of recipes, for editors: keys, methods, options with their ranges and defaults.

    Options:
        search: Return the schema of the recipes that `alnico search` takes.
    """
    from alnico.tune.search.json_schema import search_schema

    return search_schema() if search else json_schema()


def methods(name: str | None = None) -> dict[str, Method]:
    """Return the merge methods by name, with their options and documentation.

    Options:
        name: Return only this method.
    Errors: MethodError for an unknown name.
    """
    return dict(registry()) if name is None else {name: find(name)}
