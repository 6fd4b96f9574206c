"""``alnico reproduce``: whether merging again gives the same bytes."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, QUIET, Flag
from alnico.cli.printing import EXIT_CODE, Page, page
from alnico.kernels.clock import time_text
from alnico.numerics.sizes import count_of, format_size
from alnico.verification.reproduce import Reproduction


@command("alnico.reproduce", new=Flag(metavar="NEWOUT"), json=JSON, quiet=QUIET)
def run(call: CommandCall) -> None:
    result = call.invoke()
    call.show(
        result.data, lambda: reproduction_text(result), besides=EXIT_CODE, stated=result.compile_seconds
    )


def reproduction_text(result: Reproduction) -> Page:
    """What is the same, made by which versions, and where it is."""
    first, second = result.versions
    versions = f"alnico {first}" if first == second else f"alnico {first}, and again by {second}"
    if set(result.devices) != {"cpu"}:
        versions += f", on {result.devices[0]}" + (
            f", and again on {result.devices[1]}" if len(set(result.devices)) > 1 else ""
        )
    note = f"; the second is {result.again}" if result.again is not None else ""
    line = (
        f"{result.path}: merged again in {time_text(result.seconds, result.compile_seconds)}, the same bytes: {count_of(result.tensors, 'tensor')} in "
        f"{count_of(result.files, 'file')} ({format_size(result.byte_size)}), by {versions}{note}"
    )
    return page([line])
