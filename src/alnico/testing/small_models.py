"""Writes and reads small models for tests, and merges them with one method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alnico.devices import DEFAULT_DEVICE
from alnico.methods import registry
from alnico.methods.base import MatrixMethod, Merge, Method

TensorArrays = Mapping[str, np.ndarray]
WriteStatistics = Callable[[str, Path, int], Path]
"""Writes the statistics of one model: the option's name (their kind), the model's folder, its position;
returns their folder."""

STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


class BrokenLaw(AssertionError):
    """A method breaks a law: which method and options, what was found, what was expected, what to do."""


@dataclass(frozen=True)
class MethodCase:
    """A method with its options, tested with ``models`` values (the base not counted, unless it is the first
    value).

    A per-model option is one value for all models, or a list, which is cut to the number of models or
    repeated. ``write_statistics`` writes the folders for options that name statistics.
    """

    method: Method
    options: Mapping[str, Any] = field(default_factory=dict)
    models: int = 3
    write_statistics: WriteStatistics | None = None

    def bind(self) -> Merge | MatrixMethod:
        """The method with its options, as a merge of these models binds it."""
        return self.method.bind(self.options_of([Path("model")] * self.models, None), self.models)

    def options_of(self, models: Sequence[Path], write_statistics: WriteStatistics | None) -> dict[str, Any]:
        """The options with one list entry per model, and with the folders of statistics."""
        spelled = {}
        for name, value in self.options.items():
            option = self.method.options.get(name)
            if option is not None and option.per_model:
                values = value if isinstance(value, (list, tuple)) else [value]
                value = [values[i % len(values)] for i in range(len(models))]
            spelled[name] = value
        for kind in self.method.statistics:
            spelled[kind] = [
                str(write_statistics(kind, model, i) if write_statistics else model)
                for i, model in enumerate(models)
            ]
        return spelled

    def recipe(self, models: Sequence[Path], base: Path | None, **keys: Any) -> dict[str, Any]:
        """A recipe that merges ``models``; a method whose base is its first value takes the first model as
        the base."""
        if self.method.statistics and self.write_statistics is None:
            raise BrokenLaw(
                f"{self.method.name}: {', '.join(self.method.statistics)} names statistics; expected write_statistics. "
                "Define MethodLaws.write_statistics, which writes them for a small model."
            )
        base = models[0] if self.method.base == "first" else base
        return recipe_for(self.method, models, base, self.options_of(models, self.write_statistics), **keys)


def recipe_for(
    method: Method, models: Sequence[Path], base: Path | None, options: Mapping[str, Any], **keys: Any
) -> dict[str, Any]:
    """Write a recipe. A per-model option given as a list goes to each model, in the order of ``models``."""
    per_model = {n: v for n, v in options.items() if method.options[n].per_model and isinstance(v, list)}
    entries = []
    for i, path in enumerate(models):
        parameters = {n: v[i] for n, v in per_model.items()}
        entries.append({"model": str(path), **({"parameters": parameters} if parameters else {})})
    recipe: dict[str, Any] = {"merge_method": method.name, "models": entries, **keys}
    if base is not None and method.base != "unused":
        recipe["base_model"] = str(base)
    if shared := {n: v for n, v in options.items() if n not in per_model}:
        recipe["parameters"] = shared
    return recipe


def method_of(method: Method | str) -> Method:
    """Return a method that is registered. Errors: BrokenLaw for one that a recipe would not find."""
    name = method if isinstance(method, str) else method.name
    registered = registry().get(name)
    if registered is None or (isinstance(method, Method) and registered is not method):
        place = "is not registered" if registered is None else "is registered as another method"
        value = "module:name" if isinstance(method, str) else f"{method.factory.__module__}:{name}"
        raise BrokenLaw(
            f"{name} {place}; expected the entry point `{name} = {value}` in the group alnico.methods. "
            "Add it to your package's pyproject.toml and install the package (pip install -e .)."
        )
    return registered


def random_models(
    shapes: Mapping[str, tuple[int, ...]],
    count: int,
    seed: int = 0,
    dtype: Any = np.float32,
    growth: float = 0.0,
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """A base of normal numbers, and ``count`` fine-tunes: the base plus normal numbers of size 0.1, more by
    ``growth`` per model."""
    random = np.random.default_rng(seed)
    base = {n: random.standard_normal(s).astype(dtype) for n, s in shapes.items()}
    return base, [
        {n: v + ((0.1 + growth * i) * random.standard_normal(v.shape)).astype(dtype) for n, v in base.items()}
        for i in range(count)
    ]


def write_model(folder: Path, tensors: TensorArrays, dtype: str = "F32") -> Path:
    """Write a model directory of one safetensors file. BF16 values are rounded from float32."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, end = [], 0
    for name, values in tensors.items():
        raw = _encode(values, dtype)
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [end, end + len(raw)]}
        parts.append(raw)
        end += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *parts]))
    return folder


def read_model(folder: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a model directory; BF16 as float32."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in entry["data_offsets"])
                tensors[name] = _decode(raw[begin:end], entry["dtype"]).reshape(entry["shape"])
    return tensors


def model_bytes(folder: Path) -> dict[str, bytes]:
    """The bytes of every safetensors file of a model directory."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def merge_arrays(
    case: MethodCase,
    folder: Path,
    base: TensorArrays,
    models: Sequence[TensorArrays],
    dtype: str = "F32",
    device: str = DEFAULT_DEVICE,
    **keys: Any,
) -> dict[str, np.ndarray]:
    """Write models, merge them with the method of a case, and read the result. ``keys`` are keys of the
    recipe."""
    import alnico

    paths = [write_model(folder / f"m{i}", model, dtype) for i, model in enumerate(models)]
    base_path = write_model(folder / "base", base, dtype)
    alnico.merge(case.recipe(paths, base_path, **keys), folder / "out", overwrite=True, device=device)
    return read_model(folder / "out")


def _encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
    return np.ascontiguousarray(values).astype(STORED[dtype]).tobytes()


def _decode(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, STORED[dtype])
