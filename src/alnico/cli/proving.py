"""What verifying, reproducing and signing found, as text for people."""

from __future__ import annotations

from alnico.cli.printing import Page, page
from alnico.numerics.sizes import format_size
from alnico.verification.reproduce import Reproduction
from alnico.verification.verify import Verification


def verification_text(found: Verification) -> Page:
    """A line for each thing that passed."""
    tensors = f"{_count(found.tensors, 'tensor')} ({format_size(found.byte_size)})"
    files = f" and {_count(found.files, 'file')}" if found.files else ""
    lines = [f"{found.path}: {tensors}{files} as the lock says"]
    made = found.recomputed
    if made is not None:
        share = made.byte_size / made.total_bytes if made.total_bytes else 1.0
        lines.append(
            f"{found.path}: {_count(made.blocks, 'block')} of {_count(made.tensors, 'tensor')} ({share:.3%} of the bytes) made again from the "
            "inputs, the same bits"
        )
    if found.signed_by is not None:
        lines.append(f"{found.path}: the signature holds with {found.signed_by}")
    return page(lines)


def reproduction_text(found: Reproduction) -> Page:
    """What is the same, made by which versions, and where it is."""
    first, second = found.versions
    versions = f"alnico {first}" if first == second else f"alnico {first}, and again by {second}"
    kept = f"; the second is {found.again}" if found.again is not None else ""
    line = (
        f"{found.path}: merged again in {found.seconds:.2f} s, the same bytes: {_count(found.tensors, 'tensor')} in "
        f"{_count(found.files, 'file')} ({format_size(found.byte_size)}), by {versions}{kept}"
    )
    return page([line])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
