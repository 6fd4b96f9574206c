"""Defines Recipe and its parts: the checked content of a YAML file or a mapping.

Options keep their written names and values; :mod:`alnico.recipe.options` resolves them for one method and one
tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Union

from alnico.errors import MethodError
from alnico.notebook import name_text, names_text, never_fails, result_html, result_line
from alnico.numerics.norm_weights import NormMode, norm_weights

if TYPE_CHECKING:
    from alnico.recipe.experts import Mixture

Scalar = Union[float, bool, str]

Missing = Literal["error", "copy", "drop"]

DROP = "drop"
"""The ``merge_method`` of a rule that leaves its tensors out of the output. It is no merge method."""

PAIR_KEY = "alpha"
"""The key that a recipe writes for :class:`PairWeight`."""

OtherTensors = Literal["keep", "merge"]
"""What becomes of tensors without a Gram matrix where others are protected: as in the protected model, or merged."""
UnrelatedPolicy = Literal["error", "allow"]
MismatchPolicy = Literal["error", "allow"]
"""What to do with models that do not share one base."""
Requantise = Literal["fp8"]
"""The quantised format that an output is written in, with scales as those of its base."""

Approximate = Literal["omp", "subword", "mean"]
"""How a model makes the rows of tokens that it lacks: orthogonal matching pursuit, the mean of sub-words, the mean of all rows."""
APPROXIMATIONS: tuple[Approximate, ...] = ("omp", "subword", "mean")
ATOMS = 64
"""The rows that orthogonal matching pursuit combines, unless the recipe gives another number. mergekit-tokensurgeon's number."""


@dataclass(frozen=True)
class Gradient:
    """Values spread evenly over the layers.

    Between two values, numbers are interpolated; of others the left one applies.
    """

    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Case:
    """A value for the tensors whose name matches ``filter``.

    A filter is a substring, ``=`` and the whole name, ``re:`` and a regular expression, or ``*`` for all
    tensors.
    """

    filter: str
    value: Setting


@dataclass(frozen=True)
class Cases:
    """Cases tried in order: the first that matches a tensor's name applies.

    If none matches, the next level decides.
    """

    cases: tuple[Case, ...]


@dataclass(frozen=True)
class EachModel:
    """One value per model, in the order of the recipe. Written as a list, only under ``methods``."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class PairWeight:
    """The weights [1 - share, share] of two models, which recipes write as ``alpha``."""

    share: Setting


@dataclass(frozen=True)
class NormWeight:
    """A weight computed from the L2 norms of the task vectors of all models with this setting.

    ``origin`` says where the norms come from: the merge measures them, reads them from the analysis at
    ``path``, or takes those that are given, one per model in the order of the recipe. A norm is taken over the tensors with this weight: over all of them, per layer, or per tensor
    (``per``). Fields that ``mode`` does not use keep their defaults.
    """

    origin: Literal["l2_norm", "analysis", "given"] = "l2_norm"
    mode: NormMode = "exp"
    beta: float = 1.0
    alpha: float = 1.5
    scale: float = 1.0
    per: Literal["model", "layer", "tensor"] = "model"
    path: str = ""
    norms: tuple[float, ...] = ()

    def weights(self, norms: Sequence[float]) -> tuple[float, ...]:
        """Return one weight per norm. Frozen layers and tensors, where all norms are 0, get equal weights."""
        if self.per != "model" and not any(norms):
            return (self.scale / len(norms),) * len(norms)
        return norm_weights(norms, mode=self.mode, beta=self.beta, alpha=self.alpha, scale=self.scale)

    def data(self) -> dict[str, Any]:
        """Return the setting as a recipe writes it."""
        source: dict[str, Any] = {"path": self.path} if self.origin == "analysis" else {}
        source |= {"norms": [*self.norms]} if self.origin == "given" else {}
        own = {"exp": {"beta": self.beta}, "power": {"alpha": self.alpha}, "linear": {}}[self.mode]
        return {"from": self.origin, **source, "mode": self.mode, **own, "scale": self.scale, "per": self.per}


@dataclass(frozen=True)
class ScheduleWeight:
    """A weight from the place of a model among all with this setting: models are the checkpoints of a run, the newest last.

    ``shape`` names the decay of a learning rate that the average emulates, or is its factor at each checkpoint; see
    :mod:`alnico.numerics.decay_schedule`. ``decay`` is that of ``ema``; None for all others.
    """

    shape: str | tuple[float, ...] = "uniform"
    decay: float | None = None

    def weights(self, models: int) -> tuple[float, ...]:
        """Return one weight per model. Errors: MethodError for factors of another number of models."""
        from alnico.numerics import decay_schedule  # only where a recipe has a schedule

        if isinstance(self.shape, str):
            return decay_schedule.decay_coefficients(
                self.shape, models, decay_schedule.DEFAULT_DECAY if self.decay is None else self.decay
            )
        if len(self.shape) != models:
            raise MethodError(
                f"weight.shape has {len(self.shape)} factors, and {models} models have this weight; expected one factor for each "
                "of them, the oldest first."
            )
        return decay_schedule.differences(self.shape)

    def data(self) -> dict[str, Any]:
        """Return the setting as a recipe writes it."""
        shape = self.shape if isinstance(self.shape, str) else [*self.shape]
        return {
            "from": "schedule",
            "shape": shape,
            **({} if self.decay is None else {"decay": self.decay}),
        }


Setting = Union[Scalar, Gradient, Cases, EachModel, PairWeight, NormWeight, ScheduleWeight]
Parameters = Mapping[str, Setting]


def is_varied(setting: Setting) -> bool:
    """Does a setting differ between tensors: is it a gradient, or a list of filters?"""
    return isinstance(setting.share if isinstance(setting, PairWeight) else setting, (Gradient, Cases))


@dataclass(frozen=True)
class ModelEntry:
    """A model with its own options; in a slice, with its layers [first, end)."""

    reference: str
    parameters: Parameters = field(default_factory=dict)
    layers: tuple[int, int] | None = None
    all_layers: tuple[int, int] | None = field(default=None, compare=False)
    """The ``layer_range`` of a model that is merged whole. The plan checks that it covers all layers."""


@dataclass(frozen=True)
class Slice:
    """Layers of the output, made from equally many layers of each of ``models``."""

    models: tuple[ModelEntry, ...]
    parameters: Parameters = field(default_factory=dict)
    base_model: str | None = None
    merge_method: str | None = None


@dataclass(frozen=True)
class Module:
    """A part of a model with several layer stacks (text decoder, vision tower).

    It has ``models`` or ``slices``.
    """

    name: str
    models: tuple[ModelEntry, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Parameters = field(default_factory=dict)
    merge_method: str | None = None


@dataclass(frozen=True)
class Rule:
    """A separate method for the tensors whose name matches ``filter``.

    ``model`` is the model that passthrough copies. ``models`` are merged in place of those that the recipe
    lists; empty for the latter. A rule whose ``merge_method`` is :data:`DROP` leaves the tensors out.
    """

    filter: str
    merge_method: str
    parameters: Parameters = field(default_factory=dict)
    model: str | None = None
    """A reference, or "base"."""
    preset: str | None = None
    models: tuple[ModelEntry, ...] = ()
    base_model: str | None = None
    """A reference; empty for no base, None for that of the recipe."""

    @property
    def drops(self) -> bool:
        """Does the rule leave its tensors out?"""
        return self.merge_method == DROP

    def base_of(self, base: str | None, starts_from_a_model: bool) -> str | None:
        """Return the base of the rule, where the recipe's is ``base``.

        A method that starts from one of two models starts from the first of the rule's own.
        """
        if self.base_model:
            return self.base_model
        if starts_from_a_model and len(self.models) > 1:
            return self.models[0].reference
        return base if self.base_model is None else None


@dataclass(frozen=True)
class TokenSource:
    """Where a token's embedding row comes from: a model, another token of a model, or zeros.

    None: by default rules.
    """

    kind: Literal["model", "model_token", "zero"] | None = None
    model: str = ""
    token: str | None = None
    token_id: int | None = None
    force: bool = False
    """Use this row for every model, including models that have the token."""


@dataclass(frozen=True)
class TokenizerSetting:
    """The output's vocabulary: the ``union`` of all, ``base``, or that of the model with this reference."""

    source: str = "union"
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    tables: tuple[str, ...] = ()
    """Filters of the tensors with one row per token, if shapes and names do not show which they are."""
    approximate: Approximate | None = None
    """Every model makes the rows of tokens that it lacks of its own rows, in this way; None takes rows of other models."""
    atoms: int = ATOMS
    """The most rows that ``omp`` combines."""

    @property
    def references(self) -> tuple[str, ...]:
        """The models that the setting names."""
        named = [self.source, *(t.model for t in self.tokens.values())]
        return tuple(r for r in named if r not in ("", "union", "base"))


@dataclass(frozen=True)
class Lines:
    """LiNeS: scales the merged task vector of layer l of L by ``alpha + beta * l / (L - 1)``.

    Tensors before the layers are scaled by ``alpha``, tensors after them by ``alpha + beta``.
    """

    alpha: float
    beta: float


@dataclass(frozen=True)
class Protect:
    """Keeps what a model gives on its own inputs: see ``plan/protection.py``.

    ``model`` is a reference, None for the base. ``gram`` is the directory of its Gram matrices, ``energy`` the share of the inputs'
    squares that is kept, in (0, 1].
    """

    gram: str
    energy: float = 0.99
    model: str | None = None
    others: OtherTensors = "keep"

    def data(self) -> dict[str, Any]:
        """Return the setting as a recipe writes it."""
        model = {"model": self.model} if self.model else {}
        return {**model, "gram": self.gram, "energy": self.energy, "others": self.others}


@dataclass(frozen=True)
class Recipe:
    """What to merge (one of ``models``, ``slices`` and ``modules``) and the settings for all of it.

    ``dtype`` is the output dtype in the spelling of safetensors (``out_dtype`` of the file overrides
    ``dtype``); None promotes the inputs' dtypes. ``folder`` is the directory of the recipe file: a path that
    does not exist in the working directory is tried there. ``notes`` list what was accepted but has no
    effect.
    """

    merge_method: str
    models: tuple[ModelEntry, ...] = ()
    base_model: str | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 0
    missing: Missing = "error"
    unrelated: UnrelatedPolicy = "error"
    base_mismatch: MismatchPolicy = "error"
    complete_from: str | None = None
    """The model that gives tensors, keys of the config and side files that no merged model has."""
    requantise: Requantise | None = None
    routers: str | None = None
    """What the routers of mixtures of experts become: ``merge``, those of ``base``, or of the model with this reference."""
    calibrate_routers: str | None = None
    """The directory of statistics that routers are fitted to."""
    slices: tuple[Slice, ...] = ()
    modules: tuple[Module, ...] = ()
    methods: tuple[Rule, ...] = ()
    preset: str | None = None
    lines: Lines | None = None
    protect: Protect | None = None
    tokenizer: TokenizerSetting | None = None
    chat_template: str | None = None
    mixture: Mixture | None = None
    """The mixture of experts that the document builds; then ``models`` are empty, and ``merge_method`` says nothing."""
    stage: str = ""
    """The ``name`` of this document in a file of several."""
    notes: tuple[str, ...] = ()
    name: str = "recipe"
    folder: str = "."
    text: str = field(default="", compare=False)
    """The YAML text, if the recipe was read from YAML."""
    written_seed: int = field(default=0, compare=False)
    """The seed in the YAML text. ``seed`` may come from the command line instead."""

    def __repr__(self) -> str:
        return result_line(
            f"recipe of {', '.join(self.methods_used)}",
            f"{len(self.references):,} models: {names_text(self.references)}",
            f"base {name_text(self.base_model)}" if self.base_model else "",
            f"dtype {self.dtype}" if self.dtype else "",
        )

    @never_fails
    def _repr_html_(self) -> str:
        facts = [
            ("method", ", ".join(self.methods_used)),
            ("models", len(self.references)),
            ("base", self.base_model),
            ("dtype", self.dtype),
        ]
        code = self.text
        if not code:
            import yaml

            code = yaml.safe_dump(self.canonical(), sort_keys=False, allow_unicode=True)
        return result_html(
            f"Recipe {name_text(self.stage)}" if self.stage else "Recipe",
            *self.notes,
            facts=[(name, value) for name, value in facts if value is not None],
            code=code,
        )

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """Every entry that names a model, in the order of the recipe, without the base."""
        return tuple(self._entries())

    def _entries(self) -> Iterator[ModelEntry]:
        yield from self.models
        for module in self.modules:
            yield from module.models
        for part in self._slices():
            yield from part.models
        for rule in self.methods:
            yield from rule.models

    def _slices(self) -> Iterator[Slice]:
        yield from self.slices
        for module in self.modules:
            yield from module.slices

    @property
    def methods_used(self) -> tuple[str, ...]:
        """The merge methods of all parts and rules, without repetition."""
        if self.mixture is not None:
            return self.mixture.methods_used
        named = [] if self.modules or self.slices else [self.merge_method]
        named += [s.merge_method or self.merge_method for s in self.slices]
        for module in self.modules:
            own = module.merge_method or self.merge_method
            named += [s.merge_method or own for s in module.slices] or [own]
        return tuple(dict.fromkeys([*named, *(r.merge_method for r in self.methods if not r.drops)]))

    @property
    def references(self) -> tuple[str, ...]:
        """All models without repetition, as in ``Plan.sources``: listed models, bases, tokenizer models, the one that
        completes the output, the one that is protected."""
        named = [e.reference for e in self._entries()]
        named += self.mixture.references if self.mixture is not None else ()
        named += [s.base_model for s in self._slices() if s.base_model]
        named += [r.model for r in self.methods if r.model and r.model != "base"]
        named += [r.base_model for r in self.methods if r.base_model]
        if self.base_model:
            named.append(self.base_model)
        if self.tokenizer is not None:
            named += self.tokenizer.references
        if self.complete_from:
            named.append(self.complete_from)
        if self.protect is not None and self.protect.model:
            named.append(self.protect.model)
        if self.routers not in (None, "merge", "base"):
            named.append(self.routers)
        return tuple(dict.fromkeys(named))

    def canonical(self) -> dict[str, Any]:
        """Return the recipe as plain data that loads as the same recipe. Equal recipes give equal data."""
        data: dict[str, Any] = {"name": self.stage} if self.stage else {}
        if self.mixture is not None:
            data |= {"base_model": self.base_model, **self.mixture.data()}
            data |= {"dtype": self.dtype} if self.dtype else {}
            data |= {"unrelated": self.unrelated} if self.unrelated != "error" else {}
            return {**data, "seed": self.seed}
        data["merge_method"] = self.merge_method
        data |= _listed(self.models, self.slices)
        if self.modules:
            data["modules"] = {
                m.name: {
                    **_listed(m.models, m.slices),
                    **({"merge_method": m.merge_method} if m.merge_method else {}),
                    **_parameters(m.parameters),
                }
                for m in self.modules
            }
        if self.methods:
            data["methods"] = [
                {
                    "filter": r.filter,
                    "merge_method": r.merge_method,
                    **({"preset": r.preset} if r.preset else {}),
                    **({"model": r.model} if r.model else {}),
                    **_listed(r.models, ()),
                    **({"base_model": r.base_model or None} if r.base_model is not None else {}),
                    **_parameters(r.parameters),
                }
                for r in self.methods
            ]
        data |= {"base_model": self.base_model} if self.base_model else {}
        data |= {"preset": self.preset} if self.preset else {}
        data |= {"lines": {"alpha": self.lines.alpha, "beta": self.lines.beta}} if self.lines else {}
        data |= {"protect": self.protect.data()} if self.protect else {}
        data |= _parameters(self.parameters)
        if self.tokenizer is not None:
            data["tokenizer"] = _tokenizer(self.tokenizer)
        data |= {"chat_template": self.chat_template} if self.chat_template else {}
        data |= {"dtype": self.dtype} if self.dtype else {}
        data |= {"missing": self.missing} if self.missing != "error" else {}
        data |= {"unrelated": self.unrelated} if self.unrelated != "error" else {}
        data |= {"base_mismatch": self.base_mismatch} if self.base_mismatch != "error" else {}
        data |= {"complete_from": self.complete_from} if self.complete_from else {}
        if self.routers or self.calibrate_routers:
            data["routers"] = self.routers or {"calibrate": self.calibrate_routers}
        data |= {"requantise": self.requantise} if self.requantise else {}
        return {**data, "seed": self.seed}


def _listed(models: tuple[ModelEntry, ...], slices: tuple[Slice, ...]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if models:
        data["models"] = [_entry(m) for m in models]
    if slices:
        data["slices"] = [
            {
                "sources": [_entry(m) for m in s.models],
                **({"base_model": s.base_model} if s.base_model else {}),
                **({"merge_method": s.merge_method} if s.merge_method else {}),
                **_parameters(s.parameters),
            }
            for s in slices
        ]
    return data


def _entry(entry: ModelEntry) -> dict[str, Any]:
    layers = {"layer_range": list(entry.layers)} if entry.layers is not None else {}
    return {"model": entry.reference, **layers, **_parameters(entry.parameters)}


def _parameters(parameters: Parameters) -> dict[str, Any]:
    written = {PAIR_KEY if isinstance(v, PairWeight) else k: _plain(v) for k, v in parameters.items()}
    return {"parameters": dict(sorted(written.items()))} if parameters else {}


def _plain(setting: Setting) -> Any:
    match setting:
        case Gradient(values) | EachModel(values):
            return list(values)
        case Cases(cases):
            return [{"filter": c.filter, "value": _plain(c.value)} for c in cases]
        case PairWeight(share):
            return _plain(share)
        case NormWeight() | ScheduleWeight():
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
    way = {"approximate": setting.approximate} if setting.approximate else {}
    atoms = {"atoms": setting.atoms} if setting.approximate == "omp" else {}
    return {
        "source": setting.source,
        **({"tokens": tokens} if tokens else {}),
        **padding,
        **tables,
        **way,
        **atoms,
    }
