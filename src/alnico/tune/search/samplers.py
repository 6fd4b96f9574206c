"""What to try next: each sampler as a pure function of the seed, the trial's number and the trials before it.

Nothing is kept between two suggestions, neither in memory nor in the study, so a search that was interrupted goes on as if it had
not been, and the file of a study holds no state that would have to be trusted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from alnico.errors import RecipeError
from alnico.evaluation.extras import import_extra
from alnico.evaluation.tasks import Goal
from alnico.tune.search.space import Dimension, Value

TrialState = Literal["complete", "pruned", "failed", "running", "waiting"]


@dataclass(frozen=True)
class Trial:
    """One point that was tried, or is being tried.

    ``values`` are the objectives' of a complete trial; ``rungs`` the objective on the examples of each rung of the halving, as far
    as it came. ``scores`` are by task, ``reason`` says why it failed.
    """

    number: int
    state: TrialState
    point: dict[str, Value]
    values: tuple[float, ...] = ()
    rungs: tuple[float, ...] = ()
    scores: tuple[tuple[str, float], ...] = ()
    reason: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class PointRequest:
    """What a sampler is asked: the next point of a search."""

    dimensions: Sequence[Dimension]
    goals: Sequence[Goal]
    seed: int
    number: int
    before: Sequence[Trial]
    """The trials with smaller numbers; those of other workers may be running."""
    population: int
    concentration: float

    @property
    def noise(self) -> np.random.Generator:
        """Randomness of this trial alone."""
        return np.random.default_rng([self.seed & (2**64 - 1), self.number])

    @property
    def noise_seed(self) -> int:
        """A seed of 32 bits of this trial alone, for other programs."""
        return int(np.random.SeedSequence([self.seed & (2**64 - 1), self.number]).generate_state(1)[0])


Point = dict[str, Value]
Sampler = Callable[[PointRequest], Point]


def import_optuna() -> Any:
    """Return optuna. Errors: AlnicoError, saying how it is installed."""
    return import_extra("optuna", "a search", "search")


def at_random(asked: PointRequest) -> Point:
    """Uniform in every dimension; on the simplex too."""
    noise = asked.noise
    return {d.name: _drawn(d, noise) for d in asked.dimensions}


def dirichlet(asked: PointRequest) -> Point:
    """Weights on the simplex from a Dirichlet distribution of the given concentration, all else uniform.

    A weight is ``g_i / sum g`` with g_i of the gamma distribution; its share is ``exp(-g_i)``. Above 1 the concentration keeps to
    the middle, below it goes to the corners.
    """
    noise = asked.noise
    point: Point = {}
    for d in asked.dimensions:
        if d.kind == "share":
            share = math.exp(-float(noise.gamma(asked.concentration)))
            point[d.name] = min(max(share, d.low), d.high)
        else:
            point[d.name] = _drawn(d, noise)
    return point


def grid(asked: PointRequest) -> Point:
    """Each combination of the steps and choices once, in an order drawn from the seed."""
    size = grid_size(asked.dimensions)
    order = np.random.default_rng([asked.seed & (2**64 - 1)]).permutation(size)
    place = int(order[asked.number % size])
    point: Point = {}
    for d in asked.dimensions:
        place, index = divmod(place, _steps(d))
        point[d.name] = _at_step(d, index)
    return point


MAX_GRID = 1_000_000


def grid_size(dimensions: Sequence[Dimension]) -> int:
    """The number of points of a grid. Errors: RecipeError for dimensions without steps, and grids that are too large."""
    size = 1
    for d in dimensions:
        if d.kind == "share" or (d.kind == "number" and d.step is None):
            raise RecipeError(
                f"search.sampler is grid, and {d.name} has no steps; expected `step` for every range. Add it."
            )
        size *= _steps(d)
    if size > MAX_GRID:
        raise RecipeError(
            f"search.sampler is grid, and it has {size} points; expected at most {MAX_GRID}. Make the steps larger."
        )
    return size


def tpe(asked: PointRequest) -> Point:
    """Optuna's tree-structured Parzen estimator, of all dimensions together; of several objectives, each dimension by itself.

    Source: Bergstra et al. 2011, https://papers.nips.cc/paper/4443.
    """
    optuna = import_optuna()
    return _asked_of_optuna(
        asked, optuna.samplers.TPESampler(seed=asked.noise_seed, n_startup_trials=_STARTUP), asked.before
    )


_STARTUP = 10
"""Trials at random before the estimator is asked: optuna's number."""


def nsga2(asked: PointRequest) -> Point:
    """Optuna's NSGA-II: generations of ``population`` trials, parents chosen by rank and crowding distance.

    Source: Deb et al. 2002, https://doi.org/10.1109/4235.996017.
    """
    optuna = import_optuna()
    sampler = optuna.samplers.NSGAIISampler(population_size=asked.population, seed=asked.noise_seed)
    complete = [t for t in asked.before if t.state == "complete"]
    key = "NSGAIISampler:generation"
    attributes = [{key: i // asked.population} for i in range(len(complete))]
    return _asked_of_optuna(asked, sampler, complete, attributes)


def _asked_of_optuna(
    asked: PointRequest,
    sampler: Any,
    before: Sequence[Trial],
    attributes: Sequence[dict[str, int]] | None = None,
) -> Point:
    """Ask a sampler of optuna on a study in memory that holds the trials before, and nothing else."""
    optuna = import_optuna()
    given = distributions(asked.dimensions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = silent(lambda: optuna.create_study(directions=directions(asked.goals), sampler=sampler))
        for i, trial in enumerate(before):
            if trial.state in ("complete", "pruned", "running") and trial.point:
                study.add_trial(_as_optunas(trial, given, attributes[i] if attributes is not None else None))
        point = study.ask(given).params
    return {d.name: _plain(d, point[d.name]) for d in asked.dimensions}


def _as_optunas(trial: Trial, given: dict[str, Any], attributes: dict[str, int] | None) -> Any:
    optuna = import_optuna()
    states = optuna.trial.TrialState
    state = {"complete": states.COMPLETE, "pruned": states.PRUNED, "running": states.RUNNING}[trial.state]
    return optuna.trial.create_trial(
        state=state,
        params=trial.point,
        distributions=given,
        values=list(trial.values) if trial.state == "complete" else None,
        intermediate_values=dict(enumerate(trial.rungs)),
        system_attrs=attributes,
    )


def silent(call: Callable[[], Any]) -> Any:
    """Call without optuna's line about a study that is made."""
    logging = import_optuna().logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        return call()
    finally:
        logging.set_verbosity(before)


def directions(goals: Sequence[Goal]) -> list[str]:
    """Goals as optuna has them."""
    return ["maximize" if goal == "max" else "minimize" for goal in goals]


def distributions(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    """Dimensions as optuna has them."""
    return {d.name: _distribution(d) for d in dimensions}


def _distribution(d: Dimension) -> Any:
    of = import_optuna().distributions
    if d.kind == "choice":
        return of.CategoricalDistribution(d.choices)
    if d.kind == "whole":
        return of.IntDistribution(int(d.low), int(d.high), log=d.is_log, step=int(d.step or 1))
    return of.FloatDistribution(d.low, d.high, log=d.is_log, step=d.step)


def cmaes(asked: PointRequest) -> Point:
    """CMA-ES in the unit cube, replayed from the trials before: each generation is those that came next, in their order.

    It starts in the default settings with a standard deviation of a fifth of the ranges. Trials that were pruned rank below the
    complete ones, as CMA-ES looks at ranks alone.

    Source: Hansen 2016, https://arxiv.org/abs/1604.00772.
    """
    cma = import_extra("cmaes", "the sampler cmaes", "search").CMA
    of_one = (
        len(asked.dimensions) == 1
    )  # the covariance of one dimension: a second is carried along, and has no effect
    start = np.array([_to_unit(d, d.default) for d in asked.dimensions] + [0.5] * of_one)
    bounds = np.array([[0.0, 1.0]] * len(start))
    optimizer = cma(mean=np.clip(start, 0.05, 0.95), sigma=0.2, bounds=bounds, seed=0)
    done = [t for t in asked.before if t.state in ("complete", "pruned")]
    size = optimizer.population_size
    for begin in range(0, len(done) - size + 1, size):
        ranked = sorted(done[begin : begin + size], key=lambda t: _rank(t, asked.goals[0]))
        places = (
            np.array([_to_unit(d, t.point[d.name]) for d in asked.dimensions] + [0.5] * of_one)
            for t in ranked
        )
        optimizer.tell([(place, float(rank)) for rank, place in enumerate(places)])
    optimizer.reseed_rng(asked.noise_seed)
    found = optimizer.ask()
    return {d.name: _from_unit(d, float(u)) for d, u in zip(asked.dimensions, found, strict=False)}


def _rank(trial: Trial, goal: Goal) -> tuple[int, float]:
    """The best first: complete ones, then those that came far, then by the last value."""
    sign = -1.0 if goal == "max" else 1.0
    if trial.state == "complete":
        return -1_000_000, sign * trial.values[0]
    return -len(trial.rungs), sign * trial.rungs[-1] if trial.rungs else math.inf


def _to_unit(d: Dimension, value: Value) -> float:
    """Where in its range a number is, from 0 to 1; a whole number in the middle of its part."""
    number = float(value)
    if d.kind == "whole":
        number, low, high = number + 0.5, d.low, d.high + 1
    else:
        low, high = d.low, d.high
    if d.is_log:
        return (math.log(number) - math.log(low)) / (math.log(high) - math.log(low))
    return (number - low) / (high - low)


def _from_unit(d: Dimension, unit: float) -> Value:
    low, high = (d.low, d.high + 1) if d.kind == "whole" else (d.low, d.high)
    number = (
        math.exp(math.log(low) + unit * (math.log(high) - math.log(low)))
        if d.is_log
        else low + unit * (high - low)
    )
    if d.kind == "whole":
        step = int(d.step or 1)
        return min(int(d.low) + int((number - d.low) // step) * step, int(d.high))
    if d.step is not None:
        number = d.low + round((number - d.low) / d.step) * d.step
    return min(max(number, d.low), d.high)


def _drawn(d: Dimension, noise: np.random.Generator) -> Value:
    unit = float(noise.random())
    if d.kind == "choice":
        return d.choices[int(unit * len(d.choices))]
    if d.step is not None:
        return _at_step(d, int(unit * _steps(d)))
    return _from_unit(d, unit)


def _steps(d: Dimension) -> int:
    if d.kind == "choice":
        return len(d.choices)
    return round((d.high - d.low) / (d.step or 1)) + 1


def _at_step(d: Dimension, index: int) -> Value:
    if d.kind == "choice":
        return d.choices[index]
    number = min(d.low + index * (d.step or 1.0), d.high)
    return round(number) if d.kind == "whole" else number


def _plain(d: Dimension, value: Any) -> Value:
    return value if d.kind == "choice" else int(value) if d.kind == "whole" else float(value)


SAMPLERS: dict[str, Sampler] = {
    "tpe": tpe,
    "cmaes": cmaes,
    "nsga2": nsga2,
    "random": at_random,
    "dirichlet": dirichlet,
    "grid": grid,
}


def check_sampler(name: str, dimensions: Sequence[Dimension], goals: Sequence[Goal]) -> None:
    """Refuse a sampler that cannot search these dimensions. Errors: RecipeError."""
    chosen = [d.name for d in dimensions if d.kind == "choice"]
    if name == "cmaes" and chosen:
        raise RecipeError(
            f"search.sampler is cmaes, which searches numbers alone, and {chosen[0]} is a choice. Say tpe."
        )
    if name == "cmaes" and len(goals) > 1:
        raise RecipeError(
            f"search.sampler is cmaes, which has one objective, and there are {len(goals)}. Say nsga2 or tpe."
        )
    if name == "dirichlet" and not any(d.kind == "share" for d in dimensions):
        raise RecipeError(
            "search.sampler is dirichlet, and no value is on the simplex; expected {search: simplex}. Say random."
        )
    if name == "grid":
        grid_size(dimensions)


def suggest(name: str, asked: PointRequest) -> Point:
    """The point of a trial: the default settings first (a grid has its own), then what the sampler says."""
    if asked.number == 0 and name != "grid":
        return {d.name: d.default for d in asked.dimensions}
    return SAMPLERS[name](asked)
