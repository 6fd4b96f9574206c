"""Rewrites ``config.json`` for rearranged layers, and refuses what it cannot express."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alnico.checkpoint.source import Source
from alnico.errors import MismatchError
from alnico.numerics.dtypes import DTYPES
from alnico.plan import families
from alnico.plan.job import Job
from alnico.plan.layers import Layers, count_layers
from alnico.plan.sections import Layer

Path = tuple[str, ...]
"""Keys from the top of a config down."""

ConfigSection = Mapping[str, Any]
"""The part of a config that describes one stack."""

SAVE_AGAIN = (
    "Load and save the model's config with the program that it was made for, so that config.json states it, "
    "or choose layers so that each keeps its number."
)


@dataclass(frozen=True)
class _LayerOrigin:
    """The origin of an output layer, with the config section and number of layers of its model."""

    section: ConfigSection
    layers: int
    layer: int
    label: str


def layered_config(
    config: Mapping[str, Any],
    stack: str,
    layers: Sequence[Layer],
    sources: Sequence[Source],
    donor: int,
    names: Collection[str],
) -> dict[str, Any]:
    """Return ``config`` for a stack made of ``layers``; ``names`` are the tensors of the output.

    Layer counts are updated. In lists with one entry per layer, each entry comes from the config of the
    layer's model. Lists of layer numbers are renumbered. Rules by number, such as "the first three are
    dense", are rewritten if a number can express them, and checked for every layer. Errors: MismatchError
    that names the key if the config cannot express the new order, or if the key's meaning is unknown.
    """
    numbered = count_layers(sources[donor].tensors)
    old = numbered.counts.get(stack, 0)
    changed = dict(config)
    if not config or not old:
        return changed
    places = _places(config, stack, old)
    is_moved = [layer.layer for layer in layers] != list(range(old))
    depths = config.get("depths")
    if isinstance(depths, list) and len(depths) == old and (is_moved or len(layers) != old):
        raise MismatchError(
            f"config.json: depths is {depths}: {stack}0 to {stack}{old - 1} of {sources[donor].label} are "
            "stages, each with its own size and layers; expected layers of one size, because slices "
            "rearrange layers. Merge the model under models instead."
        )
    if not places and (len(layers) != old or (is_moved and any(key in config for key in families.COUNTS))):
        raise MismatchError(
            f"config.json: no key of {sources[donor].label} says that it has {old} layers, so it cannot "
            f"state that the output has {len(layers)}. Add num_hidden_layers: {old} to its config.json if "
            "the model's code reads it, or keep the number of layers."
        )
    new_layers = Layers({stack: len(layers)})
    has_predictors = any(new_layers.predictor_place(name) for name in names)
    for place in places:
        section = dict(_at(config, place))
        _check_sibling_stacks(section, stack, numbered, count_layers(names), sources[donor].label)
        if not has_predictors and any(numbered.predictor_place(name) for name in sources[donor].tensors):
            section |= {key: 0 for key in families.FURTHER_LAYERS if section.get(key)}
        origins = [_origin(layer, sources, stack, place) for layer in layers]
        is_moved = any(origin.layer != i for i, origin in enumerate(origins))
        _write_implied(section, old, is_moved=is_moved)
        _write_lists(section, origins, old)
        _write_counts(section, stack, old, len(layers))
        _write_rules(section, origins)
        _check_unknown(section, old, len(layers), is_moved=is_moved)
        _check_ends(section, origins)
        changed = _with(changed, place, section)
    return changed


def _check_sibling_stacks(
    section: ConfigSection, stack: str, before: Layers, after: Layers, label: str
) -> None:
    """Check that stacks counted by the same key keep equal lengths, as in XLM. Errors: MismatchError."""
    parent = stack.rstrip(".").rpartition(".")[0]
    old, new = before.counts[stack], after.counts.get(stack, 0)
    keys = _counts(section, stack, old)
    for other, count in before.counts.items():
        is_sibling = other != stack and count == old and other.rstrip(".").rpartition(".")[0] == parent
        if (
            keys
            and is_sibling
            and new != old
            and after.counts.get(other) == old
            and _is_as_large(section, other, old)
        ):
            raise MismatchError(
                f"config.json: {keys[0]} of {label} counts {stack}* and {other}*, which would have {new} and "
                f"{old} layers; expected the same number of each. Use the same slices for both, each under "
                "its module."
            )


def _is_as_large(section: ConfigSection, stack: str, layers: int) -> bool:
    """Does the number of layers set a list's length? Gemma 3n's altup_num_inputs, for example, does not."""
    own = [
        key for key, value in section.items() if key not in families.COUNTS and value in (layers, layers + 1)
    ]
    return not any(word in key for key in own for word in stack.rstrip(".").rpartition(".")[2].split("_"))


def check_layers(
    jobs: Sequence[Job], stack: str, layers: Sequence[Layer], sources: Sequence[Source], donor: int
) -> None:
    """Check that the donor's config can describe every layer of the output.

    Each layer must have the tensors and shapes of a layer of the donor, at a position where the donor has
    them, and the tensors outside of the layers must exist. Errors: MismatchError that names layer and tensor.
    """
    numbered = count_layers(sources[donor].tensors)
    donor_layers: dict[int, dict[str, tuple[int, ...]]] = {}
    outside = []
    for name, tensor in sources[donor].tensors.items():
        place = numbered.place(name)
        if place is not None and place.stack == stack:
            donor_layers.setdefault(place.layer, {})[place.rest] = tensor.shape
        elif (
            not families.is_vision(name)
            and DTYPES[tensor.dtype].kind == "float"
            and numbered.predictor_place(name) is None
        ):
            outside.append(name)
    output_layers: dict[int, dict[str, tuple[int, ...]]] = {}
    new = Layers({**numbered.counts, stack: len(layers)})
    for job in jobs:
        place = new.place(job.name)
        if place is not None and place.stack == stack:
            output_layers.setdefault(place.layer, {})[place.rest] = job.shape
    kinds = {frozenset(kind.items()) for kind in donor_layers.values()}
    label = sources[donor].label
    for number, kind in sorted(output_layers.items()):
        if kinds and frozenset(kind.items()) not in kinds:
            nearest = min(donor_layers.values(), key=lambda k: len(k.items() ^ kind.items()))
            rest = min({r for r, _ in nearest.items() ^ kind.items()})
            origin = layers[number]
            raise MismatchError(
                f"{stack}{number}.{rest}: layer {origin.layer} of {sources[origin.model].label} has "
                f"{kind.get(rest, 'none')}, layers of {label}, whose config the output has, have "
                f"{nearest.get(rest, 'none')}. Combine layers of models with one architecture and width."
            )
    constant = families.CONSTANTS.get(str(sources[donor].config.get("model_type")))
    has_constant = constant is None or any(
        rest.endswith(constant) for kind in donor_layers.values() for rest in kind
    )
    if not has_constant and [layer.layer for layer in layers] != list(range(len(donor_layers))):
        raise MismatchError(
            f"{stack}*: layers of {label} compute {constant} from their numbers, and its files have no such "
            "tensor that a moved layer could keep. Load the model with transformers and save it again, "
            "which writes it, or use all layers in order."
        )
    _check_special_layers(stack, donor_layers, output_layers, layers, sources, donor)
    _check_across(outside, jobs, layers, sources, donor)
    names = {job.name for job in jobs}
    heads = families.tied_heads(sources[donor].config, sources[donor].tensors, outside)
    lacking = [n for n in outside if n not in names and n not in heads]
    if lacking:
        raise MismatchError(
            f"{lacking[0]}: {label}, whose config the output has, has it; the model of the "
            f"{'first' if families.comes_first(lacking[0]) else 'last'} slice, where it would come from, "
            f"lacks it ({len(lacking)} such tensors). Use another order of slices, or another base_model."
        )


def predictor_notes(jobs: Sequence[Job], stack: str, count: int, sources: Sequence[Source]) -> list[str]:
    """Return notes on multi-token prediction layers, which follow the layers of a stack."""
    numbered = Layers({stack: count})
    first_jobs = {
        place.layer: job for job in jobs if (place := numbered.predictor_place(job.name)) is not None
    }
    return [
        f"{stack}{count + i}.*: a multi-token prediction layer, not a layer of the stack; it comes from "
        f"{sources[job.inputs[0].model].label}, the model of the last slice, with the next number."
        for i, job in sorted(first_jobs.items())
    ]


def _check_special_layers(
    stack: str,
    donor_layers: Mapping[int, Mapping[str, tuple[int, ...]]],
    output_layers: Mapping[int, Mapping[str, tuple[int, ...]]],
    layers: Sequence[Layer],
    sources: Sequence[Source],
    donor: int,
) -> None:
    """Check that layers with special tensors are where the donor has them.

    The first layer of ModernBERT has no norm, the first of T5 has a position table, the last of
    GPT-NeoX-Japanese has a bias: the model's code decides this by layer number, and no config key says so.
    Such layers at the start or the end must stay there; if others differ, none may move. Errors:
    MismatchError that names the tensor.
    """
    config, old, new = sources[donor].config, len(donor_layers), len(output_layers)
    if not config or sorted(donor_layers) != list(range(old)) or sorted(output_layers) != list(range(new)):
        return
    classes: dict[str, list[int]] = {}
    for i, description in enumerate(_layer_descriptions(config, stack, old)):
        classes.setdefault(description, []).append(i)
    for rest in dict.fromkeys(rest for kind in donor_layers.values() for rest in kind):
        odd, where = _odd(rest, donor_layers, list(classes.values()))
        for i in range(new if odd else 0):
            back = i - new + old
            at = {"start": i, "end": back, "": i}[where]
            origin = layers[i].layer
            is_moved = (at in odd) != (origin in odd) or (
                at in odd and output_layers[i].get(rest) != donor_layers[at].get(rest)
            )
            if not is_moved and (where or old == new):
                continue
            label = sources[donor].label
            suffix = {"start": "", "end": ", counted from the end", "": ", and their number"}[where]
            raise MismatchError(
                f"{stack}{i}.{rest}: layers of {label} with the same config differ in this tensor, so the "
                f"model's code decides by layer number: layer {_first_odd(odd, at, origin)} has "
                f"{donor_layers[_first_odd(odd, at, origin)].get(rest, 'none')}; position {i} of {new} has "
                f"layer {origin} of {sources[layers[i].model].label}. Choose slices that keep such layers at "
                f"their positions{suffix}."
            )


def _first_odd(odd: Sequence[int], at: int, origin: int) -> int:
    return next((i for i in (at, origin) if i in odd), odd[0])


def _odd(
    rest: str, donor_layers: Mapping[int, Mapping[str, tuple[int, ...]]], classes: Sequence[Sequence[int]]
) -> tuple[Sequence[int], Literal["start", "end", ""]]:
    """Return the layers where a tensor differs despite equal configs, and from which end they count."""
    varying = [members for members in classes if len({donor_layers[i].get(rest) for i in members}) > 1]
    if not varying:
        return (), ""
    overall = _most([kind.get(rest) for kind in donor_layers.values()])
    odd: list[int] = []
    is_early = is_late = True
    for members in varying:
        shapes = [donor_layers[i].get(rest) for i in members]
        ordinary = _most(shapes)
        ordinary = overall if ordinary is _UNCLEAR else ordinary
        ordinary = next(s for s in shapes[::-1] if s != shapes[0]) if ordinary is _UNCLEAR else ordinary
        differing = [k for k, shape in enumerate(shapes) if shape != ordinary]
        is_early &= differing == list(range(len(differing)))
        is_late &= differing == list(range(len(members) - len(differing), len(members)))
        odd += [members[k] for k in differing]
    return odd, "start" if is_early else "end" if is_late else ""


_UNCLEAR: tuple[int, ...] = (-1,)


def _most(shapes: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """Return the most frequent shape; ``_UNCLEAR`` if two are equally frequent."""
    ranked = Counter(shapes).most_common(2)
    return ranked[0][0] if len(ranked) == 1 or ranked[0][1] > ranked[1][1] else _UNCLEAR


def _check_across(
    outside: Sequence[str],
    jobs: Sequence[Job],
    layers: Sequence[Layer],
    sources: Sequence[Source],
    donor: int,
) -> None:
    """Check that layers do not move if a tensor has a part for each layer. Errors: MismatchError."""
    across = [n for n in outside if n.endswith(families.ACROSS_LAYERS)]
    names = {job.name for job in jobs}
    present = [n for n in across if n in names]
    if not present:
        return
    count = max(count_layers(sources[donor].tensors).counts.values())
    if [layer.layer for layer in layers] != list(range(count)) or len({layer.model for layer in layers}) > 1:
        raise MismatchError(
            f"{present[0]}: it has a part for each of the {count} layers of {sources[donor].label}, and "
            "layers are rearranged; expected each layer of one model at its position. Use all layers in "
            "order, or a model without such a table (Gemma's have none with hidden_size_per_layer_input: 0)."
        )


def _layer_descriptions(config: Mapping[str, Any], stack: str, layers: int) -> list[str]:
    """Return all that a config says about each layer of a stack, to compare layers."""
    descriptions: list[list[str]] = [[] for _ in range(layers)]
    for place in _places(config, stack, layers):
        section = dict(_at(config, place))
        _write_implied(section, layers, is_moved=False)
        for key, entries in _by_layer(section, layers).items():
            for description, entry in zip(descriptions, entries, strict=True):
                description.append(f"{'.'.join(key)}={entry}")
        for path, numbers in _indices(section).items():
            first = _first_number(path)
            for i, description in enumerate(descriptions):
                description.append(f"{'.'.join(path)}={i + first in numbers}")
        for rule in families.LAYER_RULES:
            if _holds(rule, section) and rule.key != "model_type":
                for i, description in enumerate(descriptions):
                    description.append(f"{rule.key}={rule.value(section, i, layers)}")
    return ["; ".join(description) for description in descriptions]


def _role(stack: str) -> str:
    """Return "encoder" or "decoder" if a stack's name has the word; "" otherwise."""
    words = stack.split(".")
    return next((role for role in ("decoder", "encoder") if role in words), "")


def _places(config: Mapping[str, Any], stack: str, layers: int) -> list[Path]:
    """Find the sections that describe a stack: the top level, or that of text, vision, audio or a role."""
    parts = (
        (("vision", "visual", "image"), families.VISION_CONFIGS),
        (("audio", "speech"), families.AUDIO_CONFIGS),
    )
    own = next((keys for words, keys in parts if any(w in stack for w in words)), None)
    role = _role(stack)
    if own is not None and any(isinstance(config.get(key), dict) for key in own):
        places: list[Path] = [(key,) for key in own if isinstance(config.get(key), dict)]
    elif isinstance(config.get(role), dict):
        places = [(role,)]
    else:
        places = [(), *((key,) for key in families.TEXT_CONFIGS if isinstance(config.get(key), dict))]
    return [place for place in places if _describes(_at(config, place), stack, layers)]


def _describes(section: ConfigSection, stack: str, layers: int) -> bool:
    return bool(_counts(section, stack, layers)) or any(len(path) == 1 for path in _by_layer(section, layers))


def _at(config: Mapping[str, Any], place: Path) -> ConfigSection:
    for key in place:
        config = config.get(key) or {}
    return config


def _origin(layer: Layer, sources: Sequence[Source], stack: str, place: Path) -> _LayerOrigin:
    source = sources[layer.model]
    config = source.config
    inner = next((config[k] for k in families.TEXT_CONFIGS if isinstance(config.get(k), dict)), config)
    counts = count_layers(source.tensors).counts
    count = counts.get(stack) or max(
        (n for s, n in counts.items() if s.endswith(stack[-12:])), default=max(counts.values())
    )
    section = dict(_at(config, place) or inner)
    _write_implied(section, count, is_moved=False)
    return _LayerOrigin(section, count, layer.layer, source.label)


def _with(config: Mapping[str, Any], place: Path, section: ConfigSection) -> dict[str, Any]:
    return {**config, place[0]: _with(config[place[0]], place[1:], section)} if place else dict(section)


def _counts(section: ConfigSection, stack: str, layers: int) -> list[str]:
    """Return the config keys that count a stack's layers, those of its role (encoder or decoder)."""
    keys = [k for k in families.COUNTS if section.get(k) == layers and not isinstance(section[k], bool)]
    role = _role(stack)
    if role and any(key in section for key in families.DECODER_COUNTS):
        keys = [k for k in keys if (k in families.DECODER_COUNTS) == (role == "decoder")]
    elif role and section.get("is_encoder_decoder") and role == "decoder":
        keys = ["num_decoder_layers"] if keys else []
    return keys


def _write_counts(section: dict[str, Any], stack: str, old: int, new: int) -> None:
    keys = _counts(section, stack, old)
    if section.get("is_encoder_decoder") and "num_layers" in keys and "num_decoder_layers" not in section:
        section["num_decoder_layers"] = old  # T5's decoder has as many layers as the encoder by default
    for key in keys:
        section[key] = new
    for key in families.ROOTS_OF_COUNT:
        if new != old and isinstance(section.get(key), (int, float)):
            section[key] *= math.sqrt(new / old)


def _write_implied(section: dict[str, Any], layers: int, *, is_moved: bool) -> None:
    """Write the lists by layer that a family implies.

    Errors: MismatchError if they are unknown and layers move.
    """
    for key, implied in families.IMPLIED.get(str(section.get("model_type")), {}).items():
        if not section.get(key):
            section[key] = implied(section, layers)
    for key in families.UNKNOWN_LISTS.get(str(section.get("model_type")), ()):
        if is_moved and not section.get(key) and not section.get("linear_attn_config"):
            raise MismatchError(
                f"config.json: {key} is missing, and models of type {section['model_type']} derive it from "
                f"layer numbers; expected a list, because layers get other numbers. {SAVE_AGAIN}"
            )


def _by_layer(section: ConfigSection, layers: int) -> dict[Path, list[Any]]:
    """Return the config's lists by layer, by key: one entry for each of ``layers`` layers."""
    lists: dict[Path, list[Any]] = {}
    for key, value in section.items():
        if key in families.LAYER_INDICES or key.startswith("mtp_"):
            continue
        is_named = any(word in key for word in families.PER_LAYER_WORDS) and not families.NOT_BY_LAYER.search(
            key
        )
        if key in families.CYCLES and isinstance(value, list) and value:
            lists[key,] = [value[i % len(value)] for i in range(layers)]
        elif isinstance(value, list):
            predictors = sum(int(section.get(k) or 0) for k in families.FURTHER_LAYERS[:1])
            if (
                len(value) in (layers, layers + predictors)
                and layers
                and (is_named or key in families.PER_LAYER_SIZES)
            ):
                lists[key,] = value[:layers]
        elif isinstance(value, str):
            if key.endswith("pattern") and key != "sliding_window_pattern" and len(value) == layers:
                lists[key,] = list(value)
        elif isinstance(value, dict) and value and "layer" in key and all(k.isdecimal() for k in value):
            lists[key,] = [value.get(str(i)) for i in range(layers)]
    return lists


def _indices(section: ConfigSection) -> dict[Path, list[int]]:
    """Return the config's lists of layer numbers, also those one level down."""
    lists: dict[Path, list[int]] = {}
    for key, value in section.items():
        if key in families.LAYER_INDICES and isinstance(value, list):
            lists[key,] = value
        elif isinstance(value, dict):
            inner = {k: v for k, v in value.items() if k in families.LAYER_INDICES and isinstance(v, list)}
            lists |= {(key, k): v for k, v in inner.items()}
    return lists


def _first_number(path: Path) -> int:
    return 1 if path[-1] in families.FROM_ONE else 0


def _write_lists(section: dict[str, Any], origins: Sequence[_LayerOrigin], old: int) -> None:
    is_new = [o.layer for o in origins] != list(range(old))
    listed = [(_by_layer(o.section, o.layers), _indices(o.section)) for o in origins]
    for path, numbers in _indices(section).items():
        first = _first_number(path)
        renumbered = [
            i + first
            for i, (origin, (_, other)) in enumerate(zip(origins, listed, strict=True))
            if origin.layer + first in other.get(path, numbers)
        ]
        if len(path) == 1:
            section[path[0]] = renumbered
        else:
            section[path[0]] = {**section[path[0]], path[1]: renumbered}
    for (key, *_), entries in _by_layer(section, old).items():
        value = section[key]
        moved = []
        for origin, (other, _) in zip(origins, listed, strict=True):
            own = other.get((key,), entries)
            if origin.layer >= len(own):
                raise MismatchError(
                    f"config.json: {key} has {len(own)} entries; layer {origin.layer} comes from "
                    f"{origin.label}, whose config has no entry for it. Use models whose configs have it."
                )
            moved.append(own[origin.layer])
        if key in families.LAYER_REFERENCES:
            section[key] = _references(key, moved, origins)
        elif isinstance(value, str):
            section[key] = "".join(moved)
        elif isinstance(value, dict):
            section[key] = {str(i): entry for i, entry in enumerate(moved) if entry is not None}
        elif key in families.CYCLES and not is_new:
            continue
        else:
            section[key] = moved + (value[old:] if key not in families.CYCLES else [])
    for key, value in section.items():
        has_known_meaning = (
            key in families.LAYER_INDICES
            or (key,) in _by_layer(section, len(origins))
            or families.NOT_BY_LAYER.search(key)
        )
        if isinstance(value, list) and len(value) == old > 1 and is_new and not has_known_meaning:
            raise MismatchError(
                f"config.json: {key} has {old} entries, as many as there were layers, and may have one entry "
                "per layer; expected only known keys, because layers are rearranged. Remove the key if the "
                "model's code does not read it, or use all layers in order."
            )


def _references(key: str, moved: Sequence[Any], origins: Sequence[_LayerOrigin]) -> list[int]:
    if all(entry == origin.layer for entry, origin in zip(moved, origins, strict=True)):
        return list(range(len(moved)))
    if all(origin.layer == i for i, origin in enumerate(origins)):
        return list(moved)
    raise MismatchError(
        f"config.json: {key} says which layer's keys and values a layer uses, and layers move; expected each "
        "layer to use its own. Choose layers so that each keeps its number."
    )


def _write_rules(section: dict[str, Any], origins: Sequence[_LayerOrigin]) -> None:
    before = dict(section)
    count = len(origins)
    for rule in families.LAYER_RULES:
        if not _holds(rule, before):
            if rule.numbers is not None and rule.unless and _is_number(before.get(rule.key)):
                section |= _number_next_to_list(rule, before, origins)
            continue
        expected = [
            rule.value(o.section if _holds(rule, o.section) else before, o.layer, o.layers) for o in origins
        ]
        if rule.numbers is not None and [rule.value(section, i, count) for i in range(count)] != expected:
            section |= rule.numbers(expected)
        for i, origin in enumerate(origins):
            if rule.value(section, i, count) != expected[i]:
                value = before[rule.key]
                if rule.types:
                    raise MismatchError(
                        f"config.json: model_type is {value}, and such models compute with layer numbers; "
                        f"layer {i} of {count} would be layer {origin.layer} of {origin.label}, which has "
                        f"{origin.layers}. Use all layers, each at its own number."
                    )
                raise MismatchError(
                    f"config.json: {rule.key} is {value}, so layer {i} of the output would be of another "
                    f"kind than layer {origin.layer} of {origin.label}, its origin. Choose layers so that "
                    "each keeps its position in the pattern."
                )
    _check_sharing(section, origins)


def _holds(rule: families.LayerRule, section: ConfigSection) -> bool:
    value = section.get(rule.key)
    if rule.types:
        return value in rule.types
    return _is_number(value) and not any(section.get(key) for key in rule.unless)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and value >= 0


def _number_next_to_list(
    rule: families.LayerRule, section: ConfigSection, origins: Sequence[_LayerOrigin]
) -> Mapping[str, int]:
    """Return the number that older programs read in place of a list; {} if no number expresses it."""
    assert rule.numbers is not None
    expected = [rule.value({**section, **o.section}, o.layer, o.layers) for o in origins]
    numbers = rule.numbers(expected)
    after = {**section, **numbers}
    return numbers if [rule.value(after, i, len(origins)) for i in range(len(origins))] == expected else {}


def _check_sharing(section: ConfigSection, origins: Sequence[_LayerOrigin]) -> None:
    """Check that layers which reuse keys and values of an earlier layer still reuse the same ones."""
    shared = int(section.get("num_kv_shared_layers") or 0)
    types = section.get("layer_types")
    if not shared or not isinstance(types, list):
        return
    first = len(origins) - shared
    for kind in dict.fromkeys(types[first:]):
        storing = [i for i in range(first) if types[i] == kind]
        before = [
            [
                i
                for i in range(o.layers - int(o.section.get("num_kv_shared_layers") or 0))
                if o.section["layer_types"][i] == kind
            ]
            for o in (o for o, t in zip(origins[first:], types[first:], strict=True) if t == kind)
        ]
        used = {
            (o.label, b[-1] if b else None)
            for o, b in zip(_origins_of_type(origins[first:], types[first:], kind), before, strict=True)
        }
        if not storing or used != {(origins[storing[-1]].label, origins[storing[-1]].layer)}:
            previous = ", ".join(f"layer {layer} of {label}" for label, layer in sorted(used, key=str))
            current = (
                f"layer {origins[storing[-1]].layer} of {origins[storing[-1]].label}" if storing else "none"
            )
            raise MismatchError(
                f"config.json: num_kv_shared_layers is {shared}, so layers of {kind} at the end use the keys "
                f"and values of the last such layer before them: that would be {current}, and was "
                f"{previous}. Keep that layer the last of its kind before the shared ones."
            )


def _origins_of_type(origins: Sequence[_LayerOrigin], types: Sequence[str], kind: str) -> list[_LayerOrigin]:
    return [o for o, t in zip(origins, types, strict=True) if t == kind]


def _check_unknown(section: ConfigSection, old: int, new: int, *, is_moved: bool) -> None:
    """Refuse numbers that may depend on layer numbers in an unknown way. Errors: MismatchError."""
    known_keys = {*families.COUNTS, *families.FURTHER_LAYERS, *(rule.key for rule in families.LAYER_RULES)}
    for key, value in section.items():
        is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if (
            not is_number
            or key in known_keys
            or not families.OTHER_NUMBERS.search(key)
            or families.NO_LAYER_NUMBERS.search(key)
        ):
            continue
        if is_moved or new < value <= old:
            raise MismatchError(
                f"config.json: {key} is {value}, which may refer to layers by number, and layers get other "
                "numbers; expected only known keys. Remove the key if the model's code does not read it, or "
                "choose layers so that each keeps its number."
            )


def _check_ends(section: ConfigSection, origins: Sequence[_LayerOrigin]) -> None:
    indexers = section.get("indexer_types")
    if isinstance(indexers, list) and indexers and indexers[0] == "shared":
        first = origins[0]
        raise MismatchError(
            f"config.json: indexer_types says that layer {first.layer} of {first.label} uses what an earlier "
            "layer chose, and it would be the first of the output; expected a layer that chooses itself. "
            "Start the first slice with such a layer."
        )
    types = section.get("layer_types")
    if section.get("model_type") in families.ENDS_IN_FULL_ATTENTION and isinstance(types, list) and types:
        last = origins[-1]
        if types[-1] != "full_attention":
            raise MismatchError(
                f"config.json: the last layer of a {section['model_type']} model has full attention, and the "
                f"last of the output, layer {last.layer} of {last.label}, has {types[-1]}. End the last "
                "slice with a layer with full attention."
            )
