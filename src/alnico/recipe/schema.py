"""The recipe as a value: what a YAML file or a mapping says, checked.

Options keep the names and values they are written with; :mod:`alnico.recipe.options` says what they mean for one method and
one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union

from alnico.numerics.norm_weights import NormMode, norm_weights

Scalar = Union[float, bool, str]

Missing = Literal["error", "copy", "drop"]

UnrelatedPolicy = Literal["error", "allow"]
"""What to do with models that were not tuned from one base."""


@dataclass(frozen=True)
class Gradient:
    """Values spread evenly over the layers; between two of them numbers are interpolated, others are taken from the left."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Case:
    """A value for the tensors whose name fits ``filter``: a substring, ``=`` and the whole name, ``re:`` and an expression, or
    ``*`` for all."""

    filter: str
    value: Setting


@dataclass(frozen=True)
class Cases:
    """The first case that fits a tensor's name; where none does, the next level of the recipe is asked."""

    cases: tuple[Case, ...]


@dataclass(frozen=True)
class EachModel:
    """A value for each model, in the order of the recipe. Written as a list, under ``methods`` only."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class NormWeight:
    """A weight that follows from how far the model is from the base: its own, and that of the other models with this setting.

    ``origin`` says where the L2 norms of the task vectors come from: the merge measures them, or they are those of the analysis at
    ``path``. They are of the tensors that have this weight: all of them, those of a layer, or each by itself (``per``). What
    the ``mode`` does not use has its default.
    """

    origin: Literal["l2_norm", "analysis"] = "l2_norm"
    mode: NormMode = "exp"
    beta: float = 1.0
    alpha: float = 1.5
    scale: float = 1.0
    per: Literal["model", "layer", "tensor"] = "model"
    path: str = ""

    def weights(self, norms: Sequence[float]) -> tuple[float, ...]:
        """Weigh the models with these norms. Frozen layers and tensors, of which no model is far, have equal weights."""
        if self.per != "model" and not any(norms):
            return (self.scale / len(norms),) * len(norms)
        return norm_weights(norms, mode=self.mode, beta=self.beta, alpha=self.alpha, scale=self.scale)

    def data(self) -> dict[str, Any]:
        """The setting as it is written."""
        path = {"path": self.path} if self.origin == "analysis" else {}
        own = {"exp": {"beta": self.beta}, "power": {"alpha": self.alpha}, "linear": {}}[self.mode]
        return {"from": self.origin, **path, "mode": self.mode, **own, "scale": self.scale, "per": self.per}


Setting = Union[Scalar, Gradient, Cases, EachModel, NormWeight]
Parameters = Mapping[str, Setting]


@dataclass(frozen=True)
class ModelEntry:
    """One model with the options given under it; in a slice, with its layers [first, end)."""

    reference: str
    parameters: Parameters = field(default_factory=dict)
    layers: tuple[int, int] | None = None
    all_layers: tuple[int, int] | None = field(default=None, compare=False)
    """What a ``layer_range`` says under a model that is merged whole: the plan checks that these are all its layers."""


@dataclass(frozen=True)
class Slice:
    """Layers of the output, made from as many layers of each of ``models``."""

    models: tuple[ModelEntry, ...]
    parameters: Parameters = field(default_factory=dict)
    base_model: str | None = None
    merge_method: str | None = None


@dataclass(frozen=True)
class Module:
    """A part of a model with several stacks of layers (text decoder, vision tower): ``models`` or ``slices``."""

    name: str
    models: tuple[ModelEntry, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Parameters = field(default_factory=dict)
    merge_method: str | None = None


@dataclass(frozen=True)
class Rule:
    """A method of its own for the tensors whose name fits ``filter``. ``model`` is what passthrough takes."""

    filter: str
    merge_method: str
    parameters: Parameters = field(default_factory=dict)
    model: str | None = None
    """A reference, or "base"."""
    preset: str | None = None


@dataclass(frozen=True)
class TokenSource:
    """Where the row of one token comes from: a model's row of it, another token's row, zeros; None leaves it to the rule."""

    kind: Literal["model", "model_token", "zero"] | None = None
    model: str = ""
    token: str | None = None
    token_id: int | None = None
    force: bool = False
    """For every model, also those that have the token."""


@dataclass(frozen=True)
class TokenizerSetting:
    """The output's vocabulary: the ``union`` of all, ``base``, or that of the model of this reference."""

    source: str = "union"
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    tables: tuple[str, ...] = ()
    """Filters of the tensors with a row for each token, where shapes and names do not tell."""

    @property
    def references(self) -> tuple[str, ...]:
        """The models it names."""
        named = [self.source, *(t.model for t in self.tokens.values())]
        return tuple(r for r in named if r not in ("", "union", "base"))


@dataclass(frozen=True)
class Lines:
    """LiNeS: the merged task vector of layer l of L is multiplied by ``alpha + beta * l / (L - 1)``; what is in no layer by
    ``alpha``, or by ``alpha + beta`` where it comes after the layers."""

    alpha: float
    beta: float


@dataclass(frozen=True)
class Recipe:
    """What is asked: one of ``models``, ``slices`` and ``modules``, and what goes for all of them.

    ``dtype`` is the output dtype (``out_dtype`` of the file wins over ``dtype``), as the safetensors format calls it, or
    None for the promotion of the inputs' dtypes. ``folder`` is the directory of the recipe's file: a model that is not found
    from the working directory is looked for there. ``notes`` tell what was accepted and means nothing.
    """

    merge_method: str
    models: tuple[ModelEntry, ...] = ()
    base_model: str | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 0
    missing: Missing = "error"
    unrelated: UnrelatedPolicy = "error"
    slices: tuple[Slice, ...] = ()
    modules: tuple[Module, ...] = ()
    methods: tuple[Rule, ...] = ()
    preset: str | None = None
    lines: Lines | None = None
    tokenizer: TokenizerSetting | None = None
    chat_template: str | None = None
    stage: str = ""
    """The ``name`` of a document among several."""
    notes: tuple[str, ...] = ()
    name: str = "recipe"
    folder: str = "."
    text: str = field(default="", compare=False)
    """The YAML it was read from, if it was."""
    written_seed: int = field(default=0, compare=False)
    """The seed in that YAML; ``seed`` may come from the command line."""

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """Every place where a model is named, in the order of the recipe, the base aside."""
        return tuple(self._entries())

    def _entries(self) -> Iterator[ModelEntry]:
        yield from self.models
        for module in self.modules:
            yield from module.models
        for piece in self._slices():
            yield from piece.models

    def _slices(self) -> Iterator[Slice]:
        yield from self.slices
        for module in self.modules:
            yield from module.slices

    @property
    def methods_used(self) -> tuple[str, ...]:
        """Every merge method that a part or a rule has, each once."""
        named = [] if self.modules or self.slices else [self.merge_method]
        named += [s.merge_method or self.merge_method for s in self.slices]
        for module in self.modules:
            own = module.merge_method or self.merge_method
            named += [s.merge_method or own for s in module.slices] or [own]
        return tuple(dict.fromkeys([*named, *(r.merge_method for r in self.methods)]))

    @property
    def references(self) -> tuple[str, ...]:
        """Every model named, each once, in the order of ``Plan.sources``: those of the lists first, then bases and donors."""
        named = [e.reference for e in self._entries()]
        named += [s.base_model for s in self._slices() if s.base_model]
        named += [r.model for r in self.methods if r.model and r.model != "base"]
        if self.base_model:
            named.append(self.base_model)
        if self.tokenizer is not None:
            named += self.tokenizer.references
        return tuple(dict.fromkeys(named))

    def canonical(self) -> dict[str, Any]:
        """Return the recipe as plain data in its own language; equal recipes give equal data, and reading it gives it back."""
        given: dict[str, Any] = {"name": self.stage} if self.stage else {}
        given["merge_method"] = self.merge_method
        given |= _listed(self.models, self.slices)
        if self.modules:
            given["modules"] = {
                m.name: {
                    **_listed(m.models, m.slices),
                    **({"merge_method": m.merge_method} if m.merge_method else {}),
                    **_parameters(m.parameters),
                }
                for m in self.modules
            }
        if self.methods:
            given["methods"] = [
                {
                    "filter": r.filter,
                    "merge_method": r.merge_method,
                    **({"preset": r.preset} if r.preset else {}),
                    **({"model": r.model} if r.model else {}),
                    **_parameters(r.parameters),
                }
                for r in self.methods
            ]
        given |= {"base_model": self.base_model} if self.base_model else {}
        given |= {"preset": self.preset} if self.preset else {}
        given |= {"lines": {"alpha": self.lines.alpha, "beta": self.lines.beta}} if self.lines else {}
        given |= _parameters(self.parameters)
        if self.tokenizer is not None:
            given["tokenizer"] = _tokenizer(self.tokenizer)
        given |= {"chat_template": self.chat_template} if self.chat_template else {}
        given |= {"dtype": self.dtype} if self.dtype else {}
        given |= {"missing": self.missing} if self.missing != "error" else {}
        given |= {"unrelated": self.unrelated} if self.unrelated != "error" else {}
        return {**given, "seed": self.seed}


def _listed(models: tuple[ModelEntry, ...], slices: tuple[Slice, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if models:
        found["models"] = [_entry(m) for m in models]
    if slices:
        found["slices"] = [
            {
                "sources": [_entry(m) for m in s.models],
                **({"base_model": s.base_model} if s.base_model else {}),
                **({"merge_method": s.merge_method} if s.merge_method else {}),
                **_parameters(s.parameters),
            }
            for s in slices
        ]
    return found


def _entry(entry: ModelEntry) -> dict[str, Any]:
    layers = {"layer_range": list(entry.layers)} if entry.layers is not None else {}
    return {"model": entry.reference, **layers, **_parameters(entry.parameters)}


def _parameters(parameters: Parameters) -> dict[str, Any]:
    return {"parameters": {k: _plain(v) for k, v in sorted(parameters.items())}} if parameters else {}


def _plain(setting: Setting) -> Any:
    match setting:
        case Gradient(values) | EachModel(values):
            return list(values)
        case Cases(cases):
            return [{"filter": c.filter, "value": _plain(c.value)} for c in cases]
        case NormWeight():
            return setting.data()
    return setting


def _tokenizer(setting: TokenizerSetting) -> dict[str, Any]:
    tokens: dict[str, Any] = {}
    for token, origin in setting.tokens.items():
        source: Any = origin.model or None
        if origin.kind == "zero":
            source = {"kind": "zero"}
        elif origin.kind == "model_token":
            which = {"token": origin.token} if origin.token is not None else {"token_id": origin.token_id}
            source = {"kind": "model_token", "model": origin.model, **which}
        tokens[token] = {
            **({"source": source} if source else {}),
            **({"force": True} if origin.force else {}),
        }
    padding = {"pad_to_multiple_of": setting.pad_to_multiple_of} if setting.pad_to_multiple_of else {}
    tables = {"tables": list(setting.tables)} if setting.tables else {}
    return {"source": setting.source, **({"tokens": tokens} if tokens else {}), **padding, **tables}
