"""The output's ``config.json`` where layers are put together anew: counts, lists by layer, and what must stay true of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alnico.checkpoint.model import Source
from alnico.errors import MismatchError
from alnico.numerics.dtypes import DTYPES
from alnico.plan import families
from alnico.plan.job import Job
from alnico.plan.layers import place_of, stacks
from alnico.plan.sections import Layer

Path = tuple[str, ...]
"""Keys from the top of a config down."""


def layered_config(
    config: Mapping[str, Any], stack: str, layers: Sequence[Layer], sources: Sequence[Source], donor: int, notes: list[str]
) -> dict[str, Any]:
    """Return ``config`` for a stack made of ``layers``.

    The number of layers is set wherever it stands; a list with an entry a layer takes each entry from the config of the model
    that the layer is from; a list of layer numbers is renumbered. A rule by number, such as "every second layer", is checked
    for every layer. Errors: MismatchError naming the key for a rule that the new order breaks.
    """
    old = stacks(sources[donor].tensors).get(stack, 0)
    changed = dict(config)
    places = [place for place in _places(config, stack) if _counts(_at(config, place), old)]
    if not config:
        return changed
    if not places:
        if len(layers) != old:
            notes.append(
                f"config.json does not say that there are {old} layers, so it cannot be made to say {len(layers)}. Check it by hand."
            )
        return changed
    for place in places:
        section = dict(_at(config, place))
        others = [_at(sources[layer.model].config, place) or _text(sources[layer.model].config) for layer in layers]
        _implied(section, old)
        _check_rules(section, others, layers, sources)
        _lists(section, others, layers, old, notes)
        for key in _counts(section, old):
            section[key] = len(layers)
        changed = _with(changed, place, section)
    return changed


def check_layers(jobs: Sequence[Job], stack: str, layers: Sequence[Layer], sources: Sequence[Source], donor: int) -> None:
    """Check that every layer of the output is one that the donor's config can describe: it has the tensors and shapes of one of the
    donor's own layers, and what is outside of the layers is there. Errors: MismatchError naming layer and tensor.
    """
    own: dict[int, dict[str, tuple[int, ...]]] = {}
    outside = []
    for name, tensor in sources[donor].tensors.items():
        place = place_of(name)
        if place is not None and place.stack == stack:
            own.setdefault(place.layer, {})[place.rest] = tensor.shape
        elif not families.is_vision(name) and DTYPES[tensor.dtype].kind == "float":
            outside.append(name)
    made: dict[int, dict[str, tuple[int, ...]]] = {}
    for job in jobs:
        place = place_of(job.name)
        if place is not None and place.stack == stack:
            made.setdefault(place.layer, {})[place.rest] = job.shape
    kinds = {frozenset(kind.items()) for kind in own.values()}
    label = sources[donor].label
    for number, kind in sorted(made.items()):
        if kinds and frozenset(kind.items()) not in kinds:
            nearest = min(own.values(), key=lambda k: len(k.items() ^ kind.items()))
            rest = min({r for r, _ in nearest.items() ^ kind.items()})
            origin = layers[number]
            raise MismatchError(
                f"{stack}{number}.{rest}: layer {origin.layer} of {sources[origin.model].label} has "
                f"{kind.get(rest, 'none')}, layers of {label}, whose config the output has, have {nearest.get(rest, 'none')}. "
                "Put layers together from models of one architecture and width."
            )
    names = {job.name for job in jobs}
    heads = families.tied_heads(sources[donor].config, sources[donor].tensors, outside)
    lost = [n for n in outside if n not in names and n not in heads]
    if lost:
        raise MismatchError(
            f"{lost[0]}: {label}, whose config the output has, has it; the model of the {'first' if families.comes_first(lost[0]) else 'last'} "
            f"slice, where it would come from, lacks it ({len(lost)} such tensors). Choose another order of slices, or another base_model."
        )


def _places(config: Mapping[str, Any], stack: str) -> list[Path]:
    """Where a config may speak of a stack: at the top, or in the part for text or for vision."""
    is_vision = any(word in stack for word in ("vision", "visual"))
    inner = families.VISION_CONFIGS if is_vision else families.TEXT_CONFIGS
    return [*([] if is_vision else [()]), *((key,) for key in inner if isinstance(config.get(key), dict))]


def _at(config: Mapping[str, Any], place: Path) -> Mapping[str, Any]:
    for key in place:
        config = config.get(key, {})
    return config


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((config[k] for k in families.TEXT_CONFIGS if isinstance(config.get(k), dict)), config)


def _with(config: Mapping[str, Any], place: Path, section: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, place[0]: _with(config[place[0]], place[1:], section)} if place else dict(section)


def _counts(config: Mapping[str, Any], layers: int) -> list[str]:
    return [key for key in families.COUNTS if config.get(key) == layers and not isinstance(config[key], bool)]


def _implied(section: dict[str, Any], old: int) -> None:
    """Write out the types of layers where the family implies them by number."""
    kind = families.IMPLIED_TYPES.get(str(section.get("model_type")))
    if kind is not None and "layer_types" not in section and not section.get("sliding_window_pattern"):
        section["layer_types"] = [kind(i) for i in range(old)]


def _lists(
    section: dict[str, Any], others: Sequence[Mapping[str, Any]], layers: Sequence[Layer], old: int, notes: list[str]
) -> None:
    for key, value in list(section.items()):
        if not isinstance(value, list):
            continue
        if key in families.LAYER_INDICES:
            section[key] = [
                i for i, (layer, other) in enumerate(zip(layers, others, strict=True)) if layer.layer in other.get(key, value)
            ]
        elif len(value) == old and any(word in key for word in families.PER_LAYER_WORDS):
            entries = []
            for layer, other in zip(layers, others, strict=True):
                theirs = other.get(key)
                own = theirs if isinstance(theirs, list) and len(theirs) > layer.layer else value
                if layer.layer >= len(own):
                    raise MismatchError(
                        f"config.json: {key} has {len(own)} entries; layer {layer.layer} is taken from a model that does not say its own. "
                        "Use models whose configs have it."
                    )
                entries.append(own[layer.layer])
            section[key] = entries
        elif len(value) == old and len(layers) != old:
            notes.append(
                f"config.json: {key} has {old} entries, as many as there were layers; it is left as it is. Check it by hand."
            )


def _check_rules(
    section: Mapping[str, Any], others: Sequence[Mapping[str, Any]], layers: Sequence[Layer], sources: Sequence[Source]
) -> None:
    for rule in families.LAYER_RULES:
        if not _holds(rule, section):
            continue
        for place, (layer, other) in enumerate(zip(layers, others, strict=True)):
            was = rule.says(other if _holds(rule, other) else section, layer.layer)
            if rule.says(section, place) != was:
                raise MismatchError(
                    f"config.json: {rule.key} is {section[rule.key]}, so layer {place} of the output would be of another kind than "
                    f"layer {layer.layer} of {sources[layer.model].label}, which it is made of. "
                    "Take layers such that each keeps its place in the pattern."
                )


def _holds(rule: families.LayerRule, config: Mapping[str, Any]) -> bool:
    value = config.get(rule.key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    return is_number and not any(config.get(key) for key in rule.unless)
