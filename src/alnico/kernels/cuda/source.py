"""Writes the text of a kernel for a GPU out of the same description as for the processor

Every thread computes elements that are far apart, so that neighbours load neighbours. Dtypes are part of the text:
a load is one of a number, never of bytes. What a scalar function says is straightened as for the processor, and then
changed in three ways:

* ``a * b`` and ``a / b`` become ``product(a, b)`` and ``quotient(a, b)``, which are rounded before anything is added
  to them, as on the processor;
* functions whose results depend on the compiler (``min``, ``max``, ``math.sqrt``) become those of ``elements.py``;
* loops over models are written out, so that the values of a parameter stay in registers; an index keeps its type.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Sequence
from typing import Any

from alnico.kernels.constants import BF16, E4M3, E5M2, F16, F32, F64, UNROLLED_MODELS
from alnico.kernels.mix_kernel import MixKernel
from alnico.kernels.parse import parse
from alnico.kernels.scalar_source import straighten
from alnico.kernels.template import ArgumentKind, Real

WORDS = {F64: "u64", F32: "u32", F16: "u16", BF16: "u16", E4M3: "u8", E5M2: "u8"}
"""What an element of each dtype is loaded as."""

MOST_WRITTEN_OUT = 64
"""The most rounds of a loop over models that are written out."""

PACK = 4
"""Consecutive elements that a thread loads at once, where every address allows it."""

_DECODED = {
    F64: "double_of({})", F32: "float_of({})", F16: "decode_f16({})", BF16: "decode_bf16({})",
    E4M3: "decode_e4m3({})", E5M2: "decode_e5m2({})",
}  # fmt: skip

_OPERATORS: dict[type, str] = {ast.Mult: "product", ast.Div: "quotient"}

_CALLS = {
    "abs": "magnitude",
    "min": "smaller",
    "max": "larger",
    "math.sqrt": "root",
    "math.fabs": "magnitude",
    "math.copysign": "with_sign",
}


def functions(function: Callable[..., Any], name: str, models: int) -> list[str]:
    """Return the text of a scalar function for a GPU, after that of those it calls. Errors: as :func:`straighten`."""
    lines = straighten(function, name)
    return [f"@device\n{ast.unparse(_translated(text, models))}\n" for text in lines]


def _translated(text: str, models: int) -> ast.Module:
    tree = _Translator(models).visit(parse(text))
    return ast.fix_missing_locations(tree)  # type: ignore[no-any-return]


class _Translator(ast.NodeTransformer):
    def __init__(self, models: int) -> None:
        self.models = models

    def visit_For(self, node: ast.For) -> Any:
        assert isinstance(node.iter, ast.Call)
        assert isinstance(node.target, ast.Name)
        bounds = [self.whole(bound) for bound in node.iter.args]
        if None not in bounds:
            steps = range(*bounds)  # type: ignore[arg-type]
            if len(steps) <= MOST_WRITTEN_OUT:
                index = node.target.id
                return [
                    line
                    for step in steps
                    for statement in _with_index(node.body, index, step)
                    for line in _as_list(self.visit(statement))
                ]
        return self.generic_visit(node)

    def whole(self, node: ast.expr) -> int | None:
        """The whole number that the bound of a loop is, if it is known."""
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.Call(func=ast.Name(id="len")):
                return self.models
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                size = self.whole(operand)
                return None if size is None else -size
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as operator, right=right):
                a, b = self.whole(left), self.whole(right)
                return None if a is None or b is None else a + b if isinstance(operator, ast.Add) else a - b
        return None

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        left: ast.expr = self.visit(node.left)
        right: ast.expr = self.visit(node.right)
        if type(node.op) in _OPERATORS:
            return _call(_OPERATORS[type(node.op)], left, right)
        return ast.BinOp(left, node.op, right)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        name = ast.unparse(node.func)
        if name in ("REAL", "range", "len"):
            return node
        passed: list[ast.expr] = [self.visit(argument) for argument in node.args]
        if name in ("min", "max"):
            best, *others = passed
            for other in others:
                best = _call(_CALLS[name], best, other)
            return best
        return ast.Call(ast.Name(_CALLS[name], ast.Load()) if name in _CALLS else node.func, passed, [])


def _as_list(statements: Any) -> list[ast.stmt]:
    return statements if isinstance(statements, list) else [statements]


def _with_index(body: list[ast.stmt], name: str, value: int) -> list[ast.stmt]:
    class Index(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ast.copy_location(ast.Constant(value), node) if node.id == name else node

    return [Index().visit(copy.deepcopy(statement)) for statement in body]


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


def preamble(real: Real) -> str:
    """The first lines of every kernel."""
    return f"REAL = np.{real}\nZERO = REAL(0.0)\nONE = REAL(1.0)\n"


def decoded(word: str, code: int, real: Real) -> str:
    """An expression for the number that a loaded word of a dtype is."""
    value = _DECODED[code].format(word)
    return value if (real == "float64") == (code == F64) else f"REAL({value})"


def loaded(address: str, place: str, code: int, real: Real) -> str:
    """An expression for an element in memory."""
    return decoded(f"load_{WORDS[code]}({address}, {place})", code, real)


def encoded(value: str, code: int, real: Real) -> tuple[list[str], str, str]:
    """Return statements, an expression for the word of a number, and one for whether it is NaN or infinite."""
    if code == F64:
        wide = value if real == "float64" else f"np.float64({value})"
        return [f"final = {wide}"], "long_of(final)", "not magnitude(final) < np.inf"
    if real == "float32":
        narrow = value
    else:
        narrow = f"np.float32({value})" if code == F32 else f"to_odd({value})"
    word = {F32: "bits_of(final)", F16: "encode_f16(final)", BF16: "encode_bf16(final)"}[code]
    # The first float32 that rounds to an infinity.
    limit = {
        F32: "np.float32(np.inf)",
        F16: "np.float32(65520.0)",
        BF16: "np.float32(3.3961775292304957e38)",
    }[code]
    return [f"final = {narrow}"], word, f"not magnitude(final) < {limit}"


class Slots:
    """Where the numbers of a kernel's arguments are among the numbers and keys that are passed to it.

    ``numbers``, ``keys`` and ``arrays`` say of each what it is: the argument, the part of it, and its model (None
    for an argument of one number).
    """

    def __init__(self, kinds: Sequence[ArgumentKind], models: Sequence[int]) -> None:
        self.numbers: list[tuple[int, str, int | None]] = []
        self.keys: list[tuple[int, int]] = []
        for a, kind in enumerate(kinds):
            if kind == "number":
                self.numbers.append((a, "a", None))
            if kind in ("numbers", "bernoulli", "ranked"):
                self.numbers += [(a, "a", m) for m in models]
            if kind == "ranked":
                self.numbers += [(a, "steps", m) for m in models]
            if kind in ("noise", "bernoulli", "ranked"):
                self.keys += [(a, m) for m in models]

    def number(self, argument: int, model: int | None = None, part: str = "a") -> str:
        return f"numbers[{self.numbers.index((argument, part, model))}]"

    def key(self, argument: int, model: int) -> str:
        return f"keys[{self.keys.index((argument, model))}]"


def extra_names(kinds: Sequence[ArgumentKind]) -> list[str]:
    """The parameters that arguments with arrays of their own have in a kernel."""
    names = []
    for a, kind in enumerate(kinds):
        if kind == "ranked":
            names.append(f"ranks{a}")
        if kind in ("rows", "columns"):
            # The address, the elements in a row, the first number that was uploaded, and how many were of each model.
            names += [f"of{a}", f"inner{a}", f"first{a}", f"wide{a}"]
    return names


def place_lines(kinds: Sequence[ArgumentKind], used: Sequence[int] | None = None) -> list[str]:
    """Statements that say where an element's number is in the rows or columns of an argument."""
    lines = []
    for a, kind in enumerate(kinds):
        if kind in ("rows", "columns") and (used is None or a in used):
            sign = "//" if kind == "rows" else "%"
            lines.append(f"at{a} = place {sign} inner{a} - first{a}")
    return lines


def argument_of(
    kind: ArgumentKind, a: int, slots: Slots, model: int, real: Real, nth: int | None = None
) -> str:
    """An expression for what one model's argument is for an element; not for a side."""
    nth = model if nth is None else nth
    load = f"load_f{real[-2:]}"
    if kind == "number":
        return slots.number(a)
    if kind == "numbers":
        return slots.number(a, model)
    if kind in ("rows", "columns"):
        return f"{load}(of{a}, {nth} * wide{a} + at{a})"
    draw = f"uniform({slots.key(a, model)}, place)"
    if kind == "bernoulli":
        return f"select({draw} < {slots.number(a, model)}, ONE, ZERO)"
    if kind == "ranked":
        rank = f"load_f32(ranks{a}, {nth} * count + j)"
        chance = f"{slots.number(a, model)} + product({slots.number(a, model, 'steps')}, {rank})"
        return f"select({draw} < {chance}, np.float32(1.0), np.float32(0.0))"
    return draw


def mix_text(
    kernel: MixKernel, codes: tuple[int, ...], base_code: int, out_code: int, *, packed: bool
) -> str:
    """The text of ``run(count, start, keep_equal, out, flag, numbers, keys, base, *raws, *extra)`` for these dtypes.

    It stores 0 at ``flag`` if a number is not finite. ``packed``: all addresses allow loads of four elements.
    """
    if kernel.models > UNROLLED_MODELS:
        return _mix_of_many(kernel, base_code, out_code)
    models, real, kinds = range(kernel.models), kernel.real, kernel.kinds
    slots = Slots(kinds, models)
    raws = [f"r{i}" for i in range(len(codes))]
    sides = [a for a, kind in enumerate(kinds) if kind == "side"]
    words = [f"w{i}" for i in range(len(codes))] + (["wb"] if kernel.of_deltas else [])
    shared = ["count", "keep_equal", "numbers", "keys", *extra_names(kinds)]
    body = place_lines(kinds)
    if kernel.of_deltas:
        body.append(f"b = {decoded('wb', base_code, real)}")
    body += [f"v{i} = {decoded(f'w{i}', code, real)}" for i, code in enumerate(codes)]
    checked = [f"v{i}" for i in range(len(codes))] + (["b"] if kernel.of_deltas else [])
    body.append("good = " + " & ".join(f"(magnitude({name}) < REAL(np.inf))" for name in checked))
    value = "(b + v{i})" if kernel.differences else "v{i}"
    value += " - b" if kernel.of_deltas else ""
    body.append(f"x = ({' '.join(value.format(i=i) + ',' for i in models)})")
    for a, kind in enumerate(kinds):
        if kind == "side":
            first = kernel.models * (1 + sides.index(a))
            values = [f"v{first + i}" for i in models]
        else:
            values = [argument_of(kind, a, slots, i, real) for i in models]
        body.append(
            f"t{a} = {values[0]}" if kind == "number" else f"t{a} = ({' '.join(v + ',' for v in values)})"
        )
    body.append(f"m = REAL(mix({', '.join(['x', *[f't{a}' for a in range(len(kinds))]])}))")
    if kernel.of_deltas:
        body.append("result = select(m == ZERO, b, b + m)")
    else:
        equal = " & ".join(f"(x[{i}] == x[0])" for i in models if i) or "True"
        body.append(f"result = select((keep_equal != 0) & {equal}, x[0], m)")
    statements, word, is_bad = encoded("result", out_code, real)
    body += [*statements, f"return {word}, (not good) | ({is_bad})"]
    heads = ["place", "j", *words, *shared]
    one = f"@device\ndef one({', '.join(heads)}):\n" + "".join(f"    {line}\n" for line in body)

    loads = [*raws, "base"] if kernel.of_deltas else raws
    kinds_of_words = [WORDS[code] for code in codes] + ([WORDS[base_code]] if kernel.of_deltas else [])
    run = ["bad = False", "step = cuda.gridsize(1)", "j = cuda.grid(1)"]
    if packed:
        run += [f"while {PACK} * j + {PACK - 1} < count:"]
        run += [f"    {w} = load4_{k}({r}, j)" for w, k, r in zip(words, kinds_of_words, loads, strict=True)]
        for n in range(PACK):
            place = [f"start + {PACK} * j + {n}", f"{PACK} * j + {n}"]
            passed = ", ".join([*place, *[f"{w}[{n}]" for w in words], *shared])
            run.append(f"    o{n}, bad{n} = one({passed})")
        run += [
            f"    store4_{WORDS[out_code]}(out, j, {', '.join(f'o{n}' for n in range(PACK))})",
            f"    bad = bad | {' | '.join(f'bad{n}' for n in range(PACK))}",
            "    j += step",
            f"j = count // {PACK} * {PACK} + cuda.grid(1)",
        ]
    passed = ", ".join(
        [
            "start + j",
            "j",
            *[f"load_{k}({r}, j)" for k, r in zip(kinds_of_words, loads, strict=True)],
            *shared,
        ]
    )
    run += [
        "while j < count:",
        f"    o, bad0 = one({passed})",
        f"    store_{WORDS[out_code]}(out, j, o)",
        "    bad = bad | bad0",
        "    j += step",
        "if bad:",
        "    store_i64(flag, 0, 0)",
    ]
    texts = functions(kernel.mix, "mix", kernel.models)
    names = [
        "count",
        "start",
        "keep_equal",
        "out",
        "flag",
        "numbers",
        "keys",
        "base",
        *raws,
        *extra_names(kinds),
    ]
    return module(real, [*texts, one], names, run)


def _mix_of_many(kernel: MixKernel, base_code: int, out_code: int) -> str:
    """The mix of so many models that each has no register: their addresses, dtypes and numbers are tables."""
    k, real, kinds = kernel.models, kernel.real, kernel.kinds
    any_of = "decode_any" if real == "float32" else "decode_any_wide"
    sides = [a for a, kind in enumerate(kinds) if kind == "side"]
    each = [a for a, kind in enumerate(kinds) if kind != "number"]
    local = {f"t{a}": "np.float32" if kinds[a] in ("noise", "ranked") else "REAL" for a in each}
    load = f"load_f{real[-2:]}"
    numbers, keys = many_slots(kinds, k)
    run = [f"{name} = cuda.local.array({k}, {of})" for name, of in {"x": "REAL", **local}.items()]
    for a, kind in enumerate(kinds):
        if kind == "number":
            run.append(f"t{a} = {load}(numbers, {numbers[a, 'a']})")
        if kind == "numbers":
            run += [f"for i in range({k}):", f"    t{a}[i] = {load}(numbers, {numbers[a, 'a']} + i)"]
    run += [
        "bad = False",
        "step = cuda.gridsize(1)",
        "j = cuda.grid(1)",
        "while j < count:",
        "    place = start + j",
    ]
    body = place_lines(kinds)
    if kernel.of_deltas:
        body += [f"b = {loaded('base', 'j', base_code, real)}", "good = magnitude(b) < REAL(np.inf)"]
    else:
        body.append("good = True")
    body += ["equal = keep_equal != 0", f"for i in range({k}):"]
    inner = [
        f"v = {any_of}(load_i64(codes, i), address_at(raws, i), j)",
        "good = good & (magnitude(v) < REAL(np.inf))",
    ]
    value = "(b + v)" if kernel.differences else "v"
    inner += [f"x[i] = {value}{' - b' if kernel.of_deltas else ''}", "equal = equal & (x[i] == x[0])"]
    for a, kind in enumerate(kinds):
        if kind == "side":
            first = k * (1 + sides.index(a))
            inner += [
                f"v = {any_of}(load_i64(codes, {first} + i), address_at(raws, {first} + i), j)",
                "good = good & (magnitude(v) < REAL(np.inf))",
                f"t{a}[i] = v",
            ]
        if kind in ("rows", "columns"):
            inner.append(f"t{a}[i] = {load}(of{a}, i * wide{a} + at{a})")
        if kind in ("noise", "bernoulli", "ranked"):
            draw = f"uniform(load_u64(keys, {keys.get(a)} + i), place)"
            if kind == "bernoulli":
                draw = f"select({draw} < {load}(numbers, {numbers[a, 'a']} + i), ONE, ZERO)"
            if kind == "ranked":
                rank = f"load_f32(ranks{a}, i * count + j)"
                chance = f"{load}(numbers, {numbers[a, 'a']} + i) + product({load}(numbers, {numbers[a, 'steps']} + i), {rank})"
                draw = f"select({draw} < {chance}, ONE, ZERO)"
            inner.append(f"t{a}[i] = {draw}")
    body += [f"    {line}" for line in inner]
    body.append(f"m = REAL(mix({', '.join(['x', *[f't{a}' for a in range(len(kinds))]])}))")
    body.append(
        "result = select(m == ZERO, b, b + m)" if kernel.of_deltas else "result = select(equal, x[0], m)"
    )
    statements, word, is_bad = encoded("result", out_code, real)
    body += [
        *statements,
        f"store_{WORDS[out_code]}(out, j, {word})",
        f"bad = bad | (not good) | ({is_bad})",
        "j += step",
    ]
    run += [f"    {line}" for line in body] + ["if bad:", "    store_i64(flag, 0, 0)"]
    texts = functions(kernel.mix, "mix", k)
    names = ["count", "start", "keep_equal", "out", "flag", "numbers", "keys", "base", "raws", "codes"]
    return module(real, texts, [*names, *extra_names(kinds)], run)


def many_slots(
    kinds: Sequence[ArgumentKind], models: int
) -> tuple[dict[tuple[int, str], int], dict[int, int]]:
    """Where the numbers and keys of each argument begin in the tables of a kernel of many models."""
    numbers: dict[tuple[int, str], int] = {}
    keys: dict[int, int] = {}
    size = 0
    for a, kind in enumerate(kinds):
        if kind in ("number", "numbers", "bernoulli", "ranked"):
            numbers[a, "a"] = size
            size += 1 if kind == "number" else models
        if kind == "ranked":
            numbers[a, "steps"] = size
            size += models
        if kind in ("noise", "bernoulli", "ranked"):
            keys[a] = models * len(keys)
    return numbers, keys


def module(real: Real, texts: Sequence[str], names: Sequence[str], run: Sequence[str]) -> str:
    """The text of a kernel: its device functions, and ``run`` with its parameters and statements."""
    body = "".join(f"    {line}\n" for line in run)
    return preamble(real) + "\n\n" + "\n\n".join(texts) + f"\n\ndef run({', '.join(names)}):\n{body}"


ROUNDING = [(1.0 + 2.0**-12, 0.0), (2.0**-149, 2.0**-149), (3.0, 1.0), (2.0, 1.0)]
"""Numbers, and what :func:`rounding_text` makes of them: 0 where a product is rounded before it is added to; the
smallest float32 where subnormal numbers are kept; 1 where a quotient and a root are the nearest numbers."""


def rounding_text() -> str:
    """The text of ``run(numbers, out)``, which shows how a GPU rounds, in float32."""
    run = [
        "x = numbers[0]",
        "store_f32(out, 0, product(x, x) - np.float32(1.00048828125))",
        "store_f32(out, 1, product(numbers[1], np.float32(1.0)))",
        "store_f32(out, 2, select(quotient(np.float32(1.0), numbers[2]) == np.float32(0.3333333432674408), ONE, ZERO))",
        "store_f32(out, 3, select(root(numbers[3]) == np.float32(1.4142135381698608), ONE, ZERO))",
    ]
    return module("float32", [], ["numbers", "out"], run)
