"""Are models of one architecture and size? What their configs say, and what is the matter where tensors do not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
"""What makes a model's size, and the keys of a config that say it, by the first one that is there."""

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
"""Keys of a config that change what weights mean and no shape; so do the counts of heads and the kind of model."""

SHOWN = 3
"""Tensors that a message names."""

NEARLY_ALL = 0.75
"""Share of the tensors that are not in all models beyond which dropping them is no advice: it would leave next to nothing."""

FEW = 0.1
"""Share of the tensors up to which those that do not fit are an exception that a filter can name."""


@dataclass(frozen=True)
class Misfit:
    """A tensor of the output that does not fit: its shape in each model (a position in the sources), None where it is not."""

    name: str
    shapes: Mapping[int, Shape | None]


def explain_mismatch(misfits: Sequence[Misfit], sources: Sequence[Source]) -> list[str] | None:
    """Say in the lines of one message why tensors do not fit: another size, or another kind of model. None if it is neither.

    Vocabularies of different sizes and single tensors are not explained here: their own messages say more.
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
    what = "of different kinds" if kinds else "of different sizes"
    said = [f"{_joined(kinds)} by their configs"] if kinds else []
    said += [f"{words} {_joined(values)}" for words, values in sizes]
    total = max(len(s.tensors) for s in involved)
    lines = [f"{_joined(labels)} are models {what}: {', '.join(said)}; expected one kind and size."]
    if reshaped:
        lines.append(f"  {len(reshaped)} of {total} tensors have another shape, such as")
        lines += _examples(reshaped, labels, models)
    for model, label in zip(models, labels, strict=True):
        absent = [m.name for m in lacking if m.shapes.get(model, ()) is None]
        if absent:
            lines.append(f"  {label} lacks {len(absent)} tensors, such as {_joined(absent[:SHOWN])}.")
    share = len(misfits) / max(total, 1)
    return [*lines, _advice(bool(reshaped), bool(kinds), dict(sizes), share)]


def config_notes(sources: Sequence[Source], donor: Source) -> list[str]:
    """What configs say of models whose tensors are merged or whose layers are stacked: another kind, or weights that mean something else."""
    notes = []
    for source in sources:
        pair = (donor, source)
        if source is donor or not all(s.config for s in pair):
            continue
        kinds = differing_kinds(pair)
        heads = [(words, values) for words, values in differing_sizes(pair) if words.endswith("heads")]
        others = [(key, [_short(_of(s)[key]) for s in pair]) for key in MEANINGS if _differs(key, pair)]
        said = [*([("model_type", kinds)] if kinds else []), *heads, *others]
        if said:
            notes.append(
                f"the configs of {donor.label} and {source.label} differ in {', '.join(f'{w} ({_joined(v)})' for w, v in said)}; "
                f"the output has those of {donor.label}, and weights made for others may not work with them."
            )
    return notes


def differing_kinds(sources: Sequence[Source]) -> list[str]:
    """The kind of each model as its config calls it, if they are not all the same; empty if one does not say."""
    kinds = [str(s.config.get("model_type") or "") for s in sources]
    return kinds if all(kinds) and len(set(kinds)) > 1 else []


def differing_sizes(sources: Sequence[Source]) -> list[tuple[str, list[str]]]:
    """Sizes that configs state differently, in words, with each model's."""
    found = []
    for words, keys in SIZES.items():
        values = [
            next((str(config[k]) for k in keys if isinstance(config.get(k), int)), "")
            for config in map(_of, sources)
        ]
        if all(values) and len(set(values)) > 1:
            found.append((words, values))
    return found


def _of(source: Source) -> Mapping[str, Any]:
    """The part of a config that describes the text model, where there are several parts."""
    inner = source.config.get("text_config")
    config = {**source.config, **inner} if isinstance(inner, dict) else source.config
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return config
    others = {
        key: value for key, value in rope.items() if key != "rope_theta"
    }  # transformers 5 writes in one what 4 wrote in two
    scaling = None if others.get("rope_type", "default") == "default" else others
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        **{k: v for k, v in config.items() if k != "rope_parameters"},
    }


def _differs(key: str, pair: Sequence[Source]) -> bool:
    configs = [_of(s) for s in pair]
    return all(key in c for c in configs) and configs[0][key] != configs[1][key]


def _widths(misfits: Sequence[Misfit]) -> list[str]:
    """The two widths that differ most often, for models without a config; empty for a few tensors, which speak for themselves."""
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
        held = [
            (label, misfit.shapes[m])
            for label, m in zip(labels, models, strict=True)
            if misfit.shapes.get(m) is not None
        ]
        shown.append(f"    {misfit.name}: {', '.join(f'{label} {shape}' for label, shape in held)}")
    return shown


def _advice(reshaped: bool, kinds: bool, sizes: Mapping[str, Any], share: float) -> str:
    few = share <= FEW
    ways = ["Use models of one kind and size" if kinds or reshaped else "Use models of one depth"]
    if few:
        ways.append(
            "take the tensors that do not fit from one model (methods: with a filter and merge_method: passthrough)"
        )
    if not reshaped and "layers" in sizes:
        ways.append("merge the layers that all have (slices with a layer_range)")
    if reshaped:
        ways.append("stack whole layers of one of them (slices, merge_method: passthrough)")
    elif share <= NEARLY_ALL:
        ways.append("say missing: copy or missing: drop")
    end = (
        " What one of them knows comes into the other by training alone (distillation)."
        if reshaped and not few
        else ""
    )
    return f"{', '.join(ways[:-1])}, or {ways[-1]}.{end}" if len(ways) > 1 else f"{ways[0]}.{end}"


def _joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
