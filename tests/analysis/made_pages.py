"""Every HTML page that alnico writes, of models that never were: 1, 2, 3 and 8 models, 1, 2, 3 and 8 tasks, and names that are hard to lay out."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from made_analyses import NAMES, made_analysis

from alnico.analysis.common_tensors import short_names
from alnico.analysis.report import write_report
from alnico.analysis.results import AnalysedModel, Analysis, Skipped
from alnico.analysis.retention import Retention, measure_distances, measure_retention
from alnico.analysis.retention_section import comparison, retention_section
from alnico.analysis.score_section import score_section
from alnico.analysis.scores import Accuracy, Estimate
from alnico.analysis.suggest_rules import suggest_recipe
from alnico.evaluation.scorecard import ModelScores, ResampledScores, Scorecard, TaskSummary, scorecard
from alnico.evaluation.scorecard_page import write_scorecard
from alnico.evaluation.tasks import Goal, Score
from alnico.tune.curve.barrier import barriers_of
from alnico.tune.curve.page import curve_page
from alnico.tune.curve.result import Curve, CurveKind, CurvePoint
from alnico.tune.search.objective import best_of, objectives_of
from alnico.tune.search.page import search_page
from alnico.tune.search.result import SearchResult
from alnico.tune.search.samplers.request import Trial
from alnico.tune.search.settings import read_search

COUNTS = (1, 2, 3, 8)
"""Of models, and of tasks."""

TASKS = ("news", "spam", "sentiment", "mmlu", "hellaswag", "arc-challenge", "winogrande", "gsm8k")

LONG_NAMES = tuple(
    f"{name}-merged-with-everything-that-was-at-hand-v{i}.2-final-{'q' * 20 if i % 2 else 'instruct-dpo-sft'}"
    for i, name in enumerate(NAMES)
)
LONG_TASKS = tuple(f"massive_multitask_language_understanding_{task}_five_shot_normalised" for task in TASKS)

HOSTILE = '</script><script>document.title="caught"</script><img src=x onerror=alert(1)>&lt;b> %{y} "quoted\''
HOSTILE_NAMES = tuple(f"{i} {HOSTILE}" for i in range(8))

Writer = Callable[[Path], None]


@dataclasses.dataclass(frozen=True)
class MadeTask:
    """A task of a scorecard, as far as pages know it."""

    name: str
    goal: Goal = "max"
    weight: float = 1.0


def renamed(analysis: Analysis, names: Sequence[str]) -> Analysis:
    """The same analysis with other names of its models, and of its tensors if they are hostile."""
    models = tuple(
        AnalysedModel(names[i % len(names)], names[i % len(names)], m.commit)
        for i, m in enumerate(analysis.models)
    )
    if names is not HOSTILE_NAMES:
        return dataclasses.replace(analysis, models=models)
    tensors = tuple(
        dataclasses.replace(t, name=f"{HOSTILE}.{t.name}", module=f"{HOSTILE}.{t.module}")
        for t in analysis.tensors
    )
    base = AnalysedModel(HOSTILE, HOSTILE)
    skipped = (Skipped(HOSTILE, HOSTILE, 3, HOSTILE),)
    return dataclasses.replace(analysis, models=models, tensors=tensors, base=base, skipped=skipped)


def one_tensor(models: int) -> Analysis:
    """Models of a single matrix outside any layer, the first of which equals the base."""
    made = made_analysis(models, 0)
    tensor = dataclasses.replace(made.tensors[0], name="weight", module="weight", group="other")
    zero = made_analysis(2, 4).tensors[1].changes[1]
    assert zero is not None
    assert zero.l2 == 0
    changes = (zero, *tensor.changes[1:])
    tensor = dataclasses.replace(tensor, changes=changes)
    whole = dataclasses.replace(
        made.whole, changes=changes, sign_conflict=None, cancelled=None if models == 1 else 0.0
    )
    return dataclasses.replace(
        made, tensors=(tensor,), whole=whole, groups={"other": whole}, layers={}, skipped=()
    )


def analysis_page(analysis: Analysis, path: Path, *, advice: bool = True) -> None:
    write_report(analysis, path, suggest_recipe(analysis) if advice else None)


def made_scores(
    models: Sequence[str], tasks: Sequence[str], *, known: bool = True
) -> Mapping[str, Mapping[str, Estimate]]:
    """Scores of some models on tasks: one is negative, one is missing, one is 0."""
    rng = np.random.default_rng(len(models) * 100 + len(tasks))
    scores: dict[str, dict[str, Estimate]] = {}
    for t, task in enumerate(tasks):
        scores[task] = {}
        for m, model in enumerate(models):
            if (t, m) == (1, 1):
                continue
            value = float(rng.uniform(0.2, 0.9)) if (t, m) != (2, 0) else -0.213
            scores[task][model] = (
                Estimate(value, value - 0.07, value + 0.06) if known else Estimate(value if m else 0.0)
            )
    return scores


def compare_page(
    parents: int, tasks: Sequence[str], layers: int, names: Sequence[str], path: Path, *, base: bool = True
) -> None:
    """The report of ``alnico compare``: parents, then the merged model, with scores."""
    analysis = renamed(made_analysis(parents + base, layers), names)
    found = measure_retention(analysis, parents) if base else measure_distances(analysis)
    if not base:
        found = dataclasses.replace(found, notes=("merged has no mergekit_config.yml that names its base.",))
    scores = made_scores([m.reference for m in found.parents] + [found.merged.reference], tasks)
    rated: list[Accuracy] = []
    for place, task in enumerate(tasks):
        of_best, merged = 0.8125 - 0.1 * place, 0.75 if place != 2 else -0.0417
        gain = None if place == 1 else merged / of_best - 0.13
        of_base = None if place == 1 else 0.25
        rated.append(Accuracy(task, merged, found.parents[0].name, of_best, of_base, merged / of_best, gain))
    retention: Retention = dataclasses.replace(found, scores=tuple(rated))
    sections = [retention_section(retention), *([score_section(scores)] if tasks else [])]
    write_report(analysis, path, None, sections, subject=comparison(retention))


def made_card(models: Sequence[str], tasks: Sequence[str], merged: int = 0) -> Scorecard:
    """A scorecard: the first model is the base, the last ``merged`` are merges, the last of many tasks is a perplexity."""
    rng = np.random.default_rng(len(models) * 100 + len(tasks))
    measured = [MadeTask(t, "min" if 2 < i == len(tasks) - 1 else "max") for i, t in enumerate(tasks)]
    scores = {
        model: {
            task.name: Score(9.0 + i, np.log(9.0 + i + rng.normal(0, 0.5, 40)), "exp")
            if task.goal == "min"
            else _score(rng, known=len(tasks) < 3 or place != 1)
            for place, task in enumerate(measured)
        }
        for i, model in enumerate(models)
    }
    base = models[0] if len(models) > 1 else None
    return scorecard(
        scores, measured, base=base, merged=list(models[len(models) - merged :]) if merged else [], draws=50
    )  # type: ignore[arg-type]


def _score(rng: np.random.Generator, *, known: bool) -> Score:
    examples = (rng.uniform(size=40) < rng.uniform(0.3, 0.95)).astype(np.float64)
    return Score(float(examples.mean()), examples if known else None)


def evaluation_page(models: Sequence[str], tasks: Sequence[str], path: Path) -> None:
    folder = path.parent / path.stem
    folder.mkdir(exist_ok=True)
    write_scorecard(made_card(models, tasks, merged=min(len(models) // 3, 2)), folder)
    (folder / "report.html").rename(path)


def made_search(
    models: Sequence[str], tasks: Sequence[str], trials: int = 40, *, report: bool = True
) -> SearchResult:
    """A search over a weight of each model and the method, as many objectives as tasks (three at most)."""
    quoted = ["'" + name.replace("'", "''") + "'" for name in models]
    entries = "\n".join(f"  - {{model: {q}, parameters: {{weight: {{search: [0.0, 1.5]}}}}}}" for q in quoted)
    wanted = ", ".join("'" + task.replace("'", "''") + "'" for task in tasks[:3])
    method = "{choice: [task_arithmetic, ties]}" if len(models) > 1 else "task_arithmetic"
    space, settings = read_search(
        f"merge_method: {method}\nbase_model: base\nmodels:\n{entries}\nsearch: {{trials: {trials}, objective: [{wanted}]}}\n"
    )
    objectives = objectives_of(settings.objective, [MadeTask(t) for t in tasks])  # type: ignore[list-item]
    rng = np.random.default_rng(len(models) * 100 + len(tasks))
    made = []
    for number in range(trials):
        point = {
            d.name: float(rng.uniform(0, 1.5))
            if d.name != "merge_method"
            else str(rng.choice(["task_arithmetic", "ties"]))
            for d in space.dimensions
        }
        values = tuple(float(v) for v in rng.uniform(0.3, 0.9, len(objectives)))
        state = "pruned" if number % 7 == 5 else "failed" if number % 11 == 10 else "complete"
        made.append(
            Trial(
                number,
                state,  # type: ignore[arg-type]
                point,
                values if state == "complete" else (),
                (values[0],) if state == "pruned" else (),
                (),
                "The merge has values that are not finite." if state == "failed" else "",
                2.5,
            )
        )
    complete = [t for t in made if t.state == "complete"]
    best = best_of(complete, [o.goal for o in objectives])
    names = tuple(d.name for d in space.dimensions)
    card = made_card(["base", *models[: len(models)], "average", "best"], tasks, merged=2) if report else None
    shares = rng.dirichlet(np.ones(len(names)))
    return SearchResult(
        "the recipe of " + models[0],
        tuple(space.instantiate(t.point) for t in best),
        best,
        tuple(made),
        objectives,
        names,
        settings,
        dict(zip(names, map(float, shares), strict=True)),
        card,
        ("No trial was better than the uniform average.",),
    )


def write_search(models: Sequence[str], tasks: Sequence[str], path: Path, *, report: bool = True) -> None:
    page = search_page(made_search(models, tasks, report=report))
    path.write_text(page.encode("utf-8", "replace").decode(), "utf-8")


def made_curve(kind: CurveKind, models: Sequence[str], tasks: Sequence[str], *, known: bool = True) -> Curve:
    """A curve whose scores rise to a scale of the task's own and fall again; the last of many tasks is a loss."""
    rng = np.random.default_rng(len(models) * 100 + len(tasks))
    measured = [MadeTask(t, "min" if 2 < i == len(tasks) - 1 else "max") for i, t in enumerate(tasks)]
    averaged = [t.name for t in measured if t.goal == "max"] if len(tasks) > 1 else []
    axis = tuple(i / 10 for i in range(11 if kind == "path" else 21))
    axes = (axis[::2], axis[:11]) if kind == "surface" else (axis,)
    places = list(itertools.product(*axes))
    draws = {t.name: rng.uniform(size=60) for t in measured}
    peaks = {t.name: rng.uniform(0.4, 1.2) for t in measured}

    def score(task: MadeTask, at: Sequence[float]) -> Score:
        share = 0.9 - 0.3 * sum((a - peaks[task.name]) ** 2 for a in at)
        if kind == "path" and at in places:
            share = 0.9 - peaks[task.name] * at[0] * (1 - at[0])
        if task.goal == "min":
            return Score(9.0 - share, np.log(9.0 - share + draws[task.name]) if known else None, "exp")
        right = (draws[task.name] < share).astype(np.float64)
        return Score(float(right.mean()), right if known else None)

    base, others = "Llama-2-13b-hf", list(models)
    lines = [base, *(others if kind != "path" else [])]
    scores = {repr(p): {t.name: score(t, p) for t in measured} for p in places}
    scores |= {m: {t.name: score(t, [0.1 * i]) for t in measured} for i, m in enumerate(lines)}
    drawn = ResampledScores(scores, measured, draws=50, averaged=averaged)  # type: ignore[arg-type]
    shown = dict(zip([base, *others], short_names([base, *others]), strict=True))
    goals: dict[str, Goal] = {"mean": "max"} | {t.name: t.goal for t in measured}
    return Curve(
        kind,
        "linear" if kind == "path" else "task_arithmetic",
        base,
        tuple(others),
        tuple(TaskSummary(t.name, t.goal, 1.0, drawn.examples(t.name)) for t in measured),
        tuple(averaged),
        "mean" if averaged else tasks[0],
        axes,
        tuple(CurvePoint(p, *drawn.scores(repr(p))) for p in places),
        tuple(ModelScores(shown[m], m, "base" if m == base else "model", *drawn.scores(m)) for m in lines),
        {"merge_method": "task_arithmetic", "models": [{"model": m} for m in others], "base_model": base},
        50,
        0,
        barriers_of(drawn, {p[0]: repr(p) for p in places}, goals) if kind == "path" else {},
    )


def write_curve_page(
    kind: CurveKind, models: Sequence[str], tasks: Sequence[str], path: Path, *, known: bool = True
) -> None:
    page = curve_page(made_curve(kind, models, tasks, known=known))
    path.write_text(page.encode("utf-8", "replace").decode(), "utf-8")


def together(pages: Mapping[str, Writer], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write all pages one below the other into a file, so that a browser reads the script that draws only once.

    Ids get their page's name in front; ``data-page`` of a page's frame is its name.
    """
    frames = []
    for place, (name, write) in enumerate(pages.items()):
        with monkeypatch.context() as patch:
            if place:
                patch.setattr("plotly.offline.get_plotlyjs", lambda: "")
            write(path)
        text = path.read_text("utf-8")
        head, begin, rest = text.partition('<div class="frame">\n')
        frame, end, scripts = rest.partition("</footer>\n</div>\n")
        assert begin
        assert end
        frames.append(
            f'<div class="frame" data-page="{name}">\n'
            + re.sub(
                r'(?<= )(id|aria-labelledby|data-figure|data-shows|data-filters)="?([\w-]+)"?(?=[ >])',
                rf'\1="{name}-\2"',
                frame,
            ).replace('href="#', f'href="#{name}-')
            + end
        )
        if not place:
            before, after = head, scripts
    path.write_text(before + "".join(frames) + after, "utf-8")


def every_page() -> Iterator[tuple[str, Writer]]:
    """The name of every made page, and what writes it."""
    for models, layers in ((1, 1), (2, 6), (3, 24), (8, 80)):
        yield f"analysis-{models}", partial(analysis_page, made_analysis(models, layers))
    yield "analysis-long", partial(analysis_page, renamed(made_analysis(3, 2), LONG_NAMES))
    yield "analysis-hostile", partial(analysis_page, renamed(made_analysis(3, 2), HOSTILE_NAMES))
    yield "analysis-one-tensor", partial(analysis_page, one_tensor(2))
    yield "analysis-unchanged", partial(analysis_page, one_tensor(1))
    yield "analysis-no-advice", partial(analysis_page, made_analysis(1, 80), advice=False)
    for parents, layers in ((1, 1), (2, 6), (3, 2), (8, 8)):
        yield f"compare-{parents}", partial(compare_page, parents, TASKS[:parents], layers, NAMES)
    yield "compare-no-base", partial(compare_page, 2, (), 2, NAMES, base=False)
    yield "compare-long", partial(compare_page, 3, LONG_TASKS[:2], 2, LONG_NAMES)
    yield "compare-hostile", partial(compare_page, 2, HOSTILE_NAMES[:3], 2, HOSTILE_NAMES)
    for models in COUNTS:
        for tasks in COUNTS:
            names = ("Llama-2-13b-hf", *NAMES)[:models]
            yield f"evaluation-{models}-{tasks}", partial(evaluation_page, names, TASKS[:tasks])
    yield "evaluation-long", partial(evaluation_page, LONG_NAMES[:4], LONG_TASKS[:3])
    yield "evaluation-hostile", partial(evaluation_page, HOSTILE_NAMES[:4], HOSTILE_NAMES[:2])
    for count in COUNTS:
        yield f"search-{count}", partial(write_search, NAMES[:count], TASKS[:count])
    for count in (1, 2, 8):
        yield f"curve-{count}", partial(write_curve_page, "line", NAMES[:count], TASKS[:count])
    for tasks in (1, 8):
        yield f"curve-path-{tasks}", partial(write_curve_page, "path", NAMES[:2], TASKS[:tasks])
        yield f"curve-surface-{tasks}", partial(write_curve_page, "surface", NAMES[:2], TASKS[:tasks])
    yield "curve-long", partial(write_curve_page, "surface", LONG_NAMES[:2], LONG_TASKS[:2])
    yield (
        "curve-hostile",
        partial(write_curve_page, "path", HOSTILE_NAMES[:2], HOSTILE_NAMES[:2], known=False),
    )
    yield "search-long", partial(write_search, LONG_NAMES[:3], LONG_TASKS[:2])
    yield "search-hostile", partial(write_search, HOSTILE_NAMES[:2], HOSTILE_NAMES[:2])
    yield "search-no-report", partial(write_search, NAMES[:2], TASKS[:1], report=False)
