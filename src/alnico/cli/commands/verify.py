"""``alnico verify``: whether a finished merge is what its lock says."""

from __future__ import annotations

import click

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, QUIET, Flag
from alnico.cli.printing import EXIT_CODE, Page, page
from alnico.errors import UncheckedError
from alnico.numerics.sizes import count_of, format_size
from alnico.verification.verify import Verification


@command("alnico.verify", key=Flag(metavar="KEY"), json=JSON, quiet=QUIET)
def run(call: CommandCall) -> None:
    for name, option in (("sample", "--sample"), ("inputs", "--input"), ("device", "--device")):
        if name in call.given and not call["against_inputs"]:
            raise click.BadParameter(f"{option} is for --against-inputs. Give both.")
    if not 0 < call["sample"] <= 1:
        raise click.BadParameter(
            f"--sample: {call['sample']:g} is not a share in (0, 1]. Give 0.01 for a hundredth of the blocks."
        )

    def show(verification: Verification) -> None:
        call.show(verification.data, lambda: verification_text(verification), besides=EXIT_CODE)

    try:
        verification = call.invoke()
    except UncheckedError as error:
        if error.result is not None:
            show(error.result)
        raise
    show(verification)


def verification_text(result: Verification) -> Page:
    """A line for each thing that passed."""
    tensors = f"{count_of(result.tensors, 'tensor')} ({format_size(result.byte_size)})"
    files = f" and {count_of(result.files, 'file')}" if result.files else ""
    lines = [f"{result.path}: {tensors}{files} as the lock says"]
    again = result.recomputed
    if again is not None:
        share = again.byte_size / again.total_bytes if again.total_bytes else 1.0
        bits = "the same bits"
        if again.elements_differ:
            bits = f"{count_of(again.elements_differ, 'number')} other by one unit in the last place"
        device = f" on {again.device}, another device than the lock's" if again.tolerance else ""
        lines.append(
            f"{result.path}: {count_of(again.blocks, 'block')} of {count_of(again.tensors, 'tensor')} ({share:.3%} of the bytes) made again from the "
            f"inputs{device}, {bits}"
        )
    if result.signed_by is not None:
        lines.append(f"{result.path}: the signature holds with {result.signed_by}")
    return page(lines)
