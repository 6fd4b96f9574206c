"""Samples with optuna's tree-structured Parzen estimator."""

from __future__ import annotations

from alnico.tune.search.samplers.optuna_study import ask_optuna, import_optuna
from alnico.tune.search.samplers.request import Point, PointRequest


def tpe(request: PointRequest) -> Point:
    """Sample with optuna's tree-structured Parzen estimator, over all dimensions jointly.

    With several objectives, each dimension is modelled separately.

    Source: Bergstra et al. 2011, https://papers.nips.cc/paper/4443.
    """
    optuna = import_optuna()
    return ask_optuna(
        request,
        optuna.samplers.TPESampler(seed=request.noise_seed, n_startup_trials=STARTUP_TRIALS),
        request.before,
    )


STARTUP_TRIALS = 10
"""Random trials before the estimator is used: optuna's default."""
