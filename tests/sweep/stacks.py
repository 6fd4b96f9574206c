"""Layers of one model in other orders, for every causal architecture: ``python tests/sweep/stacks.py [ARCHITECTURE ...]``.

Each is made with eight layers, put together by a recipe in each order of ``ORDERS``, loaded by transformers and compared with the module
whose layers were moved by hand. It prints ``equal``, ``refused`` with the message, or ``WRONG``, and exits 1 if one is wrong.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [p for p in (str(Path(__file__).parent.parent),) if p not in sys.path]

import architectures  # noqa: E402

LAYERS = 8
ORDERS: dict[str, list[tuple[int, int]]] = {
    "stacked": [(0, 5), (3, 8)],
    "prefix": [(0, 5)],
    "doubled": [(0, 4), (2, 4), (4, 8)],
    "reordered": [(0, 2), (4, 6), (2, 4), (6, 8)],
    "tail": [(2, 8)],
}
COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)
INDICES = ("no_rope", "mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs")
NUMBERS = ("layer_idx", "layer_id", "layer_number", "block_idx")


def stack_of(module: Any) -> str:
    """The list of layers with the most parameters, of the text decoder where there are others."""
    import torch

    lists = {
        n: m for n, m in module.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS
    }
    lists = {
        n: m for n, m in lists.items() if not any(word in n for word in ("vis", "image", "audio"))
    } or lists
    return max(lists, key=lambda n: sum(p.numel() for p in lists[n].parameters()))


def put_together(module: Any, order: Sequence[int]) -> Any:
    """The module a person would put together: layers moved, their numbers set, and lists by layer in the config in their order."""
    import torch

    path = stack_of(module)
    hand = copy.deepcopy(module)
    moved = torch.nn.ModuleList(copy.deepcopy(module.get_submodule(path)[i]) for i in order)
    for place, layer in enumerate(moved):
        for part in layer.modules():
            for key in NUMBERS:
                if isinstance(getattr(part, key, None), int):
                    setattr(part, key, place)
    parent, _, name = path.rpartition(".")
    setattr(hand.get_submodule(parent), name, moved)
    config = hand.config.get_text_config(decoder=True)
    for key, value in list(vars(config).items()):
        if (
            key in INDICES
            and isinstance(value, list)
            and value
            and not (key == "no_rope" and len(value) == LAYERS)
        ):
            vars(config)[key] = [place for place, i in enumerate(order) if i in value]
        elif isinstance(value, list | tuple) and len(value) == LAYERS:
            vars(config)[key] = [value[i] for i in order]
        elif key in COUNTS and value == LAYERS:
            vars(config)[key] = len(order)
    shared = vars(config).get("num_kv_shared_layers")
    if shared:
        is_shared = [i >= LAYERS - shared for i in order]
        vars(config)["num_kv_shared_layers"] = len(order) - max(
            (p + 1 for p, s in enumerate(is_shared) if not s), default=0
        )
    for part in hand.modules():
        if type(getattr(part, "config", None)) is type(config):
            part.config = config
        for key in COUNTS:
            if vars(part).get(key) == LAYERS:
                setattr(part, key, len(order))
    return hand


def logits(module: Any) -> Any:
    import torch

    tokens = (torch.arange(24)[None] * 7) % 90 + 3
    with torch.no_grad():
        found = module(input_ids=tokens, use_cache=False)
    return found.logits if hasattr(found, "logits") else found[0]


def outcomes(
    name: str, folder: Path, orders: Sequence[str] = tuple(ORDERS), **options: Any
) -> dict[str, str]:
    """What each order came to: ``equal``, ``refused: why``, or ``WRONG: what``."""
    import torch

    import alnico

    architectures.make(name, layers=LAYERS, **options).save_pretrained(folder / "base")
    kind = type(architectures.make(name, layers=LAYERS, **options))
    module, before = kind.from_pretrained(folder / "base", output_loading_info=True)
    known = {key: set(before[key]) for key in ("missing_keys", "unexpected_keys")}
    found = {}
    for order in orders:
        slices = [
            {"sources": [{"model": str(folder / "base"), "layer_range": list(r)}]} for r in ORDERS[order]
        ]
        try:
            alnico.merge({"merge_method": "passthrough", "slices": slices}, folder / order)
        except alnico.errors.AlnicoError as error:
            found[order] = f"refused: {error}"
            continue
        try:
            loaded, report = kind.from_pretrained(folder / order, output_loading_info=True)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            found[order] = f"WRONG: cannot be loaded: {error}"
            continue
        odd = {key: sorted(set(report[key]) - names) for key, names in known.items()}
        if any(odd.values()):
            found[order] = f"WRONG: {odd}"
            continue
        expected, got = (
            logits(put_together(module.eval(), [i for low, high in ORDERS[order] for i in range(low, high)])),
            logits(loaded.eval()),
        )
        is_equal = expected.shape == got.shape and torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
        found[order] = "equal" if is_equal else f"WRONG: logits differ by {(expected - got).abs().max()}"
    return found


def main(names: Sequence[str]) -> int:
    wrong = 0
    for name in names or architectures.of_kind("causal_lm"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = outcomes(name, Path(folder))
            except Exception as error:  # one that cannot be made so deep, or takes other inputs
                print(f"{name}: untested: {type(error).__name__}: {str(error)[:120]!r}", flush=True)
                continue
        wrong += sum(outcome.startswith("WRONG") for outcome in found.values())
        print(name, "equal" if set(found.values()) == {"equal"} else json.dumps(found, indent=1), flush=True)
    print(f"wrong: {wrong}")
    return int(wrong > 0)


if __name__ == "__main__":
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(main(sys.argv[1:]))
