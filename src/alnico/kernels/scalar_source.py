"""Rewrites a scalar function, as in a paper, into straight-line source that LLVM vectorises.

Three rewrites, each measured:

* numbers become ``REAL(number)``: to numba the literal ``0.0`` is float64 and halves the speed, and an
integer in float32 arithmetic makes float64 of it (indices stay integers), and ``len(x)`` is such an integer;
* ``if`` and ``a if c else b`` become ``select(c, a, b)``, one machine instruction: a branch inside the
unrolled loop over models stops vectorisation from three models on (3.2 times slower at k = 3); * functions
that the function calls are brought along under names of their own, so the generated module is whole and its
text is all that a cache has to know.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

from alnico.errors import MethodError
from alnico.kernels.parse import parse

BUILTINS = {"abs": abs, "min": min, "max": max, "len": len, "range": range}
MATH = {"sqrt", "fabs", "copysign"}
"""Functions of ``math`` that round the same on every machine; exp, log and the like do not."""


def free_variables(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the global and captured names a function uses, with their values."""
    if not isinstance(function, FunctionType):
        raise MethodError(
            f"{function!r} is a {type(function).__name__}, expected a plain function of numbers."
        )
    closure = inspect.getclosurevars(function)
    return {**closure.globals, **closure.nonlocals}


def check_pure(function: Callable[..., Any]) -> None:
    """Refuse a scalar function that uses anything except its arguments and other pure functions.

    Errors: MethodError naming the captured value: pass it as an argument instead.
    """
    _check_pure(function, ())


def _check_pure(function: Callable[..., Any], callers: tuple[Callable[..., Any], ...]) -> None:
    if function in callers:
        raise MethodError(
            f"{function.__name__} calls itself; expected a function without recursion. Write a loop over range."
        )
    for name, value in free_variables(function).items():
        if isinstance(value, FunctionType):
            _check_pure(value, (*callers, function))
        elif value is not math:
            raise MethodError(
                f"{function.__name__} uses {name}, a {type(value).__name__} from outside; "
                "it may use its arguments and pure functions only. Pass the value as an argument."
            )


def straighten(function: Callable[..., Any], name: str) -> list[str]:
    """Return the source of ``function`` as ``name``, after that of all functions it calls (as
    ``name_0_callee``, ...).

    Errors: MethodError for statements that have no straight-line form, with their line.
    """
    check_pure(function)
    callees = {n: f for n, f in free_variables(function).items() if isinstance(f, FunctionType)}
    # Numbered: mix calling a_b, and mix calling a that calls b, must not become one name.
    renamed = {callee: f"{name}_{i}_{callee}" for i, callee in enumerate(callees)}
    sources: list[str] = []
    for callee, body in callees.items():
        sources += straighten(body, renamed[callee])
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        raise MethodError(
            f"{function.__qualname__}: its source is not available, as after exec() and in a plain interpreter; "
            "expected a function in a file or in a cell of a notebook. Write it into a file, and import it."
        ) from None
    try:
        tree = parse(textwrap.dedent(text)).body[0]
    except SyntaxError:
        tree = None
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        raise MethodError(
            f"{function.__name__}: expected a function written with def, without decorators, in a file."
        )
    rewritten = _Straightener(function, renamed).function(tree, name)
    return [*sources, ast.unparse(ast.fix_missing_locations(rewritten))]


class _Straightener(ast.NodeTransformer):
    def __init__(self, function: FunctionType | Callable[..., Any], renamed: dict[str, str]) -> None:
        self.where = f"{function.__module__}.{function.__qualname__}"
        self.renamed = renamed
        self.conditions = 0

    def refuse(self, node: ast.AST, what: str) -> MethodError:
        return MethodError(f"{self.where}, line {getattr(node, 'lineno', '?')} of it: {what}")

    def function(self, tree: ast.FunctionDef, name: str) -> ast.FunctionDef:
        body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
        if not body or not isinstance(body[-1], ast.Return):
            raise self.refuse(tree, "a scalar function must end with its only return.")
        parameters = tree.args
        if (
            parameters.posonlyargs
            or parameters.kwonlyargs
            or parameters.vararg
            or parameters.kwarg
            or parameters.defaults
        ):
            raise self.refuse(
                tree, "expected plain parameters, without defaults and stars; all values are passed in order."
            )
        bound = {a.arg for a in tree.args.args}
        statements = self.block(body, None, bound)
        arguments = ast.arguments([], [ast.arg(a.arg) for a in tree.args.args], None, [], [], None, [])
        return ast.FunctionDef(name, arguments, statements, [], type_params=[])  # type: ignore[call-arg, unused-ignore]

    def block(self, statements: list[ast.stmt], condition: str | None, bound: set[str]) -> list[ast.stmt]:
        straight: list[ast.stmt] = []
        for statement in statements:
            straight += self.statement(statement, condition, bound)
        return straight

    def statement(self, node: ast.stmt, condition: str | None, bound: set[str]) -> list[ast.stmt]:
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=value):
                return [self.assign(target, self.visit(value), condition, bound)]
            case ast.AugAssign(target=ast.Name(id=target), op=operator, value=value):
                total = ast.BinOp(ast.Name(target, ast.Load()), operator, self.visit(value))
                return [self.assign(target, total, condition, bound)]
            case ast.If(test=test, body=body, orelse=orelse):
                return self.branch(test, body, orelse, condition, bound)
            case ast.For(
                target=ast.Name() as index,
                iter=ast.Call(func=ast.Name("range")) as count,
                body=body,
                orelse=[],
            ):
                if condition is not None:
                    raise self.refuse(
                        node, "a loop inside an if has no straight-line form; put the if inside the loop."
                    )
                bound.add(index.id)
                return [ast.For(index, count, self.block(body, None, bound), [])]
            case ast.Return(value=ast.expr() as value):
                if condition is not None:
                    raise self.refuse(
                        node, "a return inside an if; write `return a if condition else b` at the end."
                    )
                return [ast.Return(self.visit(value))]
            case ast.Pass():
                return []
        raise self.refuse(
            node, f"{type(node).__name__} has no straight-line form; use assignments, if, and for over range."
        )

    def assign(self, target: str, value: ast.expr, condition: str | None, bound: set[str]) -> ast.stmt:
        if condition is not None and target in bound:
            value = _call("select", ast.Name(condition, ast.Load()), value, ast.Name(target, ast.Load()))
        bound.add(target)
        return ast.Assign([ast.Name(target, ast.Store())], value)

    def branch(
        self,
        test: ast.expr,
        body: list[ast.stmt],
        orelse: list[ast.stmt],
        condition: str | None,
        bound: set[str],
    ) -> list[ast.stmt]:
        self.conditions += 1
        chosen, other = f"chosen_{self.conditions}", f"other_{self.conditions}"
        both: ast.expr = self.visit(test)
        neither: ast.expr = ast.UnaryOp(ast.Not(), ast.Name(chosen, ast.Load()))
        if condition is not None:
            both = ast.BinOp(ast.Name(condition, ast.Load()), ast.BitAnd(), both)
            neither = ast.BinOp(ast.Name(condition, ast.Load()), ast.BitAnd(), neither)
        straight: list[ast.stmt] = [ast.Assign([ast.Name(chosen, ast.Store())], both)]
        for missing in sorted((_assigned(body) ^ _assigned(orelse)) - bound):
            raise self.refuse(test, f"{missing} is set in one branch only; set it before the if.")
        straight += self.block(body, chosen, bound)
        if orelse:
            straight.append(ast.Assign([ast.Name(other, ast.Store())], neither))
            straight += self.block(orelse, other, bound)
        return straight

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if isinstance(node.value, bool):
            return node
        if isinstance(node.value, (int, float)):
            return _call("REAL", ast.Constant(float(node.value)))
        raise self.refuse(node, f"the constant {node.value!r} is not a number.")

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if ast.unparse(node) in ("math.inf", "math.pi", "math.e", "math.tau"):
            return _call("REAL", node)
        raise self.refuse(node, f"uses {ast.unparse(node)}, which is not a number.")

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        if isinstance(node.op, ast.Pow):
            raise self.refuse(
                node, "a power rounds differently from machine to machine; write x * x, or math.sqrt(x)."
            )
        return ast.BinOp(self.visit(node.left), node.op, self.visit(node.right))

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.expr) and not isinstance(node, (ast.Name, ast.UnaryOp)):
            raise self.refuse(
                node, f"{type(node).__name__} has no straight-line form; use numbers, comparisons and calls."
            )
        return super().generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        return _call("select", self.visit(node.test), self.visit(node.body), self.visit(node.orelse))

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        # `i and x > 0` would become a bitwise `i & (x > 0)`, which is false for i = 2.
        for value in node.values:
            negated = isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not)
            if not negated and not isinstance(value, (ast.Compare, ast.BoolOp)):
                raise self.refuse(
                    node, f"{ast.unparse(value)} is joined by and/or; they join comparisons: write x != 0."
                )
        operator = ast.BitAnd() if isinstance(node.op, ast.And) else ast.BitOr()
        joined: ast.expr
        joined, *rest = [self.visit(value) for value in node.values]
        for value in rest:
            joined = ast.BinOp(joined, operator, value)
        return joined

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        operands = [self.visit(value) for value in (node.left, *node.comparators)]
        parts = [
            ast.Compare(a, [op], [b]) for a, op, b in zip(operands, node.ops, operands[1:], strict=False)
        ]
        joined: ast.expr = parts[0]
        for part in parts[1:]:
            joined = ast.BinOp(joined, ast.BitAnd(), part)
        return joined

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if node.keywords:
            raise self.refuse(
                node, f"calls {ast.unparse(node.func)} with keywords; pass all values in order."
            )
        match node.func:
            case ast.Name(id="len"):
                return _call("REAL", node)
            case ast.Name(id="range"):
                return node
            case ast.Name(id=name) if name in BUILTINS or name in self.renamed:
                function: ast.expr = ast.Name(self.renamed.get(name, name), ast.Load())
            case ast.Attribute(value=ast.Name("math"), attr=attribute) if attribute in MATH:
                function = node.func
            case _:
                allowed = f"{', '.join(BUILTINS)}, math.{', math.'.join(sorted(MATH))} and pure functions"
                raise self.refuse(node, f"calls {ast.unparse(node.func)}; it may call {allowed}.")
        return ast.Call(function, [self.visit(a) for a in node.args], [])


def _assigned(statements: list[ast.stmt]) -> set[str]:
    """Names that hold a value after ``statements`` on every path."""
    names: set[str] = set()
    for node in statements:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.If):
            names |= _assigned(node.body) & _assigned(node.orelse)
    return names


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])
