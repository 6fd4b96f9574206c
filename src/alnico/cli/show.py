"""Values as text for people, and as plain data for ``--json``."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alnico.checkpoint.output_path import existing_folder
from alnico.cli.printing import Page, page
from alnico.engine.fetch import absent_files
from alnico.engine.norm_weights import NormWeights
from alnico.engine.run import MergeResult
from alnico.methods.base import Method
from alnico.methods.shared.documentation import first_recipe, one_line, read_documentation, recipe_text, takes
from alnico.numerics.sizes import format_size
from alnico.plan.job import Plan, count_by_reason
from alnico.plan.layers import layer_position

WORDS = {"mix": "merged", "matrix": "merged", "copy": "copied", "equal": "copied"}


def result_line(result: MergeResult) -> str:
    """One line about a finished merge."""
    plan = result.plan
    resumed = f", {result.resumed} of them kept from before" if result.resumed else ""
    return (
        f"{result.path}: {len(plan.jobs)} tensors{resumed}, {plan.elements:,} parameters, "
        f"{format_size(plan.bytes_to_write)}, {result.seconds:.2f} s, {result.bytes_per_second / 1e9:.2f} GB/s"
    )


def result_data(result: MergeResult) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "seconds": round(result.seconds, 4),
        "bytes_read": result.plan.bytes_to_read,
        "bytes_written": result.plan.bytes_to_write,
        "parameters": result.plan.elements,
        "resumed_tensors": result.resumed,
        **(
            {"weights": [w.data(result.plan.sources) for w in result.plan.weighings]}
            if result.plan.weighings
            else {}
        ),
        "notes": list(result.plan.notes),
        "digests": result.digests,
    }


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
    lines += [f"data      {s.label} (statistics)" for s in plan.statistics]
    lines += [f"layers    {line}" for line in _layers(plan)]
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
    lines += [f"weights   {line}" for line in weighing_lines(plan)]
    memory = plan.memory
    lines.append(
        f"memory    at most {format_size(memory.peak_bytes)} of {format_size(memory.budget_bytes)}, {memory.threads} threads"
    )
    absent = absent_files(plan, side_files=True)
    if any(absent):
        total = format_size(sum(sum(files.values()) for files in absent))
        lines.append(
            f"download  {sum(map(len, absent))} files, {total}, into the hub's cache before the merge"
        )
    with suppress(OSError):  # a working directory that is gone
        folder = existing_folder(out or Path("out"))
        lines.append(f"disk      {format_size(shutil.disk_usage(folder).free)} free at {folder}")
    return page(lines + [f"note      {note}" for note in plan.notes])


def weighing_lines(plan: Plan) -> list[str]:
    """What weights follow from: a line for those of one setting and models, with the weights where they are known for whole models."""
    groups: dict[Any, list[Any]] = {}
    for weighing in plan.weighings:
        groups.setdefault((weighing.setting, weighing.models), []).append(weighing)
    lines = []
    for (setting, models), group in groups.items():
        first, tensors = group[0], sum(len(w.tensors) for w in group)
        told = setting.data()
        how = ", ".join(f"{key} {told[key]:g}" for key in ("beta", "alpha", "scale") if key in told)
        parts = f", by layer in {len(group)} groups" if setting.per == "layer" else ", each by itself"
        origin = (
            f"as {setting.path} has them" if setting.origin == "analysis" else "measured before the merge"
        )
        lines.append(
            f"{setting.mode} ({how}) of the L2 norms of {tensors} tensors{parts if setting.per != 'model' else ''}, {origin}"
        )
        if first.norms is not None and len(group) == 1:
            entries = first.data(plan.sources)["models"]
            lines += [f"  {e['weight']:.6f}  {e['model']} (L2 norm {e['l2_norm']:.6g})" for e in entries]
        else:
            lines.append(f"  {', '.join(plan.sources[m].label for m in models)}")
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


def model_text(data: Mapping[str, Any], verbose: int) -> Page:
    """A model for people; groups of tensors that differ in a layer's number only are one line unless ``verbose``."""
    vocabulary = data["vocabulary"]
    lines = [
        f"model         {data['model']}{' (commit ' + data['commit'][:12] + ')' if 'commit' in data else ''}",
        f"architecture  {_names(data['architectures'])}"
        + "".join(
            f", {data[k]} {w}"
            for k, w in (("layers", "layers"), ("hidden_size", "wide"))
            if data[k] is not None
        ),
        f"vocabulary    {vocabulary['config'] or 'unknown'} rows in the config, "
        f"{vocabulary['tokens'] or 'unknown'} tokens in the tokenizer",
        f"parameters    {data['parameters']:,} in {len(data['tensors'])} tensors, {format_size(data['bytes'])}",
    ]
    for dtype, entry in data["dtypes"].items():
        held = f"{entry['tensors']} tensors, {entry['parameters']:,} numbers, {format_size(entry['bytes'])}"
        lines.append(f"dtype         {dtype}: {held}")
    for file in data["files"]:
        lines.append(f"file          {file['name']}: {file['tensors']} tensors, {format_size(file['bytes'])}")
    groups: dict[tuple[str, str, str], int] = {}
    for tensor in data["tensors"]:
        name = (
            tensor["name"]
            if verbose
            else ".".join("*" if part.isdigit() else part for part in tensor["name"].split("."))
        )
        key = (name, tensor["dtype"], str(tuple(tensor["shape"])))
        groups[key] = groups.get(key, 0) + 1
    lines += [f"{count:5} x  {dtype:5} {shape:20} {name}" for (name, dtype, shape), count in groups.items()]
    return page(lines)


def weights_text(found: NormWeights) -> Page:
    """Norms and weights, a line a model (under the name of its layer or tensor), and the line of a recipe that gives them."""
    lines = [f"task vectors from {found.base}"]
    for place, norms, weights in zip(found.places, found.norms, found.weights, strict=True):
        lines += ["", *([place] if place else []), f"{'L2 norm':>14}  {'weight':>10}  model"]
        lines += [f"{n:14.8f}  {w:10.6f}  {m}" for n, w, m in zip(norms, weights, found.models, strict=True)]
    told = ", ".join(f"{k}: {_plain(v)}" for k, v in found.setting.data().items())
    return page([*lines, "", "in a recipe, under parameters:", f"  weight: {{{told}}}"])


def _plain(value: Any) -> str:
    return (
        f"{value:g}"
        if isinstance(value, float)
        else json.dumps(value)
        if not str(value).replace("_", "").isalnum()
        else str(value)
    )


def _names(architectures: Any) -> str:
    """What a config says of its architecture, whatever it holds there."""
    listed = architectures if isinstance(architectures, list) else [architectures]
    return ", ".join(str(a) for a in listed if a) or "unknown"


def method_data(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "space": method.space,
        "base": method.base,
        "models": list(method.models),
        "source": method.source,
        "options": {o.name: o.describe() for o in method.options.values()},
        "documentation": method.documentation,
    }


def methods_text(methods: Iterable[Method]) -> Page:
    """A line a method, those that average models before those that add to a base."""
    every = list(methods)
    width, room = max(len(m.name) for m in every), max(len(takes(m)) for m in every)
    lines = [f"{'method':{width}}  {'models':{room}}  what it does"]
    for title, deltas in (
        ("Of models as they are:", False),
        ("Of task vectors (model - base), added to the base:", True),
    ):
        group = [m for m in every if (m.base == "required") == deltas]
        lines += (
            ["", title, *(f"{m.name:{width}}  {takes(m):{room}}  {m.summary}" for m in group)]
            if group
            else []
        )
    return page(
        [
            *lines,
            "",
            "`alnico methods NAME` shows one in full: when to use it, formula, options, a recipe, cost, source.",
        ]
    )


def method_text(method: Method) -> Page:
    """All of a method for people, in the width of a terminal."""
    told = read_documentation(method)
    lines = [method.name, "=" * len(method.name), "", *_wrapped(told.summary), ""]
    lines += [
        line for part in told.formula.replace("; ``", ";\n``").splitlines() for line in _wrapped(part)
    ] + [""]
    lines += _entry("models", takes(method))
    lines += _entry("use when", told.parts.get("Use when", ""))
    lines += _entry("cost", told.parts.get("Measures", ""))
    lines += [
        "",
        "Options, under parameters or under a model:"
        if any(o.per_model for o in method.options.values())
        else "Options:",
    ]
    for option in method.options.values():
        lines += [
            f"  {option.name}: {option.describe()}",
            *_wrapped(told.options.get(option.name, option.meaning), "      "),
        ]
    lines += [f"  preset {name}: {one_line(values)}" for name, values in method.presets.items()]
    lines += ["", "A recipe:", *(f"  {line}" for line in recipe_text(first_recipe(method)).splitlines()), ""]
    for label in ("Edge cases", "Errors", "Differs from the source", "Source"):
        lines += _entry(
            label.lower().replace("differs from the source", "differs"), told.parts.get(label, "")
        )
    return page(lines)


def _entry(label: str, text: str) -> list[str]:
    """A label and what it says beside it; nothing where nothing is said."""
    first, *rest = _wrapped(text, " " * 12) or [""]
    return [f"{label:12}{first[12:]}", *rest] if text else []


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text.replace("``", ""),
        100,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
