"""LoRA adapters as PEFT saves them: what their files mean, read without a base and without loading a model.

The format is PEFT's; LoRA is Hu et al. 2021 (https://arxiv.org/abs/2106.09685), with the scale of rsLoRA
(https://arxiv.org/abs/2312.03732) and the magnitudes of DoRA (https://arxiv.org/abs/2402.09353).
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint import patterns
from alnico.checkpoint.file_model import FileModel, open_shard
from alnico.checkpoint.files import check_inside
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.reference import is_hub_reference
from alnico.checkpoint.sidecars import check_kinds
from alnico.checkpoint.source import read_tensor
from alnico.errors import ModelError, NonFiniteError
from alnico.numerics import dtypes

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
PART = re.compile(r"\.lora_(embedding_A|embedding_B|A|B|magnitude_vector)(?:\.default)?(?:\.(weight|bias))?$")
TOKENS = re.compile(r"\.token_adapter\.trainable_tokens_delta(?:\.default)?$")
WRAPPED = re.compile(r"\.(base_layer|token_adapter|original_module|modules_to_save(\.default)?)(?=\.|$)")
"""What PEFT puts between a module and its tensors."""

READ = frozenset((
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "bias", "lora_bias",
    "init_lora_weights", "target_parameters", "target_modules", "modules_to_save", "ensure_weight_tying", "trainable_token_indices",
))  # fmt: skip
HARMLESS = frozenset((
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
))  # fmt: skip
"""Keys of the config that say how an adapter was trained, or what its tensors say too."""

INSIDE = ".base_layer.out_proj"
"""How the output projection of torch's ``nn.MultiheadAttention`` ends in PEFT, which wraps attention and projection."""

PLAIN = re.compile(r"[\w.]+")
"""A pattern of the config that is the name of a module, in which a point fits any character."""
MAX_EXPRESSIONS = 256
"""Patterns of a config that are no plain names; those that people write are a few."""
MAX_COMPARED = 50_000_000
"""Patterns times tensors of an adapter: to compare as many takes some ten seconds."""

KEEPS_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base's weights as they are; pissa, olora, corda, loftq and the like change them."""


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one parameter: ``scale * left @ right``; names are those of the adapter's tensors.

    ``left`` is PEFT's B and ``right`` its A, so that the product is (out, in); of an embedding it is the transpose of what is stored.
    ``experts`` matrices lie in one tensor: their ranks one expert after the other in A, and one rank after the other in B.
    """

    module: str
    """The module's name as in the base, but for what PEFT puts before and between."""
    left: str
    right: str
    rank: int
    scale: float
    magnitude: str = ""
    """DoRA's norms, one for each output."""
    bias: str = ""
    """What is added to the module's bias, times ``scale``."""
    is_embedding: bool = False
    parameters: tuple[str, ...] = ("weight",)
    """The parameter of the module; several where the config names several and only shapes can tell which it is."""
    depth: int = 0
    """How many of the module's parameters are wrapped inside this one: tells updates of one module apart."""
    experts: int = 1
    is_inside: bool = False
    """The output projection inside of an ``nn.MultiheadAttention``. PEFT adds its product twice, in the forward pass and when it merges."""

    @property
    def key(self) -> str:
        """A name that the updates of one adapter differ in, and that is equal between adapters of the same parameters."""
        return self.module + ".base_layer" * self.depth


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding that an adapter trained by themselves (``trainable_token_indices``): ``name`` is that of the adapter's tensor."""

    name: str
    indices: tuple[int, ...]


@dataclass
class _UpdateParts:
    """The tensors of an update while they are collected."""

    module: str
    depth: int
    left: str = ""
    right: str = ""
    magnitude: str = ""
    bias: str = ""
    is_embedding: bool = False
    is_inside: bool = False


class Adapter:
    """An open adapter: its config, what it adds to which parameters, and which tensors it replaces. Made by :func:`open_adapter`."""

    def __init__(self, files: FileModel, config: Mapping[str, Any]) -> None:
        self.label = files.label
        self.files = files
        self.config = config
        self.updates, self.replaced, self.rows = _understood(files, config)

    def matrices(self, update: Update, real: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
        """The factors of an update, of dtype ``real`` and without its scale: left (experts, out, r) and right (experts, r, in).

        What is beside a convolution's outputs is flattened. Errors: ModelError naming a tensor with a NaN or an infinity.
        """
        left, right = self.read(update.left, real), self.read(update.right, real)
        left = left.reshape(left.shape[0], math.prod(left.shape[1:]))
        right = right.reshape(right.shape[0], math.prod(right.shape[1:]))
        experts = update.experts
        return (
            np.ascontiguousarray(
                left.reshape(len(left), left.shape[1] // experts, experts).transpose(2, 0, 1)
            ),
            np.ascontiguousarray(right.reshape(experts, len(right) // experts, right.shape[1])),
        )

    def read(self, name: str, real: np.dtype[Any]) -> np.ndarray:
        """A tensor of finite numbers. Errors: NonFiniteError, naming tensor and index."""
        values = read_tensor(self.files, name).astype(real)
        if not np.isfinite(values).all():
            place = [int(i) for i in np.argwhere(~np.isfinite(values))[0]]
            found = "NaN" if np.isnan(values[tuple(place)]) else "an infinity"
            raise NonFiniteError(
                f"{self.label}: {name}{place or ''} has {found}; expected finite numbers. Mend or leave out this adapter."
            )
        return values

    def shape(self, update: Update) -> tuple[int, int]:
        """Rows and columns of one expert's update: outputs and inputs."""
        left, right = self.files.tensors[update.left].shape, self.files.tensors[update.right].shape
        return left[0], math.prod(right[1:])

    @property
    def trained_on(self) -> str:
        """The base that its config names; empty where it names none."""
        return str(self.config.get("base_model_name_or_path") or "")

    def close(self) -> None:
        self.files.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<adapter {self.label}: {len(self.updates)} updates, {len(self.replaced)} replaced tensors>"


def open_adapter(reference: str, *, offline: bool = False) -> Adapter:
    """Open a LoRA adapter: a directory, or an adapter on the hub; reads headers only, and checks them.

    Errors: ModelError for what is no adapter, an option of its config that is not understood, a factor that is missing, a rank that
    config and tensors tell apart; HubError.
    """
    try:
        files = _open(reference, offline)
    except OSError as error:
        raise ModelError(
            f"adapter {reference}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from None
    try:
        return Adapter(files, _checked_config(files))
    except BaseException:
        files.close()
        raise


def _open(reference: str, offline: bool) -> FileModel:
    location = Path(os.path.expanduser(reference))
    if location.is_dir():
        check_kinds(location)
        names = _adapter_names(reference, [p.name for p in location.iterdir()])
        for name in (CONFIG, *names):
            check_inside(location / name, location)
        return FileModel(reference, location, [open_shard(location / n) for n in names])
    if not location.exists() and is_hub_reference(reference):
        from alnico.checkpoint.hub import open_from_hub

        return open_from_hub(
            reference, offline=offline, choose=lambda where, names, *_: _adapter_names(where, names)
        )
    raise ModelError(
        f"{reference}: is no directory, expected that of a LoRA adapter, with {CONFIG} and {WEIGHTS[0]}. Check the path."
    )


def _adapter_names(where: str, names: Collection[str]) -> list[str]:
    weights = [n for n in WEIGHTS if n in names]
    if CONFIG not in names or not weights:
        missing = CONFIG if CONFIG not in names else f"{WEIGHTS[0]} and no {WEIGHTS[1]}"
        raise ModelError(
            f"{where}: has no {missing}, expected a LoRA adapter as PEFT saves it. Check the path."
        )
    return weights[:1]


def _checked_config(files: FileModel) -> Mapping[str, Any]:
    """The adapter's config, if there is nothing in it that would make another result than ours."""
    config = read_json(files.location / CONFIG)
    where = f"{files.label}: {CONFIG}"
    kind, begin = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        raise ModelError(
            f"{where}: peft_type is {kind!r}, expected 'LORA'. Merge this adapter into its base with PEFT, and give that."
        )
    others = [
        key
        for key, value in config.items()
        if key not in READ | HARMLESS and value not in (None, False, 0, "", [], {})
    ]
    if begin not in KEEPS_THE_BASE:
        others.append("init_lora_weights")
    if others:
        key = others[0]
        raise ModelError(
            f"{where}: {key} is {str(config[key])[:60]!r}, which changes what the adapter does; this version applies plain LoRA, rsLoRA "
            "and DoRA. Merge it into its base with PEFT, and give that."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ModelError(
                f"{where}: {key} is {str(config[key])[:60]!r}, expected a mapping from modules to numbers. Check the adapter."
            )
        _check_patterns(where, key, config.get(key) or {}, len(files.tensors))
    if isinstance(config.get("target_modules"), str):
        _check_patterns(where, "target_modules", [config["target_modules"]], len(files.tensors))
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise ModelError(
                f"{where}: has no {key}, without which its scale cannot be told. Get the adapter from its source."
            )
    named = config.get("target_parameters") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelError(
            f"{where}: target_parameters is {str(named)[:60]!r}, expected a list of names. Check the adapter."
        )
    return config


def _check_patterns(where: str, key: str, given: Collection[str], tensors: int) -> None:
    """Refuse patterns that take for ever, one by one or all together. Errors: ModelError."""
    expressions = [pattern for pattern in given if not PLAIN.fullmatch(pattern)]
    if len(expressions) > MAX_EXPRESSIONS or len(given) * tensors > MAX_COMPARED:
        raise ModelError(
            f"{where}: {key} has {len(given)} patterns for {tensors} tensors, {len(expressions)} of them regular expressions; expected "
            f"at most {MAX_EXPRESSIONS} expressions, and a pattern for each module at most. Write the modules out, or use fewer patterns."
        )
    for pattern in expressions:
        try:
            patterns.check(pattern if key == "target_modules" else _at_the_end(pattern))
        except patterns.PatternError as error:
            raise ModelError(
                f"{where}: {key} has the pattern {patterns.shown(pattern)}, which {error}; expected names of modules, or a short regular "
                "expression. Do not use this adapter, or write the modules out."
            ) from None


def _understood(
    files: FileModel, config: Mapping[str, Any]
) -> tuple[dict[str, Update], dict[str, str], dict[str, Rows]]:
    """The updates by their key, the replaced tensors (name as in the base to name in the adapter), and the tensors with trained rows."""
    parts: dict[str, _UpdateParts] = {}
    replaced: dict[str, str] = {}
    rows: dict[str, Rows] = {}
    for name in files.tensors:
        plain = name.removeprefix(PREFIX)
        of_tokens = TOKENS.search(plain)
        if of_tokens is not None:
            module = WRAPPED.sub("", plain[: of_tokens.start()])
            rows[f"{module}.weight"] = Rows(name, _indices(files, config, module, name))
            continue
        part = PART.search(plain)
        if part is None:
            target = WRAPPED.sub("", plain)
            if target in replaced:
                raise ModelError(
                    f"{files.label}: {replaced[target]} and {name} both stand for {target!r}; expected one. Remove the one that is not meant."
                )
            replaced[target] = name
            continue
        wrapped = plain[: part.start()]
        module = WRAPPED.sub("", wrapped)
        is_inside = wrapped.endswith(INSIDE)
        depth = wrapped.removesuffix(INSIDE).count(".base_layer")
        found = parts.setdefault(
            module + ".base_layer" * depth, _UpdateParts(module, depth, is_inside=is_inside)
        )
        if part[2] == "bias":
            found.bias = name
        elif part[1] in ("B", "embedding_B"):
            found.left = name
        elif part[1] in ("A", "embedding_A"):
            found.right = name
        else:
            found.magnitude = name
        found.is_embedding |= part[1].startswith("embedding")
    if not parts and not replaced and not rows:
        raise ModelError(
            f"{files.label}: holds no tensor; expected the factors of a LoRA adapter. Complete the download."
        )
    chosen = _chosen_parameters(files, parts, config)
    return {key: _update(files, found, config, chosen[key]) for key, found in parts.items()}, replaced, rows


def _indices(files: FileModel, config: Mapping[str, Any], module: str, name: str) -> tuple[int, ...]:
    """The rows that ``trainable_token_indices`` names for a module: one list for the input embedding, or a list by a module's last words."""
    named = config.get("trainable_token_indices")
    if isinstance(named, dict):
        named = next((v for k, v in named.items() if module == k or module.endswith(f".{k}")), None)
    shape, dtype = files.tensors[name].shape, files.tensors[name].dtype
    whole = isinstance(named, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in named
    )
    if not whole or len(set(named or ())) != len(named or ()):
        raise ModelError(
            f"{files.label}: {CONFIG}: trainable_token_indices names {str(named)[:60]} for {module}; expected a list of different row "
            "numbers. Check the adapter."
        )
    assert named is not None
    if len(shape) != 2 or shape[0] != len(named) or dtype not in dtypes.MERGEABLE:
        raise ModelError(
            f"{files.label}: {name} is {dtype} of {shape}, and trainable_token_indices names {len(named)} rows; expected a row of numbers in "
            "floating point for each. Get the adapter from its source."
        )
    return tuple(named)


def is_trained(config: Mapping[str, Any], name: str) -> bool:
    """Was a tensor that an adapter holds whole trained with it: one of ``modules_to_save``, or a bias?

    Other tensors are the base's own, which PEFT stores beside an adapter of embeddings.
    """
    parameter = name.rpartition(".")[2]
    return (parameter == "bias" and config.get("bias") not in (None, "none")) or is_saved_module(config, name)


def is_saved_module(config: Mapping[str, Any], name: str) -> bool:
    """Is a tensor inside of a module that ``modules_to_save`` names? PEFT takes what ends with a word, "norm" for "input_layernorm" too."""
    words, lengths = _words(_Same(config.get("modules_to_save")))
    parts = name.split(".")[:-1]
    inside = itertools.accumulate(parts, lambda above, part: f"{above}.{part}")
    return any(module[len(module) - n :] in words for module in inside for n in lengths if n <= len(module))


def is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Do ``target_modules`` name a module: by an ending in a list, by an expression for the whole name in a text?

    Errors: ModelError for an expression that takes too long.
    """
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return _fits(targets, module, "fullmatch", targets, "target_modules")
    words, _ = _words(_Same(targets))
    parts = module.split(".")
    return any(".".join(parts[i:]) in words for i in range(len(parts)))


class _Same:
    """A value by its identity: lists of a config have no hash, and may be long."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@functools.lru_cache(16)
def _words(held: _Same) -> tuple[frozenset[str], tuple[int, ...]]:
    """The words of a list, and how long they are."""
    words = (
        frozenset(v for v in held.value if isinstance(v, str))
        if isinstance(held.value, list)
        else frozenset()
    )
    return words, tuple(sorted({len(word) for word in words}))


def _fits(pattern: str, name: str, how: patterns.How, written: str, key: str) -> bool:
    """Does a pattern fit? Errors: ModelError."""
    try:
        return patterns.fits(pattern, name, how)
    except patterns.PatternError as error:
        raise ModelError(
            f"{CONFIG}: the pattern {patterns.shown(written)} of {key} {error}; expected one with few repetitions inside one another. "
            "Do not use this adapter, or write the modules out."
        ) from None


def _update(
    files: FileModel, found: _UpdateParts, config: Mapping[str, Any], parameters: tuple[str, ...]
) -> Update:
    where = files.label
    if not found.left or not found.right:
        held = found.left or found.right or found.magnitude or found.bias
        raise ModelError(
            f"{where}: the adapter has {held} without its lora_A or lora_B. Complete the download."
        )
    for name in (found.left, found.right, found.magnitude, found.bias):
        if name and files.tensors[name].dtype not in dtypes.MERGEABLE:
            raise ModelError(
                f"{where}: {name} is {files.tensors[name].dtype}, expected numbers in floating point. Use another adapter."
            )
    update = Update(
        found.module,
        found.left,
        found.right,
        0,
        0.0,
        magnitude=found.magnitude,
        bias=found.bias,
        is_embedding=found.is_embedding,
        parameters=parameters,
        depth=found.depth,
        is_inside=found.is_inside,
    )
    try:
        rank, scale = _scale(update, config)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ModelError(
            f"{where}: {CONFIG}: the rank or alpha of {found.module} cannot be told ({error}). Check the adapter."
        ) from None
    left, right = files.tensors[found.left].shape, files.tensors[found.right].shape
    rows = right[0] if right else 0
    experts = rows // rank if update.parameters != ("weight",) and rank > 0 and rows % rank == 0 else 1
    if rank < 1 or rows != rank * max(experts, 1):
        raise ModelError(
            f"{where}: {found.right} has rank {rows}, {CONFIG} says {rank}; they must agree and be 1 at least. "
            "Get the adapter from its source."
        )
    if len(right) < 2 or len(left) < 2 or math.prod(left[1:]) != rows:
        raise ModelError(
            f"{where}: {found.left} is {left} and {found.right} is {right}; expected matrices of one rank, ({rows}). "
            "Get the adapter from its source."
        )
    return replace(update, rank=rank, scale=2 * scale if update.is_inside else scale, experts=experts)


def _parameters(found: _UpdateParts, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The parameter that factors are of, by the config: the weight, or those of its ``target_parameters`` that the module may have.

    A name without its module ("down_proj") is for every module that ``target_modules`` do not name.
    """
    targets = [target.rpartition(".") for target in config.get("target_parameters") or []]
    named = [
        p
        for module, _, p in targets
        if module and (found.module == module or found.module.endswith(f".{module}"))
    ]
    if not named and not is_targeted(config, found.module):
        named = [p for module, _, p in targets if not module]
    return tuple(dict.fromkeys(named)) or ("weight",)


def _chosen_parameters(
    files: FileModel, parts: Mapping[str, _UpdateParts], config: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """The parameters that each update may be of. Where ranks differ between the parameters of a module, ranks tell which update is whose.

    PEFT fuses the factors of gate and up projections at twice the rank (``rank_pattern: {".*\\.gate_up_proj": 2 r}``). All updates of a
    module are of equally many experts, and A has a rank for each: one assignment of parameters to updates fulfils that.
    """
    chosen = {key: _parameters(found, config) for key, found in parts.items()}
    modules: dict[str, list[str]] = {}
    for key, found in parts.items():
        modules.setdefault(found.module, []).append(key)
    for module, keys in modules.items():
        several = chosen[keys[0]]
        if len(several) < 2 or len(several) > 4:
            continue
        ranks = {p: _rank_and_alpha(module, p, config) for p in several}
        if (
            not all(type(r) is int and r > 0 for r, _ in ranks.values())
            or len({str(r) for r in ranks.values()}) == 1
        ):
            continue
        fitting = []
        for order in itertools.permutations(several, len(keys)):
            rows = [(files.tensors[parts[k].right].shape or (0,))[0] if parts[k].right else 0 for k in keys]
            if all(n % ranks[p][0] == 0 for n, p in zip(rows, order, strict=True)):
                experts = {n // ranks[p][0] for n, p in zip(rows, order, strict=True)}
                if len(experts) == 1:
                    fitting.append(order)
        if len(fitting) == 1:
            chosen |= {k: (p,) for k, p in zip(keys, fitting[0], strict=True)}
    return chosen


def _rank_and_alpha(module: str, parameter: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The rank and alpha of a module's parameter, by the patterns of the config."""
    name = module if parameter == "weight" else f"{module}.{parameter}"

    def of(key: str, default: Any) -> Any:
        for pattern, value in (config.get(key) or {}).items():
            if _ends_with(pattern, name, key) or (name != module and _ends_with(pattern, module, key)):
                return value
        return default

    return of("rank_pattern", config["r"]), of("alpha_pattern", config["lora_alpha"])


def _at_the_end(pattern: str) -> str:
    """The expression that PEFT makes of a pattern for the end of a name."""
    return rf"(.*\.)?({pattern})$"


def _ends_with(pattern: str, name: str, key: str) -> bool:
    """Does a pattern fit whole components at the end of a name? Names of modules, in which a point is any character, are compared."""
    if "\n" in name or not PLAIN.fullmatch(pattern):
        return _fits(_at_the_end(pattern), name, "match", pattern, key)
    begin = len(name) - len(pattern)
    if begin < 0 or (begin and name[begin - 1] != "."):
        return False
    end = name[begin:]
    return end == pattern or all(p in (".", c) for p, c in zip(pattern, end, strict=True))


def _scale(update: Update, config: Mapping[str, Any]) -> tuple[int, float]:
    """The rank of a module and its scale: alpha / r, or alpha / sqrt(r) for rsLoRA; patterns end a module's name, or a parameter's.

    Where the config names several parameters, all must have the same: no adapter says which factors are of which.
    """
    found = [_rank_and_alpha(update.module, parameter, config) for parameter in update.parameters]
    if any(one != found[0] for one in found):
        raise ValueError(
            f"a pattern is for one of {' and '.join(update.parameters)}, and no adapter says which factors are whose"
        )
    rank, alpha = found[0]
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"a rank is {rank!r}")
    if rank < 1:
        return rank, 0.0
    scale = float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    if not math.isfinite(scale):
        raise ValueError(f"an alpha is {alpha!r}")
    return rank, scale
