"""Reads recipes that build a mixture of experts from dense models: mergekit-moe's keys, and ours."""

from __future__ import annotations

import dataclasses
from typing import Literal

from alnico.recipe import scalars
from alnico.recipe.experts import GATE_MODES, OF_PROMPTS, SHARPNESS, Expert, GateMode, Mixture, OutsideExperts
from alnico.recipe.keys import EXPERT, MIXTURE, Keys
from alnico.recipe.models import MAX_MODELS, read_reference
from alnico.recipe.schema import Recipe
from alnico.recipe.yaml_nodes import Document, Node, ParseContext, quote, shorten

MAX_EXPERTS = 1_000
MAX_PROMPTS = 10_000

ARCHITECTURES = ("mixtral", "qwen", "deepseek")
"""The kinds of mixtures, as ``architecture`` names them."""

OF_MERGES = ("merge_method", "models", "checkpoints", "slices", "modules", "methods", "parameters")
"""Keys of a recipe that merges, which a mixture cannot have."""


def read_mixture(document: Document, reading: ParseContext, folder: str) -> Recipe | None:
    """Read a document that has ``experts``; None if it has mistakes, which are reported."""
    before = len(reading.mistakes)
    root = document.root
    reading.notes = list(document.notes)
    both = [key for key in OF_MERGES if key in root.value]
    if both:
        reading.wrong(
            root.value[both[0]].line,
            f"{both[0]} and experts are both given; expected a merge, or a mixture. Make what the mixture is built from by a "
            "document of its own, and name that as source_model.",
        )
        return None
    keys = _known(root, "", MIXTURE, reading)
    base = read_reference(keys.get("base_model"), "base_model", root.line, reading)
    experts = _experts(keys["experts"], "experts", reading)
    shared = _experts(keys["shared_experts"], "shared_experts", reading) if "shared_experts" in keys else ()
    mode = _choice(keys.get("gate_mode"), "gate_mode", GATE_MODES, "hidden", reading)
    count = scalars.lenient_integer(keys.get("experts_per_token"), "experts_per_token", 1, reading)
    dtype, out_dtype = (scalars.dtype(_given(keys, name), name, reading) for name in ("dtype", "out_dtype"))
    scale = _positive(keys.get("gate_scale"), "gate_scale", reading)
    ridge = _positive(keys.get("ridge"), "ridge", reading)
    mixture = Mixture(
        experts=experts,
        shared=shared,
        architecture=_architecture(_given(keys, "architecture"), reading),
        experts_per_token=2 if count is None else count,
        gate_mode=mode,
        gates=scalars.text(keys.get("gates"), "gates", reading),
        gate_scale=(SHARPNESS if mode == "ridge" else 1.0) if scale is None else scale,
        ridge=0.01 if ridge is None else ridge,
        others=_others(keys.get("others"), reading),
    )
    recipe = Recipe(
        merge_method="passthrough",
        base_model=base,
        dtype=out_dtype or dtype,
        seed=scalars.seed(keys.get("seed"), reading),
        unrelated=scalars.unrelated(keys.get("unrelated"), reading),
        mixture=mixture,
        stage=scalars.text(keys.get("name"), "name", reading) or "",
        name=reading.name,
        folder=folder,
        text=document.text,
    )
    if len(reading.mistakes) == before:
        _check(mixture, keys, reading)
    if len(reading.mistakes) > before:
        return None
    return dataclasses.replace(recipe, notes=tuple(reading.notes), written_seed=recipe.seed)


def _known(node: Node, where: str, keys: Keys, reading: ParseContext) -> dict[str, Node]:
    """Return the keys of a mapping; report unknown ones, and read a misspelt key as the key that is missing."""
    held: dict[str, Node] = {}
    for key, value in node.value.items():
        meant: str | None = key
        if key not in keys:
            meant = scalars.misspelt_key(key, [k for k in keys if k not in node.value and k not in held])
            hint = f"Did you mean {meant}?" if meant else scalars.nearest(key, list(keys))
            start = f"{where} has the unknown key" if where else "unknown key"
            reading.wrong(value.line, f"{start} {shorten(key)!r}. {hint}")
        held[meant or key] = value
    return held


def _given(keys: dict[str, Node], name: str) -> Node | None:
    """Return the value of a key that counts as missing if it is empty."""
    return keys[name] if name in keys and keys[name].value is not None else None


def _experts(node: Node, where: str, reading: ParseContext) -> tuple[Expert, ...]:
    is_shared = where == "shared_experts"
    if is_shared and node.value in (None, []):
        return ()
    if not isinstance(node.value, list) or not 0 < len(node.value) <= MAX_EXPERTS:
        actual = f"a list of {len(node.value)}" if isinstance(node.value, list) else node.kind
        reading.wrong(
            node.line, f"{where} is {actual}; expected a list of experts, each with its source_model."
        )
        return ()
    if is_shared and len(node.value) > 1:
        reading.wrong(
            node.line,
            f"{where} is a list of {len(node.value)}; expected one: the architectures have one shared expert. Average several "
            "with source_models.",
        )
        return ()
    experts = [_expert(item, f"{where}[{i}]", reading) for i, item in enumerate(node.value)]
    return tuple(expert for expert in experts if expert is not None)


def _expert(node: Node, where: str, reading: ParseContext) -> Expert | None:
    if isinstance(node.value, str):
        node = Node({"source_model": node}, node.line)
    if not isinstance(node.value, dict):
        reading.wrong(node.line, f"{where} is {node.kind}; expected a mapping with source_model.")
        return None
    keys = _known(node, where, EXPERT, reading)
    models = _models(node, keys, where, reading)
    noise = (
        scalars.finite_number(keys.get("noise_scale"), f"{where}.noise_scale", node.line, reading)
        if _given(keys, "noise_scale")
        else 0.0
    )
    if noise:
        reading.wrong(
            keys["noise_scale"].line,
            f"{where}.noise_scale is {quote(keys['noise_scale'].value)}; expected 0: alnico adds no noise to weights, which is of use "
            "only where the mixture is trained afterwards. Leave it out, and add noise there.",
        )
    residual = (
        scalars.finite_number(keys.get("residual_scale"), f"{where}.residual_scale", node.line, reading)
        if _given(keys, "residual_scale")
        else 1.0
    )
    rank = _positive(keys.get("rank"), f"{where}.rank", reading)
    if rank is not None and rank > 1:
        reading.wrong(
            keys["rank"].line,
            f"{where}.rank is {quote(keys['rank'].value)}; expected the share of singular vectors that is kept, in (0, 1].",
        )
        rank = None
    if rank not in (None, 1.0) and (len(models) > 1 or residual != 1):
        other = "source_models" if len(models) > 1 else "residual_scale"
        reading.wrong(
            keys["rank"].line,
            f"{where} has rank and {other}; expected one of them. Make the expert by a document of its own, and name that as "
            "source_model.",
        )
    return Expert(
        models=models,
        positive_prompts=_prompts(_given(keys, "positive_prompts"), f"{where}.positive_prompts", reading),
        negative_prompts=_prompts(_given(keys, "negative_prompts"), f"{where}.negative_prompts", reading),
        residual_scale=1.0 if residual is None else residual,
        rank=1.0 if rank is None else rank,
        gram=scalars.text(_given(keys, "gram"), f"{where}.gram", reading),
    )


def _models(node: Node, keys: dict[str, Node], where: str, reading: ParseContext) -> tuple[str, ...]:
    several = keys.get("source_models")
    if several is None or "source_model" in keys:
        if several is not None:
            reading.wrong(
                several.line,
                f"{where} has source_model and source_models; expected one of them. Leave one out.",
            )
        one = read_reference(keys.get("source_model"), f"{where}.source_model", node.line, reading)
        return () if one is None else (one,)
    if not isinstance(several.value, list) or not 0 < len(several.value) <= MAX_MODELS:
        reading.wrong(
            several.line,
            f"{where}.source_models is {several.kind}; expected a list of models to average.{' Did you mean source_model?' if isinstance(several.value, str) else ''}",
        )
        return ()
    read = [
        read_reference(item, f"{where}.source_models[{i}]", several.line, reading)
        for i, item in enumerate(several.value)
    ]
    return tuple(model for model in read if model is not None)


def _prompts(node: Node | None, where: str, reading: ParseContext) -> tuple[str, ...]:
    if node is None:
        return ()
    prompts = node.value if isinstance(node.value, list) else None
    if prompts is None or len(prompts) > MAX_PROMPTS:
        actual = node.kind if prompts is None else f"a list of {len(prompts)}"
        reading.wrong(node.line, f"{where} is {actual}; expected a list of at most {MAX_PROMPTS} texts.")
        return ()
    texts = [scalars.multiline_text(item, f"{where}[{i}]", reading) for i, item in enumerate(prompts)]
    return tuple(text for text in texts if text is not None)


def _positive(node: Node | None, where: str, reading: ParseContext) -> float | None:
    if node is None or node.value is None:
        return None
    value = scalars.finite_number(node, where, node.line, reading)
    if value is not None and value <= 0:
        reading.wrong(node.line, f"{where} is {node.kind}; expected a number above 0.")
        return None
    return value


def _choice(
    node: Node | None, where: str, choices: tuple[GateMode, ...], default: GateMode, reading: ParseContext
) -> GateMode:
    if node is None or node.value is None:
        return default
    chosen = next((choice for choice in choices if choice == node.value), None)
    if chosen is None:
        hint = scalars.nearest(str(node.value), choices) if isinstance(node.value, str) else ""
        reading.wrong(node.line, f"{where} is {node.kind}; expected {', '.join(choices)}. {hint}".rstrip())
    return chosen or default


def _others(node: Node | None, reading: ParseContext) -> OutsideExperts:
    choices: tuple[Literal["base"], Literal["average"]] = ("base", "average")
    if node is None:
        return "base"
    for choice in choices:
        if node.value == choice:
            return choice
    reading.wrong(node.line, f"others is {node.kind}; expected base or average.")
    return "base"


def _architecture(node: Node | None, reading: ParseContext) -> str | None:
    """Read the kind of mixture. mergekit reads the beginning of its name, such as qwen for Qwen MoE."""
    name = scalars.text(node, "architecture", reading)
    if node is None or name is None:
        return None
    plain = name.casefold().replace("-", " ").split()[0]
    found = next((a for a in ARCHITECTURES if a.startswith(plain) or plain in (f"{a}2", f"{a}3")), None)
    if found is None:
        reading.wrong(
            node.line,
            f"architecture is {quote(name)}; expected {', '.join(ARCHITECTURES[:-1])} or {ARCHITECTURES[-1]}. "
            f"{scalars.nearest(plain, ARCHITECTURES)}",
        )
    return found


def _check(mixture: Mixture, keys: dict[str, Node], reading: ParseContext) -> None:
    """Report mistakes that only the whole mixture shows."""
    line = keys["experts"].line
    if len(mixture.experts) < mixture.experts_per_token:
        reading.wrong(
            line,
            f"there are {len(mixture.experts)} experts, and a token passes {mixture.experts_per_token}; expected at least as many "
            "experts. Add experts, or lower experts_per_token.",
        )
    asks = [(expert.positive_prompts, expert.negative_prompts) for expert in mixture.experts]
    if mixture.gate_mode in OF_PROMPTS:
        without = [i for i, (positive, _) in enumerate(asks) if not positive]
        if without:
            reading.wrong(
                line,
                f"experts[{without[0]}] has no positive_prompts, and gate_mode is {mixture.gate_mode}; expected prompts of every "
                "expert. Add some, or choose the gate_mode ridge or random.",
            )
        elif len(asks) > 1 and len(set(asks)) == 1:
            reading.wrong(
                line,
                "all experts have the same prompts, so no gate could tell them apart; expected prompts of what each expert is "
                "for. Change them, or choose the gate_mode random and train the mixture.",
            )
    elif mixture.gates is not None:
        reading.wrong(
            keys["gates"].line,
            f"gates are measured from prompts, and gate_mode is {mixture.gate_mode}; expected hidden, hidden_avg or cheap_embed. "
            "Leave gates out.",
        )
    elif any(map(any, asks)):
        reading.note(line, f"prompts have no effect: gate_mode is {mixture.gate_mode}.")
    if mixture.gate_mode == "ridge":
        lacking = [i for i, expert in enumerate(mixture.experts) if expert.gram is None]
        if lacking:
            reading.wrong(
                line,
                f"experts[{lacking[0]}] has no gram, and gate_mode is ridge; expected the statistics of every expert. Measure them "
                "with `alnico statistics gram`.",
            )
    else:
        for key in ("ridge",):
            if key in keys:
                reading.note(keys[key].line, f"{key} has no effect: gate_mode is {mixture.gate_mode}.")
        if any(expert.gram is not None for expert in mixture.experts):
            reading.note(line, f"gram has no effect: gate_mode is {mixture.gate_mode}.")
