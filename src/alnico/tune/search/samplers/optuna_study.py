"""Runs optuna's samplers on an in-memory study of the trials so far."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from alnico.evaluation.tasks import Goal
from alnico.installation import import_extra
from alnico.tune.search.samplers.ranges import plain_value
from alnico.tune.search.samplers.request import Point, PointRequest, Trial
from alnico.tune.search.space import Dimension


def import_optuna() -> Any:
    """Return optuna. Errors: AlnicoError, with the command that installs it."""
    return import_extra("optuna", "a search", "search")


def ask_optuna(
    request: PointRequest,
    sampler: Any,
    before: Sequence[Trial],
    attributes: Sequence[dict[str, int]] | None = None,
) -> Point:
    """Ask an optuna sampler, on an in-memory study of the earlier trials."""
    optuna = import_optuna()
    optuna_distributions = distributions(request.dimensions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = silent(lambda: optuna.create_study(directions=directions(request.goals), sampler=sampler))
        for i, trial in enumerate(before):
            if trial.state in ("complete", "pruned", "running") and trial.point:
                study.add_trial(
                    _optuna_trial(
                        trial, optuna_distributions, attributes[i] if attributes is not None else None
                    )
                )
        point = study.ask(optuna_distributions).params
    return {d.name: plain_value(d, point[d.name]) for d in request.dimensions}


def _optuna_trial(
    trial: Trial, optuna_distributions: dict[str, Any], attributes: dict[str, int] | None
) -> Any:
    optuna = import_optuna()
    states = optuna.trial.TrialState
    state = {"complete": states.COMPLETE, "pruned": states.PRUNED, "running": states.RUNNING}[trial.state]
    return optuna.trial.create_trial(
        state=state,
        params=trial.point,
        distributions=optuna_distributions,
        values=list(trial.values) if trial.state == "complete" else None,
        intermediate_values=dict(enumerate(trial.rungs)),
        system_attrs=attributes,
    )


def silent(call: Callable[[], Any]) -> Any:
    """Call without optuna's log line about a new study."""
    logging = import_optuna().logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        return call()
    finally:
        logging.set_verbosity(before)


def directions(goals: Sequence[Goal]) -> list[str]:
    """Return goals as optuna's directions."""
    return ["maximize" if goal == "max" else "minimize" for goal in goals]


def distributions(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    """Return dimensions as optuna's distributions."""
    return {d.name: _distribution(d) for d in dimensions}


def _distribution(d: Dimension) -> Any:
    of = import_optuna().distributions
    if d.kind == "choice":
        return of.CategoricalDistribution(d.choices)
    if d.kind == "whole":
        return of.IntDistribution(int(d.low), int(d.high), log=d.is_log, step=int(d.step or 1))
    return of.FloatDistribution(d.low, d.high, log=d.is_log, step=d.step)
