"""``alnico store verify``: whether task vectors are what their manifests say."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, QUIET, Flag
from alnico.cli.printing import EXIT_CODE, Page, page
from alnico.numerics.sizes import count_of, format_size
from alnico.store.verify_vectors import StoreVerification


@command(
    "alnico.cli.store_functions.verify_vectors",
    base=Flag(metavar="MODEL"),
    key=Flag(metavar="KEY"),
    json=JSON,
    quiet=QUIET,
)
def run(call: CommandCall) -> None:
    result = call.invoke()
    call.show(result.data, lambda: verification_text(result), besides=EXIT_CODE)


def verification_text(result: StoreVerification) -> Page:
    """A line for each thing that passed."""
    lines = []
    for v in result.vectors:
        lines.append(
            f"{v.vector}: {count_of(v.files, 'file')} ({format_size(v.byte_size)}) as the manifest says"
        )
        if v.base is not None:
            lines.append(f"{v.vector}: {v.base} is the base that it was made of")
        if v.signed_by is not None:
            lines.append(f"{v.vector}: the signature holds with {v.signed_by}")
    return page(lines or ["no task vectors"])
