"""``alnico inspect``: a model's tensors and sizes, or an adapter's ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, VERBOSE
from alnico.cli.printing import Page, page
from alnico.numerics.sizes import count_of, format_size


@command("alnico.inspect", json=JSON, verbose=VERBOSE)
def run(call: CommandCall) -> None:
    inspection = call.invoke()
    text = adapter_text if inspection.kind == "adapter" else model_text
    call.show(inspection.data, lambda: text(inspection.data(), call.verbose))


METADATA_FIRST = (
    "ss_base_model_version", "ss_sd_model_name", "modelspec.title", "modelspec.architecture", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "ss_output_name", "alnico.combined",
)  # fmt: skip
"""Keys of a LoRA file's header that are shown without ``-v``."""
MAX_SHOWN = 100
"""Most characters of a value of a header."""


def adapter_text(data: Mapping[str, Any], verbose: int) -> Page:
    """An adapter for people; updates that differ in a layer's number only are one line unless ``verbose``."""
    updates = data["updates"]
    ranks = sorted({u["rank"] for u in updates if u["rank"] is not None})
    kinds = sorted({u["kind"] for u in updates})
    described = [" and ".join(kinds)] + ([f"rank {' '.join(map(str, ranks))}"] if ranks else [])
    lines = [
        f"adapter       {data['adapter']}",
        *([f"dialect       {data['dialect']}"] if "dialect" in data else []),
        f"base          {data['base'] or 'not said'}",
        f"parameters    {data['parameters']:,}, {format_size(data['bytes'])}, {' and '.join(data['dtypes'])}",
        f"updates       {len(updates)}, {', '.join(described)}" if updates else "updates       none",
    ]
    if data.get("parts"):
        parts = (f"{part} ({count_of(count, 'module')})" for part, count in data["parts"].items())
        lines.insert(-1, f"changes       {', '.join(parts)}")
    groups: dict[tuple[Any, ...], int] = {}
    for update in updates:
        name = update["module"] if verbose else re.sub(r"(?<=[._])\d+(?=[._])", "N", update["module"])
        experts = f"{update['experts']} x " if "experts" in update else ""
        shape = f"{experts}{tuple(update['shape'])}"
        key = (name, update["rank"], update.get("alpha"), update["scale"], update["kind"], shape)
        groups[key] = groups.get(key, 0) + 1
    for (name, rank, alpha, scale, kind, shape), count in groups.items():
        with_alpha = f"alpha {alpha:<8.4g} " if alpha is not None else ""
        with_rank = "" if rank is None else rank
        lines.append(
            f"  {count:4} x  rank {with_rank:<4} {with_alpha}scale {scale:<8.4g} {kind:9} {shape:16}  {name}"
        )
    for title, names in (("replaced", data["replaced"]), ("vectors", data.get("vectors", ()))):
        if names:
            shown = names if verbose else names[:3]
            more = len(names) - len(shown)
            lines.append(f"{title:13} {', '.join(shown)}{f' and {more} more' if more else ''}")
    return page([*lines, *_metadata_lines(data.get("metadata", {}), verbose)])


def _metadata_lines(metadata: Mapping[str, str], verbose: int) -> list[str]:
    """The header of a LoRA file: the keys that say what it is for, or all of them."""
    keys = [key for key in METADATA_FIRST if key in metadata]
    others = [key for key in metadata if key not in METADATA_FIRST and key != "format"]
    shown = keys + (others if verbose else [])
    lines = [f"header        {key}: {_cut(metadata[key])}" for key in shown]
    if others and not verbose:
        lines.append(f"header        {count_of(len(others), 'more key')} (-v shows them)")
    return lines


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


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
    if "not_read_as_adapter" in data:
        lines.append(f"no adapter    {data['not_read_as_adapter']}")
    return page(lines)


def _names(architectures: Any) -> str:
    """What a config says of its architecture, whatever it holds there."""
    listed = architectures if isinstance(architectures, list) else [architectures]
    return ", ".join(str(a) for a in listed if a) or "unknown"
