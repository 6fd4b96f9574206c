"""A recipe's parts: which tensors of which models make which tensors of the output, by names alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from alnico.checkpoint.source import Source
from alnico.errors import MismatchError, RecipeError
from alnico.methods import find
from alnico.methods.base import Method
from alnico.plan import families
from alnico.plan.layers import LayerPosition, Layers, count_layers, depth_of, depths, layer_position
from alnico.recipe.options import Levels, TensorPlace, matches_filter, options_at, preset_options
from alnico.recipe.schema import (
    Cases,
    Gradient,
    ModelEntry,
    Module,
    NormWeight,
    Parameters,
    Recipe,
    Rule,
    Setting,
    Slice,
)

REST = "in no module that the recipe names"
"""How the section is called that has what is left of the donor."""


@dataclass(frozen=True)
class ModelPart:
    """What one model gives: ``names`` maps names of the output to the model's own."""

    model: int
    """Position in ``Plan.sources``."""
    entry: ModelEntry
    names: Mapping[str, str]

    @property
    def place(self) -> tuple[int, tuple[int, int] | None]:
        """The model and its layers: what tells parts that read the same tensors."""
        return self.model, self.entry.layers


@dataclass(frozen=True)
class Layer:
    """Where a layer of the output comes from: of the first model listed for it."""

    model: int
    layer: int


@dataclass(frozen=True)
class TensorMethod:
    """The method of one tensor, and what it is applied to. ``base`` is None where the method takes none."""

    method: Method
    values: tuple[ModelPart, ...]
    base: ModelPart | None
    rule: Rule | None
    is_chosen: bool = False
    """Is one model taken, by a rule that names it or because it is the only one? Then options of the others' merge, such as the
    scale of the merged task vector, do not count, only the rule's own."""
    measured_from: ModelPart | None = None
    """The base that weights are measured from, where the method itself takes none."""

    @property
    def needed(self) -> tuple[ModelPart, ...]:
        """All that is read, each once: the base first."""
        base = self.base if self.base is not None else self.measured_from
        parts = ([base] if base is not None else []) + list(self.values)
        return tuple({p.place: p for p in parts}.values())


@dataclass
class Section:
    """A part of the output that is made from the same models: all of it, a module, or a slice."""

    label: str
    """How messages call it; empty for all of the output."""
    merge_method: str
    listed: tuple[ModelPart, ...]
    base: ModelPart | None
    shared: tuple[Parameters, ...]
    preset: str | None
    rules: tuple[Rule, ...]
    make: Callable[[str], ModelPart]
    """The part of a model that the section does not list."""
    donor: ModelPart | None
    """Where a tensor comes from that the others lack."""
    named_base: str | None
    """The base as the recipe names it."""
    names: tuple[str, ...]
    """Names of the output that the section may give, in order."""
    depth: Mapping[str, float]
    _asked: dict[int, TensorMethod] = field(default_factory=dict)

    def rule_of(self, name: str) -> Rule | None:
        return next((r for r in self.rules if matches_filter(r.filter, name)), None)

    def asked(self, name: str) -> TensorMethod:
        """Say how the tensor ``name`` is made."""
        rule = self.rule_of(name)
        if id(rule) not in self._asked:
            self._asked[id(rule)] = self._ask(rule)
        return self._asked[id(rule)]

    def _ask(self, rule: Rule | None) -> TensorMethod:
        method = find(rule.merge_method if rule is not None else self.merge_method)
        if rule is not None and rule.model is not None:
            part = self.base if rule.model == "base" else self._of(rule.model)
            if part is None:
                raise RecipeError(
                    f"methods: {rule.filter!r} takes the base, and the recipe has no base_model. Add base_model: PATH."
                )
            return TensorMethod(
                method, (part,), part if method.space == "delta" else None, rule, is_chosen=True
            )
        base = self.base
        weighs = "weight" in method.options and any(
            _measures(p["weight"]) for p in self._scopes(rule) if "weight" in p
        )
        if base is None and self.named_base and (method.space == "delta" or method.base == "first" or weighs):
            raise RecipeError(
                f"{self.label}: its sources take different layers, so it is not known which layers of {self.named_base}, the base, go "
                "with them. List the base among the sources, with its layer_range."
            )
        others = tuple(p for p in self.listed if p is not base)
        if method.space == "delta" and base is not None and not others:
            return TensorMethod(find("passthrough"), (base,), None, rule, is_chosen=True)
        if method.space == "delta":
            return TensorMethod(method, others, base, rule)
        if method.base == "first" and base is not None:
            return TensorMethod(method, (base, *others), None, rule)
        return TensorMethod(method, self.listed, None, rule, measured_from=base if weighs else None)

    def _of(self, reference: str) -> ModelPart:
        return next((p for p in self.listed if p.entry.reference == reference), None) or self.make(reference)

    def options(self, name: str, asked: TensorMethod, depth: float | None = None) -> dict[str, object]:
        """Return the options of the method for one tensor; ``depth`` stands for its own, if it is given."""
        rule = asked.rule
        preset = preset_options(
            asked.method, rule.preset if rule is not None and rule.preset is not None else self.preset
        )
        own = rule.parameters if rule is not None else {}
        entries = [p.entry for p in asked.values]
        if asked.is_chosen:
            levels = Levels(own, (preset,))
            entries = [ModelEntry(e.reference) for e in entries]
        else:
            levels = Levels(own, (*self.shared, preset), tuple(p.entry.parameters for p in self.listed))
        place = TensorPlace(name, self.depth.get(name, 0.0) if depth is None else depth)
        return options_at(asked.method, levels, entries, place, [p.names[name] for p in asked.values])

    def varies(self, asked: TensorMethod) -> bool:
        """Do the options of the method depend on the tensor?"""
        return any(
            isinstance(value, (Gradient, Cases))
            for scope in self._scopes(asked.rule)
            for value in scope.values()
        )

    def _scopes(self, rule: Rule | None) -> list[Parameters]:
        return [
            *self.shared,
            *(p.entry.parameters for p in self.listed),
            rule.parameters if rule is not None else {},
        ]


@dataclass(frozen=True)
class Sections:
    """All parts of the output. ``layers`` maps a stack of the output to where its layers come from, if a recipe moves them."""

    parts: tuple[Section, ...]
    layers: Mapping[str, tuple[Layer, ...]]


def build_sections(
    recipe: Recipe, references: Sequence[str], sources: Sequence[Source], donor: int
) -> Sections:
    """Cut a recipe into sections. Errors: MismatchError for layers and modules that are not there, RecipeError."""
    maker = _SectionBuilder(recipe, references, sources, donor)
    if recipe.modules:
        for module in recipe.modules:
            maker.module(module)
        maker.rest_of_donor()
    elif recipe.slices:
        maker.sliced(recipe.slices, None, recipe.merge_method)
    else:
        maker.whole(recipe.models, None, recipe.merge_method)
    return Sections(tuple(maker.sections), maker.layers)


@dataclass(frozen=True)
class _Members:
    """The tensors of a model in one module: names within the module, and the model's own."""

    names: Mapping[str, str]

    @functools.cached_property
    def layers(self) -> Layers:
        return count_layers(self.names)

    @functools.cached_property
    def beginnings(self) -> dict[str, str]:
        """What stands before the names of a stack of layers within the module, in the model's own."""
        found: dict[str, str] = {}
        for name, full in self.names.items():
            place = layer_position(name)
            if place is not None and place.stack not in found and full.endswith(name):
                found[place.stack] = full[: len(full) - len(name)]
        return found

    def output_name(self, name: str, other: _Members) -> str:
        """How the donor, whose members these are, calls a tensor of ``other``: as it does itself, else as the other does."""
        place = layer_position(name)
        for members in (self, other):
            if name in members.names:
                return members.names[name]
            if place is not None and place.stack in members.beginnings:
                return members.beginnings[place.stack] + name
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
        """Heads of the output that a model may keep as its embedding."""

    def module(self, module: Module) -> None:
        method = module.merge_method or self.recipe.merge_method
        if module.slices:
            self.sliced(module.slices, module, method)
        else:
            self.whole(module.models, module, method)

    def members(self, model: int, module: Module | None) -> _Members:
        """The tensors of a model in a module, or all of them. Errors: MismatchError if the model has none of it."""
        key = (model, module.name if module is not None else None)
        if key not in self._members:
            self._members[key] = _Members(self._found(model, module))
        return self._members[key]

    def _found(self, model: int, module: Module | None) -> dict[str, str]:
        source = self.sources[model]
        if module is None or module.name == families.ONLY_MODULE:
            found = {n: n for n in source.tensors}
            tied = families.tied_heads(
                source.config, source.tensors, [h for h in self.heads if h not in found]
            )
            return found | tied
        asked = [m.name for m in self.recipe.modules]
        prefixes = families.prefixes_of(source.tensors)
        found = {}
        for name in source.tensors:
            place = families.module_of(name, asked, prefixes)
            if place is not None and place[0] == module.name:
                found[place[1]] = name
        if not found:
            has = ", ".join(dict.fromkeys(n.partition(".")[0] for n in source.tensors))
            raise MismatchError(
                f"module {module.name}: {source.label} has no tensor of it (names begin with {has[:200]}). "
                f"Known modules are {', '.join(families.MODULES)}, and {families.ONLY_MODULE} alone for all of it; "
                "or write the beginning of the names."
            )
        return found

    def shared(self, piece: Slice | None, module: Module | None) -> tuple[Parameters, ...]:
        levels = [piece.parameters] if piece is not None else []
        levels += [module.parameters] if module is not None else []
        return (*levels, self.recipe.parameters)

    def whole(self, models: Sequence[ModelEntry], module: Module | None, method: str) -> None:
        mine = self.members(self.donor, module)

        def part(entry: ModelEntry) -> ModelPart:
            model = self.references.index(entry.reference)
            members = self.members(model, module)
            self._check_whole(entry, model, members)
            return ModelPart(
                model, entry, {mine.output_name(n, members): full for n, full in members.names.items()}
            )

        listed = tuple(part(e) for e in models)
        named = self.recipe.base_model
        base = self._base(listed, named, part, None)
        names = dict.fromkeys([*mine.names.values(), *(n for p in listed for n in p.names)])
        donor = part(ModelEntry(self.references[self.donor]))
        label = module.name if module else ""
        self._add(
            label, method, listed, base, donor, named, self.shared(None, module), part, names, depths(names)
        )

    def _check_whole(self, entry: ModelEntry, model: int, members: _Members) -> None:
        """A ``layer_range`` under a model that is merged whole must be all its layers. Errors: MismatchError."""
        if entry.all_layers is None:
            return
        counts = sorted(set(count_layers(members.names).counts.values()))
        low, high = entry.all_layers
        if low != 0 or high not in counts:
            raise MismatchError(
                f"models: {self.sources[model].label} has {' and '.join(map(str, counts)) or 'no'} layers; layer_range is [{low}, {high}], "
                "and models are merged whole. Write slices to take layers, or leave layer_range out."
            )

    def sliced(self, slices: Sequence[Slice], module: Module | None, method: str) -> None:
        mine = self.members(self.donor, module)
        first = self.references.index(slices[0].models[0].reference)
        stack = self._stack(first, module)
        moved = mine.output_name(f"{stack}0._", mine)[: -len("0._")]
        origin: list[Layer] = []
        inner = f"module {module.name}, " if module else ""
        for i, piece in enumerate(slices):
            label = f"{inner}slices[{i}]"
            begin = len(origin)
            ends = (i == 0, i == len(slices) - 1)

            def part(
                entry: ModelEntry, begin: int = begin, ends: tuple[bool, bool] = ends, label: str = label
            ) -> ModelPart:
                return self._layers(entry, begin, ends, module, mine, label, stack)

            listed = tuple(part(e) for e in piece.models)
            ranges = {e.layers for e in piece.models}
            named = piece.base_model or self.recipe.base_model
            base = self._base(listed, named, part, next(iter(ranges)) if len(ranges) == 1 else None)
            names = dict.fromkeys(n for p in (*listed, *([base] if base else [])) for n in p.names)
            entry = piece.models[0]
            assert entry.layers is not None
            model = self.references.index(entry.reference)
            depth = _slice_depths(names, moved, begin, _length(piece))
            donor = base or listed[0]
            shared = self.shared(piece, module)
            self._add(
                label, piece.merge_method or method, listed, base, donor, named, shared, part, names, depth
            )
            origin += [Layer(model, layer) for layer in range(*entry.layers)]
        self.layers[moved] = tuple(origin)

    def _stack(self, model: int, module: Module | None) -> str:
        """The one stack of layers that slices can mean. Errors: MismatchError if there is none, or several."""
        source = self.sources[model]
        members = self.members(model, module)
        sizes: dict[str, int] = {}
        for name in members.names:
            place = layer_position(name)
            if place is not None and not (module is None and families.is_vision(name)):
                sizes[place.stack] = sizes.get(place.stack, 0) + 1
        if (
            module is None
        ):  # a tower may have more tensors than the text decoder, as the one for sounds of Phi-4 multimodal
            sizes = {s: size for s, size in sizes.items() if not families.is_tower(s)} or sizes
        largest = max(sizes.values(), default=0)
        likely = [s for s, size in sizes.items() if 2 * size >= largest]
        if len(likely) == 1:
            return likely[0]
        if not likely:
            raise MismatchError(
                f"slices: {source.label} has no numbered layers. Merge it whole, under models."
            )
        raise MismatchError(
            f"slices: {source.label} has several stacks of layers ({', '.join(likely)}). Write the slices of each under modules."
        )

    def _layers(
        self,
        entry: ModelEntry,
        begin: int,
        ends: tuple[bool, bool],
        module: Module | None,
        mine: _Members,
        label: str,
        out_stack: str,
    ) -> ModelPart:
        """The layers of one model that a slice takes, numbered from ``begin`` on, with what comes before or after all layers."""
        model = self.references.index(entry.reference)
        source = self.sources[model]
        stack = self._stack(model, module)
        members = self.members(model, module)
        count = members.layers.counts[stack]
        assert entry.layers is not None
        low, high = entry.layers
        if high > count:
            raise MismatchError(
                f"{label}: {source.label} has {count} layers; layer_range is [{low}, {high}]. Layers count from 0, and the end is not "
                f"included: write at most [{min(low, count - 1)}, {count}]."
            )
        names = {}
        for name, full in members.names.items():
            place, further = members.layers.place(name), members.layers.further(name)
            if place is not None and place.stack == stack:
                if low <= place.layer < high:
                    moved = LayerPosition(out_stack, place.layer, place.rest).at(begin + place.layer - low)
                    names[mine.output_name(moved, members)] = full
            elif further is not None and further.stack == stack:
                if ends[
                    1
                ]:  # what predicts further tokens follows the last layer, and has the numbers after it
                    moved = LayerPosition(out_stack, further.layer, further.rest).at(
                        begin + high - low + further.layer
                    )
                    names[mine.output_name(moved, members)] = full
            elif ends[0 if families.comes_first(name) else 1]:
                names[mine.output_name(name, members)] = full
        return ModelPart(model, entry, names)

    def _base(
        self,
        listed: Sequence[ModelPart],
        base: str | None,
        part: Callable[[ModelEntry], ModelPart],
        layers: tuple[int, int] | None,
    ) -> ModelPart | None:
        """The base of a section: the first of the models listed that is it; else its same layers, where they are the same for all."""
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
    ) -> None:
        ranges = {p.entry.layers for p in listed}
        layers = next(iter(ranges)) if len(ranges) == 1 else None
        self.sections.append(
            Section(
                label=label,
                merge_method=method,
                listed=listed,
                base=base,
                shared=shared,
                preset=self.recipe.preset,
                rules=self.recipe.methods,
                make=lambda reference: part(ModelEntry(reference, layers=layers)),
                donor=donor,
                named_base=named_base,
                names=tuple(names),
                depth=depth,
            )
        )

    def rest_of_donor(self) -> None:
        """What belongs to no module asked for stays as the donor has it."""
        given = {n for s in self.sections for n in s.names}
        for module in self.recipe.modules:  # layers that no slice takes are in a module all the same
            given.update(self.members(self.donor, module).names.values() if module.slices else ())
        rest = [n for n in self.sources[self.donor].tensors if n not in given]
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
                    rules=(),
                    make=lambda _: only,
                    donor=only,
                    named_base=None,
                    names=tuple(rest),
                    depth={},
                )
            )


def _length(piece: Slice) -> int:
    layers = piece.models[0].layers
    assert layers is not None
    return layers[1] - layers[0]


def _slice_depths(names: Iterable[str], stack: str, begin: int, count: int) -> dict[str, float]:
    """The depth of every tensor within its slice, whose layers are ``count`` from ``begin`` on; 0 for what is in no layer of it."""
    found = {}
    for name in names:
        place = layer_position(name)
        inside = place is not None and place.stack == stack and begin <= place.layer < begin + count
        found[name] = depth_of(place.layer - begin, count) if place is not None and inside else 0.0
    return found


def _measures(setting: Setting) -> bool:
    """Is there a measured weight in a setting?"""
    return isinstance(setting, NormWeight) or (
        isinstance(setting, Cases) and any(_measures(c.value) for c in setting.cases)
    )
