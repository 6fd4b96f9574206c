"""Ways whose recipe a command of alnico finds: soups, search, AdaMerging. What they found is kept, and studies go on where they were."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from alnico.evaluation.loaded_model import open_subject
from alnico.events import Event, Learned, TrialDone
from alnico.run_options import RunOptions
from alnico.tune.adamerge import LearningOptions, Per, learn
from quality.bench import Bench, Chosen, say


def souped(order: str) -> Callable[[Bench], Chosen]:
    """Choose which specialists to average: ``sorted`` or ``all``."""

    def choose(bench: Bench) -> Chosen:
        from alnico.tune.soup import soup

        began = time.process_time()
        references = [bench.specialist(name) for name in bench.tasks]
        with contextlib.chdir(bench.work):
            found = soup(references, bench.read_tasks("validation"), order=order, base="base")
        tried = {tuple(sorted(step.counts.items())) for step in found.steps} | {
            ((name, 1),) for name in found.alone
        }
        words = " + ".join(name.rpartition("/")[2] for name in found.counts)
        return Chosen(
            yaml.safe_load(found.recipe(bench.work)), words, len(tried), time.process_time() - began
        )

    return lambda bench: bench.kept(f"soup-{order}", choose)


def searched(
    name: str, space: Callable[[Bench], Mapping[str, Any]], sampler: str, trials: int
) -> Callable[[Bench], Chosen]:
    """Search a recipe's open values. A trial that is behind on a quarter, or on half, of the examples is given up there."""

    def choose(bench: Bench) -> Chosen:
        from alnico.tune.search.search import search

        folder = bench.work / "studies" / f"{name}-{sampler}-{bench.fingerprint[:8]}"
        settings = {
            "sampler": sampler,
            "trials": trials,
            "seed": 0,
            "halving": {"fraction": 0.25, "keep": 0.5},
        }
        path = bench.work / f"{folder.name}.yml"
        path.write_text(
            yaml.safe_dump({**space(bench), "search": settings}, sort_keys=False), encoding="utf-8"
        )
        found = search(path, tasks=bench.read_tasks("validation"), out=folder, watch=told)
        point = found.best[0].point
        words = ", ".join(
            f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in point.items()
        )
        seconds = sum(trial.seconds or 0.0 for trial in found.trials)
        return Chosen(
            yaml.safe_load(found.recipe.text), words if len(point) <= 2 else "", len(found.trials), seconds
        )

    return lambda bench: bench.kept(f"search-{name}-{sampler}-{trials}", choose)


def told(event: Event) -> None:
    """Tell a trial that was scored on all examples."""
    if isinstance(event, TrialDone) and event.trial.state == "complete":
        trial = event.trial
        say(f"  trial {trial.number}: {trial.values[0]:.4f} on validation")


def step_told(event: Event) -> None:
    """Tell every 25th step."""
    if isinstance(event, Learned) and event.step.number % 25 == 0:
        say(f"  step {event.step.number}: {event.step.loss:.3f} nats")


def learned(
    per: Per,
    steps: int,
    learning_rate: float,
    init: Callable[[Bench], float],
    greatest: float = 1.0,
    plus: bool = False,
    method: str = "task_arithmetic",
) -> Callable[[Bench], Chosen]:
    """Learn coefficients of task vectors, or of the parts that a method over whole matrices makes of them, from the inputs of the validation rows, all of them, without their labels."""

    def choose(bench: Bench) -> Chosen:
        began = time.process_time()
        begun = init(bench)
        names = ["base", *(bench.specialist(name) for name in bench.tasks)]
        base, *models = (str(bench.work / name) for name in names)
        found = learn(
            models,
            base,
            bench.read_tasks("unlabelled"),
            open_subject(base),
            LearningOptions(
                method, per, plus, 0.2, "model", steps, 16, learning_rate, begun, (0.0, greatest), 0, "error"
            ),
            run=RunOptions(watch=step_told),
            written_from=names,
        )
        return Chosen(
            yaml.safe_load(found.recipe), f"{steps} steps from {begun}", 0, time.process_time() - began
        )

    return lambda bench: bench.kept(
        f"adamerging-{method}-{per}-{plus}-{steps}-{learning_rate}-{init(bench)}", choose
    )


def measured(kind: str) -> Callable[[Bench], None]:
    """Measure each specialist on texts it was trained on: ``fisher`` on 128, ``gram``, or ``gram-plus`` for RegMean++, on 256."""

    def measure(bench: Bench) -> None:
        from alnico.tune.statistics.fisher import measure_fisher
        from alnico.tune.statistics.gram import measure_gram, measure_gram_plus

        missing = [name for name in bench.tasks if not bench.statistics(kind, name).exists()]
        if not missing:
            return
        tasks = {task.name: task for task in bench.read_tasks("training")}
        subjects = {name: open_subject(bench.work / bench.specialist(name)) for name in bench.tasks}
        if kind == "gram-plus":
            found = measure_gram_plus(list(subjects.values()), [[tasks[name]] for name in bench.tasks])
            for name, statistics in zip(bench.tasks, found, strict=True):
                statistics.write(bench.statistics(kind, name), subjects[name], overwrite=True)
            return
        for name in missing:
            if kind == "fisher":
                statistics = measure_fisher(
                    subjects[name], [tasks[name]], examples=128, expectation="sampled"
                )
            else:
                statistics = measure_gram(subjects[name], [tasks[name]])
            statistics.write(bench.statistics(kind, name), subjects[name])

    return measure


def by_statistics(method: str, option: str, kind: str, **settings: Any) -> Callable[[Bench], Chosen]:
    """Merge by what was measured of the specialists, by a method that takes it under ``option``."""

    def choose(bench: Bench) -> Chosen:
        began = time.process_time()
        measured(kind)(bench)
        recipe = bench.sum(method, base=False, **settings)
        for name, model in zip(bench.tasks, recipe["models"], strict=True):
            model["parameters"] = {option: str(bench.statistics(kind, name).relative_to(bench.work))}
        words = ", ".join(f"{name} {value}" for name, value in settings.items())
        return Chosen(recipe, words, 0, time.process_time() - began)

    return lambda bench: bench.kept(" ".join(map(str, (method, kind, *settings.values()))), choose)
