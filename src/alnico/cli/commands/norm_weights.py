"""``alnico norm-weights``: weights derived from how far models are from their base."""

from __future__ import annotations

import json
from typing import Any

import click

from alnico.cli import quick
from alnico.cli.command import CommandCall, command
from alnico.cli.commands import merge
from alnico.cli.options import JSON, Flag, dtype_names, method_names
from alnico.cli.printing import Page, page
from alnico.engine.norm_weights import NormWeights
from alnico.recipe.from_options import Words, recipe_of_options
from alnico.recipe.norm_weight import setting_of

OF_THE_MERGE = ("method", "dtype", "missing", "unrelated", "overwrite")
"""The options that only ``--merge`` uses."""


@command(
    "alnico.norm_weights",
    analysis=Flag(spelled=("--from",), metavar="FOLDER"),
    json=JSON,
    more={
        "merge": Flag("Also merge the models with these weights, into OUT.", type=str, metavar="OUT"),
        "method": Flag(
            "Merge method of --merge; default: task_arithmetic.",
            type=str,
            metavar="NAME",
            complete=method_names,
        ),
        "dtype": Flag("Dtype of the merged model.", type=str, metavar="NAME", complete=dtype_names),
        "missing": Flag(
            "What --merge does with tensors that some models lack: error, copy or drop.", type=str
        ),
        "unrelated": Flag(
            "What --merge does with models that were not tuned from one base: error or allow.", type=str
        ),
        "overwrite": Flag("Let --merge replace an output of alnico.", type=bool, default=False),
    },
)
def run(call: CommandCall) -> None:
    if call["base"] in call["models"]:
        raise click.BadParameter(
            f"{call['base']} is the base, not one of the models. Leave it out of the models."
        )
    if call["merge"] is not None:
        _merge(call)
        return
    idle = next((p.label for p in call.command.parameters if p.name in OF_THE_MERGE and call[p.name]), None)
    if idle is not None:
        raise click.BadParameter(f"{idle} is an option of a merge. Add --merge OUT, or leave it out.")
    weights = call.invoke()
    call.note(weights.notes)
    call.show(weights.data, lambda: weights_text(weights))


def _merge(call: CommandCall) -> None:
    """Merge by a recipe with these weights, which the merge measures itself, and print them with the merge."""
    labels = {p.name: p.label for p in call.command.parameters}
    names = {**labels, "merge_method": labels["method"], "base_model": labels["base"], "weight": "weights"}
    recipe = recipe_of_options(
        call["models"],
        call["method"] or "task_arithmetic",
        base=call["base"],
        weights=setting_of(
            call["mode"], call["beta"], call["alpha"], call["scale"], call["per"], call["analysis"]
        ),
        dtype=call["dtype"],
        missing=call["missing"] or "error",
        unrelated=call["unrelated"] or "error",
        options={},
        words=Words(names, "{}", "Give {}".format),
    )
    merging = call.of(merge.run)
    with quick.words_of_options(quick.MergeWords(None, tuple(call["models"]), call["merge"])):
        results = merging.invoke(recipe=(recipe,), out=call["merge"])
    merge.show_merge(merging, results, call["merge"])


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
