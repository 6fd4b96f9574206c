"""Lists the types of tensors in GGUF files: how many elements a block has, how many bytes, and what decodes it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from alnico.kernels.choice import kernel_for

Decode = Callable[[np.ndarray, np.ndarray], None]
"""Fills float32 (blocks, elements) from the bytes of blocks, uint8 (blocks, bytes)."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """One type. A block has ``elements`` numbers in ``byte_size`` bytes; no block crosses a row.

    ``dtype`` is alnico's name of a type whose elements are stored one by one. ``decoder`` is the file and the
    function that decode blocks.
    """

    code: int
    name: str
    elements: int
    byte_size: int
    dtype: str = ""
    decoder: tuple[str, str] = ("", "")

    @property
    def decode(self) -> Decode:
        """The function that decodes blocks."""
        module, function = self.decoder
        found: Decode = getattr(importlib.import_module(f"alnico.checkpoint.gguf.{module}"), function)
        return found

    def prepare(self, elements: int) -> None:
        """Say how many elements are about to be decoded, so that a kernel is compiled where that is worth it."""
        if self.decoder[0]:
            module = importlib.import_module(f"alnico.checkpoint.gguf.{self.decoder[0]}")
            if (kernel := getattr(module, "KERNELS", {}).get(self.name)) is not None:
                kernel_for(kernel, elements)


def _plain(code: int, name: str, byte_size: int) -> BlockType:
    return BlockType(code, name, 1, byte_size, dtype=name)


def _blocks(code: int, name: str, elements: int, byte_size: int, module: str) -> BlockType:
    return BlockType(code, name, elements, byte_size, decoder=(module, f"decode_{name.lower()}"))


NO_LEVELS = np.empty(0, np.float32)
"""The levels of codes that stand for themselves."""

BLOCK_TYPES: dict[int, BlockType] = {
    t.code: t
    for t in (
        _plain(0, "F32", 4),
        _plain(1, "F16", 2),
        _blocks(2, "Q4_0", 32, 18, "simple_blocks"),
        _blocks(3, "Q4_1", 32, 20, "simple_blocks"),
        _blocks(6, "Q5_0", 32, 22, "simple_blocks"),
        _blocks(7, "Q5_1", 32, 24, "simple_blocks"),
        _blocks(8, "Q8_0", 32, 34, "simple_blocks"),
        _blocks(10, "Q2_K", 256, 84, "k_blocks"),
        _blocks(11, "Q3_K", 256, 110, "k_blocks"),
        _blocks(12, "Q4_K", 256, 144, "k_blocks"),
        _blocks(13, "Q5_K", 256, 176, "k_blocks"),
        _blocks(14, "Q6_K", 256, 210, "k_blocks"),
        _blocks(15, "Q8_K", 256, 292, "k_blocks"),
        _blocks(16, "IQ2_XXS", 256, 66, "codebook_blocks"),
        _blocks(17, "IQ2_XS", 256, 74, "codebook_blocks"),
        _blocks(18, "IQ3_XXS", 256, 98, "codebook_blocks"),
        _blocks(19, "IQ1_S", 256, 50, "codebook_blocks"),
        _blocks(20, "IQ4_NL", 32, 18, "level_blocks"),
        _blocks(21, "IQ3_S", 256, 110, "codebook_blocks"),
        _blocks(22, "IQ2_S", 256, 82, "codebook_blocks"),
        _blocks(23, "IQ4_XS", 256, 136, "level_blocks"),
        _plain(24, "I8", 1),
        _plain(25, "I16", 2),
        _plain(26, "I32", 4),
        _plain(27, "I64", 8),
        _plain(28, "F64", 8),
        _blocks(29, "IQ1_M", 256, 56, "codebook_blocks"),
        _plain(30, "BF16", 2),
        _blocks(34, "TQ1_0", 256, 54, "ternary_blocks"),
        _blocks(35, "TQ2_0", 256, 66, "ternary_blocks"),
        _blocks(39, "MXFP4", 32, 17, "level_blocks"),
        _blocks(40, "NVFP4", 64, 36, "level_blocks"),
    )
}
"""All types that are read, by their code in the file."""


def scales_of(blocks: np.ndarray, begin: int) -> np.ndarray:
    """The float16 at an even byte of each block, as float32 (blocks, 1)."""
    scales: np.ndarray = blocks.view(np.float16)[:, begin // 2, None].astype(np.float32)
    return scales


def nibbles(packed: np.ndarray, width: int) -> np.ndarray:
    """Split bytes (blocks, n) into their low and high halves: ``width`` low ones, then the ``width`` high ones of the same bytes.

    >>> nibbles(np.array([[0x21, 0x43]], np.uint8), 2)
    array([[1, 3, 2, 4]], dtype=uint8)
    """
    groups = packed.reshape(len(packed), -1, width)
    codes = np.empty((len(packed), groups.shape[1], 2, width), np.uint8)
    np.bitwise_and(groups, 15, out=codes[:, :, 0])
    np.right_shift(groups, 4, out=codes[:, :, 1])
    return codes.reshape(len(packed), -1)


def bits(packed: np.ndarray, count: int, per_code: int, width: int) -> np.ndarray:
    """Split bytes (blocks, n) into ``count`` codes of ``per_code`` bits each, the lowest first: ``width`` codes of one
    position, then those of the next, of the same bytes.

    >>> bits(np.array([[0b11100100, 0b00000001]], np.uint8), 4, 2, 2)
    array([[0, 1, 1, 0, 2, 0, 3, 0]], dtype=uint8)
    """
    groups = packed.reshape(len(packed), -1, width)
    codes = np.empty((len(packed), groups.shape[1], count, width), np.uint8)
    for i in range(count):
        np.right_shift(groups, per_code * i, out=codes[:, :, i])
    codes &= (1 << per_code) - 1
    return codes.reshape(len(packed), -1)
