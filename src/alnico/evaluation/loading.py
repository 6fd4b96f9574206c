"""Loads modules and tokenizers with transformers, without running a model's code and within its files' size.

Every call into transformers that could run a model's code is here or in ``module_names.py``, with
``trust_remote_code=False`` (tests/evaluation/test_no_code.py lists them). Keys of a config that name code are removed
before transformers reads it:

- ``auto_map``: a model whose type transformers knows is loaded with its class, because many uploads contain code that is
  no longer needed. Any other model is refused.
- kernels for attention and experts that would be fetched from the hub: those of transformers are used.
- the files to read (``transformers_weights``, ``configuration_files``): those that alnico reads are used.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.memory_model import TORCH_DTYPES, to_torch
from alnico.checkpoint.open_model import open_headers
from alnico.checkpoint.patterns import PatternError, fits
from alnico.checkpoint.reference import PICKLES
from alnico.checkpoint.source import Source
from alnico.checkpoint.weight_files import INDICES
from alnico.errors import ModelError, NonFiniteError, ResourceError, first_line
from alnico.evaluation.extras import quiet_transformers
from alnico.evaluation.module_names import MAY_BE_MISSING
from alnico.evaluation.module_places import StoredSizes, device_map, needed_bytes, own_dtype, stored_sizes
from alnico.evaluation.placement import ON_THE_PROCESSOR, ModulePlacement
from alnico.evaluation.tasks import ModelKind
from alnico.folders import temporary_files
from alnico.installation import import_extra
from alnico.numerics.dtypes import Shape

OF_CODE = frozenset(
    {"auto_map", "custom_pipelines", "configuration_files", "transformers_weights", "adapter_kwargs"}
)
"""Keys of configs that name code or other files."""

IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
"""Keys of configs that select an implementation, and the values included in torch; others are fetched from the hub."""

MOST_LAYERS = 1_000
"""Layers, heads and experts that any config may claim: some models share weights between all layers."""

MOST_LABELS = 10_000
"""Labels that any config may claim: transformers creates a name for each."""

COUNTS = re.compile(
    r"(^|_)(layers?|blocks?|depths?|stages|experts|heads|n_layer|n_head|repeats)($|_(?!dim|size|drop|norm|init|scale|id))"
)

REPEATED = re.compile(r"(^|_)(num_hashes|num_chunks_(before|after))$")
STRETCHED = re.compile(r"(^|_)(attention_window|num_buckets|chunk_length)$")
"""Keys of repeat counts and of lengths that inputs are padded to. No tensor in the files has their size."""

MOST_GROWTH = 1_000
"""The largest factor by which a tokenizer's replacements may lengthen a text."""

SLACK_ELEMENTS = 1 << 20
"""Parameters that a module may have beyond twice those of the files: a pooler, tied tensors."""

PACKED = 16
"""The most numbers in a quantised 32-bit element, of two bits each."""

SLACK_BYTES = 1 << 28
"""Bytes of buffers (masks, position tables) that a small model may have."""


# ---- configs ----------------------------------------------------------------------------------------------------------


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without keys that name code, at any depth.

    >>> without_code({"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}, "text_config": {"attn_implementation": "a/b"}})
    {'model_type': 'llama', 'text_config': {}}
    """
    cleaned: dict[str, Any] = {}
    for key, value in config.items():
        if key in OF_CODE:
            continue
        allowed = IMPLEMENTATIONS.get(key.strip("_").removesuffix("_internal"))
        if allowed is not None and value not in allowed:
            continue
        if key == "use_pretrained_backbone":  # its weights are in the files and must not be fetched
            value = False
        cleaned[key] = without_code(value) if isinstance(value, Mapping) else value
    return cleaned


def check_claims(config: Mapping[str, Any], files: Mapping[str, Shape], where: str) -> None:
    """Refuse counts that are too large for files of this size, before anything is created. Errors: ModelError."""
    count, longest = (
        max(MOST_LAYERS, len(files)),
        max([MOST_LABELS, *(n for shape in files.values() for n in shape)]),
    )
    for path, number in _numbers(config, ""):
        key = re.sub(r"\[\d+\]$", "", path).rpartition(".")[2]
        is_long = key == "num_labels" or STRETCHED.search(key) is not None
        most = longest if is_long else count
        if (is_long or COUNTS.search(key) or REPEATED.search(key)) and number > most:
            raise ModelError(
                f"{where}: {path} is {number}; its files contain {len(files)} tensors; expected at most {most}. Check config.json."
            )


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Yield every number of a config with its path."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _numbers(one, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from _numbers(one, f"{path}[{i}]")
    elif isinstance(value, int | float):
        yield path, value


def config_of(transformers: Any, config: Mapping[str, Any], label: str) -> Any:
    """Return transformers' config of a model, without code. Errors: ModelError for a model that needs its own code."""
    kind = config.get("model_type")
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if "auto_map" in config and not (isinstance(kind, str) and kind in mapping):
        raise ModelError(
            f"{label}: auto_map in config.json names code ({_named_code(config['auto_map'])}), and model_type is {kind!r}, which transformers "
            "does not include; alnico does not run a model's code. Use a model that transformers includes, or a version of "
            "transformers that includes this one."
        )
    with temporary_files():
        temporary = tempfile.TemporaryDirectory(prefix="alnico-")
    with temporary as folder:
        (Path(folder) / "config.json").write_text(json.dumps(without_code(config)), "utf-8")
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _named_code(auto_map: Any) -> str:
    value = next(iter(auto_map.values()), "") if isinstance(auto_map, Mapping) else auto_map
    while isinstance(value, list):
        value = next((one for one in value if one), "")
    return str(value)[:100]


def auto_class(transformers: Any, config: Any, kind: ModelKind) -> Any:
    if kind == "encoder":
        return transformers.AutoModel
    if kind == "causal":
        return transformers.AutoModelForCausalLM
    if any("ImageClassification" in name for name in config.architectures or ()):
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForSequenceClassification


# ---- the module that a config describes, before memory is allocated -----------------------------------------------------------


def module_that_fits(
    transformers: Any, config: Any, kind: ModelKind, files: Mapping[str, Shape], held: int, where: str
) -> Any:
    """Return the module that a config describes, built without memory (on ``meta``) and compared with the headers.

    ``held`` is the most elements that the files can contain. Errors: ModelError for a module larger than that.
    """
    torch = import_extra("torch", "a transformers checkpoint", "eval")
    with ExitStack() as stack:
        counted = stack.enter_context(_counted(files, held, where))
        init = getattr(transformers, "initialization", None)
        for name in ("no_init_weights", "meta_device_safe_creation_ops"):
            if hasattr(init, name):
                stack.enter_context(getattr(init, name)())
        stack.enter_context(torch.device("meta"))
        module = auto_class(transformers, config, kind).from_config(config, trust_remote_code=False)
    own = {id(p): (n, p) for n, p in module.named_parameters()}
    elements = sum(p.numel() for _, p in own.values())
    if elements > 2 * held + SLACK_ELEMENTS:
        raise _too_large(
            {n: tuple(p.shape) for n, p in own.values()}, files, elements, module.base_model_prefix, where
        )
    buffers = sum(b.numel() * b.element_size() for b in module.buffers())
    if buffers > counted.most_bytes:
        raise _buffers(buffers, counted.most_bytes, where)
    return module


class _RegistrationCounter:
    """Counts what a module registers while it is built, and stops at a limit."""

    def __init__(self, files: Mapping[str, Shape], held: int, where: str) -> None:
        self._where = where
        self._files = files
        self._modules = self._parameters = self._elements = self._bytes = 0
        self._most = 100 * len(files) + 10_000
        self._most_elements = 4 * held + 4 * SLACK_ELEMENTS
        self.most_bytes = max(8 * held, SLACK_BYTES)

    def module(self, _: Any, __: str, ___: Any) -> None:
        self._modules += 1
        if self._modules > 10 * self._most:
            raise _too_many(self._modules, "modules", self._files, self._where)

    def parameter(self, _: Any, name: str, value: Any) -> None:
        if value is None:
            return
        self._parameters += 1
        self._elements += value.numel()
        if self._parameters > self._most:
            raise _too_many(self._parameters, "parameters", self._files, self._where)
        if self._elements > self._most_elements:
            raise _too_large({name: tuple(value.shape)}, self._files, self._elements, "", self._where)

    def buffer(self, _: Any, __: str, value: Any) -> None:
        if value is None:
            return
        self._bytes += value.numel() * value.element_size()
        if self._bytes > 2 * self.most_bytes:
            raise _buffers(self._bytes, self.most_bytes, self._where)


@contextmanager
def _counted(files: Mapping[str, Shape], held: int, where: str) -> Iterator[_RegistrationCounter]:
    """Count registered modules and parameters: a config may ask for a billion of them."""
    import torch.nn.modules.module as of

    counted = _RegistrationCounter(files, held, where)
    handles = (
        of.register_module_module_registration_hook(counted.module),
        of.register_module_parameter_registration_hook(counted.parameter),
        of.register_module_buffer_registration_hook(counted.buffer),
    )
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


def _too_many(count: int, what: str, files: Mapping[str, Shape], where: str) -> ModelError:
    return ModelError(
        f"{where}: config.json describes a module of more than {count - 1} {what}, but the files contain {len(files)} tensors; expected a module "
        "that they fill. Check the number of layers in config.json."
    )


def _too_large(
    own: Mapping[str, Shape], files: Mapping[str, Shape], elements: int, prefix: str, where: str
) -> ModelError:
    first = ""
    for name, shape in own.items():
        match = next(
            (n for n in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if n in files), None
        )
        if match is None and len(own) == 1:
            match = next((n for n in files if n.rpartition(".")[2] == name), None)
        if match is not None and math.prod(shape) > math.prod(files[match]):
            first = f" ({match} is {files[match]} in the files, {shape} in the module)"
            break
    held = sum(map(math.prod, files.values()))
    return ModelError(
        f"{where}: config.json describes a module of at least {elements} parameters, but the files contain {held}{first}; expected a module that "
        "they fill. Check the sizes in config.json."
    )


def _buffers(count: int, most: int, where: str) -> ModelError:
    return ModelError(
        f"{where}: config.json describes buffers of at least {count} bytes in addition to the parameters; expected at most {most}. "
        "Check the number of positions in config.json."
    )


# ---- loading ----------------------------------------------------------------------------------------------------------------


def load_module(
    directory: Path, kind: ModelKind, label: str, *, placement: ModulePlacement = ON_THE_PROCESSOR
) -> Any:
    """Load a checkpoint's module in evaluation mode: on the processor in float32, on a GPU in the dtype of its files.

    The ``placement`` may name another dtype. The headers decide where the module lies: on the first of its GPUs with
    room for it, else over all of them. Errors: ModelError, also for missing tensors and for a config that describes a
    larger module than the files; ResourceError for a module that the GPUs have no room for.
    """
    torch = import_extra("torch", "a transformers checkpoint", "eval")
    with closing(open_headers(directory)) as model, quiet_transformers() as transformers:
        files = {name: tensor.shape for name, tensor in model.tensors.items()}
        given = read_json(directory / "config.json")
        if (directory / "adapter_config.json").exists():
            raise ModelError(
                f"{label}: has both config.json and adapter_config.json; expected a model or an adapter. Give the model without the "
                "adapter's files, or both as BASE+ADAPTER."
            )
        config = _config(transformers, given, files, kind, label)
        outline = _fitting(transformers, config, given, kind, files, label)
        class_ = type(outline)
        stored = stored_sizes(model)
        options: dict[str, Any] = {
            "config": config,
            "local_files_only": True,
            "trust_remote_code": False,
            **_placed(torch, outline, stored, placement, label),
        }
        with _named_errors(given, kind, label):
            # alnico reads pickles, and runs no code in them.
            if any(path.suffix in PICKLES for path in model.paths()):
                module, report = class_.from_pretrained(
                    None, state_dict=torch_state(model), output_loading_info=True, **options
                )
                if (directory / "generation_config.json").exists():
                    module.generation_config = transformers.GenerationConfig.from_pretrained(
                        directory, local_files_only=True
                    )
            else:
                _set_files(config, directory)
                module, report = class_.from_pretrained(
                    directory, use_safetensors=True, output_loading_info=True, **options
                )
    _refuse_missing(report["missing_keys"], kind, label)
    refuse_not_finite(module, label)
    return module.eval()


def torch_state(model: Source) -> dict[str, Any]:
    """Return the stored tensors by name, as torch tensors on the CPU."""
    tensors = {}
    for name, tensor in model.tensors.items():
        raw = np.empty(tensor.byte_size, np.uint8)
        model.read_into(name, 0, memoryview(raw))
        tensors[name] = to_torch(raw, tensor.dtype, tensor.shape)
    return tensors


def _set_files(config: Any, directory: Path) -> None:
    """Make transformers read the same files as alnico: given an index and a single file, it would read the file."""
    index = next((name for name in INDICES if (directory / name).is_file()), None)
    if index is not None and (directory / "model.safetensors").is_file():
        config.transformers_weights = index


def _placed(
    torch: Any,
    outline: Any,
    stored: StoredSizes,
    placement: ModulePlacement,
    label: str,
) -> dict[str, Any]:
    """Return transformers' options for the dtype and the places of a module. Errors: ResourceError."""
    dtype = placement.torch_dtype or own_dtype(stored)
    options = {"dtype": getattr(torch, dtype)}
    if placement.device.is_gpu:
        import_extra("accelerate", "a checkpoint on a GPU", "eval")
        outline = outline.to(options["dtype"])
        options["device_map"] = device_map(outline, needed_bytes(stored, dtype), dtype, placement, label)
    return options


def _stored(state: Mapping[str, Any]) -> StoredSizes:
    names = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}
    return {name: (TORCH_DTYPES[dtype], tuple(state[name].shape)) for name, dtype in names.items()}


def load_state(
    config: Mapping[str, Any],
    state: Mapping[str, Any],
    kind: ModelKind,
    label: str,
    *,
    placement: ModulePlacement = ON_THE_PROCESSOR,
) -> tuple[Any, frozenset[str]]:
    """Load a module like :func:`load_module`, from a config and tensors in memory; also returns missing, unneeded names.

    The module may share tensors with the state. Errors: as for :func:`load_module`.
    """
    torch = import_extra("torch", "a transformers checkpoint", "eval")
    files = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with quiet_transformers() as transformers:
        parsed = _config(transformers, config, files, kind, label)
        outline = _fitting(transformers, parsed, config, kind, files, label)
        placed = _placed(torch, outline, _stored(state), placement, label)
        with _named_errors(config, kind, label):
            module, report = type(outline).from_pretrained(
                None,
                config=parsed,
                state_dict=dict(state),
                output_loading_info=True,
                trust_remote_code=False,
                **placed,
            )
    _refuse_missing(report["missing_keys"], kind, label)
    return module.eval(), frozenset(report["missing_keys"])


def _config(
    transformers: Any,
    given: Mapping[str, Any],
    files: Mapping[str, Shape],
    kind: ModelKind | Literal["tokenizer"],
    label: str,
) -> Any:
    check_claims(given, files, label)
    with _named_errors(given, kind, label):
        return config_of(transformers, given, label)


def _fitting(
    transformers: Any,
    config: Any,
    given: Mapping[str, Any],
    kind: ModelKind,
    files: Mapping[str, Shape],
    label: str,
) -> Any:
    held = sum(map(math.prod, files.values())) * (
        PACKED if '"quantization_config"' in json.dumps(given) else 1
    )
    with _named_errors(given, kind, label):
        return module_that_fits(transformers, config, kind, files, held, label)


@contextmanager
def _named_errors(
    given: Mapping[str, Any], kind: ModelKind | Literal["tokenizer"], label: str
) -> Iterator[None]:
    """Turn exceptions of transformers for a damaged or hostile model into an error that names it."""
    try:
        yield
    except ModelError:
        raise
    except (Exception, MemoryError) as error:  # its many classes raise any exception for unexpected values
        if type(error).__name__ == "OutOfMemoryError":  # of torch, for a GPU
            raise ResourceError(
                f"{label}: the GPU has too little memory for it ({first_line(error)}); expected room for the whole model. "
                "End other programs that use the GPU, or choose another device or a smaller dtype."
            ) from None
        code = (
            f"; auto_map in config.json names code ({_named_code(given['auto_map'])}), which alnico does not run"
            if "auto_map" in given
            else ""
        )
        raise ModelError(
            f"{label}: transformers cannot load it as {article(kind)} ({first_line(error)}{code}). Check its config.json and files."
        ) from None


TOKENIZER_FILES = (
    "tokenizer",
    "vocab",
    "merges",
    "spiece",
    "sentencepiece",
    "source.spm",
    "bpe",
    "dict",
    "tekken",
)
"""How names of files of tokenizers begin."""


def load_tokenizer(directory: Path, label: str) -> Any:
    """Load a checkpoint's tokenizer. Errors: ModelError, also for a tokenizer that needs its own code."""
    with quiet_transformers() as transformers:
        settings = _read_if_exists(directory / "tokenizer_config.json")
        given = _read_if_exists(directory / "config.json")
        class_names = transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING_NAMES
        kind = given.get("model_type")
        for name in (
            settings.get("tokenizer_class"),
            given.get("tokenizer_class"),
            class_names.get(kind) if isinstance(kind, str) else None,
        ):
            _check_tokenizer(transformers, name, label)
        config = None
        if given:
            config = _tokenizer_config(transformers, given, label)
            config.name_or_path = str(directory)
        _check_growth(directory / "tokenizer.json", label)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                directory, config=config, local_files_only=True, trust_remote_code=False
            )
        except (Exception, MemoryError) as error:  # the tokenizers package raises Exception itself
            if not any(f"{path.name}".startswith(TOKENIZER_FILES) for path in directory.iterdir()):
                raise ModelError(
                    f"{label}: has no tokenizer, which reading text needs; expected tokenizer.json or the files of its "
                    "kind. Copy them from the model that it was tuned from."
                ) from None
            code = ""
            if "auto_map" in settings:
                code = f"; auto_map in tokenizer_config.json names code ({_named_code(settings['auto_map'])}), which alnico does not run"
            raise ModelError(
                f"{label}: transformers cannot load its tokenizer ({first_line(error)}{code}). Check its tokenizer files."
            ) from None
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            raise ModelError(
                f"{label}: transformers loads its tokenizer as {type(tokenizer).__name__}, expected a tokenizer class. Check tokenizer_config.json."
            )
        longest = tokenizer.model_max_length
        if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
            raise ModelError(
                f"{label}: model_max_length is {str(longest)[:100]!r}, expected a number of at least 1. Check tokenizer_config.json."
            )
        return tokenizer


def _check_growth(path: Path, label: str) -> None:
    """Refuse a normaliser whose consecutive replacements lengthen a text too much. Errors: ModelError."""
    growth, left = 1.0, [_read_if_exists(path).get("normalizer")]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += [one for one in value.values() if isinstance(one, list)]
            content = value.get("content")
            if isinstance(content, str):
                growth *= max(1, len(content) + _matches_empty(value.get("pattern")))
        if growth > MOST_GROWTH:
            raise ModelError(
                f"{label}: the normalizer of tokenizer.json may make a text at least {growth:.0f} times as long; expected at most {MOST_GROWTH} "
                "times. Check tokenizer.json."
            )


def _matches_empty(pattern: Any) -> bool:
    """Check whether the pattern of a replacement may match between any two characters."""
    if isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
        return not pattern["String"]
    try:
        return fits(pattern["Regex"], "")
    except (PatternError, TypeError, KeyError):
        return True


def _read_if_exists(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _tokenizer_config(transformers: Any, given: Mapping[str, Any], label: str) -> Any:
    """Return the config that selects a tokenizer's class; a generic one for a model that transformers does not include."""
    check_claims(given, {}, label)
    if given.get("model_type") in list(transformers.models.auto.configuration_auto.CONFIG_MAPPING.keys()):
        try:
            return _config(transformers, given, {}, "tokenizer", label)
        except ModelError:
            pass
    return transformers.PreTrainedConfig.from_dict(without_code(given))


def _check_tokenizer(transformers: Any, name: Any, label: str) -> None:
    """Refuse a name in transformers that is not a tokenizer: its ``from_pretrained`` would be called.

    transformers also looks up the name without "Fast". A class whose package is not installed is a dummy object.
    """
    if not isinstance(name, str):
        return
    for one in {name, name.removesuffix("Fast")}:
        target = getattr(transformers, one, None) if one.isidentifier() else None
        is_dummy = type(target).__name__ == "DummyObject" and one.endswith(
            ("Tokenizer", "TokenizerFast", "Backend")
        )
        is_tokenizer = isinstance(target, type) and issubclass(target, transformers.PreTrainedTokenizerBase)
        if target is not None and not is_tokenizer and not is_dummy:
            raise ModelError(
                f"{label}: tokenizer_class is {name!r}, expected a tokenizer class. Check tokenizer_config.json."
            )


def refuse_not_finite(module: Any, label: str) -> None:
    """Refuse a module with a NaN or an infinity. Errors: NonFiniteError, naming tensor and index."""
    for name, value in module.named_parameters():
        if not value.is_floating_point() or value.is_meta or bool(value.isfinite().all()):
            continue
        place = (~value.isfinite()).nonzero()[0].tolist()
        kind = "NaN" if bool(value[tuple(place)].isnan()) else "an infinity"
        advice = "Repair or exclude this model."
        if str(value.dtype) == "torch.float16":
            advice += " If its own dtype is another one, its numbers may be too large for float16: choose dtype bfloat16."
        raise NonFiniteError(f"{name}{place or ''}: {label} has {kind}; expected finite numbers. {advice}")


def _refuse_missing(absent: Iterable[str], kind: ModelKind, label: str) -> None:
    missing = sorted(name for name in absent if kind != "encoder" or not name.startswith(MAY_BE_MISSING))
    if missing:
        raise ModelError(
            f"{label}: lacks {len(missing)} tensors of {article(kind)}, the first is {missing[0]}; they would be random. "
            "Give a checkpoint with them, or a task that does not need them."
        )


def article(kind: ModelKind | Literal["tokenizer"]) -> str:
    return {
        "encoder": "an encoder", "classifier": "a classifier", "causal": "a causal language model", "tokenizer": "a model with a tokenizer",
    }[kind]  # fmt: skip
