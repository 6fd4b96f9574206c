"""``alnico diff``: how two models differ."""

from __future__ import annotations

from collections.abc import Sequence

import click

from alnico.analysis.diff import Alone, FilePair, ModelDiff, TensorPair
from alnico.checkpoint.factors import is_factor
from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, VERBOSE, Flag
from alnico.cli.printing import EXIT_CODE, Page, page
from alnico.errors import DIFFERENT

SHOWN = 12
"""Lines of a list, and keys of a file, unless all are asked for."""

WIDTH = 60
"""Characters of a value of a config, unless all are asked for."""

DIFFERENCES_MEAN = "change: |b - a| / |a|, over a tensor. max |b-a|: of one entry. cosine: 1 for the same direction, 0 for none in common."

VERDICTS = {
    "equal": "equal",
    "same values": "of the same values",
    "differs": "differ",
    "other bytes": "of other bytes",
    "other shape": "of another shape",
}


@command(
    "alnico.diff",
    exit_code=Flag("Exit with 14 if the models differ, with 0 if not.", type=bool, default=False),
    json=JSON,
    verbose=VERBOSE,
)
def run(call: CommandCall) -> None:
    difference = call.invoke()
    tells_by_code = EXIT_CODE if call["exit_code"] else None
    call.show(difference.data, lambda: difference_text(difference, call.verbose), besides=tells_by_code)
    if call["exit_code"] and not difference.is_equal:
        raise click.exceptions.Exit(DIFFERENT)


def difference_text(difference: ModelDiff, verbose: int) -> Page:
    """The verdict, then the tensors that differ, most first, then files and the keys of configs."""
    counts = [
        (sum(t.verdict == verdict for t in difference.tensors), words) for verdict, words in VERDICTS.items()
    ]
    counts += [(len(difference.only_in_a), "only in A"), (len(difference.only_in_b), "only in B")]
    lines = [f"A         {difference.a}", f"B         {difference.b}"]
    lines.append(f"tensors   {', '.join(f'{n} {what}' for n, what in counts if n) or 'none in both'}")
    if difference.layout:
        lines.append(
            f"names     of B differ from A's ({difference.layout}); its tensors are compared under A's names"
        )
    if difference.files is None:
        lines.append("files     not compared: a model is no directory")
    elif difference.files:
        lines.append(
            f"files     {len(difference.files)} differ: {_some([file.name for file in difference.files])}"
        )
    else:
        lines.append("files     config and side files are equal")
    differing = sorted((t for t in difference.tensors if t.values), key=_change, reverse=True)
    if differing:
        lines += ["", f"{'entries differ':>14}  {'change':>9}  {'max |b-a|':>9}  {'cosine':>11}  tensor"]
        lines += _cut([_line(t) for t in differing], verbose)
    others = [t for t in difference.tensors if t.verdict in ("same values", "other bytes", "other shape")]
    if others:
        lines += ["", *_cut([_other(t) for t in others], verbose)]
    for side, other, only in (("A", "B", difference.only_in_a), ("B", "A", difference.only_in_b)):
        if only:
            lines += ["", f"only in {side}", *_cut([_alone(t, other) for t in only], verbose)]
    if difference.files:
        lines += ["", *(line for file in difference.files for line in _file(file, verbose))]
    if differing:
        lines += ["", DIFFERENCES_MEAN]
    if any(is_factor(t.name) for t in differing):
        lines += [
            "",
            "The factors of adapters are compared by themselves: other factors may make the same update.",
        ]
    if difference.is_equal:
        lines += ["", "The models are equal." if difference.files is not None else "The tensors are equal."]
    return page(lines)


def _change(tensor: TensorPair) -> float:
    assert tensor.values is not None
    relative = tensor.values.relative_l2
    return float("inf") if relative is None or tensor.values.not_finite else relative


def _line(tensor: TensorPair) -> str:
    values = tensor.values
    assert values is not None
    change = "-" if values.relative_l2 is None else f"{values.relative_l2:.3%}"
    cosine = "-" if values.cosine is None else f"{values.cosine:.8f}"
    more = [f"{values.not_finite} of NaN or infinity"] if values.not_finite else []
    more += [" / ".join(tensor.dtypes)] if len(set(tensor.dtypes)) > 1 else []
    details = f" ({'; '.join(more)})" if more else ""
    return f"{values.differing / values.elements:14.2%}  {change:>9}  {values.max_abs:9.2e}  {cosine:>11}  {tensor.name}{details}"


def _other(tensor: TensorPair) -> str:
    in_a, in_b = tensor.dtypes
    if tensor.verdict == "other shape":
        return f"{tensor.name}: {tensor.shapes[0]} in A, {tensor.shapes[1]} in B"
    if tensor.verdict == "other bytes":
        return f"{tensor.name}: other bytes; values of {' and '.join(dict.fromkeys(tensor.dtypes))} are not compared"
    how = f"{in_a} in A, {in_b} in B" if in_a != in_b else f"other bytes of {in_a} (0 and -0, or NaN)"
    return f"{tensor.name}: the same values, {how}"


def _alone(tensor: Alone, other: str) -> str:
    twins = f"; byte for byte {other}'s {', '.join(tensor.twins[:3])}" if tensor.twins else ""
    return f"{tensor.name}: {tensor.dtype} {tensor.shape}{twins}"


def _file(file: FilePair, verbose: int) -> list[str]:
    if not (file.in_a and file.in_b):
        return [f"{file.name}: only in {'A' if file.in_a else 'B'}"]
    if file.keys is None:
        return [f"{file.name}: other contents"]
    if not file.keys:
        return [f"{file.name}: the same keys and values, written in another way"]
    if file.name != "config.json" and not verbose:
        return [f"{file.name}: {_some([k.key for k in file.keys])}"]
    shown = [f"  {k.key}: {_value(k.a, verbose)} in A, {_value(k.b, verbose)} in B" for k in file.keys]
    return [file.name, *_cut(shown, verbose)]


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _value(text: str | None, verbose: int) -> str:
    if text is None:
        return "not there"
    return text if verbose or len(text) <= WIDTH else f"{text[:WIDTH]} ..."


def _cut(lines: Sequence[str], verbose: int) -> list[str]:
    if verbose or len(lines) <= SHOWN + 1:
        return list(lines)
    return [*lines[:SHOWN], f"... and {len(lines) - SHOWN} more (-v prints all)"]
