"""Computes weights of models from the norms of their task vectors."""

from __future__ import annotations

import os

from alnico.engine.norm_weights import NormWeights, compute_norm_weights
from alnico.kernels.clock import counts_compiling
from alnico.models.open_models import AnyModel, AnyModels, name_model, name_models, open_models
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.recipe.norm_weight import setting_of
from alnico.run_options import DEFAULT_BUDGET_BYTES, Access, RunOptions, Size


@counts_compiling
@ieee_arithmetic()
def norm_weights(
    models: AnyModels,
    *,
    base: AnyModel,
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
    and models share; nothing is merged. The formulas are in docs/recipes.md. Base and models may also be in
    memory, of every kind that :func:`alnico.merge_models` takes.

    Options:
        models: Models: directories, files, URLs, or owner/name@revision on the hub.
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
    named = name_models(models)
    base_label = name_model(base, "base", named)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base_label,
        "models": list(named),
        "parameters": {"weight": setting_of(mode, beta, alpha, scale, per, analysis)},
        "missing": "drop",
        "unrelated": "allow",
    }
    run = RunOptions.of(memory=memory, threads=threads, offline=offline)
    with open_models({base_label: base, **named}, base=base, access=Access(offline)) as opened:
        return compute_norm_weights(opened.plan(recipe, run=run))
