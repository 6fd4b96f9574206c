"""What the command line prints of LoRA adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from alnico.cli.printing import Page, page
from alnico.numerics.sizes import format_size


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
