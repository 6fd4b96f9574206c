"""Writes a kernel's module, compiles it, and keeps it between runs.

A kernel is asked for by a frozen description (:class:`MixKernel`, :class:`MeasureKernel`, :class:`GramKernel`), becomes
the text of a module, and is compiled before any thread starts. The cache key hashes that text (which holds the method's
equation and all functions it calls), the source of the pieces it imports, the versions of numba and llvmlite and the CPU; numba's own
cache does not see a change in an inlined function of another file. The directory must belong to us and be closed to
others, since numba's cache is pickle; where it cannot be used, kernels are compiled for this process alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from alnico.kernels.shape import LANES, LEAF, TILE, UNROLLED_MODELS
from alnico.kernels.source import straighten

Kind = Literal["number", "numbers", "noise", "bernoulli"]
"""What an argument is to a kernel: one number; one a model; uniform noise; draws of 1.0 or 0.0."""

Real = Literal["float32", "float64"]
GRAM_LANES = 64

_DECORATOR = '@njit({options}nogil=True, error_model="numpy")'
_PREAMBLE = """\
import math

import numpy as np
from numba import njit
from alnico.kernels.tiles import decode{bits} as decode, encode{bits} as encode, fill_noise, select

REAL = np.float{bits}
ZERO = REAL(0.0)
ONE = REAL(1.0)
"""


@dataclass(frozen=True)
class MixKernel:
    """Computes output bytes from input bytes, for ``models`` inputs.

    ``run(raws, codes, base, base_code, out, out_code, start, keep_equal, *arguments) -> int`` takes raw bytes (uint8) of
    the same elements of each input, and returns -1, or the first element of a tile that holds a NaN or an infinity.
    """

    mix: Callable[..., float]
    models: int
    of_deltas: bool
    kinds: tuple[Kind, ...]
    real: Real

    def text(self) -> str:
        unrolled = self.models <= UNROLLED_MODELS
        models = range(self.models)
        names = [f"a{i}" for i in range(len(self.kinds))]
        noisy = [i for i, kind in enumerate(self.kinds) if kind in ("noise", "bernoulli")]
        value = "v{i}[j] - b" if self.of_deltas else "v{i}[j]"
        body: list[str] = []
        loop: list[str] = []
        if unrolled:
            heads = [f"v{i}" for i in models] + ["base"] + [f"n{a}_{i}" for a in noisy for i in models] + ["out", "keep_equal"]
            for i, kind in enumerate(self.kinds):
                if kind in ("numbers", "bernoulli"):
                    body.append(f"    {'t' if kind == 'numbers' else 'p'}{i} = ({' '.join(f'a{i}[{m}],' for m in models)})")
            loop.append(f"        x = ({' '.join(value.format(i=i) + ',' for i in models)})")
            for a in noisy:
                draws = (f"n{a}_{m}[j]" for m in models)
                if self.kinds[a] == "bernoulli":
                    draws = (f"select({d} < p{a}[{m}], ONE, ZERO)" for m, d in enumerate(list(draws)))
                loop.append(f"        t{a} = ({' '.join(d + ',' for d in draws)})")
            equal = " & ".join(f"(x[{i}] == x[0])" for i in models if i) or "True"
        else:
            heads = ["values", "base"] + [f"n{a}" for a in noisy] + ["out", "keep_equal"]
            body += [f"    t{i} = a{i}" for i, kind in enumerate(self.kinds) if kind == "numbers"]
            body += [f"    t{a} = np.empty({self.models}, REAL)" for a in noisy]
            body.append(f"    x = np.empty({self.models}, REAL)")
            loop += ["        equal = True", f"        for i in range({self.models}):"]
            loop.append(f"            x[i] = values[i, j]{' - b' if self.of_deltas else ''}")
            loop.append("            equal &= x[i] == x[0]")
            for a in noisy:
                draw = f"n{a}[i, j]"
                if self.kinds[a] == "bernoulli":
                    draw = f"select({draw} < a{a}[i], ONE, ZERO)"
                loop.append(f"            t{a}[i] = {draw}")
            equal = "equal"
        arguments = ", ".join(f"a{i}" if kind == "number" else f"t{i}" for i, kind in enumerate(self.kinds))
        loop.append(f"        m = REAL(mix(x, {arguments}))")
        if self.of_deltas:
            loop.append("        out[j] = select(m == ZERO, b, b + m)")
        else:
            loop.append(f"        out[j] = select(keep_equal & {equal}, x[0], m)")
        tile = [f"def tile({', '.join([*heads, *names])}):", *body, "    for j in range(out.size):"]
        tile += (["        b = base[j]"] if self.of_deltas else []) + loop
        return (
            self._preamble() + _DECORATOR.format(options="") + "\n" + "\n".join(tile) + "\n\n\n" + self._run(unrolled, names, noisy)
        )

    def _preamble(self) -> str:
        inline = _DECORATOR.format(options='inline="always", ')
        return (
            _PREAMBLE.format(bits=self.real[-2:])
            + "".join(f"\n\n{inline}\n{function}\n" for function in straighten(self.mix, "mix"))
            + "\n\n"
        )

    def _run(self, unrolled: bool, names: list[str], noisy: list[int]) -> str:
        models = range(self.models)
        signature = ["raws", "codes", "base", "base_code", "out", "out_code", "start", "keep_equal"]
        for i, name in enumerate(names):
            signature += [name, f"keys{i}"] if i in noisy else [name]
        lines = [
            f"def run({', '.join(signature)}):",
            "    width = 8 if out_code == 0 else (4 if out_code == 1 else 2)",
            "    base_width = 8 if base_code == 0 else (4 if base_code == 1 else 2)",
            "    count = out.size // width",
            f"    values = np.empty(({self.models}, {TILE}), REAL)",
            f"    base_tile = np.empty({TILE}, REAL)",
            f"    out_tile = np.empty({TILE}, REAL)",
        ]
        lines += [f"    noise{a} = np.empty(({self.models}, {TILE}), np.float32)" for a in noisy]
        lines += [f"    for s in range(0, count, {TILE}):", f"        e = min(s + {TILE}, count)", "        bad = False"]
        for i in models:
            lines.append(f"        w = 8 if codes[{i}] == 0 else (4 if codes[{i}] == 1 else 2)")
            lines.append(f"        bad |= decode(raws[{i}][w * s:w * e], codes[{i}], values[{i}, :e - s])")
        if self.of_deltas:
            lines.append("        bad |= decode(base[base_width * s:base_width * e], base_code, base_tile[:e - s])")
        lines += [f"        fill_noise(keys{a}[{i}], start + s, noise{a}[{i}, :e - s])" for a in noisy for i in models]
        passed = [f"values[{i}, :e - s]" for i in models] if unrolled else ["values"]
        passed.append("base_tile[:e - s]")
        passed += [f"noise{a}[{i}, :e - s]" for a in noisy for i in models] if unrolled else [f"noise{a}" for a in noisy]
        passed += ["out_tile[:e - s]", "keep_equal", *names]
        lines += [
            f"        tile({', '.join(passed)})",
            "        bad |= encode(out_tile[:e - s], out_code, out[width * s:width * e])",
            "        if bad:",
            "            return s",
            "    return -1",
        ]
        return _DECORATOR.format(options="cache=CACHE, ") + "\n" + "\n".join(lines) + "\n"

    def signature(self, types: Any) -> Any:
        raw, real, keys = types.uint8[::1], getattr(types, self.real), types.uint64[::1]
        arguments: list[Any] = [
            types.UniTuple(raw, self.models),
            types.int64[::1],
            raw,
            types.int64,
            raw,
            types.int64,
            types.int64,
            types.boolean,
        ]
        return tuple(arguments + _argument_types(self.kinds, real[::1], real, keys))


@dataclass(frozen=True)
class MeasureKernel:
    """Reduces ``of`` of one model's values over a block that begins at a leaf.

    ``run(raw, code, base, base_code, start, leaves, *arguments)`` fills ``leaves`` (float64 sums, or int64 counts) with
    one number a leaf; for ``values`` it fills it with the values themselves. For ``histogram``, ``run(raw, code, base, base_code, start, shift, prefix, bins, *arguments)``
    adds to bin ``(bits >> shift) & 0xFFFF`` each element whose bits above that equal ``prefix``.
    """

    reduction: Literal["sum", "count", "values", "histogram"]
    of: Callable[..., float]
    of_deltas: bool
    kinds: tuple[Kind, ...]
    real: Real

    def text(self) -> str:
        names = [f"a{i}" for i in range(len(self.kinds))]
        noisy = [i for i, kind in enumerate(self.kinds) if kind in ("noise", "bernoulli")]
        arguments = ["v[j] - base[j]" if self.of_deltas else "v[j]"]
        for i, kind in enumerate(self.kinds):
            arguments.append({"noise": f"n{i}[j]", "bernoulli": f"select(n{i}[j] < a{i}, ONE, ZERO)"}.get(kind, f"a{i}"))
        value = f"of({', '.join(arguments)})"
        noise = [f"n{i}" for i in noisy]
        inline = _DECORATOR.format(options='inline="always", ')
        plain = _DECORATOR.format(options="")
        text = _PREAMBLE.format(bits=self.real[-2:])
        text += "".join(f"\n\n{inline}\n{function}\n" for function in straighten(self.of, "of"))
        extra = ["shift", "prefix", "bins"] if self.reduction == "histogram" else ["leaves"]
        signature = ["raw", "code", "base", "base_code", "start", *extra]
        for i, name in enumerate(names):
            signature += [name, f"key{i}"] if i in noisy else [name]
        lines = [
            f"def run({', '.join(signature)}):",
            "    width = 8 if code == 0 else (4 if code == 1 else 2)",
            "    base_width = 8 if base_code == 0 else (4 if base_code == 1 else 2)",
            "    count = raw.size // width",
            f"    values = np.empty({TILE}, REAL)",
            f"    base_tile = np.empty({TILE}, REAL)",
            *[f"    noise{i} = np.empty({TILE}, np.float32)" for i in noisy],
        ]
        fill = [
            "decode(raw[width * s:width * e], code, values[:e - s])",
            *(["decode(base[base_width * s:base_width * e], base_code, base_tile[:e - s])"] if self.of_deltas else []),
            *[f"fill_noise(key{i}, start + s, noise{i}[:e - s])" for i in noisy],
        ]
        if self.reduction == "histogram":
            bits = "uint32" if self.real == "float32" else "uint64"
            text += f"\n\n{plain}\ndef tile(v, base, {''.join(n + ', ' for n in noise)}measured, {', '.join(names)}):\n"
            # -0.0 + 0.0 is 0.0: with its sign bit a zero would be the largest of all.
            text += f"    for j in range(v.size):\n        measured[j] = {value} + ZERO\n"
            passed = ["values[:e - s]", "base_tile[:e - s]", *[f"noise{i}[:e - s]" for i in noisy], "measured[:e - s]", *names]
            lines += [
                f"    measured = np.empty({TILE}, REAL)",
                f"    bits = measured.view(np.{bits})",
                f"    for s in range(0, count, {TILE}):",
                f"        e = min(s + {TILE}, count)",
                *[f"        {line}" for line in fill],
                f"        tile({', '.join(passed)})",
                "        for j in range(e - s):",
                "            b = np.uint64(bits[j])",
                "            if (b >> np.uint64(16)) >> shift == prefix:",
                "                bins[np.int64((b >> shift) & np.uint64(0xFFFF))] += 1",
            ]
        elif self.reduction == "values":
            text += f"\n\n{plain}\ndef tile(v, base, {''.join(n + ', ' for n in noise)}measured, {', '.join(names)}):\n"
            text += f"    for j in range(v.size):\n        measured[j] = {value}\n"
            passed = ["values[:e - s]", "base_tile[:e - s]", *[f"noise{i}[:e - s]" for i in noisy], "leaves[s:e]", *names]
            lines += [
                f"    for s in range(0, count, {TILE}):",
                f"        e = min(s + {TILE}, count)",
                *[f"        {line}" for line in fill],
                f"        tile({', '.join(passed)})",
            ]
        else:
            one = f"np.float64({value})" if self.reduction == "sum" else f"np.int64({value} != ZERO)"
            zero, lane_type = ("0.0", "float64") if self.reduction == "sum" else ("0", "int64")
            text += f"\n\n{plain}\ndef tile(v, base, {''.join(n + ', ' for n in noise)}lanes, {', '.join(names)}):\n"
            text += f"    for j in range(v.size):\n        lanes[j] += {one}\n"
            passed = ["values[g:h]", "base_tile[g:h]", *[f"noise{i}[g:h]" for i in noisy], "lanes[:h - g]", *names]
            lines += [
                f"    lanes = np.empty({LANES}, np.{lane_type})",
                "    for leaf in range(leaves.size):",
                f"        lanes[:] = {zero}",
                f"        for s in range(leaf * {LEAF}, min((leaf + 1) * {LEAF}, count), {TILE}):",
                f"            e = min(s + {TILE}, min((leaf + 1) * {LEAF}, count))",
                *[f"            {line}" for line in fill],
                f"            for g in range(0, e - s, {LANES}):",
                f"                h = min(g + {LANES}, e - s)",
                f"                tile({', '.join(passed)})",
                f"        total = {zero}",
                f"        for j in range({LANES}):",
                "            total += lanes[j]",
                "        leaves[leaf] = total",
            ]
        return text + "\n\n" + _DECORATOR.format(options="cache=CACHE, ") + "\n" + "\n".join(lines) + "\n"

    def signature(self, types: Any) -> Any:
        raw, real = types.uint8[::1], getattr(types, self.real)
        result = {"sum": types.float64[::1], "count": types.int64[::1], "values": real[::1]}
        extra = [types.uint64, types.uint64, types.int64[::1]] if self.reduction == "histogram" else [result[self.reduction]]
        arguments = [raw, types.int64, raw, types.int64, types.int64, *extra]
        return tuple(arguments + _argument_types(self.kinds, real, real, types.uint64))


@dataclass(frozen=True)
class GramKernel:
    """Inner products of all pairs of ``models`` inputs over a block that begins at a leaf.

    ``run(raws, codes, base, base_code, count, leaves)`` fills ``leaves`` (leaves, models, models) float64 above and on
    the diagonal. Products of float32 are exact in float64.
    """

    models: int
    of_deltas: bool
    real: Real

    def text(self) -> str:
        k = self.models
        fill: list[str] = []
        for i in range(k):
            fill += [f"w = 8 if codes[{i}] == 0 else (4 if codes[{i}] == 1 else 2)"]
            fill += [f"decode(raws[{i}][w * s:w * e], codes[{i}], values[{i}, :e - s])"]
        if self.of_deltas:
            fill += ["decode(base[base_width * s:base_width * e], base_code, base_tile[:e - s])"]
            fill += [f"subtract(values[{i}, :e - s], base_tile[:e - s])" for i in range(k)]
        lines = [
            "def run(raws, codes, base, base_code, count, leaves):",
            "    base_width = 8 if base_code == 0 else (4 if base_code == 1 else 2)",
            f"    values = np.empty(({k}, {TILE}), REAL)",
            f"    base_tile = np.empty({TILE}, REAL)",
            f"    lanes = np.empty(({k}, {k}, {GRAM_LANES}), np.float64)",
            "    for leaf in range(leaves.shape[0]):",
            "        lanes[:] = 0.0",
            f"        for s in range(leaf * {LEAF}, min((leaf + 1) * {LEAF}, count), {TILE}):",
            f"            e = min(s + {TILE}, min((leaf + 1) * {LEAF}, count))",
            *[f"            {line}" for line in fill],
            f"            for i in range({k}):",
            f"                for j in range(i, {k}):",
            f"                    for g in range(0, e - s, {GRAM_LANES}):",
            f"                        h = min(g + {GRAM_LANES}, e - s)",
            "                        dot(values[i, g:h], values[j, g:h], lanes[i, j, :h - g])",
            f"        for i in range({k}):",
            f"            for j in range(i, {k}):",
            "                total = 0.0",
            f"                for l in range({GRAM_LANES}):",
            "                    total += lanes[i, j, l]",
            "                leaves[leaf, i, j] = total",
        ]
        plain = _DECORATOR.format(options="")
        text = _PREAMBLE.format(bits=self.real[-2:])
        text += f"\n\n{plain}\ndef dot(a, b, lanes):\n    for j in range(a.size):\n"
        text += "        lanes[j] += np.float64(a[j]) * np.float64(b[j])\n"
        text += f"\n\n{plain}\ndef subtract(a, b):\n    for j in range(a.size):\n        a[j] -= b[j]\n"
        return text + "\n\n" + _DECORATOR.format(options="cache=CACHE, ") + "\n" + "\n".join(lines) + "\n"

    def signature(self, types: Any) -> Any:
        raw = types.uint8[::1]
        return (types.UniTuple(raw, self.models), types.int64[::1], raw, types.int64, types.int64, types.float64[:, :, ::1])


Description = MixKernel | MeasureKernel | GramKernel


def _argument_types(kinds: tuple[Kind, ...], numbers: Any, number: Any, keys: Any) -> list[Any]:
    flat: list[Any] = []
    for kind in kinds:
        flat += [number] if kind == "number" else [numbers]
        flat += [keys] if kind in ("noise", "bernoulli") else []
    return flat


@functools.lru_cache(maxsize=1024)
def compiled(kernel: Description) -> Callable[..., Any]:
    """Return the kernel's ``run``, from the cache or compiled now (0.5 to 3 s)."""
    # A method makes its equation anew for every merge: equal text is the same kernel, whatever function it came from.
    return _compiled(f'"""Generated by alnico; safe to delete."""\n\n{kernel.text()}', _Signature(kernel))


@functools.cache
def _compiled(text: str, signature: _Signature) -> Callable[..., Any]:
    directory = cache_directory()
    if directory is not None:
        try:
            return _load(text, directory, signature)
        except OSError:
            pass  # a full or vanished cache costs time, not the merge
        except Exception:  # so does a damaged one, whose readers raise anything; what is wrong with the text is raised below
            with contextlib.suppress(OSError):
                for path in directory.rglob(f"alnico_kernel_{_key(text)}*"):
                    path.unlink(missing_ok=True)
    module = ModuleType("alnico_kernel")
    module.CACHE = False  # type: ignore[attr-defined]
    exec(compile(text, "<alnico kernel>", "exec"), module.__dict__)
    return _specialise(module, signature)


class _Signature:
    """A kernel's argument types, which its text determines: all are equal as keys of a cache that has the text."""

    def __init__(self, kernel: Description) -> None:
        self.of = kernel.signature

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Signature)

    def __hash__(self) -> int:
        return 0


def _load(text: str, directory: Path, signature: _Signature) -> Callable[..., Any]:
    name = f"alnico_kernel_{_key(text)}"
    path = directory / f"{name}.py"
    if not path.exists() or path.read_bytes() != text.encode():
        descriptor, temporary = tempfile.mkstemp(dir=directory, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.CACHE = True  # type: ignore[attr-defined]
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return _specialise(module, signature)


def _specialise(module: ModuleType, signature: _Signature) -> Callable[..., Any]:
    from numba import types

    run = module.run
    run.compile(signature.of(types))
    run.disable_compile()
    result: Callable[..., Any] = run
    return result


@functools.cache
def _pieces() -> bytes:
    here = Path(__file__).parent
    return b"".join((here / name).read_bytes() for name in ("tiles.py", "shape.py", "../numerics/noise.py"))


def _key(text: str) -> str:
    import llvmlite
    import llvmlite.binding
    import numba

    cpu = f"{llvmlite.binding.get_host_cpu_name()} {llvmlite.binding.get_host_cpu_features().flatten()}"
    parts = (
        text.encode(),
        _pieces(),
        numba.__version__.encode(),
        llvmlite.__version__.encode(),
        cpu.encode(),
        sys.version.encode(),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def cache_directory() -> Path | None:
    """Return the private directory of compiled kernels, made if need be; None if there is none to be trusted.

    ``$ALNICO_CACHE_DIR/kernels``, else ``$XDG_CACHE_HOME/alnico/kernels``, else ``~/.cache/alnico/kernels``.
    """
    chosen = os.environ.get("ALNICO_CACHE_DIR")
    try:
        parent = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alnico"
        directory = parent / "kernels"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        return None
    return directory if os.access(directory, os.W_OK | os.X_OK) else None
