"""Explains mismatches of models with different architectures or sizes, from configs and shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alnico.checkpoint.quantised.dequantised_model import quantised_kinds
from alnico.checkpoint.source import Source
from alnico.numerics.dtypes import Shape

SIZES = {
    "hidden size": ("hidden_size", "n_embd", "d_model", "dim"),
    "intermediate size": ("intermediate_size", "n_inner", "d_ff", "ffn_dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "attention heads": ("num_attention_heads", "n_head", "num_heads"),
    "key-value heads": ("num_key_value_heads",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}
"""Properties of a model's size, with the config keys that give them; the first key present applies."""

MEANINGS = (
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
)
"""Config keys that change the meaning of weights but no shape, as do head counts and the model type."""

SHOWN = 3
"""The number of tensors that a message names."""

NEARLY_ALL = 0.75
"""If more than this share of the tensors is not in all models, dropping them would leave almost nothing."""

FEW = 0.1
"""Up to this share of mismatched tensors, a filter can exclude them."""


@dataclass(frozen=True)
class Misfit:
    """A mismatched output tensor, with its shape by model (position in the sources); None if missing."""

    name: str
    shapes: Mapping[int, Shape | None]


def explain_mismatch(misfits: Sequence[Misfit], sources: Sequence[Source]) -> list[str] | None:
    """Return the lines of a message if models differ in size or kind; None otherwise.

    Vocabularies of different sizes and single tensors have their own, more precise messages.
    """
    models = sorted({model for misfit in misfits for model in misfit.shapes})
    if len(models) < 2:
        return None
    involved = [sources[m] for m in models]
    kinds, sizes = differing_kinds(involved), differing_sizes(involved)
    reshaped = [m for m in misfits if len({s for s in m.shapes.values() if s is not None}) > 1]
    if not kinds and not [words for words, _ in sizes if words != "layers" or not reshaped]:
        widths = [] if any(s.config for s in involved) else _widths(reshaped)
        if not widths:
            return None
        sizes = [("widths", widths)]
    lacking = [m for m in misfits if None in m.shapes.values()]
    labels = [s.label for s in involved]
    how = "of different architectures" if kinds else "of different sizes"
    differences = [f"model_type {_join(kinds)}"] if kinds else []
    differences += [f"{words} {_join(values)}" for words, values in sizes]
    total = max(len(s.tensors) for s in involved)
    lines = [
        f"{_join(labels)} are models {how}: {', '.join(differences)}; expected one architecture and size."
    ]
    if reshaped:
        lines.append(f"  {len(reshaped)} of {total} tensors have different shapes, such as")
        lines += _examples(reshaped, labels, models)
    for model, label in zip(models, labels, strict=True):
        absent = [m.name for m in lacking if m.shapes.get(model, ()) is None]
        if absent:
            lines.append(f"  {label} lacks {len(absent)} tensors, such as {_join(absent[:SHOWN])}.")
    share = len(misfits) / max(total, 1)
    return [*lines, _advice(bool(reshaped), bool(kinds), dict(sizes), share)]


def config_notes(sources: Sequence[Source], donor: Source) -> list[str]:
    """Return notes on merged or stacked models whose configs differ in kind or in the meaning of weights."""
    notes = []
    for source in sources:
        pair = (donor, source)
        if source is donor or not all(s.config for s in pair):
            continue
        kinds = differing_kinds(pair)
        heads = [(words, values) for words, values in differing_sizes(pair) if words.endswith("heads")]
        others = [
            (key, [_short(_text_config(s)[key]) for s in pair]) for key in MEANINGS if _differs(key, pair)
        ]
        differences = [*([("model_type", kinds)] if kinds else []), *heads, *others]
        if differences:
            notes.append(
                f"the configs of {donor.label} and {source.label} differ in "
                f"{', '.join(f'{w} ({_join(v)})' for w, v in differences)}; the output has those of "
                f"{donor.label}, and weights trained with another config may not work with it."
            )
    return notes


def differing_kinds(sources: Sequence[Source]) -> list[str]:
    """Return the ``model_type`` of each model if they differ; [] if they are equal or one is missing."""
    kinds = [str(s.config.get("model_type") or "") for s in sources]
    return kinds if all(kinds) and len(set(kinds)) > 1 else []


def differing_sizes(sources: Sequence[Source]) -> list[tuple[str, list[str]]]:
    """Return the sizes in which configs differ, each with every model's value."""
    differing = []
    for words, keys in SIZES.items():
        values = [
            next((str(config[k]) for k in keys if isinstance(config.get(k), int)), "")
            for config in map(_text_config, sources)
        ]
        if all(values) and len(set(values)) > 1:
            differing.append((words, values))
    return differing


def _text_config(source: Source) -> Mapping[str, Any]:
    """Return a config with the keys of its text part at the top level, in the layout of transformers 4."""
    inner = source.config.get("text_config")
    config = {**source.config, **inner} if isinstance(inner, dict) else source.config
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return config
    others = {
        key: value for key, value in rope.items() if key != "rope_theta"
    }  # transformers 5 has one key for what 4 had in two
    scaling = None if others.get("rope_type", "default") == "default" else others
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        **{k: v for k, v in config.items() if k != "rope_parameters"},
    }


def _differs(key: str, pair: Sequence[Source]) -> bool:
    configs = [_text_config(s) for s in pair]
    return all(key in c for c in configs) and configs[0][key] != configs[1][key]


def _widths(misfits: Sequence[Misfit]) -> list[str]:
    """Return the most frequent pair of differing widths, for models without config; [] if few differ."""
    pairs: Counter[tuple[int, int]] = Counter()
    for misfit in misfits:
        first, *rest = [s for s in misfit.shapes.values() if s is not None]
        other = next(s for s in rest if s != first)
        if len(first) == len(other):
            pairs.update({(a, b) for a, b in zip(first, other, strict=True) if a != b})
    common = pairs.most_common(1)
    return [str(width) for width in common[0][0]] if common and common[0][1] > SHOWN else []


def _examples(misfits: Sequence[Misfit], labels: Sequence[str], models: Sequence[int]) -> list[str]:
    shown = []
    for misfit in misfits[:SHOWN]:
        shapes = [
            (label, misfit.shapes[m])
            for label, m in zip(labels, models, strict=True)
            if misfit.shapes.get(m) is not None
        ]
        shown.append(f"    {misfit.name}: {', '.join(f'{label} {shape}' for label, shape in shapes)}")
    return shown


def _advice(reshaped: bool, kinds: bool, sizes: Mapping[str, Any], share: float) -> str:
    few = share <= FEW
    options = [
        "Use models of one architecture and size"
        if kinds or reshaped
        else "Use models with the same number of layers"
    ]
    if few:
        options.append(
            "copy the mismatched tensors from one model (methods: with a filter and merge_method: "
            "passthrough)"
        )
    if not reshaped and "layers" in sizes:
        options.append("merge the layers that all have (slices with a layer_range)")
    if reshaped:
        options.append("stack whole layers of one of them (slices, merge_method: passthrough)")
    elif share <= NEARLY_ALL:
        options.append("set missing: copy or missing: drop")
    end = " Only training (distillation) transfers knowledge between them." if reshaped and not few else ""
    return f"{', '.join(options[:-1])}, or {options[-1]}.{end}" if len(options) > 1 else f"{options[0]}.{end}"


def _join(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def quantisation_notes(models: Sequence[Source]) -> list[str]:
    """Return a note if models that are merged with one another are quantised in different ways, or only some of them are."""
    kinds = [quantised_kinds(model) for model in models]
    first = next((i for i, kind in enumerate(kinds) if kind), None)
    other = next((i for i, kind in enumerate(kinds) if first is not None and kind != kinds[first]), None)
    if first is None or other is None:
        return []
    return [
        f"{models[first].label} holds {' and '.join(sorted(kinds[first]))} and {models[other].label} holds "
        f"{' and '.join(sorted(kinds[other])) or 'none'}: what is between them is also the error of quantisation, which is as large as "
        "many a fine-tune's change. Use models of one precision, best the full one."
    ]
