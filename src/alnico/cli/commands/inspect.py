"""``alnico inspect``: a model's tensors and sizes, or an adapter's ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, VERBOSE
from alnico.cli.printing import Page, page
from alnico.numerics.sizes import format_size


@command("alnico.inspect", json=JSON, verbose=VERBOSE)
def run(call: CommandCall) -> None:
    inspection = call.invoke()
    text = adapter_text if inspection.kind == "adapter" else model_text
    call.show(inspection.data, lambda: text(inspection.data(), call.verbose))


def adapter_text(data: Mapping[str, Any], verbose: int) -> Page:
    """An adapter for people; updates that differ in a layer's number only are one line unless ``verbose``."""
    updates = data["updates"]
    ranks = sorted({u["rank"] for u in updates})
    kinds = sorted({u["kind"] for u in updates})
    lines = [
        f"adapter       {data['adapter']}",
        f"base          {data['base'] or 'not said'}",
        f"parameters    {data['parameters']:,}, {format_size(data['bytes'])}, {' and '.join(data['dtypes'])}",
        f"updates       {len(updates)}, {' and '.join(kinds)}, rank {' '.join(map(str, ranks))}"
        if updates
        else "updates       none",
    ]
    groups: dict[tuple[str, int, float, str, str], int] = {}
    for update in updates:
        name = update["module"] if verbose else re.sub(r"(?<=\.)\d+(?=\.)", "N", update["module"])
        experts = f"{update['experts']} x " if "experts" in update else ""
        key = (name, update["rank"], update["scale"], update["kind"], f"{experts}{tuple(update['shape'])}")
        groups[key] = groups.get(key, 0) + 1
    for (name, rank, scale, kind, shape), count in groups.items():
        lines.append(f"  {count:4} x  rank {rank:<4} scale {scale:<8.4g} {kind:9} {shape:16}  {name}")
    if data["replaced"]:
        shown = data["replaced"] if verbose else data["replaced"][:3]
        more = len(data["replaced"]) - len(shown)
        lines.append(f"replaced      {', '.join(shown)}{f' and {more} more' if more else ''}")
    return page(lines)


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
    if "task_vector_of" in data:
        lines.insert(
            1, f"task vector   of {data['task_vector_of'] or 'an unknown base'}; it is no model without one"
        )
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


def _names(architectures: Any) -> str:
    """What a config says of its architecture, whatever it holds there."""
    listed = architectures if isinstance(architectures, list) else [architectures]
    return ", ".join(str(a) for a in listed if a) or "unknown"
