"""Runs a scalar function on whole arrays, where numpy computes every step in the type numba does.

The function is straightened as for a compiled kernel. Then each expression is given a type. Where numba and
numpy could choose different ones (a loop's index in arithmetic, a comparison that is added), and for operators
whose results differ (``%`` and ``//``), the function has no array form, and its kernel is compiled.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from alnico.kernels.parse import parse
from alnico.kernels.scalar_source import straighten
from alnico.kernels.template import ArgumentKind, Real

Type = Literal["real", "narrow", "flag", "index", "reals", "narrows"]
"""``narrow`` is float32 in a kernel of float64 (noise and draws); the plurals are one value per model."""

_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div)
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
_ARGUMENTS = {"abs": 1, "math.sqrt": 1, "math.fabs": 1, "math.copysign": 2}
_WORDS = {2: np.int16, 4: np.int32, 8: np.int64}


class NoArrayForm(Exception):
    """A scalar function that must be compiled."""


class ArrayFunction:
    """A scalar function that takes and returns arrays, and ``steps``: how many operations it has, its loops
    over models counted once for each model."""

    def __init__(self, call: Callable[..., Any], steps: int) -> None:
        self.call = call
        self.steps = steps


def types_of(kinds: Sequence[ArgumentKind], real: Real, *, per_model: bool) -> list[Type]:
    """The types of a kernel's arguments: those of ``mix`` hold a value per model (``per_model``), those of a
    measure one."""
    narrow: Type = "real" if real == "float32" else "narrow"
    of_kind: dict[str, Type] = {"noise": narrow, "ranked": narrow}
    types: list[Type] = [of_kind.get(kind, "real") for kind in kinds]
    if not per_model:
        return types
    several: dict[Type, Type] = {"real": "reals", "narrow": "narrows"}
    return ["real" if kind == "number" else several[each] for kind, each in zip(kinds, types, strict=True)]


def on_arrays(function: Callable[..., Any], types: Sequence[Type], models: int, real: Real) -> ArrayFunction:
    """Return a function that computes ``function`` for arrays of elements. Errors: NoArrayForm; MethodError as for
    :func:`straighten`."""
    lines = straighten(function, "of")
    tree = parse("\n\n".join(lines))
    definitions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    checker = _Checker(definitions, models)
    result = checker.call("of", list(types))
    if result not in ("real", "narrow", "flag"):
        raise NoArrayForm(f"returns {result}")
    names = _namespace(real)
    tree = ast.fix_missing_locations(_Negations().visit(tree))
    exec(compile(tree, "<alnico equation>", "exec"), names)
    return ArrayFunction(names["of"], checker.steps)


def types_inside(statements: Sequence[ast.stmt], known: dict[str, Type]) -> dict[str, Type]:
    """Return the types of all variables of straight-line statements that call no function. Errors: NoArrayForm."""
    names = dict(known)
    _Checker({}, 1).block(statements, names)
    return names


class _Checker:
    """Gives each expression its type, and counts operations."""

    def __init__(self, definitions: dict[str, ast.FunctionDef], models: int) -> None:
        self.definitions = definitions
        self.models = models
        self.rounds = 1
        self.steps = 0

    def call(self, name: str, types: list[Type]) -> Type:
        node = self.definitions[name]
        parameters = [a.arg for a in node.args.args]
        if len(parameters) != len(types):
            raise NoArrayForm(f"{name} takes {len(parameters)} arguments, not {len(types)}")
        names = dict(zip(parameters, types, strict=True))
        self.block(node.body[:-1], names)
        last = node.body[-1]
        assert isinstance(last, ast.Return)
        assert last.value is not None
        return self.type_of(last.value, names)

    def block(self, statements: Sequence[ast.stmt], names: dict[str, Type]) -> None:
        for node in statements:
            match node:
                case ast.Assign(targets=[ast.Name(id=target)], value=value):
                    found = self.type_of(value, names)
                    # numba gives a variable of two types the wider one in all places.
                    if names.setdefault(target, found) != found:
                        raise NoArrayForm(f"{target} is {names[target]} and {found}")
                case ast.For(target=ast.Name(id=index), body=body):
                    if names.setdefault(index, "index") != "index":
                        raise NoArrayForm(f"{index} is {names[index]} and an index")
                    rounds, self.rounds = self.rounds, self.rounds * self.models
                    self.block(body, names)
                    self.rounds = rounds
                case _:
                    raise NoArrayForm(ast.unparse(node))

    def type_of(self, node: ast.expr, names: dict[str, Type]) -> Type:
        match node:
            case ast.Constant(value=bool()):
                return "flag"
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.Subscript(value=ast.Name(id=name)) if names.get(name) in ("reals", "narrows"):
                return "real" if names[name] == "reals" else "narrow"
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self.all_of(("flag",), [operand], names)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                return self.all_of(("real", "narrow"), [operand], names)
            case ast.BinOp(left=left, op=operator, right=right) if isinstance(operator, _ARITHMETIC):
                return self.all_of(("real", "narrow"), [left, right], names)
            case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr(), right=right):
                return self.all_of(("flag",), [left, right], names)
            case ast.Compare(left=left, ops=[operator], comparators=[right]) if isinstance(
                operator, _COMPARISONS
            ):
                self.all_of(("real", "narrow", "index"), [left, right], names)
                return "flag"
            case ast.Call(func=ast.Name(id="REAL")):
                return "real"
            case ast.Call(func=ast.Name(id="select"), args=[test, chosen, other]):
                self.all_of(("flag",), [test], names)
                self.steps += 3 * self.rounds  # a selection takes as long as four other operations
                chosen_type = self.type_of(chosen, names)
                allowed: tuple[Type, ...] = ("flag",) if chosen_type == "flag" else ("real", "narrow")
                return self.all_of(allowed, [chosen, other], names)
            case ast.Call(func=function, args=arguments):
                return self.called(ast.unparse(function), arguments, names)
        raise NoArrayForm(ast.unparse(node))

    def called(self, name: str, arguments: list[ast.expr], names: dict[str, Type]) -> Type:
        if name in self.definitions:
            return self.call(name, [self.type_of(a, names) for a in arguments])
        if name in ("min", "max") and len(arguments) > 1:
            self.steps += 4 * (len(arguments) - 1) * self.rounds
            return self.all_of(("real", "narrow"), arguments, names)
        if _ARGUMENTS.get(name) == len(arguments):
            return self.all_of(("real", "narrow"), arguments, names)
        raise NoArrayForm(f"{name} of {len(arguments)} arguments")

    def all_of(self, allowed: Sequence[Type], nodes: Sequence[ast.expr], names: dict[str, Type]) -> Type:
        self.steps += self.rounds
        found = [self.type_of(node, names) for node in nodes]
        if not set(found) <= set(allowed):
            raise NoArrayForm(f"{' and '.join(found)} where only {', '.join(allowed)} have one meaning")
        return "real" if "real" in found else found[0]


class _Negations(ast.NodeTransformer):
    """``not x`` is one truth value to Python; arrays are negated by a function."""

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not):
            return ast.Call(ast.Name("is_not", ast.Load()), [node.operand], [])
        return node


@functools.cache
def _shared_names() -> dict[str, Any]:
    of_math = SimpleNamespace(
        sqrt=np.sqrt, fabs=np.abs, copysign=np.copysign, inf=math.inf, pi=math.pi, e=math.e, tau=math.tau
    )
    return {
        "select": select,
        "is_not": np.logical_not,
        "abs": np.abs,
        "min": functools.partial(_pairwise, np.less),
        "max": functools.partial(_pairwise, np.greater),
        "math": of_math,
    }


def _namespace(real: Real) -> dict[str, Any]:
    return {**_shared_names(), "REAL": np.dtype(real).type}


def select(condition: Any, chosen: Any, other: Any) -> Any:
    """``chosen if condition else other`` for arrays and numbers. By masks: ``np.where`` branches for each element, and takes
    15 times as long where the condition follows no pattern."""
    if not isinstance(condition, np.ndarray):
        dtype = np.result_type(chosen, other)
        return (
            dtype.type(chosen if condition else other)
            if np.ndim(chosen) == np.ndim(other) == 0
            else (np.asarray(chosen if condition else other, dtype))
        )
    a, b = np.asarray(chosen), np.asarray(other)
    dtype = np.result_type(a.dtype, b.dtype)
    if dtype.kind == "b":
        return (condition & a) | (~condition & b)
    word = _WORDS[dtype.itemsize]
    bits_a, bits_b = (value.astype(dtype, copy=False).view(word) for value in (a, b))
    mask = condition.view(np.int8).astype(word)
    np.negative(mask, out=mask)
    mask &= bits_a ^ bits_b
    mask ^= bits_b
    return mask.view(dtype)


def _pairwise(wins: Callable[[Any, Any], Any], first: Any, *others: Any) -> Any:
    """``min`` or ``max`` as numba has them: a later value is taken if it ``wins``, so a NaN never is, and of two zeros the first
    stays."""
    best = first
    for value in others:
        best = select(wins(value, best), value, best)
    return best
