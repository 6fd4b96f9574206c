"""Writes the config, card and lock of a combined adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from alnico._version import __version__
from alnico.checkpoint.lineage import LOCK, lineage_of
from alnico.checkpoint.lora_adapter import Adapter, is_saved_module
from alnico.checkpoint.reference import is_hub_reference
from alnico.checkpoint.source import unwrap
from alnico.checkpoint.statistics import compute_digest
from alnico.lora.combine_options import CombineOptions
from alnico.lora.matching import SharedModule, SharedSavedTensor
from alnico.lora.writer import OutputAdapter
from alnico.methods import find
from alnico.output.card import public_names

SELECTS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys that together select the modules with an update."""


def config_of(
    adapters: Sequence[Adapter], modules: Sequence[SharedModule], saved: Sequence[SharedSavedTensor]
) -> dict[str, Any]:
    """Return the keys of the config other than ranks and alphas: those the adapters agree on, and the modules they change."""
    configs = [a.config for a in adapters]
    config: dict[str, Any] = {
        "task_type": _agreed(configs, "task_type"),
        "base_model_name_or_path": next((a.trained_on for a in adapters if a.trained_on), None),
        "revision": _agreed(configs, "revision"),
        "fan_in_fan_out": any(c.get("fan_in_fan_out") for c in configs),
        "bias": next(
            (b for b in ("all", "lora_only") if saved and any(c.get("bias") == b for c in configs)), "none"
        ),
    }
    whole = dict.fromkeys(
        name for c in configs for name in c.get("modules_to_save") or [] if any(s.is_trained for s in saved)
    )
    if whole:
        config["modules_to_save"] = list(whole)
    # ensure_weight_tying trains modules that no list names; the output names them instead of tying them again.
    is_tied = any(c.get("ensure_weight_tying") for c in configs)
    if whole and is_tied:
        modules_of = [
            s.written.rpartition(".")[0]
            for s in saved
            if s.is_trained and not is_saved_module(config, s.written)
        ]
        config["modules_to_save"] += modules_of
    if not is_tied and all(
        tuple(a.updates) == tuple(adapters[0].updates) and _selects(a.config) == _selects(configs[0])
        for a in adapters
    ):
        config |= {key: configs[0][key] for key in SELECTS if configs[0].get(key) is not None}
    parameters = sorted({name for c in configs for name in c.get("target_parameters") or []})
    if parameters:
        config["target_parameters"] = parameters
        config.setdefault("target_modules", sorted({m.module for m in modules if m.kind != "parameter"}))
    return config


def _selects(config: Mapping[str, Any]) -> list[Any]:
    values = [config.get(key) for key in SELECTS]
    return [sorted(v) if isinstance(v, list) and all(isinstance(x, str) for x in v) else v for v in values]


def _agreed(configs: Sequence[Mapping[str, Any]], key: str) -> Any:
    values = [c.get(key) for c in configs]
    return values[0] if all(v == values[0] for v in values) else None


def card(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return the card's front matter. A base is named if it is a hub id, a licence if all adapters state the same one."""
    base = next((a.trained_on for a in adapters if a.trained_on), "")
    licences = [lineage_of(a.files).licence for a in adapters]
    return {
        **({"base_model": base, "base_model_relation": "adapter"} if is_hub_reference(base) else {}),
        "library_name": "peft" if adapters[0].dialect is None else "diffusers",
        "tags": ["lora", "merge", "alnico"],
        **(licences[0] if all(licence == licences[0] for licence in licences) else {}),
    }


def text(
    adapters: Sequence[Adapter],
    combination: CombineOptions,
    output: OutputAdapter,
    rank: int | None,
    energy: float | None,
    error: float,
    notes: Sequence[str],
) -> str:
    """Return the card's text: how the adapter was made."""
    names = public_names([a.files for a in adapters])
    ranks = sorted({m.rank for m in output.modules})
    limits = [f"rank {rank}"] * (rank is not None) + [f"energy {energy:g}" if energy is not None else ""] * (
        energy is not None
    )
    options = ", ".join(f"{k} {_shown(v)}" for k, v in combination.options.items() if k != "weight")
    method = find(combination.method).source if combination.kind == "delta" else ""
    lines = [
        "# A combination of " + ", ".join(names),
        "",
        f"LoRA adapters combined from their files with alnico {__version__} by `{combination.method}`"
        + (f" in the space `{combination.space}`" if combination.space else "")
        + (f" ({options})" if options else "")
        + (f", {' and '.join(limits)}." if limits else "."),
        *(["", f"Method: {method}."] if method else []),
        "",
        "| adapter | weight | commit | rank |",
        "|---|---|---|---|",
    ]
    for name, adapter, weight in zip(names, adapters, combination.weights, strict=True):
        origin = adapter.files.origin
        adapter_ranks = sorted({u.rank for u in adapter.updates.values()})
        commit = f"`{origin.commit[:12]}`" if origin else "not from the hub"
        lines.append(
            f"| {name.replace('|', chr(92) + '|')} | {weight:g} | {commit} | {_range(adapter_ranks)} |"
        )
    lines += [
        "",
        f"{len(output.modules)} updates of rank {_range(ranks)}, "
        f"{f'{len(output.saved)} whole tensors, ' if output.saved else ''}dtype {output.dtype}. "
        + (
            "No part of the result is dropped."
            if error == 0
            else f"The ranks drop {error:.2g} of the norm of the method's result; `{LOCK}` lists this for each update."
        ),
        *[line for note in notes for line in ("", f"Note: {note}")],
    ]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return (
        " / ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
        if isinstance(value, tuple)
        else str(value)
    )


def _range(numbers: Sequence[int]) -> str:
    if not numbers:
        return "none"
    return f"{numbers[0]}" if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"


def _digests(adapter: Adapter) -> dict[str, str]:
    """The hashes of the tensors of an adapter as its files hold them."""
    stored = unwrap(adapter.files)
    return {name: compute_digest(stored, name) for name in sorted(stored.tensors)}


def lock(
    adapters: Sequence[Adapter],
    combination: CombineOptions,
    rank: int | None,
    energy: float | None,
    saved: str,
    blocks: Sequence[str],
    seed: int,
    device: str,
    errors: Mapping[str, float],
) -> dict[str, Any]:
    """Return the contents of the lock; equal combinations give equal locks."""
    return {
        "do": "combine",
        "options": {
            **combination.data(),
            **({"rank": rank} if rank is not None else {}),
            **({"energy": energy} if energy is not None else {}),
            "saved": saved,
            **({"blocks": list(blocks)} if blocks else {}),
        },
        "seed": seed,
        "device": device,
        "inputs": [
            {
                "model": a.label,
                **(
                    {"repository": a.files.origin.name, "commit": a.files.origin.commit}
                    if a.files.origin is not None
                    else {}
                ),
                **lineage_of(a.files).data(),
                "files": [
                    {k: v for k, v in f.items() if k not in ("mtime_ns", "commit")}
                    for f in a.files.identity()
                ],
                "config": xxhash.xxh3_128_hexdigest(json.dumps(dict(a.config), sort_keys=True).encode()),
                "tensors": _digests(a),
            }
            for a in adapters
        ],
        "errors": dict(errors),
    }
