"""Modules and tokenizers of checkpoints, loaded by transformers: without code of the model, and no larger than its files.

Every call of alnico into transformers that could run code of a model is here or in ``placed.py``, with ``trust_remote_code=False``
(tests/evaluation/test_no_code.py lists them). What a config says about code is taken out before transformers sees it:

- ``auto_map``. A model whose type transformers knows is loaded with the class of transformers, as many uploads carry code that is not
  needed any more. Any other is refused.
- which kernels compute attention and experts, where they would be fetched from the hub. transformers' own are used.
- which files are read (``transformers_weights``, ``configuration_files``). Those that alnico reads are used.
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
from alnico.checkpoint.memory_model import to_torch
from alnico.checkpoint.open_model import open_headers
from alnico.checkpoint.patterns import PatternError, fits
from alnico.checkpoint.reference import PICKLES
from alnico.checkpoint.source import Source
from alnico.checkpoint.weight_files import INDICES
from alnico.errors import ModelError, NonFiniteError
from alnico.evaluation.extras import import_extra, quiet_transformers
from alnico.evaluation.module_names import MAY_BE_MISSING
from alnico.evaluation.tasks import ModelKind
from alnico.folders import temporary_files
from alnico.numerics.dtypes import Shape

OF_CODE = frozenset(
    {"auto_map", "custom_pipelines", "configuration_files", "transformers_weights", "adapter_kwargs"}
)
"""Keys of configs that name code or other files."""

IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
"""Keys of configs that choose how something is computed, and what comes with torch. Others are packages or fetched from the hub."""

MOST_LAYERS = 1_000
"""Layers, heads and experts that a config may claim whatever its files hold: some models use the same weights in all layers."""

MOST_LABELS = 10_000
"""Labels that a config may claim whatever its files hold: transformers names each."""

COUNTS = re.compile(
    r"(^|_)(layers?|blocks?|depths?|stages|experts|heads|n_layer|n_head|repeats)($|_(?!dim|size|drop|norm|init|scale|id))"
)

REPEATED = re.compile(r"(^|_)(num_hashes|num_chunks_(before|after))$")
STRETCHED = re.compile(r"(^|_)(attention_window|num_buckets|chunk_length)$")
"""Keys of what is computed as often for each input, and of lengths that each input is filled up to. No tensor in the files has their size."""

MOST_GROWTH = 1_000
"""How many times longer the replacements of a tokenizer may make a text."""

SLACK_ELEMENTS = 1 << 20
"""Parameters that a module may have beyond twice those of the files: a pooler, what is tied."""

PACKED = 16
"""Numbers that a quantised element of 32 bits holds at most, of two bits each."""

SLACK_BYTES = 1 << 28
"""Bytes of buffers (masks, tables of positions) that a small model may have."""


# ---- configs ----------------------------------------------------------------------------------------------------------


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what names code, at any depth.

    >>> without_code({"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}, "text_config": {"attn_implementation": "a/b"}})
    {'model_type': 'llama', 'text_config': {}}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in OF_CODE:
            continue
        allowed = IMPLEMENTATIONS.get(key.strip("_").removesuffix("_internal"))
        if allowed is not None and value not in allowed:
            continue
        if key == "use_pretrained_backbone":  # its weights would be fetched, and are in the files
            value = False
        found[key] = without_code(value) if isinstance(value, Mapping) else value
    return found


def check_claims(config: Mapping[str, Any], files: Mapping[str, Shape], where: str) -> None:
    """Refuse counts that no files of this size can mean, before anything is made as often as they say. Errors: ModelError."""
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
                f"{where}: {path} is {number}; its files hold {len(files)} tensors, and cannot mean more than {most}. Check config.json."
            )


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Every number of a config, with the keys that lead to it."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _numbers(one, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from _numbers(one, f"{path}[{i}]")
    elif isinstance(value, int | float):
        yield path, value


def config_of(transformers: Any, config: Mapping[str, Any], label: str) -> Any:
    """The config of a model as transformers has it, without code. Errors: ModelError for a model that needs code of its own."""
    kind = config.get("model_type")
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if "auto_map" in config and not (isinstance(kind, str) and kind in mapping):
        raise ModelError(
            f"{label}: auto_map in config.json names code ({_named_code(config['auto_map'])}), and model_type is {kind!r}, which transformers "
            "does not know by itself; alnico runs no code of a model. Use a model that transformers knows, or a version of transformers "
            "that knows this one."
        )
    with temporary_files():
        made = tempfile.TemporaryDirectory(prefix="alnico-")
    with made as folder:
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


# ---- the module that a config describes, before it takes memory -----------------------------------------------------------


def class_that_fits(
    transformers: Any, config: Any, kind: ModelKind, files: Mapping[str, Shape], held: int, where: str
) -> Any:
    """The class of the module that a config describes, built without memory and held against the headers of the files.

    ``held`` are the numbers that the files may stand for. Errors: ModelError for a module that is larger than they can fill.
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
    return type(module)


class _ReadCounter:
    """What a module registers while it is built, and how much of it there may be."""

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
def _counted(files: Mapping[str, Shape], held: int, where: str) -> Iterator[_ReadCounter]:
    """Watch what is registered in modules: a config may ask for a billion of them."""
    import torch.nn.modules.module as of

    counted = _ReadCounter(files, held, where)
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
        f"{where}: config.json describes a module of more than {count - 1} {what}, and the files hold {len(files)} tensors; expected a module that "
        "they fill. Check config.json: the number of layers."
    )


def _too_large(
    own: Mapping[str, Shape], files: Mapping[str, Shape], elements: int, prefix: str, where: str
) -> ModelError:
    first = ""
    for name, shape in own.items():
        found = next(
            (n for n in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if n in files), None
        )
        if found is None and len(own) == 1:
            found = next((n for n in files if n.rpartition(".")[2] == name), None)
        if found is not None and math.prod(shape) > math.prod(files[found]):
            first = f" ({found} is {files[found]} in the files, {shape} in the module)"
            break
    held = sum(map(math.prod, files.values()))
    return ModelError(
        f"{where}: config.json describes a module of {elements} parameters or more, and the files hold {held}{first}; expected a module that they "
        "fill. Check the sizes in config.json."
    )


def _buffers(count: int, most: int, where: str) -> ModelError:
    return ModelError(
        f"{where}: config.json describes tables of {count} bytes or more beside the parameters, as for positions; expected at most {most}. "
        "Check config.json: the number of positions."
    )


# ---- loading ----------------------------------------------------------------------------------------------------------------


def load_module(directory: Path, kind: ModelKind, label: str) -> Any:
    """Load a checkpoint's module in evaluation mode and float32. Errors: ModelError, also for tensors that the checkpoint lacks, and for
    a config that describes a larger module than the files fill."""
    torch = import_extra("torch", "a transformers checkpoint", "eval")
    with closing(open_headers(directory)) as model, quiet_transformers() as transformers:
        files = {name: tensor.shape for name, tensor in model.tensors.items()}
        given = read_json(directory / "config.json")
        if (directory / "adapter_config.json").exists():
            raise ModelError(
                f"{label}: has a config.json and an adapter_config.json; expected a model or an adapter. Give the model without the "
                "adapter's files, or both as BASE+ADAPTER."
            )
        config = _config(transformers, given, files, kind, label)
        class_ = _fitting(transformers, config, given, kind, files, label)
        options: dict[str, Any] = {
            "config": config,
            "local_files_only": True,
            "dtype": torch.float32,
            "trust_remote_code": False,
        }
        with _named_errors(given, kind, label):
            if any(
                path.suffix in PICKLES for path in model.paths()
            ):  # read by alnico, which runs nothing of them
                module, told = class_.from_pretrained(
                    None, state_dict=torch_state(model), output_loading_info=True, **options
                )
                if (directory / "generation_config.json").exists():
                    module.generation_config = transformers.GenerationConfig.from_pretrained(
                        directory, local_files_only=True
                    )
            else:
                _set_files(config, directory)
                module, told = class_.from_pretrained(
                    directory, use_safetensors=True, output_loading_info=True, **options
                )
    _refuse_missing(told["missing_keys"], kind, label)
    refuse_not_finite(module, label)
    return module.eval()


def torch_state(model: Source) -> dict[str, Any]:
    """The tensors of a model by name, as they are stored: torch tensors on the CPU."""
    found = {}
    for name, tensor in model.tensors.items():
        raw = np.empty(tensor.byte_size, np.uint8)
        model.read_into(name, 0, memoryview(raw))
        found[name] = to_torch(raw, tensor.dtype, tensor.shape)
    return found


def _set_files(config: Any, directory: Path) -> None:
    """Have transformers read the files that alnico reads: of an index and a single file it would take the file."""
    index = next((name for name in INDICES if (directory / name).is_file()), None)
    if index is not None and (directory / "model.safetensors").is_file():
        config.transformers_weights = index


def load_state(
    config: Mapping[str, Any], state: Mapping[str, Any], kind: ModelKind, label: str
) -> tuple[Any, frozenset[str]]:
    """Load a module as :func:`load_module` does, from a config and tensors in memory; return it with the names that no task needs
    and the state lacks. It may hold tensors of the state themselves. Errors: as there."""
    torch = import_extra("torch", "a transformers checkpoint", "eval")
    files = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with quiet_transformers() as transformers:
        made = _config(transformers, config, files, kind, label)
        class_ = _fitting(transformers, made, config, kind, files, label)
        with _named_errors(config, kind, label):
            module, told = class_.from_pretrained(
                None,
                config=made,
                state_dict=dict(state),
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
    _refuse_missing(told["missing_keys"], kind, label)
    return module.eval(), frozenset(told["missing_keys"])


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
        return class_that_fits(transformers, config, kind, files, held, label)


@contextmanager
def _named_errors(
    given: Mapping[str, Any], kind: ModelKind | Literal["tokenizer"], label: str
) -> Iterator[None]:
    """What transformers makes of a damaged or hostile model, as an error that names it."""
    try:
        yield
    except ModelError:
        raise
    except (
        Exception,
        MemoryError,
    ) as error:  # whatever its many classes raise for values that they do not expect
        code = (
            f"; auto_map in config.json names code ({_named_code(given['auto_map'])}), which alnico does not run"
            if "auto_map" in given
            else ""
        )
        raise ModelError(
            f"{label}: transformers cannot load it as {article(kind)} ({first_line(error)}{code}). Check its config.json and files."
        ) from None


def load_tokenizer(directory: Path, label: str) -> Any:
    """Load a checkpoint's tokenizer. Errors: ModelError, also for a tokenizer that needs code of its own."""
    with quiet_transformers() as transformers:
        settings = _read_if_there(directory / "tokenizer_config.json")
        given = _read_if_there(directory / "config.json")
        named = transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING_NAMES
        kind = given.get("model_type")
        for name in (
            settings.get("tokenizer_class"),
            given.get("tokenizer_class"),
            named.get(kind) if isinstance(kind, str) else None,
        ):
            _check_tokenizer(transformers, name, label)
        config = None
        if given:
            config = _tokenizers_config(transformers, given, label)
            config.name_or_path = str(directory)
        _check_growth(directory / "tokenizer.json", label)
        try:
            made = transformers.AutoTokenizer.from_pretrained(
                directory, config=config, local_files_only=True, trust_remote_code=False
            )
        except (Exception, MemoryError) as error:  # the tokenizers package raises Exception itself
            code = ""
            if "auto_map" in settings:
                code = f"; auto_map in tokenizer_config.json names code ({_named_code(settings['auto_map'])}), which alnico does not run"
            raise ModelError(
                f"{label}: transformers cannot load its tokenizer ({first_line(error)}{code}). Check its tokenizer files."
            ) from None
        if not isinstance(made, transformers.PreTrainedTokenizerBase):
            raise ModelError(
                f"{label}: transformers loads its tokenizer as {type(made).__name__}, expected a class of tokenizers. Check tokenizer_config.json."
            )
        longest = made.model_max_length
        if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
            raise ModelError(
                f"{label}: model_max_length is {str(longest)[:100]!r}, expected a number of at least 1. Check tokenizer_config.json."
            )
        return made


def _check_growth(path: Path, label: str) -> None:
    """Refuse a normaliser whose replacements, one after the other, make a text longer without end. Errors: ModelError."""
    growth, left = 1.0, [_read_if_there(path).get("normalizer")]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += [one for one in value.values() if isinstance(one, list)]
            content = value.get("content")
            if isinstance(content, str):
                growth *= max(1, len(content) + _fits_nothing(value.get("pattern")))
        if growth > MOST_GROWTH:
            raise ModelError(
                f"{label}: the normalizer of tokenizer.json may make a text {growth:.0f} times as long or more; expected at most {MOST_GROWTH} "
                "times. Check tokenizer.json."
            )


def _fits_nothing(pattern: Any) -> bool:
    """May a pattern of a replacement fit between any two characters?"""
    if isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
        return not pattern["String"]
    try:
        return fits(pattern["Regex"], "")
    except (PatternError, TypeError, KeyError):
        return True


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _tokenizers_config(transformers: Any, given: Mapping[str, Any], label: str) -> Any:
    """The config by which a tokenizer's class is chosen; of a model that transformers does not know, a general one."""
    check_claims(given, {}, label)
    if given.get("model_type") in list(transformers.models.auto.configuration_auto.CONFIG_MAPPING.keys()):
        try:
            return _config(transformers, given, {}, "tokenizer", label)
        except ModelError:
            pass
    return transformers.PreTrainedConfig.from_dict(without_code(given))


def _check_tokenizer(transformers: Any, name: Any, label: str) -> None:
    """Refuse the name of a thing of transformers that is no tokenizer: its ``from_pretrained`` would be called.

    transformers looks for a name without its last "Fast", too. A class whose package is not installed stands there as a dummy.
    """
    if not isinstance(name, str):
        return
    for one in {name, name.removesuffix("Fast")}:
        found = getattr(transformers, one, None) if one.isidentifier() else None
        is_dummy = type(found).__name__ == "DummyObject" and one.endswith(
            ("Tokenizer", "TokenizerFast", "Backend")
        )
        is_tokenizer = isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase)
        if found is not None and not is_tokenizer and not is_dummy:
            raise ModelError(
                f"{label}: tokenizer_class is {name!r}, expected a class of tokenizers. Check tokenizer_config.json."
            )


def refuse_not_finite(module: Any, label: str) -> None:
    """Refuse a module with a NaN or an infinity before it is scored or measured. Errors: NonFiniteError, naming tensor and index."""
    for name, value in module.named_parameters():
        if not value.is_floating_point() or value.is_meta or bool(value.isfinite().all()):
            continue
        place = (~value.isfinite()).nonzero()[0].tolist()
        found = "NaN" if bool(value[tuple(place)].isnan()) else "an infinity"
        raise NonFiniteError(
            f"{name}{place or ''}: {label} has {found}; expected finite numbers. Repair or exclude this model."
        )


def _refuse_missing(absent: Iterable[str], kind: ModelKind, label: str) -> None:
    missing = sorted(name for name in absent if kind != "encoder" or not name.startswith(MAY_BE_MISSING))
    if missing:
        raise ModelError(
            f"{label}: lacks {len(missing)} tensors of {article(kind)}, {missing[0]} first; they would be random. "
            "Give a checkpoint that has them, or a task that needs none of them."
        )


def article(kind: ModelKind | Literal["tokenizer"]) -> str:
    return {
        "encoder": "an encoder", "classifier": "a classifier", "causal": "a causal language model", "tokenizer": "a model with a tokenizer",
    }[kind]  # fmt: skip


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")
