"""Reads LoRA adapters in PEFT's format, without their base and without loading a model.

The format is PEFT's; LoRA is Hu et al. 2021 (https://arxiv.org/abs/2106.09685), with the scale of rsLoRA
(https://arxiv.org/abs/2312.03732) and the magnitudes of DoRA (https://arxiv.org/abs/2402.09353).
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.checkpoint import patterns
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.source import FactorSource, read_finite
from alnico.errors import ModelError
from alnico.numerics import dtypes

if TYPE_CHECKING:
    from alnico.checkpoint.lora_dialects.factor_names import Dialect

CONFIG = "adapter_config.json"
SAFE_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = (SAFE_WEIGHTS, "adapter_model.bin")
PREFIX = "base_model.model."
FACTOR_NAME = re.compile(
    r"\.lora_(embedding_A|embedding_B|A|B|magnitude_vector)(?:\.default)?(?:\.(weight|bias))?$"
)
TRAINED_ROWS = re.compile(r"\.token_adapter\.trainable_tokens_delta(?:\.default)?$")
PEFT_WRAPPERS = re.compile(
    r"\.(base_layer|token_adapter|original_module|modules_to_save(\.default)?)(?=\.|$)"
)
"""What PEFT inserts between a module's name and its tensors' names."""

APPLIED_KEYS = frozenset((
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "bias", "lora_bias",
    "init_lora_weights", "target_parameters", "target_modules", "modules_to_save", "ensure_weight_tying", "trainable_token_indices",
))  # fmt: skip
IGNORED_KEYS = frozenset((
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
))  # fmt: skip
"""Config keys that describe the training, or repeat what the tensors show."""

ATTENTION_PROJECTION = ".base_layer.out_proj"
"""End of the name of an ``nn.MultiheadAttention``'s output projection: PEFT wraps the attention and the
projection."""

PLAIN_NAME = re.compile(r"[\w.]+")
"""A config pattern that is a module's name; its dots match any character."""
MAX_EXPRESSIONS = 256
"""Most regular expressions in a config. People write a few."""
MAX_COMPARISONS = 50_000_000
"""Most patterns times tensors of an adapter: comparing that many takes about ten seconds."""

INITS_THAT_KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights unchanged; pissa, olora, corda, loftq and similar ones change
them."""


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one parameter: ``scale * left @ right``. The names are those of the adapter's
    tensors.

    ``left`` is PEFT's B and ``right`` its A, so that the product is (out, in); for an embedding it is the
    transpose of the stored matrix. One tensor holds ``experts`` matrices: A goes through the ranks expert by
    expert, B through the experts rank by rank.
    """

    module: str
    """The module's name as in the base, without what PEFT puts before it and into it."""
    left: str
    right: str
    rank: int
    scale: float
    magnitude: str = ""
    """DoRA's norms, one per output."""
    bias: str = ""
    """Added to the module's bias, times ``scale``."""
    is_embedding: bool = False
    difference: str = ""
    """The tensor that holds ``left @ right``, where reading that is less work than computing the product; '' where there is none."""
    is_magnitude_by_input: bool = False
    """Is a norm of DoRA that of all weights of an input, and not of an output?"""
    parameters: tuple[str, ...] = ("weight",)
    """The module's parameter; several where the config names several and only the base's shapes can
    decide."""
    depth: int = 0
    """Number of the module's parameters wrapped inside this one: distinguishes the updates of one module."""
    experts: int = 1
    is_attention_projection: bool = False
    """Is this the output projection of an ``nn.MultiheadAttention``? PEFT adds its product twice, in the
    forward pass and when it merges."""

    @property
    def key(self) -> str:
        """A name that is unique in one adapter, and equal between adapters for the same parameter."""
        return self.module + ".base_layer" * self.depth


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding that an adapter trained alone (``trainable_token_indices``). ``name`` is the
    adapter's tensor."""

    name: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class AddedVector:
    """A whole difference of a vector, such as a bias: ``vector + scale * difference``. ``name`` is the adapter's tensor."""

    module: str
    parameter: str
    name: str
    scale: float = 1.0


@dataclass
class _UpdateParts:
    """The tensors of an update, while they are collected."""

    module: str
    depth: int
    left: str = ""
    right: str = ""
    magnitude: str = ""
    bias: str = ""
    is_embedding: bool = False
    is_attention_projection: bool = False


class Adapter:
    """An open adapter: its config, its updates by parameter, and the tensors it replaces. Made by
    :func:`alnico.checkpoint.open_adapter.open_adapter`."""

    def __init__(
        self,
        files: FactorSource,
        config: Mapping[str, Any],
        updates: Mapping[str, Update] | None = None,
        replaced: Mapping[str, str] | None = None,
        *,
        vectors: Mapping[str, AddedVector] | None = None,
        dialect: Dialect | None = None,
    ) -> None:
        """Read what the names of tensors say, unless ``updates`` and ``replaced`` say it. ``dialect`` is that of a file without a config."""
        self.label = files.label
        self.files = files
        self.config = config
        self.rows: dict[str, Rows] = {}
        self.vectors = dict(vectors or {})
        self.dialect = dialect
        self.blocks = ""
        """The strengths of its blocks, as a reference writes them."""
        if updates is None:
            self.updates, self.replaced, self.rows = _parse_tensors(files, config)
        else:
            self.updates, self.replaced = dict(updates), dict(replaced or {})

    def matrices(self, update: Update, dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
        """The factors of an update, in ``dtype`` and without its scale: left (experts, out, r) and right
        (experts, r, in).

        A convolution's other dimensions are flattened. Errors: ModelError naming a tensor with a NaN or an
        infinity.
        """
        left, right = self.read(update.left, dtype), self.read(update.right, dtype)
        left = left.reshape(left.shape[0], math.prod(left.shape[1:]))
        right = right.reshape(right.shape[0], math.prod(right.shape[1:]))
        experts = update.experts
        return (
            np.ascontiguousarray(
                left.reshape(len(left), left.shape[1] // experts, experts).transpose(2, 0, 1)
            ),
            np.ascontiguousarray(right.reshape(experts, len(right) // experts, right.shape[1])),
        )

    def read(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        """Read a tensor. Errors: NonFiniteError, naming tensor and index, for a NaN or an infinity."""
        return read_finite(self.files, name, dtype)

    def shape(self, update: Update) -> tuple[int, int]:
        """Rows and columns of one expert's update: outputs and inputs."""
        left, right = self.files.tensors[update.left].shape, self.files.tensors[update.right].shape
        return left[0], math.prod(right[1:])

    @property
    def trained_on(self) -> str:
        """The base that its config names; '' if it names none."""
        return str(self.config.get("base_model_name_or_path") or "")

    def close(self) -> None:
        self.files.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<adapter {self.label}: {len(self.updates)} updates, {len(self.replaced)} replaced tensors>"


def checked_config(files: FileModel) -> Mapping[str, Any]:
    """Read the adapter's config. Errors: ModelError for an option that changes the result and is not
    supported."""
    config = read_json(files.location / CONFIG)
    check_config(config, f"{files.label}: {CONFIG}", len(files.tensors))
    return config


def check_config(config: Mapping[str, Any], where: str, tensors: int) -> None:
    """Check the config of an adapter of some tensors. Errors: ModelError, as for :func:`alnico.checkpoint.open_adapter.open_adapter`."""
    kind, init = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        raise ModelError(
            f"{where}: peft_type is {kind!r}, expected 'LORA'. Merge this adapter into its base with PEFT "
            "and use the result."
        )
    others = [
        key
        for key, value in config.items()
        if key not in APPLIED_KEYS | IGNORED_KEYS and value not in (None, False, 0, "", [], {})
    ]
    if init not in INITS_THAT_KEEP_THE_BASE:
        others.append("init_lora_weights")
    if others:
        key = others[0]
        raise ModelError(
            f"{where}: {key} is {str(config[key])[:60]!r}, which changes what the adapter does; this version "
            "applies plain LoRA, rsLoRA and DoRA. Merge it into its base with PEFT and use the result."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ModelError(
                f"{where}: {key} is {str(config[key])[:60]!r}, expected a mapping from modules to numbers. "
                "Check the adapter."
            )
        _check_patterns(where, key, config.get(key) or {}, tensors)
    if isinstance(config.get("target_modules"), str):
        _check_patterns(where, "target_modules", [config["target_modules"]], tensors)
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise ModelError(
                f"{where}: has no {key}, which its scale depends on. Get the adapter from its source."
            )
    named = config.get("target_parameters") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelError(
            f"{where}: target_parameters is {str(named)[:60]!r}, expected a list of names. Check the adapter."
        )


def _check_patterns(where: str, key: str, keys: Collection[str], tensors: int) -> None:
    """Refuse patterns that take too long, one by one or together. Errors: ModelError."""
    expressions = [pattern for pattern in keys if not PLAIN_NAME.fullmatch(pattern)]
    if len(expressions) > MAX_EXPRESSIONS or len(keys) * tensors > MAX_COMPARISONS:
        raise ModelError(
            f"{where}: {key} has {len(keys)} patterns for {tensors} tensors, {len(expressions)} of them "
            f"regular expressions; expected at most {MAX_EXPRESSIONS} expressions, and at most one pattern "
            "per module. List the modules by name, or use fewer patterns."
        )
    for pattern in expressions:
        try:
            patterns.check_pattern(pattern if key == "target_modules" else _suffix_pattern(pattern))
        except patterns.PatternError as error:
            raise ModelError(
                f"{where}: {key} has the pattern {patterns.quote_pattern(pattern)}, which {error}; expected module "
                "names, or a short regular expression. Use another adapter, or list the modules by name."
            ) from None


def _parse_tensors(
    files: FactorSource, config: Mapping[str, Any]
) -> tuple[dict[str, Update], dict[str, str], dict[str, Rows]]:
    """Return the updates by key, the replaced tensors (base's name to adapter's name), and the tensors with
    trained rows."""
    parts: dict[str, _UpdateParts] = {}
    replaced: dict[str, str] = {}
    rows: dict[str, Rows] = {}
    for name in files.tensors:
        plain = name.removeprefix(PREFIX)
        rows_match = TRAINED_ROWS.search(plain)
        if rows_match is not None:
            module = PEFT_WRAPPERS.sub("", plain[: rows_match.start()])
            rows[f"{module}.weight"] = Rows(name, _indices(files, config, module, name))
            continue
        part = FACTOR_NAME.search(plain)
        if part is None:
            target = PEFT_WRAPPERS.sub("", plain)
            if target in replaced:
                raise ModelError(
                    f"{files.label}: {replaced[target]} and {name} both replace {target!r}; expected one. "
                    "Remove the one that is not meant."
                )
            replaced[target] = name
            continue
        wrapped = plain[: part.start()]
        module = PEFT_WRAPPERS.sub("", wrapped)
        is_attention_projection = wrapped.endswith(ATTENTION_PROJECTION)
        depth = wrapped.removesuffix(ATTENTION_PROJECTION).count(".base_layer")
        update_parts = parts.setdefault(
            module + ".base_layer" * depth,
            _UpdateParts(module, depth, is_attention_projection=is_attention_projection),
        )
        if part[2] == "bias":
            update_parts.bias = name
        elif part[1] in ("B", "embedding_B"):
            update_parts.left = name
        elif part[1] in ("A", "embedding_A"):
            update_parts.right = name
        else:
            update_parts.magnitude = name
        update_parts.is_embedding |= part[1].startswith("embedding")
    if not parts and not replaced and not rows:
        raise ModelError(
            f"{files.label}: holds no tensors; expected the factors of a LoRA adapter. Complete the download."
        )
    chosen = _assign_parameters(files, parts, config)
    return (
        {key: _update(files, update_parts, config, chosen[key]) for key, update_parts in parts.items()},
        replaced,
        rows,
    )


def _indices(files: FactorSource, config: Mapping[str, Any], module: str, name: str) -> tuple[int, ...]:
    """The rows that ``trainable_token_indices`` names for a module: one list for the input embedding, or a
    list per end of a module's name."""
    named = config.get("trainable_token_indices")
    if isinstance(named, dict):
        named = next((v for k, v in named.items() if module == k or module.endswith(f".{k}")), None)
    shape, dtype = files.tensors[name].shape, files.tensors[name].dtype
    is_valid = isinstance(named, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in named
    )
    if not is_valid or len(set(named or ())) != len(named or ()):
        raise ModelError(
            f"{files.label}: {CONFIG}: trainable_token_indices names {str(named)[:60]} for {module}; "
            "expected a list of distinct row numbers. Check the adapter."
        )
    assert named is not None
    if len(shape) != 2 or shape[0] != len(named) or dtype not in dtypes.MERGEABLE:
        raise ModelError(
            f"{files.label}: {name} is {dtype} of {shape}, and trainable_token_indices names {len(named)} "
            "rows; expected a row of numbers in floating point for each. Get the adapter from its source."
        )
    return tuple(named)


def is_trained(config: Mapping[str, Any], name: str) -> bool:
    """Was a whole tensor in an adapter trained: one of ``modules_to_save``, or a bias?

    Other whole tensors are the base's own, which PEFT saves next to an adapter of embeddings.
    """
    parameter = name.rpartition(".")[2]
    return (parameter == "bias" and config.get("bias") not in (None, "none")) or is_saved_module(config, name)


def is_saved_module(config: Mapping[str, Any], name: str) -> bool:
    """Is a tensor in a module that ``modules_to_save`` names? PEFT compares ends of names: "norm" also names
    "input_layernorm"."""
    words, lengths = _words(_ByIdentity(config.get("modules_to_save")))
    parts = name.split(".")[:-1]
    inside = itertools.accumulate(parts, lambda above, part: f"{above}.{part}")
    return any(module[len(module) - n :] in words for module in inside for n in lengths if n <= len(module))


def is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Do ``target_modules`` name a module: a list by an end of its name, a string by a regular expression for
    the whole name?

    Errors: ModelError for an expression that takes too long.
    """
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return _matches(targets, module, "fullmatch", targets, "target_modules")
    words, _ = _words(_ByIdentity(targets))
    parts = module.split(".")
    return any(".".join(parts[i:]) in words for i in range(len(parts)))


class _ByIdentity:
    """A value compared by identity: the lists of a config have no hash, and may be long."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@functools.lru_cache(16)
def _words(key: _ByIdentity) -> tuple[frozenset[str], tuple[int, ...]]:
    """The strings of a list, and their lengths."""
    words = (
        frozenset(v for v in key.value if isinstance(v, str)) if isinstance(key.value, list) else frozenset()
    )
    return words, tuple(sorted({len(word) for word in words}))


def _matches(pattern: str, name: str, how: patterns.How, written: str, key: str) -> bool:
    """Does a pattern match a name? Errors: ModelError for one that takes too long."""
    try:
        return patterns.fits(pattern, name, how)
    except patterns.PatternError as error:
        raise ModelError(
            f"{CONFIG}: the pattern {patterns.quote_pattern(written)} of {key} {error}; expected one with few "
            "repetitions inside one another. Use another adapter, or list the modules by name."
        ) from None


def _update(
    files: FactorSource,
    parts: _UpdateParts,
    config: Mapping[str, Any],
    parameters: tuple[str, ...],
) -> Update:
    where = files.label
    if not parts.left or not parts.right:
        name = parts.left or parts.right or parts.magnitude or parts.bias
        raise ModelError(
            f"{where}: the adapter has {name} without its lora_A or lora_B. Complete the download."
        )
    for name in (parts.left, parts.right, parts.magnitude, parts.bias):
        if name and files.tensors[name].dtype not in dtypes.MERGEABLE:
            raise ModelError(
                f"{where}: {name} is {files.tensors[name].dtype}, expected floating-point numbers. Use "
                "another adapter."
            )
    update = Update(
        parts.module,
        parts.left,
        parts.right,
        0,
        0.0,
        magnitude=parts.magnitude,
        bias=parts.bias,
        is_embedding=parts.is_embedding,
        parameters=parameters,
        depth=parts.depth,
        is_attention_projection=parts.is_attention_projection,
    )
    try:
        rank, scale = scale_of(update, config)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ModelError(
            f"{where}: {CONFIG}: the rank or alpha of {parts.module} cannot be determined ({error}). Check "
            "the adapter."
        ) from None
    left, right = files.tensors[parts.left].shape, files.tensors[parts.right].shape
    rows = right[0] if right else 0
    experts = rows // rank if update.parameters != ("weight",) and rank > 0 and rows % rank == 0 else 1
    if rank < 1 or rows != rank * max(experts, 1):
        raise ModelError(
            f"{where}: {parts.right} has rank {rows}, {CONFIG} says {rank}; they must agree and be at least "
            "1. Get the adapter from its source."
        )
    if len(right) < 2 or len(left) < 2 or math.prod(left[1:]) != rows:
        raise ModelError(
            f"{where}: {parts.left} is {left} and {parts.right} is {right}; expected matrices of rank "
            f"{rows}. Get the adapter from its source."
        )
    return replace(
        update, rank=rank, scale=2 * scale if update.is_attention_projection else scale, experts=experts
    )


def _parameters(parts: _UpdateParts, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The parameters that factors may belong to, by the config: the weight, or the ``target_parameters`` that
    the module may have.

    A name without a module ("down_proj") is for every module that ``target_modules`` do not name.
    """
    targets = [target.rpartition(".") for target in config.get("target_parameters") or []]
    named = [
        p
        for module, _, p in targets
        if module and (parts.module == module or parts.module.endswith(f".{module}"))
    ]
    if not named and not is_targeted(config, parts.module):
        named = [p for module, _, p in targets if not module]
    return tuple(dict.fromkeys(named)) or ("weight",)


def _assign_parameters(
    files: FactorSource, parts: Mapping[str, _UpdateParts], config: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """The parameters that each update may belong to. Where the ranks of a module's parameters differ, they
    decide which update is whose.

    PEFT fuses the factors of gate and up projections at twice the rank (``rank_pattern: {".*\\.gate_up_proj":
    2 r}``). All updates of a module have equally many experts, and A has a rank for each: only one assignment
    of parameters to updates agrees with that.
    """
    chosen = {key: _parameters(update_parts, config) for key, update_parts in parts.items()}
    modules: dict[str, list[str]] = {}
    for key, update_parts in parts.items():
        modules.setdefault(update_parts.module, []).append(key)
    for module, keys in modules.items():
        candidates = chosen[keys[0]]
        if len(candidates) < 2 or len(candidates) > 4:
            continue
        ranks = {p: _rank_and_alpha(module, p, config) for p in candidates}
        if (
            not all(type(r) is int and r > 0 for r, _ in ranks.values())
            or len({str(r) for r in ranks.values()}) == 1
        ):
            continue
        fits = []
        for order in itertools.permutations(candidates, len(keys)):
            rows = [(files.tensors[parts[k].right].shape or (0,))[0] if parts[k].right else 0 for k in keys]
            if all(n % ranks[p][0] == 0 for n, p in zip(rows, order, strict=True)):
                experts = {n // ranks[p][0] for n, p in zip(rows, order, strict=True)}
                if len(experts) == 1:
                    fits.append(order)
        if len(fits) == 1:
            chosen |= {k: (p,) for k, p in zip(keys, fits[0], strict=True)}
    return chosen


def _rank_and_alpha(module: str, parameter: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The rank and alpha of a module's parameter, from the patterns of the config."""
    name = module if parameter == "weight" else f"{module}.{parameter}"

    def of(key: str, default: Any) -> Any:
        for pattern, value in (config.get(key) or {}).items():
            if _matches_end(pattern, name, key) or (name != module and _matches_end(pattern, module, key)):
                return value
        return default

    return of("rank_pattern", config["r"]), of("alpha_pattern", config["lora_alpha"])


def _suffix_pattern(pattern: str) -> str:
    """The regular expression that PEFT builds from a pattern for the end of a name."""
    return rf"(.*\.)?({pattern})$"


def _matches_end(pattern: str, name: str, key: str) -> bool:
    """Does a pattern match whole components at the end of a name? Plain names are compared directly; their
    dots match any character."""
    if "\n" in name or not PLAIN_NAME.fullmatch(pattern):
        return _matches(_suffix_pattern(pattern), name, "match", pattern, key)
    begin = len(name) - len(pattern)
    if begin < 0 or (begin and name[begin - 1] != "."):
        return False
    end = name[begin:]
    return end == pattern or all(p in (".", c) for p, c in zip(pattern, end, strict=True))


def scale_of(update: Update, config: Mapping[str, Any]) -> tuple[int, float]:
    """The rank of an update and its scale: alpha / r, or alpha / sqrt(r) for rsLoRA. Patterns match the end
    of a module's or parameter's name.

    Where the config names several parameters, all must have the same values: no adapter says which factors
    belong to which.
    """
    pairs = [_rank_and_alpha(update.module, parameter, config) for parameter in update.parameters]
    if any(pair != pairs[0] for pair in pairs):
        raise ValueError(
            f"a pattern matches only one of {' and '.join(update.parameters)}, and no adapter says which "
            "factors are whose"
        )
    rank, alpha = pairs[0]
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"the rank is {rank!r}")
    if rank < 1:
        return rank, 0.0
    scale = float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    if not math.isfinite(scale):
        raise ValueError(f"alpha is {alpha!r}")
    return rank, scale
