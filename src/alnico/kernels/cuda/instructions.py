"""The instructions of a GPU that kernels are made of: loads, stores, atomic sums, products, bits

Importing this file imports numba-cuda. Each function is one instruction, or a few. Memory is an address in a kernel, not
an array: a launch passes one number per array instead of seven, and a table of addresses has any number of inputs.
``simulated.py`` has the same names for the simulator.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic

_OF_NAME = {
    "u8": types.uint8, "u16": types.uint16, "u32": types.uint32, "u64": types.uint64, "i64": types.int64,
    "f32": types.float32, "f64": types.float64, "float32": types.float32, "float64": types.float64,
    "uint32": types.uint32, "uint64": types.uint64,
}  # fmt: skip
_GLOBAL = 1
"""The address space of the GPU's memory."""


def _place(builder: Any, value_type: Any, address: Any, place: Any) -> Any:
    pointer = builder.inttoptr(address, ir.PointerType(value_type, _GLOBAL))
    return builder.gep(pointer, [place])


def _load(name: str, is_constant: bool = True) -> Any:
    kind = _OF_NAME[name]

    @intrinsic
    def load(_typing: Any, address: Any, place: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, place = _whole(context, builder, signature, arguments)
            value_type = context.get_value_type(kind)
            loaded = builder.load(
                _place(builder, value_type, address, place), align=_bytes(kind), typ=value_type
            )
            return _as_constant(builder, loaded) if is_constant else loaded

        return kind(address, place), generate

    return load


def _load4(name: str) -> Any:
    kind = _OF_NAME[name]

    @intrinsic
    def load4(_typing: Any, address: Any, place: Any) -> Any:
        four = types.UniTuple(kind, 4)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, place = _whole(context, builder, signature, arguments)
            vector = ir.VectorType(context.get_value_type(kind), 4)
            loaded = builder.load(
                _place(builder, vector, address, place), align=min(16, 4 * _bytes(kind)), typ=vector
            )
            loaded = _as_constant(builder, loaded)
            parts = [builder.extract_element(loaded, ir.Constant(ir.IntType(32), n)) for n in range(4)]
            return context.make_tuple(builder, four, parts)

        return four(address, place), generate

    return load4


def _store(name: str) -> Any:
    kind = _OF_NAME[name]

    @intrinsic
    def store(_typing: Any, address: Any, place: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, place = _whole(context, builder, signature, arguments)
            value = context.cast(builder, arguments[2], signature.args[2], kind)
            to = _place(builder, context.get_value_type(kind), address, place)
            builder.store(value, to, align=_bytes(kind))
            return context.get_dummy_value()

        return types.void(address, place, value), generate

    return store


def _store4(name: str) -> Any:
    kind = _OF_NAME[name]

    @intrinsic
    def store4(_typing: Any, address: Any, place: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, place = _whole(context, builder, signature, arguments)
            vector = ir.VectorType(context.get_value_type(kind), 4)
            values: Any = ir.Constant(vector, ir.Undefined)
            for n, (value, source) in enumerate(zip(arguments[2:], signature.args[2:], strict=True)):
                value = context.cast(builder, value, source, kind)
                values = builder.insert_element(values, value, ir.Constant(ir.IntType(32), n))
            builder.store(values, _place(builder, vector, address, place), align=min(16, 4 * _bytes(kind)))
            return context.get_dummy_value()

        return types.void(address, place, a, b, c, d), generate

    return store4


def _add(name: str) -> Any:
    kind = _OF_NAME[name]

    @intrinsic
    def add(_typing: Any, address: Any, place: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, place = _whole(context, builder, signature, arguments)
            value = context.cast(builder, arguments[2], signature.args[2], kind)
            to = _place(builder, context.get_value_type(kind), address, place)
            return builder.atomic_rmw("add", to, value, "monotonic")

        return kind(address, place, value), generate

    return add


def _bits(before: str, after: str) -> Any:
    source, target = _OF_NAME[before], _OF_NAME[after]

    @intrinsic
    def bits(_typing: Any, value: Any) -> Any:
        if value != source:
            return None

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(value), generate

    return bits


def _whole(context: Any, builder: Any, signature: Any, arguments: Any) -> list[Any]:
    """The address and the place among arguments, as 64 bits."""
    pairs = list(zip(arguments, signature.args, strict=True))[:2]
    return [context.cast(builder, value, source, types.int64) for value, source in pairs]


def _bytes(kind: Any) -> int:
    return int(kind.bitwidth) // 8


def _as_constant(builder: Any, loaded: Any) -> Any:
    """Say that no kernel writes there while this one runs: then loads may be made early."""
    loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
    return loaded


def _rounded(operation: Any, name: str) -> Any:
    """An operation on two numbers in the type that numba gives it, as an instruction that the compiler leaves alone.

    Of a product and a sum NVVM makes one instruction, which rounds once where the processor rounds twice; numba-cuda has
    no option against it. ``llvm.nvvm.div.rn.d`` by 2 becomes a product, which is joined, too.
    """

    @intrinsic
    def rounded(typing: Any, a: Any, b: Any) -> Any:
        usual = typing.resolve_function_type(operation, (a, b), {})
        kind = usual.return_type

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pairs = list(zip(arguments, signature.args, usual.args, strict=True))
            if not isinstance(kind, types.Float):  # of two whole numbers
                values = [context.cast(builder, value, source, target) for value, source, target in pairs]
                return context.get_function(operation, usual)(builder, values)
            values = [context.cast(builder, value, source, kind) for value, source, _ in pairs]
            value_type = context.get_value_type(kind)
            letter, bits = ("f", 32) if kind == types.float32 else ("d", 64)
            function = ir.FunctionType(value_type, [value_type, value_type])
            text = f"{name}.rn.f{bits} $0, $1, $2;"
            return builder.call(ir.InlineAsm(function, text, f"={letter},{letter},{letter}"), values)

        return kind(a, b), generate

    return rounded


product = _rounded(operator.mul, "mul")
"""``a * b``, rounded before anything is added to it."""

quotient = _rounded(operator.truediv, "div")
"""``a / b``, rounded before anything is added to it."""


@intrinsic
def select(_typing: Any, condition: Any, chosen: Any, other: Any) -> Any:
    """``chosen if condition else other``, in the wider of their types, both computed: no branch."""
    result = chosen
    if chosen != other:
        if not (isinstance(chosen, types.Float) and isinstance(other, types.Float)):
            return None
        result = chosen if chosen.bitwidth >= other.bitwidth else other

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        test, a, b = (
            context.cast(builder, value, source, target)
            for value, source, target in zip(
                arguments, signature.args, (types.boolean, result, result), strict=True
            )
        )
        return builder.select(test, a, b)

    return result(condition, chosen, other), generate


device = cuda.jit(device=True)


@device
def root(value):
    """The square root, rounded once."""
    return math.sqrt(value)


@device
def with_sign(value, sign):
    """``math.copysign``."""
    return math.copysign(value, sign)


address_at = _load("i64")


load_u8, load_u16, load_u32, load_u64 = (_load(name) for name in ("u8", "u16", "u32", "u64"))
load_i64, load_f32, load_f64 = (_load(name) for name in ("i64", "f32", "f64"))
reload_f64 = _load("f64", False)
load4_u8, load4_u16, load4_u32, load4_u64 = (_load4(name) for name in ("u8", "u16", "u32", "u64"))
store_u16, store_u32, store_u64 = (_store(name) for name in ("u16", "u32", "u64"))
store_i64, store_f32, store_f64 = (_store(name) for name in ("i64", "f32", "f64"))
store4_u16, store4_u32, store4_u64 = (_store4(name) for name in ("u16", "u32", "u64"))
add_u32, add_u64 = _add("u32"), _add("u64")
float_of, bits_of = _bits("uint32", "float32"), _bits("float32", "uint32")
double_of, long_of = _bits("uint64", "float64"), _bits("float64", "uint64")
