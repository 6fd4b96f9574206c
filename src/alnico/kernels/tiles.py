"""Compiled functions that every kernel uses: select, decode and encode a tile, fill a tile with noise.

A tile is :data:`TILE` elements in float32 (float64 when an input is F64) and stays in the first-level cache.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit  # type: ignore[attr-defined, unused-ignore]
from numba.core import cgutils, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.extending import intrinsic

from alnico.kernels.constants import BF16, E5M2, F16, F32, F64, WIDE_BF16, WIDE_F16, WORD
from alnico.numerics.noise import GAMMA, MIX_1, MIX_2

_GAMMA, _MIX_1, _MIX_2 = np.uint64(GAMMA), np.uint64(MIX_1), np.uint64(MIX_2)
_U1, _U27, _U30, _U32, _U40 = (np.uint64(n) for n in (1, 27, 30, 32, 40))


class _Unfinished(JITCodeLibrary):
    """Code that other functions include. It never runs by itself, so that no machine code is made of it."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, _name: str) -> int:
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> Any:
        return self

    def set_env(self, *_: Any) -> None:
        """Give Python's objects to machine code: there is none."""


class _KernelCompiler(Compiler):
    """Compiles a function up to the text of LLVM, from which ``build.py`` makes the code of a kernel."""

    def define_pipelines(self) -> Any:
        self.state.library = _Unfinished(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()


class _ApartCompiler(_KernelCompiler):
    """Declares that the arrays of a function do not overlap: else loops over many arrays are not vectorised."""

    def define_pipelines(self) -> Any:
        self.state.flags.noalias = True
        return super().define_pipelines()


def compiled(signature: Any = None, *, apart: bool = False, inline: str = "never") -> Any:
    """Mark a function of a kernel: one that only other such functions call, without Python and its lock."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "inline": inline}
    options |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # not among those that numba declares
    return njit(signature, pipeline_class=_ApartCompiler if apart else _KernelCompiler, **options)


@intrinsic
def select(_typing: Any, condition: Any, chosen: Any, other: Any) -> Any:
    """``chosen if condition else other``, both computed: one instruction, no branch."""
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


@intrinsic
def bits_of(_typing: Any, number: Any) -> Any:
    """The bits of a float32 as uint32."""
    if number != types.float32:
        return None

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(number), generate


@intrinsic
def double_of(_typing: Any, bits: Any) -> Any:
    """The float64 whose bits an int64 holds."""
    if bits != types.int64:
        return None

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float64))

    return types.float64(bits), generate


@intrinsic
def pointer(_typing: Any, address: Any) -> Any:
    """An address as a pointer, to read memory that a caller owns."""
    if not isinstance(address, types.Integer):
        return None

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def _place(context: Any, builder: Any, array: Any, arguments: Any, vector: Any) -> Any:
    """Where a vector lies in an array; ``arguments`` are the array and the first element."""
    data = context.make_array(array)(context, builder, arguments[0]).data
    return builder.bitcast(builder.gep(data, [arguments[1]]), vector.as_pointer())


def _mask(predicate: str, name: str) -> Any:
    """An intrinsic ``(values, first, bound) -> uint64``: bit i says whether ``values[first + i]`` compares so with a bound. A NaN
    never does."""

    def mask(_typing: Any, values: Any, _first: Any, bound: Any) -> Any:
        if not isinstance(values, types.Array) or values.dtype != bound:
            return None

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            real = context.get_value_type(bound)
            vector = ir.VectorType(real, WORD)
            place = _place(context, builder, values, arguments, vector)
            loaded = builder.load(place, align=real.get_abi_alignment(context.target_data))
            one = builder.insert_element(
                ir.Constant(vector, ir.Undefined), arguments[2], ir.Constant(ir.IntType(32), 0)
            )
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), WORD), [0] * WORD)
            every = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)
            return builder.bitcast(builder.fcmp_ordered(predicate, loaded, every), ir.IntType(WORD))

        return types.uint64(values, types.intp, bound), generate

    mask.__name__ = name
    return intrinsic(mask)


mask_above = _mask(">", "mask_above")
mask_reached = _mask(">=", "mask_reached")


@intrinsic
def add_product(_typing: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """``a * b + c`` in float64, in one instruction where the processor has one. For exact products: others would be rounded
    there, or not."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        double = ir.DoubleType()
        function = ir.FunctionType(double, [double] * 3)
        return builder.call(builder.module.declare_intrinsic("llvm.fmuladd", (double,), function), arguments)

    return types.float64(types.float64, types.float64, types.float64), generate


@intrinsic
def bits_of_flags(_typing: Any, flags: Any, _first: Any) -> Any:
    """Bit i of the uint64 says whether ``flags[first + i]``, a uint8, is not 0."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), WORD)
        loaded = builder.load(_place(context, builder, flags, arguments, vector), align=1)
        is_set = builder.icmp_unsigned("!=", loaded, ir.Constant(vector, [0] * WORD))
        return builder.bitcast(is_set, ir.IntType(WORD))

    return types.uint64(flags, types.intp), generate


@intrinsic
def flags_of_bits(_typing: Any, _word: Any, flags: Any, _first: Any) -> Any:
    """Store bit i of a uint64 as ``flags[first + i]``, a uint8 of 1 or 0."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), WORD)
        bits = builder.bitcast(arguments[0], ir.VectorType(ir.IntType(1), WORD))
        builder.store(
            builder.zext(bits, vector), _place(context, builder, flags, arguments[1:], vector), align=1
        )
        return context.get_dummy_value()

    return types.void(types.uint64, flags, types.intp), generate


@intrinsic
def count_bits(_typing: Any, _word: Any) -> Any:
    """The number of bits of a uint64 that are set."""
    return types.int64(types.uint64), lambda _context, builder, _signature, arguments: builder.ctpop(
        arguments[0]
    )


@intrinsic
def lowest_bit(_typing: Any, _word: Any) -> Any:
    """The place of the lowest bit of a uint64 that is set; 64 if none is."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@compiled()
def keep_between(measured, count, low, high, gathered, place, counts):
    """Count the values above ``high`` and those in [``low``, ``high``] among the first ``count``, and put the latter into
    ``gathered`` from ``place`` on, while there is room for :data:`WORD`, unless both bounds are the same. Returns the next place.

    ``measured`` has room for a word more; what follows the first ``count`` is overwritten.
    """
    for j in range(count, -(-count // WORD) * WORD):
        measured[j] = np.nan
    above = inside = 0
    gathers = low != high
    for w in range(0, count, WORD):
        over = mask_above(measured, w, high)
        left = mask_reached(measured, w, low) & ~over
        found = count_bits(left)
        above += count_bits(over)
        inside += found
        if gathers and place + WORD <= gathered.size:
            # Most words have a few: four are stored without a branch that depends on how many, which would be mispredicted.
            of_word, kept = measured[w : w + WORD + 1], gathered[place : place + WORD]
            t = np.uint64(0)
            while True:
                for u in range(4):
                    kept[t + np.uint64(u)] = of_word[lowest_bit(left)]
                    left &= left - _U1
                t += np.uint64(4)
                if t >= np.uint64(found):
                    break
            place += found
    counts[0] += above
    counts[1] += inside
    return place


@intrinsic
def address_of(_typing: Any, array: Any) -> Any:
    """The address of a contiguous array."""
    if not isinstance(array, types.Array):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.ptrtoint(data, context.get_value_type(types.int64))

    return types.int64(array), generate


@intrinsic
def store_past_cache(_typing: Any, source: Any, target: Any, _first: Any) -> Any:
    """Copy the 16 numbers of 32 bits at a place of two contiguous arrays, the target's at a multiple of 64 bytes.

    What is written is not read into the cache first. Other threads see it after the lock that ends the work of this one.
    """
    if not (isinstance(source, types.Array) and isinstance(target, types.Array)):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.IntType(32), 16)
        source_at, target_at = (
            _place(context, builder, kind, (array, arguments[2]), vector)
            for kind, array in zip(signature.args[:2], arguments[:2], strict=True)
        )
        store = builder.store(builder.load(source_at, align=4), target_at, align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(source, target, types.int64), generate


@compiled()
def part(raws, i, width, s, e):
    """The raw bytes of elements ``s`` to ``e`` of an input, out of a table of addresses."""
    return carray(pointer(raws[i, 0] + width * s), (width * (e - s),), np.uint8)


# The largest magnitude, as bits, shows whether a tile holds a NaN or an infinity: a reduction by max at the width of the
# source takes a fifth of the time of comparing exponents (0.02 against 0.11 ns per element). Each sum and shift is cut back
# to 32 bits: numba widens them to 64, and vectors then hold half as many elements.


@compiled()
def _largest8(raw):
    largest = np.uint8(0)
    for j in range(raw.size):
        largest = max(largest, np.uint8(raw[j] & np.uint8(0x7F)))
    return largest


@compiled()
def _largest16(raw):
    source = raw.view(np.uint16)
    largest = np.uint16(0)
    for j in range(source.size):
        largest = max(largest, np.uint16(source[j] & np.uint16(0x7FFF)))
    return largest


@compiled()
def _largest32(bits):
    largest = np.uint32(0)
    for j in range(bits.size):
        largest = max(largest, np.uint32(bits[j] & np.uint32(0x7FFFFFFF)))
    return largest


@compiled()
def _largest64(bits):
    largest = np.uint64(0)
    for j in range(bits.size):
        largest = max(largest, bits[j] & np.uint64((1 << 63) - 1))
    return largest


@compiled()
def _decode_bf16(raw, tile):
    # In one loop: a second one over the bytes costs more than the wider maximum, most of all in short tiles.
    source, bits = raw.view(np.uint16), tile.view(np.uint32)
    largest = np.uint32(0)
    for j in range(source.size):
        word = np.uint32(np.uint32(source[j]) << np.uint32(16))
        bits[j] = word
        largest = max(largest, np.uint32(word & np.uint32(0x7FFFFFFF)))
    return largest >= 0x7F800000


@compiled()
def _decode_f16(raw, tile):
    # Multiplying by 2**112 moves the exponent. It is exact, and right for subnormals too.
    source, bits = raw.view(np.uint16), tile.view(np.uint32)
    for j in range(source.size):
        bits[j] = np.uint32(np.uint32(source[j]) & np.uint32(0x7FFF)) << np.uint32(13)
    for j in range(source.size):
        tile[j] *= np.float32(2.0**112)
    for j in range(source.size):
        bits[j] = np.uint32(
            bits[j] | np.uint32(np.uint32(np.uint32(source[j]) & np.uint32(0x8000)) << np.uint32(16))
        )
    bad = _largest16(raw) >= 0x7C00
    if bad:  # the multiplication turned NaN and infinities into large numbers; facts measured of them would be finite
        for j in range(source.size):
            if np.uint16(source[j] & np.uint16(0x7FFF)) >= 0x7C00:
                bits[j] = np.uint32(bits[j] | np.uint32(0x7F800000))
    return bad


@compiled()
def _decode_f8(raw, shift, scale, limit, tile):
    # As for halves; ``scale`` is 2 to the difference of the exponents' biases. Magnitudes from ``limit`` on are not numbers.
    bits = tile.view(np.uint32)
    for j in range(raw.size):
        bits[j] = np.uint32(np.uint32(raw[j]) & np.uint32(0x7F)) << shift
    for j in range(raw.size):
        tile[j] *= scale
    for j in range(raw.size):
        bits[j] = np.uint32(
            bits[j] | np.uint32(np.uint32(np.uint32(raw[j]) & np.uint32(0x80)) << np.uint32(24))
        )
    bad = _largest8(raw) >= limit
    if bad:
        for j in range(raw.size):
            if np.uint8(raw[j] & np.uint8(0x7F)) >= limit:
                bits[j] = np.uint32(bits[j] | np.uint32(0x7F800000))
    return bad


@compiled()
def _decode_f32(raw, tile):
    source, bits = raw.view(np.uint32), tile.view(np.uint32)
    for j in range(source.size):
        bits[j] = source[j]
    return _largest32(bits) >= 0x7F800000


@compiled()
def has_bad32(tile):
    """Whether a float32 is NaN or infinite."""
    return _largest32(tile.view(np.uint32)) >= 0x7F800000


@compiled()
def has_bad64(tile):
    """Whether a float64 is NaN or infinite."""
    return _largest64(tile.view(np.uint64)) >= np.uint64(0x7FF << 52)


@compiled()
def width_of(code):
    """Bytes per element of a dtype."""
    if code == F64:
        return 8
    return 4 if code == F32 or code >= WIDE_F16 else (2 if code <= BF16 else 1)


@compiled()
def decode32(raw, code, tile):
    """Fill a float32 tile from raw bytes. Returns whether a value is NaN or infinite."""
    if code == BF16:
        return _decode_bf16(raw, tile)
    if code == F32:
        return _decode_f32(raw, tile)
    if code == F16:
        return _decode_f16(raw, tile)
    if code == E5M2:
        return _decode_f8(raw, np.uint32(21), np.float32(2.0**112), np.uint8(0x7C), tile)
    return _decode_f8(
        raw, np.uint32(20), np.float32(2.0**120), np.uint8(0x7F), tile
    )  # E4M3 has no infinities


@compiled()
def decode64(raw, code, tile):
    """Fill a float64 tile from raw bytes. Returns whether a value is NaN or infinite."""
    if code == F64:
        source, bits = raw.view(np.uint64), tile.view(np.uint64)
        for j in range(source.size):
            bits[j] = source[j]
        return _largest64(bits) >= np.uint64(0x7FF << 52)
    narrow = tile.view(np.float32)[
        tile.size :
    ]  # the upper half: each of its floats is read before it is overwritten
    bad = decode32(raw, code, narrow)
    for j in range(tile.size):
        tile[j] = narrow[j]
    return bad


@compiled()
def _stream(bits, out):
    # Modules are larger than the cache: without reading their memory before it is written, a third less passes the bus.
    whole = 0
    if address_of(out) % 64 == 0:
        whole = bits.size - bits.size % 16
        for j in range(0, whole, 16):
            store_past_cache(bits, out, j)
    for j in range(whole, bits.size):
        out[j] = bits[j]


@compiled()
def encode32(tile, code, raw):
    """Round a float32 tile once, to nearest even, into raw bytes. Returns whether a result is NaN or infinite."""
    bits = tile.view(np.uint32)
    largest = _largest32(bits)
    if code == BF16:
        short = raw.view(np.uint16)
        for j in range(bits.size):
            b = bits[j]
            odd = np.uint32(np.uint32(b >> np.uint32(16)) & np.uint32(1))
            short[j] = np.uint16(np.uint32(np.uint32(b + np.uint32(0x7FFF)) + odd) >> np.uint32(16))
        return largest >= 0x7F7F8000  # rounds to an infinity
    if code == WIDE_BF16:
        for j in range(bits.size):  # in the tile, which nobody reads again
            b = bits[j]
            odd = np.uint32(np.uint32(b >> np.uint32(16)) & np.uint32(1))
            bits[j] = np.uint32(np.uint32(np.uint32(b + np.uint32(0x7FFF)) + odd) & np.uint32(0xFFFF0000))
        _stream(bits, raw.view(np.uint32))
        return largest >= 0x7F7F8000
    if code == F16:
        _encode_f16(tile, raw)
        return largest >= 0x477FF000
    if code == WIDE_F16:
        _encode_f16(tile, raw[: 2 * tile.size])
        _decode_f16(raw[: 2 * tile.size], tile)
        _stream(bits, raw.view(np.uint32))
        return largest >= 0x477FF000
    if code == F32:
        whole = raw.view(np.uint32)
        for j in range(bits.size):
            whole[j] = bits[j]
    else:
        double = raw.view(np.float64)
        for j in range(bits.size):
            double[j] = tile[j]
    return largest >= 0x7F800000


@compiled()
def _encode_f16(tile, raw):
    # Below 2**-14 halves are multiples of 2**-24: adding 0.5, whose float32 spacing is 2**-24, rounds to them.
    bits, short = tile.view(np.uint32), raw.view(np.uint16)
    for j in range(bits.size):
        small = np.uint32(bits_of(abs(tile[j]) + np.float32(0.5)) - np.uint32(126 << 23))
        magnitude = np.uint32(bits[j] & np.uint32(0x7FFFFFFF))
        odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
        normal = np.uint32(
            np.uint32(np.uint32(magnitude - np.uint32(112 << 23)) + np.uint32(0xFFF)) + odd
        ) >> np.uint32(13)
        half = select(magnitude < np.uint32(113 << 23), small, np.uint32(normal))
        half = select(magnitude >= np.uint32(0x477FF000), np.uint32(0x7C00), half)
        sign = np.uint32(np.uint32(bits[j] >> np.uint32(16)) & np.uint32(0x8000))
        short[j] = np.uint16(np.uint32(half | sign))


@compiled()
def encode64(tile, code, raw):
    """Round a float64 tile once into raw bytes. Overwrites the tile. Returns whether a result is NaN or infinite."""
    if code == F64:
        bits, whole = tile.view(np.uint64), raw.view(np.uint64)
        for j in range(bits.size):
            whole[j] = bits[j]
        return _largest64(bits) >= np.uint64(0x7FF << 52)
    # Written to the lower half of the tile, whose values have been read by then.
    narrow, bits32 = tile.view(np.float32)[: tile.size], tile.view(np.uint32)[: tile.size]
    for j in range(tile.size):
        exact = tile[j]
        narrow[j] = np.float32(exact)
        # Round to odd first: then rounding the float32 to 16 bits equals one rounding of the float64.
        wide = np.float64(narrow[j])
        if code != F32 and wide != exact and not np.isinf(wide):  # an infinity is refused anyway
            if abs(wide) > abs(exact):
                bits32[j] -= np.uint32(1)
            bits32[j] |= np.uint32(1)
    return encode32(narrow, code, raw)


@compiled()
def _upper_bits(z):
    """The upper 24 bits of what SplitMix64 makes of ``z``; its last step does not change them."""
    z = (z ^ (z >> _U30)) * _MIX_1
    return ((z ^ (z >> _U27)) * _MIX_2) >> _U40


@compiled()
def fill_noise(key, start, tile):
    """Fill a tile with uniform numbers in [0, 1), for the elements from ``start`` on (see numerics.noise)."""
    z = key + (np.uint64(start) + _U1) * _GAMMA
    for j in range(tile.size):
        tile[j] = np.float32(np.int64(_upper_bits(z))) * np.float32(2.0**-24)
        z += _GAMMA


@compiled()
def draw(key, start, chance, words, are_known, tile):
    """Fill a tile of uint8 with 1 where an element is drawn with a probability, else 0, for the elements from ``start`` on.

    ``words`` have a bit for each element of the tensor, or of its first leaves: they are read if they ``are_known``, else
    written.
    """
    kept = words[start // WORD : -(-(start + tile.size) // WORD)]
    is_kept = WORD * kept.size >= tile.size
    if is_kept and are_known:
        return _read_bits(kept, tile)
    # The upper 24 bits of a uniform number are a multiple of 2**-24, which is less than the chance as a float if it is as an
    # integer.
    most = np.uint64(math.ceil(np.float64(chance) * 2.0**24))
    z = key + (np.uint64(start) + _U1) * _GAMMA
    for j in range(tile.size):
        tile[j] = np.uint8(_upper_bits(z) < most)
        z += _GAMMA
    if is_kept:
        _write_bits(tile, kept)


@compiled()
def draw_ranked(key, start, low, step, ranks, words, are_known, tile):
    """Draw as :func:`draw` does, with probability ``low + step * rank``."""
    kept = words[start // WORD : -(-(start + tile.size) // WORD)]
    is_kept = WORD * kept.size >= tile.size
    if is_kept and are_known:
        return _read_bits(kept, tile)
    z = key + (np.uint64(start) + _U1) * _GAMMA
    for j in range(tile.size):
        uniform = np.float32(np.int64(_upper_bits(z))) * np.float32(2.0**-24)
        tile[j] = np.uint8(uniform < low + step * ranks[j])
        z += _GAMMA
    if is_kept:
        _write_bits(tile, kept)


@compiled()
def _write_bits(tile, words):
    whole = tile.size // WORD
    for w in range(whole):
        words[w] = bits_of_flags(tile, WORD * w)
    if whole < words.size:
        rest = np.uint64(0)
        for j in range(tile.size - WORD * whole):
            rest |= np.uint64(tile[WORD * whole + j]) << np.uint64(j)
        words[whole] = rest


@compiled()
def _read_bits(words, tile):
    whole = tile.size // WORD
    for w in range(whole):
        flags_of_bits(words[w], tile, WORD * w)
    for j in range(WORD * whole, tile.size):
        tile[j] = np.uint8((words[whole] >> np.uint64(j - WORD * whole)) & _U1)


@compiled()
def fill_rows(numbers, start, inner, tile):
    """Fill a tile with the number of each element's row; rows have ``inner`` elements."""
    row, left, j = start // inner, inner - start % inner, 0
    while j < tile.size:
        stop, number = min(j + left, tile.size), numbers[row]
        for i in range(j, stop):
            tile[i] = number
        row, left, j = row + 1, inner, stop


@compiled()
def fill_columns(numbers, start, inner, tile):
    """Fill a tile with the number of each element's column; there are ``inner`` columns."""
    column, j = start % inner, 0
    while j < tile.size:
        stop = min(j + inner - column, tile.size)
        part, source = tile[j:stop], numbers[column : column + stop - j]
        for i in range(part.size):
            part[i] = source[i]
        column, j = 0, stop


@compiled()
def subtract(tile, base):
    """Subtract the base in place: values become task-vector entries."""
    for j in range(tile.size):
        tile[j] -= base[j]


@compiled()
def add(tile, base):
    """Add the base in place: differences become values."""
    for j in range(tile.size):
        tile[j] += base[j]


@compiled()
def rank_rows(keys, shares, ranks):
    """Fill ``ranks`` (rows, n) with the rank of each element in its row over n - 1: 0 the smallest, 1 the largest.

    ``keys`` are the sorted rows: a number that orders as the element does, and in the lower 32 bits the column it came from.
    Equal numbers share their mean rank, and ``shares[i]`` is i / 2 / (n - 1).
    """
    rows, size = keys.shape
    for row in range(rows):
        own, ranked = keys[row], ranks[row]
        first = 0
        while first < size:
            number = own[first] >> _U32
            stop = first + 1
            while stop < size and own[stop] >> _U32 == number:
                stop += 1
            rank = shares[first + stop - 1]
            for j in range(first, stop):
                ranked[np.int64(own[j] & np.uint64(0xFFFFFFFF))] = rank
            first = stop
