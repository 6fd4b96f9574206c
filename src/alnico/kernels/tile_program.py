"""Turns an equation over models into loops over a tile, one model after another, for any number of models.

The equation of one parameter loops over models, and carries totals from one to the next. Here the loops change places: a
loop over models contains one over the elements of a tile, which LLVM vectorises, and each total is an array of the tile's
size. Every element goes through the same operations in the same order, so the bits are the same. The text does not depend
on the number of models: one kernel serves all numbers.

Functions with loops are written into the equation, under names of their own. What does not depend on a loop's index moves
in front of the loop: an equation that asks each model about the sum of all then has one loop over all, not one per model.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from alnico.kernels.array_source import NoArrayForm, Type, types_inside, types_of
from alnico.kernels.parse import parse
from alnico.kernels.scalar_source import straighten
from alnico.kernels.template import APART, DECORATOR, ArgumentKind, Real, tile_type, tiled_arguments, value_of

GROUP = 4
"""Models that one loop over a tile takes: totals are loaded and stored once for so many."""

ROOM_BYTES = 1 << 19
"""Memory for the tiles of all models, where each has one: tiles are shorter for more models, so that all stay in the
second-level cache."""

MOST_TILE = 1024
"""The largest tile: those of a group of models and of the totals stay in the first-level cache."""

LEAST_TILE = 64
"""Every tile's size is a multiple of this."""

VALUES = "x"
"""The argument of an equation that has one value per model."""

CHOSEN = "chosen_model"
"""The index of the loop over the models that are measured."""


_FILL, _EACH, _WORK = "fill", "each", "work"
"""Lines that stand for statements that a kernel gives."""

TRACKING = f"""\
all_equal = REAL(1.0)
for equal_i in range(len({VALUES})):
    all_equal = select({VALUES}[equal_i] == {VALUES}[0], all_equal, REAL(0.0))
"""
"""Sets ``all_equal`` to 1 where all models have the same value. A number: LLVM has vectors of them in registers, not of flags."""


@dataclass(frozen=True)
class Steps:
    """Statements without loops, for each element of a tile."""

    statements: list[ast.stmt]


@dataclass(frozen=True)
class Loop:
    """``for index in range(*bounds)``; ``is_over_models``: from the first to the last."""

    index: str
    bounds: list[ast.expr]
    is_over_models: bool
    body: list[Steps | Loop]

    @property
    def steps(self) -> Steps | None:
        """What it does with each model, if that contains no other loop."""
        only = self.body[0] if len(self.body) == 1 and self.is_over_models else None
        return only if isinstance(only, Steps) else None


class TileProgram:
    """An equation as loops and steps over a tile.

    Its arguments are ``x`` (the values) and ``t0``, ``t1``, ... of ``kinds``. ``finish`` gives statements that set ``out``
    from an expression of the result; they may use ``b``, the base's value, and ``keep_equal``. With ``own`` it is an
    equation of a measure, of one model's value and all values: ``chosen`` is then what follows for each chosen model ``i``.
    ``tracks_equal`` sets ``all_equal``: 1 where all models have the same value, else 0.

    Errors: NoArrayForm, where the types of variables are not known; MethodError as for ``straighten``.
    """

    def __init__(
        self, function: Callable[..., Any], kinds: Sequence[ArgumentKind], real: Real,
        finish: Callable[[str], str], *, own: bool = False, tracks_equal: bool = False,
    ) -> None:  # fmt: skip
        self.kinds = kinds
        self.real = real
        self.own = own
        self.out = "measured[:size]" if own else "out_tile[:size]"
        tree = parse("\n\n".join(straighten(function, "of")))
        flattening = _Flattening({node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)})
        names = [f"t{a}" for a in range(len(kinds))]
        arguments: list[ast.expr] = [_name(VALUES), *map(_name, names)]
        if own:
            arguments = [_item(VALUES), _name(VALUES)]  # of the chosen model, and of all
            arguments += [
                _name(n) if kind == "number" else _item(n) for n, kind in zip(names, kinds, strict=True)
            ]
        statements, result = flattening.call("of", arguments)
        if tracks_equal:
            statements = [*parse(TRACKING).body, *statements]
        statements += parse(finish(ast.unparse(result))).body
        if own:
            statements = [_for(CHOSEN, ast.Call(_name("chosen"), [], []), statements)]
        statements = _joined(_lifted(statements, _assignments(statements)))
        real_types = dict(zip(names, types_of(kinds, real, per_model=True), strict=True))
        known: dict[str, Type] = {VALUES: "reals", **real_types, "b": "real", "keep_equal": "flag"}
        self.types = types_inside(statements, known)
        if "index" in (
            self.types[name] for name in _assignments(statements) if name not in _indices(statements)
        ):
            raise NoArrayForm("an index is assigned to a variable")
        self.parts = _parts(statements)
        self.carried = {name for part in _all_steps(self.parts) for name in _read_first(part.statements)}
        self.carried &= set(_assignments(statements)) - _indices(statements)
        self.functions: list[str] = []
        passes = [part for part in self.parts if _uses_models(part)]
        fills = isinstance(passes[0], Loop) and _takes_in_turn(passes[0]) if passes and not own else False
        self._filling = passes[0] if fills else None
        """The loop over models that reads them, if they are not all read before."""
        self.is_single = fills and all(_takes_in_turn(p, only_first=p is not passes[0]) for p in passes)
        """Whether every model is used once, and only by that loop: then there are tiles for a group of them alone."""
        before = [] if fills else ["for i in range(models):", *_indented(["r = i", _FILL])]
        self._lines = before + [line for part in self.parts for line in self._part(part)]

    def rows(self) -> str:
        """How many models there are tiles of."""
        return str(GROUP) if self.is_single else "models"

    def tiles(self) -> list[str]:
        """The arrays of a tile's size that it works in."""
        return sorted(f"tile_{name}" for name in self.carried)

    @property
    def uses_first(self) -> bool:
        """Whether the first model's values must outlast its row."""
        return self.is_single and any(ast.unparse(i) == f"{VALUES}[0]" for p in self.parts for i in _items(p))

    def statements(
        self, fill: Sequence[str], each: Sequence[str] = (), work: Sequence[str] = ()
    ) -> list[str]:
        """The statements for one tile of ``size`` elements. ``fill`` reads model ``i`` into row ``r``. For each chosen model
        ``i``, the ``n``-th, ``each`` is done before the equation, and ``work`` after it."""
        given = {_FILL: fill, _EACH: each, _WORK: work}
        lines: list[str] = []
        for line in self._lines:
            bare = line.lstrip()
            lines += [line[: -len(bare)] + other for other in given[bare]] if bare in given else [line]
        return lines

    def _part(self, part: Steps | Loop) -> list[str]:
        if isinstance(part, Steps):
            return self._call(part.statements)
        if part.steps is None:
            inside = [line for p in part.body for line in self._part(p)]
            if part.index == CHOSEN:
                head = [f"{CHOSEN} = chosen[n]", f"i = {CHOSEN}"]
                return ["for n in range(chosen.size):", *_indented([*head, _EACH, *inside, _WORK])]
            bounds = ", ".join(map(ast.unparse, part.bounds))
            return [f"for {part.index} in range({bounds}):", *_indented(inside)]
        lines = []
        whole = f"models - models % {GROUP}"
        for size, span in ((GROUP, f"0, {whole}, {GROUP}"), (1, f"{whole}, models")):
            names = [f"g{m}_{part.index}" for m in range(size)]
            lines.append(f"for {names[0]} in range({span}):")
            if part is self._filling:
                row = "r = g" if self.is_single else "r = i"
                lines += _indented(
                    [f"for g in range({size}):", *_indented([f"i = {names[0]} + g", row, _FILL])]
                )
            lines += _indented([f"{name} = {names[0]} + {m}" for m, name in enumerate(names) if m])
            several = [s for name in names for s in _with_name(part.steps.statements, part.index, name)]
            lines += _indented(self._call(several))
        return lines

    def _call(self, statements: list[ast.stmt]) -> list[str]:
        """A call of a function that does the statements for each element, which is added to ``functions``."""
        writer = _StepsWriter(self)
        before = [writer.loaded(name) for name in _read_first(statements) if name in self.carried]
        body = [ast.unparse(ast.fix_missing_locations(writer.visit(s))) for s in copy.deepcopy(statements)]
        after = [writer.stored(name) for name in sorted(_assignments(statements)) if name in self.carried]
        if not after and "out" not in writer.passed:
            return []
        name = f"part{len(self.functions)}"
        arrays = [p for p in writer.passed if p not in writer.numbers]
        head = f"def {name}({', '.join(writer.passed)}):\n    for j in range({arrays[0]}.size):\n"
        lines = [line for line in (*before, *body, *after) if line]
        self.functions.append(
            f"{DECORATOR.format(options=APART)}\n{head}" + "".join(f"        {line}\n" for line in lines)
        )
        return [f"{name}({', '.join(writer.passed.values())})"]

    def row(self, array: str, index: str) -> str:
        """An expression for a model's tile of values or of an argument."""
        if array != VALUES and self.own:
            return f"filled{array[1:]}[:size]"
        if self.is_single:
            if index == "0":
                return "first_tile[:size]"
            index = "r" if index == "r_" else index.partition("_")[0][1:]  # the place in its group
        index = index.rstrip("_")
        of = 0 if array == VALUES else 1 + tiled_arguments(tuple(self.kinds)).index(int(array[1:]))
        place = f"({of} * rows + {index}) * length"
        narrow = "REAL" if array == VALUES else tile_type(self.kinds[int(array[1:])])
        view = "" if narrow in ("REAL", self.real) else f".view(np.{narrow})[:size]"
        return f"room[{place}:{place} + size]{view}"


def room_of(tiles: int, real: Real) -> int:
    """How many times the smallest tile there is room for, where ``tiles`` are needed at once."""
    width = 8 if real == "float64" else 4
    return min(MOST_TILE // LEAST_TILE * tiles, max(ROOM_BYTES // (LEAST_TILE * width), tiles))


class _StepsWriter(ast.NodeTransformer):
    """Rewrites steps to read numbers that are the same for all elements, and arrays at ``j``; collects what is passed."""

    def __init__(self, program: TileProgram) -> None:
        self.program = program
        self.passed: dict[str, str] = {}
        self.numbers: set[str] = set()

    def array(self, name: str, passed: str) -> str:
        self.passed.setdefault(name, passed)
        return f"{name}[j]"

    def number(self, name: str, passed: str) -> str:
        self.passed.setdefault(name, passed)
        self.numbers.add(name)
        return name

    def loaded(self, name: str) -> str:
        element = self.array(f"tile_{name}", f"tile_{name}[:size]")
        form = {"flag": "{} != ZERO", "narrow": "np.float32({})"}.get(self.program.types[name], "{}")
        return f"{name} = {form.format(element)}"

    def stored(self, name: str) -> str:
        element = self.array(f"tile_{name}", f"tile_{name}[:size]")
        return f"{element} = {f'select({name}, ONE, ZERO)' if self.program.types[name] == 'flag' else name}"

    def visit_Assign(self, node: ast.Assign) -> ast.stmt:
        value = self.visit(node.value)
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id == "out":
            return parse(f"{self.array('out', self.program.out)} = {ast.unparse(value)}").body[0]
        return ast.Assign(node.targets, value)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if isinstance(node.func, ast.Name) and node.func.id == "len":
            return _name(self.number("models", "models"))
        node.args = [self.visit(argument) for argument in node.args]
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        name = node.id
        if name == "b":
            return _expression(self.array("base", "base_tile[:size]"))
        if name == "keep_equal":
            return _name(self.number(name, "keep_equal != 0"))
        if name not in self.program.types:  # an index of a group, or REAL and other functions
            is_index = name.partition("_")[2] in self.program.types
            return _name(self.number(name, name)) if is_index else node
        if self.program.types[name] == "index":
            return _name(self.number(name, name))
        if name in (f"t{a}" for a in range(len(self.program.kinds))):
            return _name(self.number(name, f"a{name[1:]}"))
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        array, index = ast.unparse(node.value), ast.unparse(node.slice)
        label = "".join(c if c.isalnum() else "_" for c in index)
        kind: ArgumentKind = "rows" if array == VALUES else self.program.kinds[int(array[1:])]
        if kind == "numbers":
            return _name(self.number(f"{array}_{label}", f"a{array[1:]}[{index}]"))
        element = self.array(f"{array}_{label}", self.program.row(array, index))
        return _expression(value_of(kind, element))


class _Flattening:
    """Writes calls of functions as their statements, under names of their own."""

    def __init__(self, definitions: dict[str, ast.FunctionDef]) -> None:
        self.definitions = definitions
        self.calls = 0

    def call(self, name: str, arguments: Sequence[ast.expr]) -> tuple[list[ast.stmt], ast.expr]:
        """The statements of a call, and an expression of its result."""
        node = self.definitions[name]
        prefix = f"c{self.calls}_"
        self.calls += 1
        assigned = _assignments(node.body)
        names: dict[str, ast.expr] = {own: _name(prefix + own) for own in assigned}
        statements: list[ast.stmt] = []
        for parameter, argument in zip((a.arg for a in node.args.args), arguments, strict=True):
            if parameter not in assigned and isinstance(argument, (ast.Name, ast.Subscript, ast.Constant)):
                names[parameter] = argument
            else:
                names[parameter] = _name(f"{prefix}{parameter}")
                statements.append(_assign(f"{prefix}{parameter}", argument))
        renaming = _Renaming(names)
        body = [renaming.visit(copy.deepcopy(s)) for s in node.body]
        statements += self.block(body[:-1])
        last = body[-1]
        assert isinstance(last, ast.Return)
        assert last.value is not None
        return statements, self.expression(last.value, statements)

    def block(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        flat: list[ast.stmt] = []
        for node in statements:
            if isinstance(node, ast.For):
                assert isinstance(node.target, ast.Name)
                flat.append(_for(node.target.id, node.iter, self.block(node.body)))
            else:
                assert isinstance(node, ast.Assign)
                value = self.expression(node.value, flat)
                flat.append(ast.Assign(node.targets, value))
        return flat

    def expression(self, node: ast.expr, before: list[ast.stmt]) -> ast.expr:
        flattening = self

        class Calls(ast.NodeTransformer):
            def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
                return node

            def visit_Call(self, node: ast.Call) -> ast.expr:
                node.args = [self.visit(argument) for argument in node.args]
                if not (isinstance(node.func, ast.Name) and node.func.id in flattening.definitions):
                    return node
                statements, result = flattening.call(node.func.id, node.args)
                before.extend(statements)
                return result

        flat: ast.expr = Calls().visit(node)
        return flat


class _Renaming(ast.NodeTransformer):
    def __init__(self, names: dict[str, ast.expr]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        other = copy.deepcopy(self.names.get(node.id, node))
        if isinstance(node.ctx, ast.Store) and isinstance(other, ast.Name):
            other.ctx = ast.Store()
        return other


def _lifted(statements: Sequence[ast.stmt], everywhere: Counter[str]) -> list[ast.stmt]:
    """Move what does not depend on a loop's index in front of the loop."""
    lifted: list[ast.stmt] = []
    for node in statements:
        if not isinstance(node, ast.For):
            lifted.append(node)
            continue
        body = _lifted(node.body, everywhere)
        inside = _assignments(body)
        varying = {_index(node), *_read_first(body)} & set(inside) | {_index(node)}
        varying |= {n for n in inside if inside[n] != everywhere[n]}
        size = -1
        while size != len(varying):
            size = len(varying)
            for statement in body:
                if (_names_in(statement) | set(_assignments([statement]))) & varying:
                    varying |= set(_assignments([statement]))
        fixed = [s for s in body if not set(_assignments([s])) & varying and "out" not in _assignments([s])]
        lifted += fixed
        lifted.append(_for(_index(node), node.iter, [s for s in body if s not in fixed]))
    return lifted


def _joined(statements: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Join loops over the same range that need nothing of each other, so that models are read once for both."""
    joined: list[ast.stmt] = []
    for node in statements:
        before = next((i for i in reversed(range(len(joined))) if isinstance(joined[i], ast.For)), None)
        if before is not None and isinstance(node, ast.For):
            loop = joined[before]
            assert isinstance(loop, ast.For)
            between = joined[before + 1 :]
            made = set(_assignments([loop])) - {_index(loop)}
            asked = _names_in(loop) - {_index(loop)}
            is_free = not any(
                _names_in(s) & made or set(_assignments([s])) & (asked | made) for s in (*between, node)
            )
            if is_free and ast.unparse(loop.iter) == ast.unparse(node.iter):
                body = _with_name(node.body, _index(node), _index(loop))
                joined[before:] = [*between, _for(_index(loop), loop.iter, [*loop.body, *body])]
                continue
        joined.append(node)
    return joined


def _parts(statements: Sequence[ast.stmt]) -> list[Steps | Loop]:
    parts: list[Steps | Loop] = []
    for node in statements:
        if isinstance(node, ast.For):
            assert isinstance(node.iter, ast.Call)
            bounds = [_Lengths().visit(copy.deepcopy(b)) for b in node.iter.args]
            over_models = [ast.unparse(b) for b in bounds] in (["models"], ["0", "models"])
            parts.append(Loop(_index(node), bounds, over_models, _parts(node.body)))
        elif parts and isinstance(parts[-1], Steps):
            parts[-1].statements.append(node)
        else:
            parts.append(Steps([node]))
    return parts


class _Lengths(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.expr:
        return _name("models") if ast.unparse(node.func) == "len" else node


def _all_steps(parts: Sequence[Steps | Loop]) -> Iterator[Steps]:
    for part in parts:
        if isinstance(part, Steps):
            yield part
        else:
            yield from _all_steps(part.body)


def _items(part: Steps | Loop) -> Iterator[ast.Subscript]:
    """What a part reads of single models."""
    for steps in _all_steps([part]):
        for statement in steps.statements:
            yield from (node for node in ast.walk(statement) if isinstance(node, ast.Subscript))


def _uses_models(part: Steps | Loop) -> bool:
    return any(True for _ in _items(part))


def _takes_in_turn(part: Steps | Loop, *, only_first: bool = False) -> bool:
    """Whether a part is a loop that uses each model in its turn, and else the first value alone."""
    if not only_first and not (isinstance(part, Loop) and part.steps):
        return False
    own = part.index if isinstance(part, Loop) and not only_first else None
    return all(
        ast.unparse(item) == f"{VALUES}[0]" or (own is not None and ast.unparse(item.slice) == own)
        for item in _items(part)
    )


def _read_first(statements: Sequence[ast.stmt]) -> list[str]:
    """The variables that statements read before they set them, in order."""
    known: set[str] = set()
    found: dict[str, None] = {}

    def visit(block: Sequence[ast.stmt]) -> None:
        for node in block:
            if isinstance(node, ast.For):
                known.add(_index(node))
                visit(node.body)
            else:
                found.update(dict.fromkeys(n for n in sorted(_names_in(node)) if n not in known))
                known.update(_assignments([node]))

    visit(statements)
    return list(found)


def _names_in(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _assignments(statements: Sequence[ast.stmt]) -> Counter[str]:
    """How often each variable is set."""
    return Counter(
        n.id
        for s in statements
        for n in ast.walk(s)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    )


def _indices(statements: Sequence[ast.stmt]) -> set[str]:
    return {_index(n) for s in statements for n in ast.walk(s) if isinstance(n, ast.For)}


def _with_name(statements: Sequence[ast.stmt], name: str, other: str) -> list[ast.stmt]:
    return [_Renaming({name: _name(other)}).visit(copy.deepcopy(s)) for s in statements]


def _index(node: ast.For) -> str:
    assert isinstance(node.target, ast.Name)
    return node.target.id


def _for(index: str, count: ast.expr, body: Sequence[ast.stmt]) -> ast.For:
    return ast.For(ast.Name(index, ast.Store()), count, list(body), [])


def _assign(name: str, value: ast.expr) -> ast.stmt:
    return ast.Assign([ast.Name(name, ast.Store())], value)


def _name(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _item(name: str) -> ast.Subscript:
    return ast.Subscript(_name(name), _name(CHOSEN), ast.Load())


def _expression(text: str) -> ast.expr:
    node = parse(text).body[0]
    assert isinstance(node, ast.Expr)
    return node.value


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]
