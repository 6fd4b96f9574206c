"""``alnico norm-weights``: weights derived from how far models are from their base."""

from __future__ import annotations

import json
from typing import Any

import typer

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, Flag
from alnico.cli.printing import Page, page
from alnico.engine.norm_weights import NormWeights


@command("alnico.norm_weights", analysis=Flag(spelled=("--from",), metavar="FOLDER"), json=JSON)
def run(call: CommandCall) -> None:
    if call["base"] in call["models"]:
        raise typer.BadParameter(
            f"{call['base']} is the base, not one of the models. Leave it out of the models."
        )
    weights = call.invoke()
    call.note(weights.notes)
    call.show(weights.data, lambda: weights_text(weights))


def weights_text(result: NormWeights) -> Page:
    """Norms and weights, a line for each model (under the name of its layer or tensor), and the line of a recipe that gives them."""
    lines = [f"task vectors from {result.base}"]
    for place, norms, weights in zip(result.places, result.norms, result.weights, strict=True):
        lines += ["", *([place] if place else []), f"{'L2 norm':>14}  {'weight':>10}  model"]
        lines += [f"{n:14.4g}  {w:10.4f}  {m}" for n, w, m in zip(norms, weights, result.models, strict=True)]
    setting = ", ".join(f"{k}: {_plain(v)}" for k, v in result.setting.data().items())
    return page([*lines, "", "in a recipe, under parameters:", f"  weight: {{{setting}}}"])


def _plain(value: Any) -> str:
    return (
        f"{value:g}"
        if isinstance(value, float)
        else json.dumps(value)
        if not str(value).replace("_", "").isalnum()
        else str(value)
    )
