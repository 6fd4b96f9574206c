"""Sizes and codes that kernels, facts and the engine share; importing this compiles nothing."""

TILE = 4096
"""Elements of one decoded input that a kernel holds at a time (16 KiB of float32)."""

LEAF = 65_536
"""Elements summed as one. Part of the arithmetic: blocks are cut at multiples of it, whatever the budget."""

LANES = 512
"""Accumulators of a leaf's sum; element i of a leaf goes to lane i modulo this."""

GRAM_LANES = 512
"""Accumulators of an inner product in a leaf: element i of the tensor goes to lane i modulo this."""

UNROLLED_MODELS = 8
"""Up to here the loop over models is unrolled; above, a kernel that loops is used."""

F64, F32, F16, BF16 = 0, 1, 2, 3
CODES = {"F64": F64, "F32": F32, "F16": F16, "BF16": BF16}
"""What a kernel calls the dtypes."""

ARITHMETIC = 2
"""Raised only when the bits of some merge change; recorded in every lock and journal."""
