"""``alnico plan``: what a merge would do."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from alnico.checkpoint.lora_model import repositories
from alnico.checkpoint.output_path import check_publishable, existing_folder, is_single_file
from alnico.cli import quick
from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, VERBOSE, Flag, size_of
from alnico.cli.printing import Page, page, recipe_page, show_result
from alnico.cli.progress import matrices_line
from alnico.engine.fetch import absent_files
from alnico.engine.job_devices import devices_data, tensors_by_device
from alnico.engine.matrix_time import forecast_matrices
from alnico.engine.requested_bytes import requested_bytes
from alnico.errors import RecipeError
from alnico.numerics.sizes import count_of, format_size
from alnico.output.disk_space import check_disk, check_disk_at
from alnico.output.remote_target import RemoteTarget, output_place
from alnico.plan.job import Plan, count_by_reason
from alnico.plan.layers import layer_position
from alnico.recipe.load import MAX_BYTES, decode_recipes
from alnico.recipe.schema import DROP

WORDS = {"mix": "merged", "matrix": "merged", "copy": "copied", "equal": "copied"}


def mergekit_size_of(text: str, option: str) -> int:
    """Bytes of mergekit's ``--out-shard-size``, where 5B means 5 billion."""
    text = text.strip()
    is_billions = text[-1:] in ("b", "B") and text[-2:-1].isdigit()
    return size_of(f"{text[:-1]}GB" if is_billions else text, option)


MERGEKIT_SHARD_SIZE = Flag(type=str, is_hidden=True, parse=mergekit_size_of)


@command(
    "alnico.plan_documents",
    summary="Print what a merge would do, from headers alone: what is merged, copied, dropped and why, bytes, memory, disk.",
    also=quick.MAKER,
    fills=("single_file", "recipe", "models"),
    seed=Flag(also=("--random-seed",)),
    out=Flag("Where the output would be written: its disk is checked.", type=str, also=("-o",), default=""),
    out_shard_size=MERGEKIT_SHARD_SIZE,
    json=JSON,
    verbose=VERBOSE,
    more=quick.flags("RECIPE [OUT] | MODEL MODEL..."),
)
def run(call: CommandCall) -> None:
    check_signature_options(call)
    words = quick.read_words(call, call["out"], needs_out=False, has_out=False)
    if not print_recipe(call, words):
        show_plan(call, words)


def print_recipe(call: CommandCall, words: quick.MergeWords) -> bool:
    """Print the recipe of models and options, if that is all that is asked for."""
    if call["print_recipe"]:
        show_result(recipe_page(quick.recipe_of_words(call, words).text))
    return bool(call["print_recipe"])


def show_plan(call: CommandCall, words: quick.MergeWords) -> None:
    """Plan a merge and print the plan."""
    options = recipe_options(call, words)
    with quick.words_of_options(words):
        show_plans(call, options, words.out)


def show_plans(call: CommandCall, options: dict[str, Any], out: str) -> None:
    """Plan recipes with these options of the function, and print the plans."""
    single_file = Path(out).name if is_single_file(Path(out)) else None
    plans = call.invoke(**options, single_file=single_file)
    place = output_place(out) if out else None
    disk = place.unfinished if isinstance(place, RemoteTarget) else place
    if disk is not None:
        if not isinstance(place, RemoteTarget):
            check_publishable(disk, is_tried=False, may_be_gguf=True)
        for plan in plans:
            (check_disk_at if isinstance(place, RemoteTarget) else check_disk)(plan, disk)
    call.show(
        lambda: one_or_all([plan_data(plan) for plan in plans]),
        lambda: Page("\n\n".join(plan_text(p, call.verbose, disk) for p in plans)),
    )


def plan_data(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, with its GPUs and the forecast for whole matrices."""
    forecast = forecast_matrices(plan)
    devices = {"devices": devices_data(plan)} if plan.gpus else {}
    return (plan.summary() | devices) | (
        {"matrices": dataclasses.asdict(forecast) | {"seconds": round(forecast.seconds, 2)}}
        if forecast is not None
        else {}
    )


def recipe_options(call: CommandCall, words: quick.MergeWords) -> dict[str, Any]:
    """The recipe, and the size of shards, for the function of a command."""
    recipe = recipe_from(words.recipe) if words.recipe is not None else quick.recipe_of_words(call, words)
    return {"recipe": recipe, **shard_options(call)}


def shard_options(call: CommandCall) -> dict[str, Any]:
    """The size of shards, by mergekit's option of it. Errors: a wrong command line."""
    if call["out_shard_size"] is None:
        return {}
    if "max_shard_size" in call.given:
        raise click.BadParameter("--max-shard-size and --out-shard-size are one option. Leave one out.")
    return {"max_shard_size": call["out_shard_size"]}


def check_signature_options(call: CommandCall) -> None:
    """Refuse options about signatures that contradict each other. Errors: a wrong command line."""
    is_required = call.values.get("require_signed")
    if (is_required or call["allow_unsigned"]) and not call["verify_inputs"]:
        option = "--require-signed" if is_required else "--allow-unsigned"
        raise click.BadParameter(f"{option} needs a key to verify with. Give --verify-inputs KEY.")
    if is_required and call["allow_unsigned"]:
        raise click.BadParameter("--require-signed allows no --allow-unsigned. Leave one out.")


def recipe_from(reference: str) -> Any:
    """A path, or the text of standard input with a name for messages."""
    if reference != "-":
        return reference
    try:
        text = sys.stdin.buffer.read(MAX_BYTES + 1) or b""
    except (AttributeError, OSError, ValueError) as error:  # closed, or open for writing only
        raise RecipeError(
            f"standard input: cannot be read ({error}); expected a recipe. Send it there, or name a file."
        ) from None
    return decode_recipes(text, "standard input")


def one_or_all(documents: list[Any]) -> Any:
    """The data of one document alone; of several, a list."""
    return documents[0] if len(documents) == 1 else documents


def plan_text(plan: Plan, verbose: int, out: Path | None) -> Page:
    """The plan for people: groups of tensors with what is done to them, then bytes, memory and the disk of ``out`` (or of here)."""
    recipe = plan.recipe
    lines = [f"stage     {recipe.stage}"] if recipe.stage else []
    lines.append(f"method    {', '.join(recipe.methods_used)}, seed {recipe.seed}")
    for i, source in enumerate(plan.models):
        part = ["base"] if source.label == recipe.base_model else []
        part += ["gives config and tokenizer"] if i == plan.donor else []
        part += [f"commit {source.origin.commit[:12]}"] if source.origin is not None else []
        lines.append(f"model     {source.label}{' (' + '; '.join(part) + ')' if part else ''}")
    lines += [f"data      {s.label}{' (statistics)' if s.paths() else ''}" for s in plan.statistics]
    lines += [f"layers    {line}" for line in _layers(plan)]
    lines += [f"rule      {line}" for line in _rules(plan)]
    lines.append(
        f"output    {len(plan.jobs)} tensors, {plan.elements:,} parameters, dtype {plan.dtype or 'mixed'}"
    )
    for (kind, why), jobs in count_by_reason(plan.jobs).items():
        names = (
            ", ".join(j.name for j in jobs)
            if len(jobs) <= 3 or verbose
            else f"{jobs[0].name} to {jobs[-1].name}"
        )
        lines.append(f"  {WORDS[kind]:8}{len(jobs)}: {names}{' (' + why + ')' if why else ''}")
    reasons: dict[tuple[int, str], list[str]] = {}
    for dropped in plan.dropped:
        reasons.setdefault((dropped.model, dropped.why), []).append(dropped.name)
    for (model, why), left in reasons.items():
        shown = (
            ", ".join(left) if len(left) <= 3 or verbose else f"{len(left)} tensors, {left[0]} to {left[-1]}"
        )
        lines.append(f"  dropped {plan.sources[model].label}: {shown} ({why})")
    shards = f"{len(plan.shards)} files" if len(plan.shards) > 1 else plan.shards[0].name
    lines.append(
        f"bytes     read {format_size(plan.bytes_to_read)}, write {format_size(plan.bytes_to_write)} in {shards}"
    )
    if plan.bytes_to_request:
        parts = [f"{format_size(count)} {purpose}" for purpose, count in requested_bytes(plan).items()]
        lines.append(f"request   {format_size(plan.bytes_to_request)} of weights: {', '.join(parts)}")
    lines += [f"weights   {line}" for line in (*weighing_lines(plan), *schedule_lines(plan))]
    memory = plan.memory
    lines.append(
        f"memory    at most {format_size(memory.peak_bytes)} of {format_size(memory.budget_bytes)}, {memory.threads} threads"
    )
    if plan.gpus:
        for device, tensors in tensors_by_device(plan).items():
            most = f", at most {format_size(memory.gpu_bytes)} of its memory" if device.is_gpu else ""
            lines.append(f"device    {device}: {count_of(tensors, 'tensor')}{most}")
    if (forecast := forecast_matrices(plan)) is not None:
        lines.append(f"matrices  {matrices_line(forecast)} on this machine")
    absent = absent_files(plan, side_files=True)
    if any(absent):
        total = format_size(sum(sum(files.values()) for files in absent))
        into = "the hub's cache" if any(map(repositories, plan.sources)) else "a temporary folder"
        lines.append(f"download  {sum(map(len, absent))} files, {total}, into {into} before the merge")
    with suppress(OSError):  # a working directory that is gone
        folder = existing_folder(out or Path("out"))
        lines.append(f"disk      {format_size(shutil.disk_usage(folder).free)} free at {folder}")
    return page(lines + [f"note      {note}" for note in plan.notes])


def weighing_lines(plan: Plan) -> list[str]:
    """What weights follow from: a line for those of one setting and models, with the weights where they are known for whole models."""
    groups: dict[Any, list[Any]] = {}
    for weighing in plan.norm_weight_groups:
        groups.setdefault((weighing.setting, weighing.models), []).append(weighing)
    lines = []
    for (setting, models), group in groups.items():
        first, tensors = group[0], sum(len(w.tensors) for w in group)
        setting_data = setting.data()
        how = ", ".join(
            f"{key} {setting_data[key]:g}" for key in ("beta", "alpha", "scale") if key in setting_data
        )
        parts = f", by layer in {len(group)} groups" if setting.per == "layer" else ", each by itself"
        origin = {
            "analysis": f"as {setting.path} has them",
            "given": "as the recipe gives them",
            "l2_norm": "measured before the merge",
        }[setting.origin]
        lines.append(
            f"{setting.mode} ({how}) of the L2 norms of {tensors} tensors{parts if setting.per != 'model' else ''}, {origin}"
        )
        if first.norms is not None and len(group) == 1:
            entries = first.data(plan.sources)["models"]
            lines += [f"  {e['weight']:.4f}  {e['model']} (L2 norm {e['l2_norm']:.4g})" for e in entries]
        else:
            lines.append(f"  {', '.join(plan.sources[m].label for m in models)}")
    return lines


def schedule_lines(plan: Plan) -> list[str]:
    """The schedules that weights follow: what each is, and a line for each of its models."""
    lines = []
    for schedule in plan.schedules():
        shape, models = schedule["shape"], schedule["models"]
        named = shape if isinstance(shape, str) else f"[{', '.join(f'{factor:g}' for factor in shape)}]"
        decay = f", decay {schedule['decay']:g}" if "decay" in schedule else ""
        lines.append(f"{named}{decay}: a schedule over {count_of(len(models), 'model')}")
        lines += [f"  {entry['weight']:.6g}  {entry['model']}" for entry in models]
    return lines


def _rules(plan: Plan) -> list[str]:
    """Each rule under ``methods``: how many tensors it makes, and from which models."""
    lines = []
    for i, rule in enumerate(plan.rules):
        count = f"{rule.tensors} tensor{'' if rule.tensors == 1 else 's'}"
        models = " and ".join(plan.sources[m].label for m in rule.models)
        base = f" with base {plan.sources[rule.base].label}" if rule.base is not None else ""
        made = f" of {models}{base}" if models else ""
        how = "dropped" if rule.merge_method == DROP else f"by {rule.merge_method}{made}"
        lines.append(f"methods[{i}] ({rule.filter}): {count} {how}")
    return lines


def _layers(plan: Plan) -> list[str]:
    """Where the layers of slices come from: a line for neighbours that come from neighbours."""
    recipe = plan.recipe
    if not recipe.slices and not any(module.slices for module in recipe.modules):
        return []
    origins: dict[str, dict[int, dict[tuple[int, int], None]]] = {}
    for job in plan.jobs:
        place = layer_position(job.name)
        for given in job.merged:
            own = layer_position(given.name)
            if place is not None and own is not None:
                origins.setdefault(place.stack, {}).setdefault(place.layer, {})[given.model, own.layer] = None
    lines = []
    for stack, layers in origins.items():
        runs: list[list[int]] = []
        for layer in sorted(layers):
            before = layers.get(layer - 1, {}) if runs else {}
            if before and list(layers[layer]) == [(model, number + 1) for model, number in before]:
                runs[-1][1] = layer
            else:
                runs.append([layer, layer])
        for first, last in runs:
            parts = [f"{_range(n, n + last - first)} of {plan.sources[m].label}" for m, n in layers[first]]
            lines.append(f"{stack}{_range(first, last)} from {' and '.join(parts)}")
    return lines


def _range(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else f"{first}"
