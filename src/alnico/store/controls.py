"""Scores an equipped model beside its controls: without vectors, and with random vectors of the same length."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alnico.analysis.scores import Estimate
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.source import Source
from alnico.engine.fetch import fetch_weights
from alnico.engine.run import MergeResult, run_plan
from alnico.engine.stages import close
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.placement import ModulePlacement
from alnico.evaluation.scorecard import ResampledScores, Scorecard, TaskScores, scorecard
from alnico.evaluation.task_file import TasksLike, as_tasks
from alnico.evaluation.tasks import Task, metric_of
from alnico.events import Scored
from alnico.folders import temporary_files
from alnico.notebook import ResultTable
from alnico.plan.build import build_plan
from alnico.recipe.reference import resolve_reference
from alnico.recipe.schema import Recipe
from alnico.run_options import RunOptions
from alnico.store.random_model import RandomModel
from alnico.store.vector_measures import measure_vectors

NO_VECTOR, EQUIPPED, RANDOM = "no vector", "equipped", "random vectors"
"""The models that are scored, as results name them; several of random vectors are numbered."""

SEEDS = (1, 2, 3)
"""The seeds of the random vectors: each makes one model."""


@dataclass(frozen=True)
class ControlDifference:
    """Scores of the equipped model minus those of a control, by task and for the mean of tasks where higher is better."""

    control: str
    scores: Mapping[str, Estimate]
    mean: Estimate | None


@dataclass(frozen=True)
class Controls:
    """Scores of the base, of the equipped model, and of the base with random vectors of the same norms and weights.

    ``card`` has all scores with their intervals, ``random`` the mean of the models with random vectors, and
    ``differences`` what the equipped model has over the base and over that mean; draws are paired.
    """

    card: Scorecard
    random: Mapping[str, Estimate]
    random_mean: Estimate | None
    differences: tuple[ControlDifference, ...]
    seeds: tuple[int, ...] = SEEDS

    @property
    def beats_random(self) -> bool | None:
        """Is the equipped model better than random vectors, on the mean over tasks? None where that is not known.

        It is if the 95 % interval of the difference is above 0.
        """
        mean = next(d.mean for d in self.differences if d.control == RANDOM)
        return None if mean is None or mean.low is None else mean.low > 0

    def table(self) -> ResultTable:
        """Return the scores as a table."""
        tasks = [task.name for task in self.card.tasks]
        rows: list[list[Any]] = []
        for model in self.card.models:
            if model.reference in (NO_VECTOR, EQUIPPED):
                mean = None if model.mean is None else model.mean.value
                rows.append([model.reference, mean, *(model.scores[task].value for task in tasks)])
        mean = None if self.random_mean is None else self.random_mean.value
        rows.append([f"{RANDOM} (mean of {len(self.seeds)})", mean, *(self.random[t].value for t in tasks)])
        return ResultTable(("model", "mean", *tasks), rows)

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""

        def estimates(scores: Mapping[str, Estimate], mean: Estimate | None) -> dict[str, Any]:
            by_task = {task: estimate.data() for task, estimate in scores.items()}
            return {"scores": by_task, "mean": None if mean is None else mean.data()}

        return {
            "card": self.card.data(),
            "random_vectors": estimates(self.random, self.random_mean),
            "differences": [
                {"model": EQUIPPED, "control": d.control, **estimates(d.scores, d.mean)}
                for d in self.differences
            ],
            "beats_random": self.beats_random,
            "seeds": list(self.seeds),
        }


@dataclass
class ControlRuns:
    """The scores of one call while it runs. Models with random vectors are written to ``folder``."""

    recipe: Recipe
    tasks: Sequence[Task]
    run: RunOptions
    folder: Path
    placement: ModulePlacement
    _scores: dict[str, TaskScores] = field(default_factory=dict)

    def score_base(self) -> None:
        """Score the base. Errors: EvaluationError, ModelError, HubError."""
        place = resolve_reference(self.recipe.base_model or "", self.recipe.folder)
        self._score(place, NO_VECTOR)

    def score_equipped(self, path: Path) -> Controls:
        """Score the equipped model, then those with random vectors. Errors: as for :meth:`score_base`."""
        self._score(path, EQUIPPED)
        norms = self._norms()
        labels = [f"{RANDOM} {seed}" for seed in SEEDS]
        for seed, label in zip(SEEDS, labels, strict=True):
            folder = self._write_random(norms, seed)
            self._score(folder, label)
            shutil.rmtree(folder, ignore_errors=True)
        drawn = ResampledScores(self._scores, self.tasks)
        share = 1 / len(labels)
        random, random_mean = drawn.combined(dict.fromkeys(labels, share))
        over_base = drawn.combined({EQUIPPED: 1.0, NO_VECTOR: -1.0})
        over_random = drawn.combined({EQUIPPED: 1.0, **dict.fromkeys(labels, -share)})
        card = replace(
            scorecard(self._scores, self.tasks, base=NO_VECTOR),
            device=self.placement.where,
            dtype=self.placement.own_or_dtype,
        )
        differences = (ControlDifference(NO_VECTOR, *over_base), ControlDifference(RANDOM, *over_random))
        return Controls(card, random, random_mean, differences)

    def _score(self, model: str | Path, label: str) -> None:
        subject = open_subject(
            model,
            label=label,
            offline=self.run.offline,
            may_be_plain=True,
            placement=self.placement,
            watch=self.run.watch,
        )
        scores = {}
        for task in self.tasks:
            scores[task.name] = task.evaluate(subject)
            self.run.report(Scored(label, task.name, scores[task.name], metric_of(task)))
        self._scores[label] = scores

    def _norms(self) -> dict[str, dict[str, float]]:
        """The norms of each vector's tensors, as it is applied to the base, by the reference of its model."""
        base = resolve_reference(self.recipe.base_model or "", self.recipe.folder)
        references = [r for r in self.recipe.references if r != self.recipe.base_model]
        models = [resolve_reference(r, self.recipe.folder) for r in references]
        measured = measure_vectors(base, models, offline=self.run.offline)
        return dict(zip(references, measured.norms, strict=True))

    def _write_random(self, norms: Mapping[str, Mapping[str, float]], seed: int) -> Path:
        """Merge the recipe with random vectors in the place of the given ones; returns the folder."""
        reference = self.recipe.base_model or ""
        base: Source = open_model(resolve_reference(reference, self.recipe.folder), access=self.run.access)
        sources: dict[str, Source] = {reference: base}
        for position, (one, of_one) in enumerate(norms.items()):
            sources[one] = RandomModel(one, base, of_one, seed, position)
        recipe = replace(self.recipe, unrelated="allow")
        out = self.folder / f"random-{seed}"
        try:
            plan = build_plan(recipe, run=self.run, open_source=sources.__getitem__)
        except BaseException:
            base.close()
            raise
        try:
            fetch_weights(plan)
            run_plan(plan, out, restart=True)
        finally:
            close([plan])
        return out


def score_equipped(
    recipe: Recipe,
    tasks: TasksLike,
    out: Path,
    merge: Callable[[], MergeResult],
    run: RunOptions,
    *,
    allow_code: bool = False,
) -> tuple[MergeResult, Controls]:
    """Score the base, ``merge`` a recipe into ``out``, and score that and the models with random vectors.

    Errors: EvaluationError before the merge for tasks that cannot be read, and for a base that they cannot score; those of
    the merge.
    """
    placement = ModulePlacement.of(run.device)
    read = as_tasks(tasks, allow_code=allow_code)
    placement = placement.for_tasks(read)
    with temporary_files():
        folder = Path(tempfile.mkdtemp(prefix="alnico-"))
    try:
        runs = ControlRuns(recipe, read, run, folder, placement)
        runs.score_base()
        result = merge()
        return result, runs.score_equipped(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
