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
from alnico.checkpoint.model import FileModel
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.output_path import Replace, check_new_file, check_publishable, check_twins, replacing
from alnico.checkpoint.reference import Paths
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.checkpoint.signatures import SignedInputs, check_key, check_signature
from alnico.checkpoint.signatures import sign as sign_folder
from alnico.checkpoint.source import Model, Source
from alnico.checkpoint.statistics import StatisticsSource
from alnico.engine.fetch import fetch_inputs
from alnico.engine.norm_weights import NormWeights, weights_of
from alnico.engine.run import MergeResult, run_plan
from alnico.engine.stages import Planner, close, plan_stages, run_stages
from alnico.errors import AlnicoError, EvaluationError, OutputError
from alnico.events import Watcher
from alnico.methods import registry
from alnico.methods.base import Method
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.numbers import real, whole
from alnico.numerics.sizes import bytes_of
from alnico.output.validate import check_finished
from alnico.plan.build import build_plan
from alnico.plan.job import Plan
from alnico.plan.memory import DEFAULT_BUDGET_BYTES, threads_of
from alnico.plan.norm_weights import analyses_of
from alnico.recipe import load
from alnico.recipe.reference import located, reference_from
from alnico.recipe.schema import Recipe
from alnico.recipe.stages import stages
from alnico.values.merge import merge_modules, merge_values
from alnico.verification.replan import ReplanOptions
from alnico.verification.reproduce import Reproduction
from alnico.verification.reproduce import reproduce as reproduce_output
from alnico.verification.verify import Verification, refuse_unchecked, signed_by
from alnico.verification.verify import verify as verify_output

if TYPE_CHECKING:
    from alnico.evaluation.scorecard import Scorecard
    from alnico.evaluation.tasks import Score, Task
    from alnico.tune.adamerge import AdaMergingResult, LearningStep
    from alnico.tune.search.result import SearchResult
    from alnico.tune.search.samplers import Trial
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
    strict_licence: bool = False,
    verify_inputs: Paths = (),
    allow_unsigned: Paths = (),
) -> Plan:
    """Say what a merge would do, from headers alone: a frozen :class:`Plan`.

    ``memory`` is the budget of the whole process, ``max_shard_size`` the data in one output file; both in bytes or as text
    such as "2GiB". ``threads`` defaults to the number of processors. ``single_file`` names the one output file.
    ``offline`` takes models of the hub from its cache alone. Licences of the models that do not go together are notes of the plan, with
    ``strict_licence`` a MismatchError, as is a licence that is not known. ``verify_inputs`` and ``allow_unsigned`` as for :func:`merge`.
    Errors: RecipeError, ModelError, MismatchError, ResourceError, HubError; VerificationError and UncheckedError for signatures.
    """
    signed = _signed(verify_inputs, allow_unsigned, False)
    return _planner(memory, threads, max_shard_size, offline, strict_licence, signed)(
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
    strict_licence: bool = False,
    verify_inputs: Paths = (),
    allow_unsigned: Paths = (),
    require_signed: bool = False,
    watch: Watcher | None = None,
) -> MergeResult:
    """Merge a recipe into the directory ``out``, or into one file if its name ends in ``.safetensors``.

    An interrupted merge of the same recipe and inputs is taken up; ``restart`` begins anew. ``overwrite`` replaces a model
    that stands under ``out``, or what alnico wrote there, when the merge is complete; ``overwrite_anything`` whatever stands there.
    ``verify_inputs`` are public keys (PEM files): every
    model, adapter, vocabulary and statistics of the recipe must have a signature that holds with one of them, of its folder or of one
    around it, before its tensors are read; those that ``allow_unsigned`` names, as the recipe writes them or by their path, need have none.
    With ``require_signed`` none may be named. ``watch`` receives
    events (``alnico.events``), from any thread but one at a time. Other arguments as for :func:`plan`. Errors: all of ``alnico.errors``.
    """
    planner = _planner(
        memory,
        threads,
        max_shard_size,
        offline,
        strict_licence,
        _signed(verify_inputs, allow_unsigned, require_signed),
    )
    return _run(
        planner,
        load_recipe(recipe, seed=seed),
        Path(out),
        replacing(overwrite, overwrite_anything),
        restart,
        watch,
    )


@ieee_arithmetic()
def merge_all(
    recipes: Recipes,
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
    strict_licence: bool = False,
    verify_inputs: Paths = (),
    allow_unsigned: Paths = (),
    require_signed: bool = False,
    watch: Watcher | None = None,
) -> tuple[MergeResult, ...]:
    """Run all documents of a recipe file: stages that take one another's outputs (by ``name``), or independent merges.

    What no other document takes is the output: one goes to ``out``, several to ``out/NAME``, or to ``out/NUMBER-METHOD`` without a
    name. Stages in between are removed at the end. Arguments and errors: as for :func:`merge`.
    """
    given = load.load_recipes(recipes, seed=seed)
    planner = _planner(
        memory,
        threads,
        max_shard_size,
        offline,
        strict_licence,
        _signed(verify_inputs, allow_unsigned, require_signed),
    )
    may_replace = replacing(overwrite, overwrite_anything)
    if len(given) == 1:
        return (_run(planner, given[0], Path(out), may_replace, restart, watch),)
    return run_stages(stages(given), planner, Path(out), overwrite=may_replace, restart=restart, watch=watch)


@ieee_arithmetic()
def plan_all(
    recipes: Recipes,
    *,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    single_file: str | None = None,
    seed: int | None = None,
    offline: bool = False,
    strict_licence: bool = False,
    verify_inputs: Paths = (),
    allow_unsigned: Paths = (),
) -> tuple[Plan, ...]:
    """Say what :func:`merge_all` would do, in the order in which it would: a plan a document. Arguments and errors: as :func:`plan`."""
    planner = _planner(
        memory,
        threads,
        max_shard_size,
        offline,
        strict_licence,
        _signed(verify_inputs, allow_unsigned, False),
    )
    return plan_stages(stages(load.load_recipes(recipes, seed=seed)), planner, single_file)


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
    strict_licence: bool = False,
    signed: SignedInputs | None = None,
) -> Planner:
    memory_bytes, max_shard_bytes = bytes_of(memory), bytes_of(max_shard_size)
    checked: set[str] = set()

    def planned(recipe: Recipe, made: Mapping[str, Any], single_file: str | None) -> Plan:
        def opened(reference: str) -> Source:
            stage = made.get(reference)
            if stage is not None and not isinstance(stage, str):
                return stage  # type: ignore[no-any-return]
            model = open_model(stage or located(reference, recipe.folder), offline=offline)
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
            strict_licence=strict_licence,
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
    for path, place in analyses_of(plan, (".", plan.recipe.folder)).items():
        if path not in checked:
            signed.check_place(place, path)
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

    Torch tensors in, torch tensors on the CPU out; numpy arrays in, numpy arrays out. Modules, paths and hub ids may stand
    among the dicts; a module with adapters of PEFT stands for its merged weights. ``options`` are the method's, one value for all models or a list with one for each; ``weights`` are those
    of the models, or say what they follow from, as in a recipe: ``{"from": "l2_norm"}``. ``layers`` gives tensors a method of their own, ``{"fc1": {"method": "ties", "density": 0.7}}``: a key fits
    whole dotted components of names, and the first that fits wins. ``dtype`` is the output's, by default the promotion of the inputs'. Tensors that share memory in all dicts
    share it in the result. Models that were not tuned from one base are refused, unless ``unrelated="allow"``. Inputs are never changed.
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
    """Merge ``nn.Module`` s into a copy of ``base``, or of the first model where no base is given.

    The copy has the merged parameters and buffers, on the devices of what it is a copy of, and all else as it was, the
    training mode too; of a module in ``torch.compile`` or ``DataParallel`` it is the module inside. With ``missing: drop`` a
    tensor that some model lacks stays as it is in the copy. Other arguments as for :func:`merge_state_dicts`; paths and hub
    ids may stand among the models. Inputs are never changed. Errors: all of ``alnico.errors``, worded as for a recipe.
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
def open(model: str | os.PathLike[str], *, offline: bool = False) -> Model:
    """Open a model directory, a ``.safetensors`` file, or ``owner/name@revision`` on the hub; reads headers only.

    ``model.tensors`` maps names to dtype and shape, ``model.read(name)`` gives a numpy array, ``model.config`` the config.
    Close it, or use it in ``with``. ``offline`` looks at the hub's cache alone. The tensors of an adapter are read as they are; what merges
    or compares models takes no such file. Errors: ModelError, HubError.
    """
    return open_model(model, offline=offline, may_be_adapter=True)


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
    """Say what a merged model kept of its parents: distances, how much of each task vector, signs, largest parameters, scores.

    The base is the one that the merged model's own recipe names, unless ``base`` is given; without any, only distances are known,
    and ``kept.notes`` says so. ``scores`` maps tasks to models to scores, or lists files and values (docs/analysis.md). ``out`` is a folder for
    ``kept.json``, ``kept.csv`` and what :func:`analyze` leaves of the parents and the merged model. Other arguments as for :func:`merge`. Errors: ModelError, MismatchError, NonFiniteError, ResourceError,
    HubError, OutputError.
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
            return opened.enter_context(closing(open_model(reference, offline=offline)))

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
    """Say how far models are from their base, where, and how their task vectors lie to one another: an :class:`Analysis`.

    Base and models are read at most twice, by blocks. ``out`` is a folder for the numbers (``summary.json``, CSV files) and, with
    ``alnico[report]`` installed, ``report.html`` and pictures. ``top_share`` in (0, 1] is the share of entries that count as a model's top parameters;
    ``subspace_side`` the largest smaller side of matrices whose leading singular vectors are compared, 0 for none. An interrupted analysis
    of the same models into the same ``out`` is taken up; ``restart`` begins anew. Other arguments as for :func:`merge`. Errors: ModelError,
    MismatchError, NonFiniteError, ResourceError, HubError, OutputError, RunError.
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
            opened.enter_context(closing(open_model(r, offline=offline))) for r in (base, *_listed(models))
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
    """Score models on tasks: a :class:`Scorecard` with intervals, paired differences and what merges kept of their parents.

    Models are transformers checkpoints, directories or hub ids; files of weights and folders without a config, for tasks that are functions
    of one's own with a parameter ``path``; or subjects (``alnico.evaluation.loaded_model.ModuleSubject`` for modules in
    memory); they are loaded one after the other. Among ``models`` base and merges may stand again. ``tasks`` is a tasks file, a mapping that says the same, or tasks. ``models`` are
    parents of the ``merged`` ones; ``base`` is what they were tuned from. ``out`` is a folder for ``evaluation.json`` and, with
    ``alnico[report]``, ``report.html``. With ``allow_code`` a tasks file or mapping may name code that is run: functions, and folders of tasks of
    the harness; tasks given as objects need no permission. ``watch`` is told label, task and score as they come. Errors: EvaluationError, ModelError,
    HubError, OutputError.
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
    """Search the values that a recipe leaves open, for the best scores on tasks: a :class:`SearchResult` with ``recipe`` and ``trials``.

    ``recipe`` is YAML or a mapping with ``{search: [least, greatest]}`` and ``{choice: [...]}`` in place of values, and the
    settings under ``search``. ``tasks`` are searched on, ``report`` reported on: files, or tasks; both win over the settings', as
    ``trials`` does, the number of recipes that are tried in all. ``out`` is the folder for the best recipe, all trials and the page,
    and for the study: the same call goes on with it. ``workers`` are processes, of this machine or, with ``engine="ray"``, of a
    cluster, each with ``threads``. With ``allow_code`` files of tasks may name code that is run, and ``recipe`` a ``storage``. ``watch`` is told of every trial that ends. Other arguments as for :func:`merge`. Errors: RecipeError, EvaluationError,
    OutputError, ModelError, HubError, RunError.
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
    """Suggest a recipe for ``models`` of one ``base``, with its reasons: the rules of docs/choosing.md.

    The models are analysed, but for those that fit the base in no way; or an ``analysis`` is taken, or its folder, instead of them.
    Relative paths in the recipe are as seen from ``folder``. Other arguments and errors: as for :func:`analyze`.
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
    """Measure a model's Fisher information on tasks and write it into the directory ``out``, which ``merge_method: fisher`` takes.

    ``tasks`` are a tasks file, a mapping that says the same, or classification tasks; labels are never read. ``allow_code`` is as for :func:`evaluate`. Other options:
    :func:`alnico.tune.statistics.fisher.measure_fisher`. Needs ``alnico[eval]``. Errors: EvaluationError, ModelError, OutputError, HubError.
    """
    from alnico.checkpoint.statistics import check_folder
    from alnico.evaluation.loaded_model import open_subject
    from alnico.tune.statistics.fisher import measure_fisher

    may_replace = replacing(overwrite, overwrite_anything)
    check_folder(Path(out), may_replace, _paths_among((model, tasks)))
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
    """Measure the Gram matrices of models' linear layers on tasks and write them as files, which ``merge_method: regmean`` takes.

    One model's go to ``out``, those of several each to a directory in it that is called like the model. ``tasks`` are those of
    all models, or a list with one for each. ``plus`` measures them for RegMean++: all models layer by layer, with the layers
    before merged by ``weights``, ``alpha``, ``ridge`` and ``normalize``; give the recipe the same. ``allow_code`` is as for :func:`evaluate`. Other options:
    :func:`alnico.tune.statistics.gram.measure_gram`. Needs ``alnico[eval]``. Errors: EvaluationError, ModelError, MismatchError, OutputError, HubError.
    """
    from alnico.checkpoint.statistics import check_folder
    from alnico.evaluation.loaded_model import open_subject
    from alnico.tune.statistics.gram import measure_gram, measure_gram_plus

    names = [os.fspath(model) for model in _listed(models)]
    folders = [Path(out)] if len(names) == 1 else [Path(out) / _folder_name(name) for name in names]
    if len({str(folder).casefold() for folder in folders}) < len(folders):
        raise OutputError(
            f"{out}: two models have one name ({', '.join(f.name for f in folders)}); expected names of their own. Measure them one by one."
        )
    may_replace = replacing(overwrite, overwrite_anything)
    for folder in folders:
        check_folder(
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
    """Learn how much of each task vector a merge should have from inputs without labels (AdaMerging): a recipe, and its course.

    Coefficients ``per`` task, layer or tensor are moved so that the merge is sure of its answers on the inputs of ``tasks`` (a tasks file, a mapping that
    says the same, or tasks); their labels are never read. ``plus`` trims the task vectors and elects signs first, as TIES does with ``density`` and
    ``scope``. ``out`` is a file for the recipe; the course goes beside it, ``NAME.course.json``. Relative paths in the recipe are as seen from the folder of ``out``.
    ``memory`` is what the task vectors may take, beside the model in training. ``allow_code`` is as for :func:`evaluate`. Other options: :func:`alnico.tune.adamerge.learn`.
    ``watch`` is called after each step. Needs ``alnico[eval]``. Errors: EvaluationError, MethodError, ModelError, MismatchError, OutputError, HubError.
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
        written_from=[reference_from(name, Path(out).parent) for name in names] if out is not None else None,
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
    """Say how model ``b`` differs from model ``a``: tensors by content hash and by value, configs by key, side files by content.

    Both are read in full, in blocks; of models on the hub, the files are fetched. ``difference.is_equal`` is the short answer.
    Other arguments as for :func:`plan`. Errors: ModelError, ResourceError, HubError.
    """
    with ExitStack() as opened:
        one, other = (
            opened.enter_context(closing(open_model(r, offline=offline, may_be_adapter=True))) for r in (a, b)
        )
        return diff_sources(one, other, threads=threads, memory_bytes=bytes_of(memory))


@ieee_arithmetic()
def weights(
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
    """Say what models weigh if weights follow from the L2 norms of their task vectors: ``weight: {from: l2_norm, ...}`` of a recipe.

    Arguments are its keys (docs/recipes.md). The norms are measured over all tensors that base and models share, and
    nothing is merged; or they are those of an ``analysis`` (its folder). Errors: RecipeError, ModelError, MismatchError for a model
    at distance 0 in ``linear`` and ``power``, HubError.
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
        return weights_of(made)
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
    """Find which of some models to average by scoring the averages on ``tasks``: a file, a mapping that says the same, or tasks.

    Options: see :func:`alnico.tune.soup.soup`. ``.recipe(folder)`` of the result is the recipe that makes the soup. ``report`` are other
    tasks, on which the soup is scored beside its models and the uniform soup: a :class:`Scorecard` as ``.report``. Examples that are in
    both are refused, unless they are ``shared`` on purpose. ``allow_code`` is as for :func:`evaluate`. ``watch`` is told each step. Needs ``alnico[eval]`` for tasks that do. Errors: RecipeError, EvaluationError, and those of merging.
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
    """Upload a finished merge to ``owner/name`` on the hub, as one commit; returns its address.

    The repository is made if it is not there, ``private`` or public; ``branch`` defaults to main. ``quiet`` draws no
    progress bars. Errors: ModelError and OutputError for what is no finished merge, HubError.
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
    """Check a finished merge: every tensor and file against the hashes in its lock; returns only what passed.

    With ``against_inputs`` a share ``sample`` in (0, 1] of its blocks, chosen by ``seed``, is made again from the inputs and compared bit
    for bit; these are where the lock says, or where ``inputs`` maps their names to. ``key`` is the public key (a PEM file) with which its
    signature must hold. Other arguments as for :func:`merge`. Errors: VerificationError for what differs; UncheckedError, whose ``found`` is what was checked, for what
    could not be checked; OutputError, ModelError, ResourceError, HubError.
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
        found = signed_by(found, lambda: check_signature(folder, [Path(key)]))
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
    """Merge the recipe in the lock of ``out`` again, and compare: the same bytes in all weights and side files.

    The second merge is kept in ``new``; without, it stands beside ``out`` until it is compared. Arguments as for :func:`verify` and
    :func:`merge`. Errors: VerificationError for what differs; UncheckedError for inputs that are not there, or are not those of the merge,
    and for a lock of another arithmetic; those of :func:`merge`.
    """
    again = _again(inputs, memory, threads, offline)
    return reproduce_output(
        Path(out), None if new is None else Path(new), again, restart=restart, watch=watch
    )


def sign(out: str | os.PathLike[str], key: str | os.PathLike[str]) -> Path:
    """Sign a finished merge with a private key (a PEM file of the curve P-256, P-384 or P-521); returns its ``model.sig``.

    The output is checked against its lock before: what is signed is what was merged. Needs the extra ``[sign]``. Errors: those of :func:`verify` but
    for files that the lock does not list; UncheckedError for a key that cannot be used.
    """
    verify_output(Path(out), ReplanOptions())
    return sign_folder(Path(out), Path(key))


def _again(
    inputs: Mapping[str, str | os.PathLike[str]] | None, memory: Size, threads: int | None, offline: bool
) -> ReplanOptions:
    places = {name: os.fspath(place) for name, place in (inputs or {}).items()}
    return ReplanOptions(places, bytes_of(memory), threads_of(threads), offline)


def methods() -> dict[str, Method]:
    """Return all merge methods by name, with their options and documentation."""
    return dict(registry())
