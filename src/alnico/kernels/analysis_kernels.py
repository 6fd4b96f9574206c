"""Writes the two analysis kernels: sums and coarse histograms, then fine ones and overlaps.

One kernel serves any number of models: their loops are not written out, as in a merge, since they contain
whole loops over tiles.

An entry of a task vector is read as a float32 (a float64 is rounded, but never to 0). Its *key* is a uint32
in the same order: the bits with the sign bit flipped; for negative entries all bits flipped. A histogram over
the upper 16 bits of the keys, then one over the lower 16 bits of those that share them, finds any order
statistic exactly in two passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from alnico.kernels.constants import LANES, LEAF, TILE
from alnico.kernels.measure_kernels import FOLD, PLAIN
from alnico.kernels.template import PREAMBLE, Interface, Real

MOMENTS = 6
"""Sums of a model in a leaf: of y, y^2, y^3, y^4 with y = d less the leaf's first entry; of |d| and d^2."""

TABLES = 2
"""Histograms that entries alternate between: raising one counter twice in a row waits for memory."""

_SHARED = [
    # uint32 throughout: numba widens sums and shifts to 64 bits, and vectors then hold half as many elements.
    "def narrow_to_float32(values, narrow):\n    bits = narrow.view(np.uint32)\n    for j in range(values.size):\n"
    "        value = np.float32(values[j])\n        least = math.copysign(np.float32(1e-45), value)\n"
    "        narrow[j] = select((values[j] != ZERO) & (value == np.float32(0.0)), np.float32(least), value)\n"
    "    for j in range(bits.size):\n        zero = (bits[j] & np.uint32(0x7FFFFFFF)) == np.uint32(0)\n"
    "        bits[j] = np.uint32(0) if zero else bits[j]",
    "def fill_keys(bits, keys):\n    for j in range(bits.size):\n"
    "        sign = np.uint32(-np.int32(bits[j] >> np.uint32(31)))\n"
    "        keys[j] = np.uint32(bits[j] ^ np.uint32(sign | np.uint32(0x80000000)))",
]

_STATISTICS = [
    "def count_zeros(bits):\n    n = np.uint32(0)\n    for j in range(bits.size):\n        n += np.uint32(bits[j] == np.uint32(0))\n"
    "    return np.int64(n)",
    "def widen_ends(keys, ends):\n    low = np.uint32(0xFFFFFFFF)\n    high = np.uint32(0)\n    for j in range(keys.size):\n"
    "        low = min(low, keys[j])\n        high = max(high, keys[j])\n    ends[0] = min(ends[0], low)\n    ends[1] = max(ends[1], high)",
    "def histogram(keys, first, second):\n    half = keys.size // 2\n    for j in range(half):\n"
    "        first[keys[2 * j] >> np.uint32(16)] += np.uint32(1)\n        second[keys[2 * j + 1] >> np.uint32(16)] += np.uint32(1)\n"
    "    if keys.size % 2:\n        first[keys[keys.size - 1] >> np.uint32(16)] += np.uint32(1)",
    "def add_moments(v, shift, y1, y2, y3, y4, size, square):\n    for j in range(v.size):\n        d = np.float64(v[j])\n        y = d - shift\n"
    "        q = y * y\n        y1[j] += y\n        y2[j] += q\n        y3[j] += q * y\n        y4[j] += q * q\n"
    "        size[j] += abs(d)\n        square[j] += d * d",
    "def add_base(v, size, square):\n    for j in range(v.size):\n        d = np.float64(v[j])\n        size[j] += abs(d)\n        square[j] += d * d",
    "def add_products(a, b, product, size):\n    for j in range(a.size):\n        p = np.float64(a[j]) * np.float64(b[j])\n"
    "        product[j] += p\n        size[j] += abs(p)",
    "def count_opposite(a, b, counts):\n    both = np.uint32(0)\n    apart = np.uint32(0)\n    for j in range(a.size):\n"
    "        changed = np.uint32((a[j] != np.uint32(0)) & (b[j] != np.uint32(0)))\n        both += changed\n"
    "        apart += np.uint32(changed & np.uint32(np.uint32(a[j] ^ b[j]) >> np.uint32(31)))\n"
    "    counts[0] += np.int64(both)\n    counts[1] += np.int64(apart)",
    "def add_model(v, bits, total, holders, signs):\n    for j in range(v.size):\n        total[j] += np.float64(v[j])\n"
    "    for j in range(v.size):\n        changed = np.uint32(bits[j] != np.uint32(0))\n        holders[j] += changed\n"
    "        signs[j] |= np.uint32(changed << np.uint32(bits[j] >> np.uint32(31)))",
    "def count_conflicts(holders, signs, counts):\n    several = np.uint32(0)\n    mixed = np.uint32(0)\n    for j in range(holders.size):\n"
    "        several += np.uint32(holders[j] > np.uint32(1))\n        mixed += np.uint32(signs[j] == np.uint32(3))\n"
    "    counts[0] += np.int64(several)\n    counts[1] += np.int64(mixed)",
    "def add_magnitudes(total, lanes):\n    for j in range(total.size):\n        lanes[j] += abs(total[j])",
    FOLD,
]

_ORDERS = [
    "def count_in_slots(keys, slots, fine):\n    for j in range(keys.size):\n        slot = slots[keys[j] >> np.uint32(16)]\n"
    "        if slot > 0:\n            fine[slot - 1, keys[j] & np.uint32(0xFFFF)] += np.uint32(1)",
    "def flag_largest(bits, least, flags):\n    n = np.uint32(0)\n    for j in range(bits.size):\n"
    "        flag = np.uint32(np.uint32(bits[j] & np.uint32(0x7FFFFFFF)) >= least)\n        flags[j] = flag\n        n += flag\n"
    "    return np.int64(n)",
    "def count_overlap(a, b, signs_a, signs_b, counts):\n    both = np.uint32(0)\n    apart = np.uint32(0)\n    for j in range(a.size):\n"
    "        shared = np.uint32(a[j] & b[j])\n        both += shared\n"
    "        apart += np.uint32(shared & np.uint32(np.uint32(signs_a[j] ^ signs_b[j]) >> np.uint32(31)))\n"
    "    counts[0] += np.int64(both)\n    counts[1] += np.int64(apart)",
]


COMMON = (
    ("addresses", "int64*1"),
    ("count", "int"),
    ("codes", "int64*1"),
    ("base", "uint8*1"),
    ("base_code", "int"),
)
"""The first parameters of both kernels: the address of each model's raw bytes, and the number of elements."""


@dataclass(frozen=True)
class DescribingKernel:
    """Sums and counts of the task vectors of k models over a block that begins at a leaf.

    ``run(addresses, count, codes, base, base_code, moments, of_base, of_pairs, of_sum, unchanged, pairs,
    together, ends, tables, values, narrow, lanes)`` fills for each leaf ``moments`` (leaves, k x
    (:data:`MOMENTS` + 1), the shift last), ``of_base`` (leaves, 2: |b|, b^2), ``of_pairs`` (leaves, 2 x
    pairs: d1 d2 and |d1 d2|) and ``of_sum`` (leaves, 1: |d1 + d2 + ...|), all float64; and adds to
    ``unchanged`` (k), ``pairs`` (pairs, 2: entries that both changed, and with opposite signs), ``together``
    (2: entries that two or more changed, and with both signs), ``ends`` (k, 2: least and largest key) and
    ``tables`` (k x :data:`TABLES`, 65,536). It works in ``values`` and ``narrow`` (k, TILE) and ``lanes``
    (:func:`lanes_of`, LANES). Returns 1 if an input is NaN or infinite, 2 if a difference is too large for
    float32, else 0. Pairs are (0, 1), (0, 2), ... (1, 2), ...
    """

    real: Real

    def text(self) -> str:
        m = MOMENTS
        several = [
            "            total[:] = 0.0",
            "            holders[:] = np.uint32(0)",
            "            signs[:] = np.uint32(0)",
            "            for i in range(k):",
            "                add_model(values[i, :n], bits[i, :n], total[:n], holders[:n], signs[:n])",
            "            count_conflicts(holders[:n], signs[:n], together)",
            f"            for g in range(0, n, {LANES}):",
            f"                add_magnitudes(total[g:min(g + {LANES}, n)], lanes[after + 2, :min({LANES}, n - g)])",
        ]
        of_pairs = [
            "            p = 0",
            "            for i in range(k):",
            "                for j in range(i + 1, k):",
            "                    count_opposite(bits[i, :n], bits[j, :n], pairs[p])",
            "                    q = after + 3 + 2 * p",
            f"                    for g in range(0, n, {LANES}):",
            f"                        h = min(g + {LANES}, n)",
            "                        add_products(values[i, g:h], values[j, g:h], lanes[q, :h - g], lanes[q + 1, :h - g])",
            "                    p += 1",
        ]
        lines = [
            f"def run({self.interface().signature()}):",
            "    base_width = width_of(base_code)",
            "    k = codes.size",
            f"    after = k * {m}",
            "    bits = narrow.view(np.uint32)",
            "    bad = 0",
            "    large = np.uint32(0)",
            "    for leaf in range(of_base_.shape[0]):",
            "        lanes[:] = 0.0",
            f"        for s in range(leaf * {LEAF}, min((leaf + 1) * {LEAF}, count), {TILE}):",
            f"            e = min(s + {TILE}, min((leaf + 1) * {LEAF}, count))",
            "            n = e - s",
            "            if decode(base[base_width * s:base_width * e], base_code, base_tile[:n]):",
            "                bad = 1",
            f"            for g in range(0, n, {LANES}):",
            f"                h = min(g + {LANES}, n)",
            "                add_base(base_tile[g:h], lanes[after, :h - g], lanes[after + 1, :h - g])",
            "            for i in range(k):",
            "                w = width_of(codes[i])",
            "                if decode(carray(pointer(addresses[i] + w * s), (w * n,), np.uint8), codes[i], values[i, :n]):",
            "                    bad = 1",
            "                subtract(values[i, :n], base_tile[:n])",
            "                narrow_to_float32(values[i, :n], narrow[i, :n])",
            "                fill_keys(bits[i, :n], keys[:n])",
            "                widen_ends(keys[:n], ends[i])",
            "                unchanged[i] += count_zeros(bits[i, :n])",
            f"                histogram(keys[:n], tables[{TABLES} * i], tables[{TABLES} * i + 1])",
            f"                if s == leaf * {LEAF}:",
            f"                    moments_[leaf, i * {m + 1} + {m}] = np.float64(values[i, 0])",
            f"                shift = moments_[leaf, i * {m + 1} + {m}]",
            f"                for g in range(0, n, {LANES}):",
            f"                    h = min(g + {LANES}, n)",
            f"                    add_moments(values[i, g:h], shift, {', '.join(f'lanes[i * {m} + {q}, :h - g]' for q in range(m))})",
            "            if k > 1:",
            *[f"    {line}" for line in several + of_pairs],
            "        for i in range(k):",
            f"            for q in range({m}):",
            f"                moments_[leaf, i * {m + 1} + q] = fold(lanes[i * {m} + q])",
            "        for q in range(2):",
            "            of_base_[leaf, q] = fold(lanes[after + q])",
            "        of_sum[leaf, 0] = fold(lanes[after + 2])",
            "        for q in range(k * (k - 1)):",
            "            of_pairs[leaf, q] = fold(lanes[after + 3 + q])",
            "    for i in range(k):",
            "        if ends[i, 1] >= np.uint32(0xFF800000) or ends[i, 0] <= np.uint32(0x007FFFFF):",
            "            large = np.uint32(1)",
            "    return np.int64(1) if bad else (np.int64(2) if large else np.int64(0))",
        ]
        return _text([*_SHARED, *_STATISTICS], self.interface(), lines)

    def interface(self) -> Interface:
        outputs = (
            ("moments_", "float64*2"),
            ("of_base_", "float64*2"),
            ("of_pairs", "float64*2"),
            ("of_sum", "float64*2"),
            ("unchanged", "int64*1"),
            ("pairs", "int64*2"),
            ("together", "int64*1"),
            ("ends", "uint32*2"),
            ("tables", "uint32*2"),
            ("values", f"{self.real}*2"),
            ("narrow", "float32*2"),
            ("lanes", "float64*2"),
        )
        scratch = (
            *_scratch(),
            ("total", (TILE,), "float64"),
            ("holders", (TILE,), "uint32"),
            ("signs", (TILE,), "uint32"),
        )
        return Interface(1, self.real, (*COMMON, *outputs), scratch, returns=True)


@dataclass(frozen=True)
class OrderKernel:
    """The second pass over the task vectors of k models: fine histograms, overlaps of large entries.

    ``run(addresses, count, codes, base, base_code, slots, fine, least, tops, pairs, values, narrow, flags)``:
    an entry of model i whose key has the upper half u is counted in ``fine[i x slots + slots[i, u] - 1]`` by
    the lower half, unless ``slots[i, u]`` is 0 (``slots`` (k, 65,536) uint8, ``fine`` (k x slots, 65,536)
    uint32). ``least`` (k) are bits of magnitudes: ``tops`` (k) gets the number of entries that reach them,
    ``pairs`` (pairs, 2) that of those that do in both models, and of these with opposite signs.
    """

    real: Real

    def text(self) -> str:
        lines = [
            f"def run({self.interface().signature()}):",
            "    base_width = width_of(base_code)",
            "    k = codes.size",
            "    bits = narrow.view(np.uint32)",
            "    each = fine.shape[0] // k",
            f"    for s in range(0, count, {TILE}):",
            f"        e = min(s + {TILE}, count)",
            "        n = e - s",
            "        decode(base[base_width * s:base_width * e], base_code, base_tile[:n])",
            "        for i in range(k):",
            "            w = width_of(codes[i])",
            "            decode(carray(pointer(addresses[i] + w * s), (w * n,), np.uint8), codes[i], values[i, :n])",
            "            subtract(values[i, :n], base_tile[:n])",
            "            narrow_to_float32(values[i, :n], narrow[i, :n])",
            "            if each > 0:",
            "                fill_keys(bits[i, :n], keys[:n])",
            "                count_in_slots(keys[:n], slots[i], fine[i * each:(i + 1) * each])",
            "            tops[i] += flag_largest(bits[i, :n], least[i], flags[i, :n])",
            "        p = 0",
            "        for i in range(k):",
            "            for j in range(i + 1, k):",
            "                count_overlap(flags[i, :n], flags[j, :n], bits[i, :n], bits[j, :n], pairs[p])",
            "                p += 1",
            "    return np.int64(0)",
        ]
        return _text([*_SHARED, *_ORDERS], self.interface(), lines)

    def interface(self) -> Interface:
        outputs = (
            ("slots", "uint8*2"),
            ("fine", "uint32*2"),
            ("least", "uint32*1"),
            ("tops", "int64*1"),
            ("pairs", "int64*2"),
        )
        work = (("values", f"{self.real}*2"), ("narrow", "float32*2"), ("flags", "uint32*2"))
        return Interface(1, self.real, (*COMMON, *outputs, *work), _scratch(), returns=True)


def lanes_of(models: int) -> int:
    """The number of sums that :class:`DescribingKernel` keeps in lanes."""
    return models * MOMENTS + 3 + models * (models - 1)


def _scratch() -> tuple[tuple[str, tuple[int, ...], str], ...]:
    return ("base_tile", (TILE,), "REAL"), ("keys", (TILE,), "uint32")


def _text(definitions: list[str], interface: Interface, lines: list[str]) -> str:
    text = PREAMBLE.format(bits=interface.real[-2:]) + "".join(
        f"\n\n{PLAIN}\n{definition}\n" for definition in definitions
    )
    return f"{text}\n\n{PLAIN}\n" + "\n".join(lines) + "\n\n\n" + interface.entry()
