"""Divides a recipe into sections and maps the names of output tensors to tensors of the models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from alnico.checkpoint.source import Source
from alnico.errors import MismatchError, RecipeError
from alnico.methods import find
from alnico.methods.base import Method
from alnico.plan import families
from alnico.plan.layers import LayerPosition, Layers, count_layers, depth_of, depths, layer_position
from alnico.recipe.options import (
    Levels,
    TensorPlace,
    matches_filter,
    options_at,
    preset_options,
    starts_from_a_model,
)
from alnico.recipe.schema import (
    Cases,
    ModelEntry,
    Module,
    NormWeight,
    Parameters,
    Recipe,
    Rule,
    Setting,
    Slice,
    is_varied,
)

REST = "in no module that the recipe names"
"""The label of the section with the donor's tensors outside of all modules."""


@dataclass(frozen=True)
class ModelPart:
    """What one model contributes. ``names`` maps output names to the model's own names."""

    model: int
    """Position in ``Plan.sources``."""
    entry: ModelEntry
    names: Mapping[str, str]

    @property
    def place(self) -> tuple[int, tuple[int, int] | None]:
        """The model and its layers. Parts with equal places read the same tensors."""
        return self.model, self.entry.layers


@dataclass(frozen=True)
class Layer:
    """The origin of an output layer: a layer of the first model of its slice."""

    model: int
    layer: int


@dataclass(frozen=True)
class TensorMethod:
    """The method for a tensor and the models that it merges. ``base`` is None if the method uses none."""

    method: Method
    parts: tuple[ModelPart, ...]
    base: ModelPart | None
    rule: Rule | None
    copies_one_model: bool = False
    """Is a single model copied, because a rule names it or no other is listed? Then only the rule's own
    options apply, not those of the merge, such as the scale of the merged task vector."""
    measured_from: ModelPart | None = None
    """The base for norm weights, if the method itself uses no base."""
    listed: tuple[ModelPart, ...] = ()
    """All models of the section, or those that the rule lists itself."""
    named_base: str | None = None
    """The base's reference in the recipe or the rule."""

    @functools.cached_property
    def needed(self) -> tuple[ModelPart, ...]:
        """All parts that are read, without repetition, the base first."""
        base = self.base if self.base is not None else self.measured_from
        parts = ([base] if base is not None else []) + list(self.parts)
        return tuple({p.place: p for p in parts}.values())


@dataclass
class Section:
    """A part of the output that is made from the same models: the whole output, a module, or a slice."""

    label: str
    """Its name in messages; empty for the whole output."""
    merge_method: str
    listed: tuple[ModelPart, ...]
    base: ModelPart | None
    shared: tuple[Parameters, ...]
    preset: str | None
    rules: tuple[Rule, ...]
    make: Callable[[str], ModelPart]
    """Returns the part of a model that the section does not list."""
    donor: ModelPart | None
    """The model that provides tensors that the others lack."""
    named_base: str | None
    """The base's reference in the recipe."""
    names: tuple[str, ...]
    """Names of the output tensors that the section may make, in order."""
    depth: Mapping[str, float]
    completing: ModelPart | None = None
    """The model that provides tensors that no model of the section has."""
    _methods: dict[int, TensorMethod] = field(default_factory=dict)
    _rules_by_name: dict[str, Rule | None] = field(default_factory=dict)
    _parts: dict[str, ModelPart] = field(default_factory=dict)

    def rule_of(self, name: str) -> Rule | None:
        if name not in self._rules_by_name:
            self._rules_by_name[name] = first_rule(self.rules, name)
        return self._rules_by_name[name]

    def drops(self, name: str) -> bool:
        """Does a rule leave the tensor ``name`` out?"""
        rule = self.rule_of(name)
        return rule is not None and rule.drops

    def holders(self, name: str) -> tuple[ModelPart, ...]:
        """Return every part of the section that has the tensor ``name``."""
        given = (self.base, *self.listed, self.donor, self.completing)
        parts = {part.place: part for part in given if part is not None and name in part.names}
        return tuple(parts.values())

    def part_of(self, reference: str) -> ModelPart:
        """Return the part of a model, also of one that the section does not list."""
        return self._of(reference)

    def method_for(self, name: str) -> TensorMethod:
        """Return the method that makes the tensor ``name``, with its models."""
        rule = self.rule_of(name)
        if id(rule) not in self._methods:
            self._methods[id(rule)] = self._choose_method(rule)
        return self._methods[id(rule)]

    def parts_of(self, rule: Rule) -> tuple[ModelPart, ...]:
        """Return the parts of the models that a rule lists itself, with its options.

        Errors: RecipeError for a model that a slice lists with several ranges of layers.
        """
        parts = [(self._only(entry.reference), entry) for entry in rule.models]
        return tuple(replace(part, entry=replace(entry, layers=part.entry.layers)) for part, entry in parts)

    def _choose_method(self, rule: Rule | None) -> TensorMethod:
        method = find(rule.merge_method if rule is not None else self.merge_method)
        if rule is not None and rule.model is not None:
            part = self.base if rule.model == "base" else self._of(rule.model)
            if part is None:
                raise RecipeError(
                    f"methods: {rule.filter!r} copies the base, but the recipe has no base_model. Add "
                    "base_model: PATH."
                )
            return TensorMethod(
                method, (part,), part if method.space == "delta" else None, rule, copies_one_model=True
            )
        if rule is not None and (rule.models or rule.base_model is not None):
            return self._choose_models(method, rule)
        base = self.base
        uses_norms = _uses_norms(method, self._scopes(rule, self.listed))
        if (
            base is None
            and self.named_base
            and (method.space == "delta" or method.base == "first" or uses_norms)
        ):
            raise RecipeError(
                f"{self.label}: its sources have different layers, so the layers of the base "
                f"{self.named_base} are ambiguous. List the base among the sources, with its layer_range."
            )
        others = tuple(p for p in self.listed if p is not base)
        return self._with_models(method, rule, self.listed, base, others, self.named_base, uses_norms)

    def _choose_models(self, method: Method, rule: Rule) -> TensorMethod:
        """Return the method of a rule that names its own models or base, with these."""
        listed = self.parts_of(rule) if rule.models else self.listed
        named = rule.base_of(self.named_base, starts_from_a_model(method))
        uses_norms = _uses_norms(method, self._scopes(rule, listed))
        base = None
        if named is not None and (method.space == "delta" or method.base == "first" or uses_norms):
            base = next((p for p in listed if p.entry.reference == named), None) or self._only(named)
        others = tuple(p for p in listed if base is None or p.entry.reference != named)
        return self._with_models(method, rule, listed, base, others, named, uses_norms)

    def _with_models(
        self,
        method: Method,
        rule: Rule | None,
        listed: tuple[ModelPart, ...],
        base: ModelPart | None,
        others: tuple[ModelPart, ...],
        named_base: str | None,
        uses_norms: bool,
    ) -> TensorMethod:
        """Return the method with its models in order: ``others`` are those of ``listed`` without the base."""
        if method.space == "delta" and base is not None and not others:
            return TensorMethod(find("passthrough"), (base,), None, rule, copies_one_model=True)
        parts, measured_from = others, None
        if method.space != "delta":
            measured_from = base if uses_norms and method.base != "first" else None
            parts = (base, *others) if method.base == "first" and base is not None else listed
            base = None
        return TensorMethod(
            method,
            parts,
            base,
            rule,
            copies_one_model=rule is not None and bool(rule.models) and method.name == "passthrough",
            measured_from=measured_from,
            listed=listed,
            named_base=named_base,
        )

    def _only(self, reference: str) -> ModelPart:
        ranges = dict.fromkeys(p.entry.layers for p in self.listed if p.entry.reference == reference)
        if len(ranges) > 1:
            shown = " and ".join(str(list(layers or ())) for layers in ranges)
            raise RecipeError(
                f"{self.label}: its sources have the layers {shown} of {reference}, which a rule under methods "
                "names, so its layers are ambiguous. List it once among the sources, or name another model."
            )
        return self._of(reference)

    def _of(self, reference: str) -> ModelPart:
        if reference not in self._parts:
            listed = next((p for p in self.listed if p.entry.reference == reference), None)
            self._parts[reference] = listed or self.make(reference)
        return self._parts[reference]

    def options(self, name: str, chosen: TensorMethod, depth: float | None = None) -> dict[str, object]:
        """Return the options of the method for one tensor. ``depth`` overrides the tensor's own depth."""
        rule = chosen.rule
        preset = preset_options(
            chosen.method, rule.preset if rule is not None and rule.preset is not None else self.preset
        )
        own = rule.parameters if rule is not None and rule.merge_method == chosen.method.name else {}
        entries = [p.entry for p in chosen.parts]
        under = tuple(p.entry.parameters for p in chosen.listed)
        if chosen.copies_one_model:
            levels = Levels(own, (preset,))
            if rule is None or not rule.models:
                entries = [ModelEntry(e.reference) for e in entries]
        elif rule is not None and rule.models:
            levels = Levels({}, (own, *self.shared, preset), under)
        else:
            levels = Levels(own, (*self.shared, preset), under)
        place = TensorPlace(name, self.depth.get(name, 0.0) if depth is None else depth)
        return options_at(chosen.method, levels, entries, place, [p.names[name] for p in chosen.parts])

    def varies(self, chosen: TensorMethod) -> bool:
        """Do the options of the method differ between tensors?"""
        return any(
            is_varied(value) for scope in self._scopes(chosen.rule, chosen.listed) for value in scope.values()
        )

    def _scopes(self, rule: Rule | None, listed: Sequence[ModelPart]) -> list[Parameters]:
        return [
            *self.shared,
            *(p.entry.parameters for p in listed),
            rule.parameters if rule is not None else {},
        ]


@dataclass(frozen=True)
class Sections:
    """All sections of the output. ``layers`` maps each sliced stack to the origins of its layers."""

    parts: tuple[Section, ...]
    layers: Mapping[str, tuple[Layer, ...]]


def build_sections(
    recipe: Recipe, references: Sequence[str], sources: Sequence[Source], donor: int
) -> Sections:
    """Divide a recipe into sections. Errors: MismatchError for missing layers and modules, RecipeError."""
    builder = _SectionBuilder(recipe, references, sources, donor)
    if recipe.modules:
        for module in recipe.modules:
            builder.module(module)
        builder.rest_of_donor()
    elif recipe.slices:
        builder.sliced(recipe.slices, None, recipe.merge_method)
    else:
        builder.whole(recipe.models, None, recipe.merge_method)
    return Sections(tuple(builder.sections), builder.layers)


@dataclass(frozen=True)
class _Members:
    """The tensors of a model in one module: maps names within the module to the model's own names."""

    names: Mapping[str, str]

    @functools.cached_property
    def layers(self) -> Layers:
        return count_layers(self.names)

    @functools.cached_property
    def prefixes(self) -> dict[str, str]:
        """Maps each stack of layers to the prefix that the module's names have in the model."""
        prefix_by_stack: dict[str, str] = {}
        for name, full in self.names.items():
            place = layer_position(name)
            if place is not None and place.stack not in prefix_by_stack and full.endswith(name):
                prefix_by_stack[place.stack] = full[: len(full) - len(name)]
        return prefix_by_stack

    def output_name(self, name: str, other: _Members) -> str:
        """Return the output name of a tensor of ``other``: the donor's name (``self``), or else its own."""
        if name in self.names:
            return self.names[name]
        place = layer_position(name)
        for members in (self, other):
            if name in members.names:
                return members.names[name]
            if place is not None and place.stack in members.prefixes:
                return members.prefixes[place.stack] + name
        return name


class _SectionBuilder:
    def __init__(
        self, recipe: Recipe, references: Sequence[str], sources: Sequence[Source], donor: int
    ) -> None:
        self.recipe = recipe
        self.references = references
        self.sources = sources
        self.donor = donor
        self.sections: list[Section] = []
        self.layers: dict[str, tuple[Layer, ...]] = {}
        self._members: dict[tuple[int, str | None], _Members] = {}
        heads = [n for n in sources[donor].tensors if n.endswith(tuple(families.TIED))]
        tied = families.tied_heads(sources[donor].config, sources[donor].tensors, heads)
        self.heads = [h for h in heads if h not in tied]
        """Heads of the output that a model may store only as its embedding."""

    def module(self, module: Module) -> None:
        method = module.merge_method or self.recipe.merge_method
        if module.slices:
            self.sliced(module.slices, module, method)
        else:
            self.whole(module.models, module, method)

    def members(self, model: int, module: Module | None) -> _Members:
        """Return a model's tensors in a module, or all tensors.

        Errors: MismatchError if it has none in the module.
        """
        key = (model, module.name if module is not None else None)
        if key not in self._members:
            self._members[key] = _Members(self._names(model, module))
        return self._members[key]

    def _names(self, model: int, module: Module | None) -> dict[str, str]:
        source = self.sources[model]
        if module is None or module.name == families.ONLY_MODULE:
            names = {n: n for n in source.tensors}
            tied = families.tied_heads(
                source.config, source.tensors, [h for h in self.heads if h not in names]
            )
            return names | tied
        modules = [m.name for m in self.recipe.modules]
        prefixes = families.prefixes_of(source.tensors)
        names = {}
        for name in source.tensors:
            place = families.module_of(name, modules, prefixes)
            if place is not None and place[0] == module.name:
                names[place[1]] = name
        if not names:
            has = ", ".join(dict.fromkeys(n.partition(".")[0] for n in source.tensors))
            raise MismatchError(
                f"module {module.name}: {source.label} has no tensors in it (its names begin with "
                f"{has[:200]}). Known modules are {', '.join(families.MODULES)}, and {families.ONLY_MODULE} "
                "for the whole model; or use the beginning of the names."
            )
        return names

    def shared(self, slice_: Slice | None, module: Module | None) -> tuple[Parameters, ...]:
        levels = [slice_.parameters] if slice_ is not None else []
        levels += [module.parameters] if module is not None else []
        return (*levels, self.recipe.parameters)

    def whole(self, models: Sequence[ModelEntry], module: Module | None, method: str) -> None:
        own = self.members(self.donor, module)

        def part(entry: ModelEntry) -> ModelPart:
            model = self.references.index(entry.reference)
            members = self.members(model, module)
            self._check_whole(entry, model, members)
            return ModelPart(
                model, entry, {own.output_name(n, members): full for n, full in members.names.items()}
            )

        listed = tuple(part(e) for e in models)
        named = self.recipe.base_model
        base = self._base(listed, named, part, None)
        names = dict.fromkeys([*own.names.values(), *(n for p in listed for n in p.names)])
        names |= dict.fromkeys(self._names_of_rules(names, functools.partial(_part_of, part, None)))
        completing = None
        if self.recipe.complete_from is not None:
            completing = part(ModelEntry(self.recipe.complete_from))
            names |= dict.fromkeys(completing.names)
        donor = part(ModelEntry(self.references[self.donor]))
        label = module.name if module else ""
        self._add(
            label,
            method,
            listed,
            base,
            donor,
            named,
            self.shared(None, module),
            part,
            names,
            depths(names),
            completing,
        )

    def _names_of_rules(self, names: Container[str], make: Callable[[str], ModelPart]) -> Iterator[str]:
        """Yield the tensors, in addition to ``names``, that rules make of models that only they name."""
        rules_by_model: dict[str, list[Rule]] = {}
        for rule in self.recipe.methods:
            if rule.drops:
                continue
            method = find(rule.merge_method)
            uses_base = method.space == "delta" or method.base == "first"
            named = [entry.reference for entry in rule.models]
            for reference in (*named, rule.base_model if uses_base else None):
                if reference:
                    rules_by_model.setdefault(reference, []).append(rule)
        for reference, rules in rules_by_model.items():
            try:
                part = make(reference)
            except MismatchError:  # raised again where the rule makes a tensor of this section
                continue
            for name in part.names:
                if name not in names and any(r is first_rule(self.recipe.methods, name) for r in rules):
                    yield name

    def _check_whole(self, entry: ModelEntry, model: int, members: _Members) -> None:
        """Check that the ``layer_range`` of a model that is merged whole has all its layers.

        Errors: MismatchError.
        """
        if entry.all_layers is None:
            return
        counts = sorted(set(count_layers(members.names).counts.values()))
        low, high = entry.all_layers
        if low != 0 or high not in counts:
            raise MismatchError(
                f"models: {self.sources[model].label} has {' and '.join(map(str, counts)) or 'no'} layers; "
                f"layer_range is [{low}, {high}], but models are merged with all their layers. Use slices to "
                "select layers, or remove layer_range."
            )

    def sliced(self, slices: Sequence[Slice], module: Module | None, method: str) -> None:
        own = self.members(self.donor, module)
        first = self.references.index(slices[0].models[0].reference)
        stack = self._stack(first, module)
        moved = own.output_name(f"{stack}0._", own)[: -len("0._")]
        origin: list[Layer] = []
        inner = f"module {module.name}, " if module else ""
        for i, slice_ in enumerate(slices):
            label = f"{inner}slices[{i}]"
            begin = len(origin)
            ends = (i == 0, i == len(slices) - 1)

            def part(
                entry: ModelEntry, begin: int = begin, ends: tuple[bool, bool] = ends, label: str = label
            ) -> ModelPart:
                return self._layers(entry, begin, ends, module, own, label, stack)

            listed = tuple(part(e) for e in slice_.models)
            ranges = {e.layers for e in slice_.models}
            named = slice_.base_model or self.recipe.base_model
            base = self._base(listed, named, part, next(iter(ranges)) if len(ranges) == 1 else None)
            names = dict.fromkeys(n for p in (*listed, *([base] if base else [])) for n in p.names)
            if len(ranges) == 1:
                layers = next(iter(ranges))
                found = self._names_of_rules(names, functools.partial(_part_of, part, layers))
                names |= dict.fromkeys(found)
            entry = slice_.models[0]
            assert entry.layers is not None
            model = self.references.index(entry.reference)
            depth = _slice_depths(names, moved, begin, _length(slice_))
            donor = base or listed[0]
            shared = self.shared(slice_, module)
            self._add(
                label, slice_.merge_method or method, listed, base, donor, named, shared, part, names, depth
            )
            origin += [Layer(model, layer) for layer in range(*entry.layers)]
        self.layers[moved] = tuple(origin)

    def _stack(self, model: int, module: Module | None) -> str:
        """Return the stack of layers that slices refer to.

        Errors: MismatchError if there is none, or several.
        """
        source = self.sources[model]
        members = self.members(model, module)
        sizes: dict[str, int] = {}
        for name in members.names:
            place = layer_position(name)
            if place is not None and not (module is None and families.is_vision(name)):
                sizes[place.stack] = sizes.get(place.stack, 0) + 1
        if (
            module is None
        ):  # a tower may have more tensors than the text decoder, such as the audio tower of Phi-4 multimodal
            sizes = {s: size for s, size in sizes.items() if not families.is_tower(s)} or sizes
        largest = max(sizes.values(), default=0)
        likely = [s for s, size in sizes.items() if 2 * size >= largest]
        if len(likely) == 1:
            return likely[0]
        if not likely:
            raise MismatchError(
                f"slices: {source.label} has no numbered layers. Merge it under models instead."
            )
        raise MismatchError(
            f"slices: {source.label} has several stacks of layers ({', '.join(likely)}). Write the slices of "
            "each stack under modules."
        )

    def _layers(
        self,
        entry: ModelEntry,
        begin: int,
        ends: tuple[bool, bool],
        module: Module | None,
        own: _Members,
        label: str,
        out_stack: str,
    ) -> ModelPart:
        """Return a model's layers in a slice, renumbered from ``begin``, and tensors outside of layers."""
        model = self.references.index(entry.reference)
        source = self.sources[model]
        stack = self._stack(model, module)
        members = self.members(model, module)
        count = members.layers.counts[stack]
        assert entry.layers is not None
        low, high = entry.layers
        if high > count:
            raise MismatchError(
                f"{label}: {source.label} has {count} layers; layer_range is [{low}, {high}]. Layers count "
                f"from 0, and the end is excluded: write at most [{min(low, count - 1)}, {count}]."
            )
        names = {}
        for name, full in members.names.items():
            place, predictor = members.layers.place(name), members.layers.predictor_place(name)
            if place is not None and place.stack == stack:
                if low <= place.layer < high:
                    moved = LayerPosition(out_stack, place.layer, place.rest).at(begin + place.layer - low)
                    names[own.output_name(moved, members)] = full
            elif predictor is not None and predictor.stack == stack:
                if ends[1]:  # multi-token prediction layers follow the last layer, with the next numbers
                    moved = LayerPosition(out_stack, predictor.layer, predictor.rest).at(
                        begin + high - low + predictor.layer
                    )
                    names[own.output_name(moved, members)] = full
            elif ends[0 if families.comes_first(name) else 1]:
                names[own.output_name(name, members)] = full
        return ModelPart(model, entry, names)

    def _base(
        self,
        listed: Sequence[ModelPart],
        base: str | None,
        part: Callable[[ModelEntry], ModelPart],
        layers: tuple[int, int] | None,
    ) -> ModelPart | None:
        """Return the base's part: a listed one, or else the layers that all listed models have in common."""
        if base is None:
            return None
        for candidate in listed:
            if candidate.entry.reference == base:
                return candidate
        if listed and listed[0].entry.layers is not None and layers is None:
            return None
        return part(ModelEntry(base, layers=layers))

    def _add(
        self,
        label: str,
        method: str,
        listed: tuple[ModelPart, ...],
        base: ModelPart | None,
        donor: ModelPart,
        named_base: str | None,
        shared: tuple[Parameters, ...],
        part: Callable[[ModelEntry], ModelPart],
        names: Iterable[str],
        depth: Mapping[str, float],
        completing: ModelPart | None = None,
    ) -> None:
        ranges = {p.entry.layers for p in listed}
        layers = next(iter(ranges)) if len(ranges) == 1 else None

        def make(reference: str) -> ModelPart:
            if len(ranges) > 1:
                raise RecipeError(
                    f"{label}: its sources have different layers, so the layers of {reference}, which a rule "
                    "under methods names, are ambiguous. List it among the sources, with its layer_range."
                )
            return part(ModelEntry(reference, layers=layers))

        self.sections.append(
            Section(
                label=label,
                merge_method=method,
                listed=listed,
                base=base,
                shared=shared,
                preset=self.recipe.preset,
                rules=self.recipe.methods,
                make=make,
                donor=donor,
                named_base=named_base,
                names=tuple(names),
                depth=depth,
                completing=completing,
            )
        )

    def rest_of_donor(self) -> None:
        """Copy the donor's tensors that belong to none of the recipe's modules."""
        used = {n for s in self.sections for n in s.names}
        for module in self.recipe.modules:  # layers that no slice uses still belong to their module
            used.update(self.members(self.donor, module).names.values() if module.slices else ())
        rest = [n for n in self.sources[self.donor].tensors if n not in used]
        if rest:
            entry = ModelEntry(self.references[self.donor])
            only = ModelPart(self.donor, entry, {n: n for n in rest})
            self.sections.append(
                Section(
                    label=REST,
                    merge_method="passthrough",
                    listed=(only,),
                    base=None,
                    shared=(),
                    preset=None,
                    rules=tuple(rule for rule in self.recipe.methods if rule.drops),
                    make=lambda _: only,
                    donor=only,
                    named_base=None,
                    names=tuple(rest),
                    depth={},
                )
            )


def _part_of(
    part: Callable[[ModelEntry], ModelPart], layers: tuple[int, int] | None, reference: str
) -> ModelPart:
    return part(ModelEntry(reference, layers=layers))


def first_rule(rules: Sequence[Rule], name: str) -> Rule | None:
    """Return the first rule whose filter matches a tensor's name."""
    return next((r for r in rules if matches_filter(r.filter, name)), None)


def _length(slice_: Slice) -> int:
    layers = slice_.models[0].layers
    assert layers is not None
    return layers[1] - layers[0]


def _slice_depths(names: Iterable[str], stack: str, begin: int, count: int) -> dict[str, float]:
    """Return the depth of every tensor in a slice of ``count`` layers from ``begin``; 0 outside of it."""
    depth_by_name = {}
    for name in names:
        place = layer_position(name)
        inside = place is not None and place.stack == stack and begin <= place.layer < begin + count
        depth_by_name[name] = depth_of(place.layer - begin, count) if place is not None and inside else 0.0
    return depth_by_name


def _uses_norms(method: Method, scopes: Iterable[Parameters]) -> bool:
    """Do options of a method depend on norms?"""
    return "weight" in method.options and any(_has_norm_weight(p["weight"]) for p in scopes if "weight" in p)


def _has_norm_weight(setting: Setting) -> bool:
    """Does a setting contain a norm weight?"""
    return (isinstance(setting, NormWeight) and setting.origin != "given") or (
        isinstance(setting, Cases) and any(_has_norm_weight(c.value) for c in setting.cases)
    )
