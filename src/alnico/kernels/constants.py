"""Defines sizes and dtype codes for kernels, facts and the engine. Importing it compiles nothing."""

TILE = 4096
"""Elements of one decoded input that a kernel holds at a time (16 KiB of float32)."""

WORD = 64
"""Elements whose answers to a question are the bits of one number."""

LEAF = 65_536
"""Elements in one partial sum. Part of the arithmetic: blocks are cut at multiples of it for any budget."""

LANES = 512
"""Accumulators of a leaf's sum; element i of a leaf goes to lane i modulo this."""

GRAM_LANES = 512
"""Accumulators of an inner product in a leaf; element i of the tensor goes to lane i modulo this."""

FEW_MODELS = 8
"""Up to this many models an equation has a kernel for their number, in which LLVM unrolls the loops over models; above it,
one kernel serves all numbers."""

UNROLLED_MODELS = 64
"""Up to this many models a GPU's kernel keeps each in registers of its own; above it, it loops over models."""

F64, F32, F16, BF16, E4M3, E5M2 = 0, 1, 2, 3, 4, 5
CODES = {"F64": F64, "F32": F32, "F16": F16, "BF16": BF16, "F8_E4M3": E4M3, "F8_E5M2": E5M2}
"""The number that stands for each dtype in a kernel."""

WIDE_F16, WIDE_BF16 = 6, 7
WIDE_CODES = {"F16": WIDE_F16, "BF16": WIDE_BF16}
"""The number for an output that is rounded to a dtype and written as float32, as modules hold it that are scored."""

ARITHMETIC = 3
"""Version of the arithmetic. Raised only when the bits of some merge change; recorded in every lock and journal."""
