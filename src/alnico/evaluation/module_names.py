"""Finds the tensors of a checkpoint in a module: under other names, in parts, packed or reordered."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.checkpoint.layouts import Piece, closest_names, find_layout
from alnico.checkpoint.memory_model import unwrap_module
from alnico.errors import MismatchError, ModelError
from alnico.evaluation.extras import quiet_transformers
from alnico.numerics.dtypes import Shape

if TYPE_CHECKING:
    import torch


PIECE = 1 << 22
"""Elements numbered from 0 before numbers start again: float32 represents these numbers exactly."""

CLOSE = 1e-2
"""The largest relative distance of a module's values from its checkpoint's: it may be loaded in a smaller dtype."""

MAY_BE_MISSING = "pooler."
"""Tensors of an encoder that no task uses, and that many checkpoints lack."""


@dataclass(frozen=True, eq=False)
class PlacedElements:
    """Elements of a checkpoint's tensor in a module: flat indices ``of`` in the tensor, and ``at`` in ``own``."""

    name: str
    """Its name in the module."""
    own: torch.Tensor
    at: slice | torch.Tensor
    of: slice | torch.Tensor

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole tensor of the module, in order."""
        return isinstance(self.at, slice) and self.at == slice(0, self.own.numel())

    @property
    def is_same(self) -> bool:
        """Whether it is the whole tensor of the module, with the elements of the checkpoint's tensor from its first, in order."""
        return self.is_whole and isinstance(self.of, slice) and self.of == self.at

    def put(self, values: torch.Tensor) -> None:
        """Write the values of the checkpoint's tensor into the module."""
        part = values.reshape(-1)[self.of].to(self.own.device)
        if self.is_whole:
            self.own.data.copy_(part.reshape(self.own.shape))
            return
        flat = self.own.data.reshape(-1)
        flat[self.at] = part.to(flat.dtype)
        if not self.own.is_contiguous():
            self.own.data.copy_(flat.reshape(self.own.shape))

    def add_to(self, total: torch.Tensor, values: torch.Tensor) -> None:
        """Add values shaped like the module's tensor (a gradient) to the flat ``total`` of the checkpoint's tensor."""
        total[self.of] += values.reshape(-1)[self.at].to(total.device, total.dtype)


@dataclass(frozen=True, eq=False)
class Placement:
    """Where each tensor of a checkpoint is in a module.

    ``of`` maps the checkpoint's names to places, in the module's order; empty for a tensor the module does not have.
    ``lacking`` are names of parameters and saved buffers that no tensor of the checkpoint fills.
    """

    of: Mapping[str, tuple[PlacedElements, ...]]
    lacking: tuple[str, ...]

    @cached_property
    def files_of(self) -> Mapping[int, tuple[str, ...]]:
        """The checkpoint's names for each tensor of the module, by the tensor's ``id``."""
        names_of: dict[int, dict[str, None]] = {}
        for name, places in self.of.items():
            for part in places:
                names_of.setdefault(id(part.own), {})[name] = None
        return {own: tuple(names) for own, names in names_of.items()}


def sum_of(
    places: Sequence[PlacedElements], elements: int, values: Callable[[torch.Tensor], torch.Tensor | None]
) -> torch.Tensor | None:
    """Collect ``values`` of module tensors as a flat tensor, laid out like the checkpoint's; None if there are none."""
    import torch

    total = None
    if len(places) == 1 and places[0].is_same and places[0].own.numel() == elements:
        value = values(places[0].own)
        return None if value is None else value.reshape(-1)
    for part in places:
        if (value := values(part.own)) is not None:
            if total is None:
                total = torch.zeros(elements, dtype=value.dtype, device=value.device)
            part.add_to(total, value)
    return total


def place(
    module: Any, files: Mapping[str, Shape], read: Callable[[str], np.ndarray], label: str, kind: str = ""
) -> Placement:
    """Find the tensors of a checkpoint in a module that was loaded from it.

    ``files`` are the checkpoint's names and shapes; ``read`` returns a tensor's values. The table of layouts matches names
    and shapes. Otherwise transformers loads tensors of numbers instead of the checkpoint, and the positions of the
    numbers are those of the values. In both cases every tensor of the module must have the checkpoint's values. ``kind``
    is what the module was loaded as. Errors: MismatchError for a parameter or saved buffer that is in no file; ModelError.
    """
    module = unwrap_module(module)
    own = tensors_of(module)
    aliases: dict[int, list[str]] = {}
    for name, tensor in own.items():
        aliases.setdefault(id(tensor), []).append(name)
    best = Placement(dict.fromkeys(files, ()), tuple(names[0] for names in aliases.values()))
    for candidate in itertools.chain(
        _by_layout(own, files, False),
        _by_layout(own, files, True),
        _by_loading(module, own, files, read, label),
    ):
        placement = _checked(own, aliases, files, read, candidate)
        if not _needed(placement.lacking, kind):
            return placement
        if len(placement.lacking) < len(best.lacking):
            best = placement
    raise _refused(module, own, files, _needed(best.lacking, kind), label)


def _needed(lacking: Sequence[str], kind: str) -> list[str]:
    return [name for name in lacking if kind != "encoder" or not name.startswith(MAY_BE_MISSING)]


def tensors_of(module: Any) -> dict[str, torch.Tensor]:
    """Return the parameters and saved buffers of a module by name; a tied tensor has several names."""
    import torch

    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters | {
        n: v
        for n, v in module.state_dict(keep_vars=True).items()
        if isinstance(v, torch.Tensor) and n not in parameters
    }


def _refused(
    module: Any, own: Mapping[str, Any], files: Mapping[str, Shape], lacking: Sequence[str], label: str
) -> MismatchError:
    first, kind = lacking[0], type(module).__name__
    if len(lacking) == len({id(tensor) for tensor in own.values()}) and first not in files:
        return MismatchError(
            f"{next(iter(files), 'the model')}: no tensor of the files of {label} is in the module ({kind}), which starts with {first}; "
            "expected the names of the models. Give tasks for models of this architecture."
        )
    if first in files and files[first] != tuple(own[first].shape):
        return MismatchError(
            f"{first}: is {files[first]} in the models, {tuple(own[first].shape)} in the module ({kind}); "
            "expected one shape. Give tasks for models of this architecture."
        )
    shape = tuple(own[first].shape)
    alike = [n for n, s in files.items() if s == shape] or list(files)
    near = closest_names(first, alike, 2)
    return MismatchError(
        f"{label}: {len(lacking)} of {len(own)} tensors of the module ({kind}) match no file by name and values; "
        f"the first is {first} {shape}{'; the closest are ' + ' and '.join(near) if near else ''}. Expected a tensor in the files for each. "
        "Save the model again with transformers, or give tasks for models of this architecture."
    )


# ---- by names and shapes ----------------------------------------------------------------------------------------------

_TensorPieces = Mapping[str, list[tuple[str, Any, Any]]]
"""For each tensor of the module: the checkpoint's tensors in it, with the elements in both."""


def _by_layout(
    own: Mapping[str, torch.Tensor], files: Mapping[str, Shape], swapped: bool
) -> Iterator[_TensorPieces]:
    """Match by the table of layouts."""
    try:
        layout = find_layout(
            files, {name: tuple(tensor.shape) for name, tensor in own.items()}, swapped=swapped
        )
    except MismatchError:  # two layouts match
        return
    if swapped and not layout.halves:
        return
    parts: dict[str, list[tuple[str, Any, Any]]] = {}
    for name, pieces in layout.stored.items():
        start = 0
        for piece in pieces:
            if piece.of:
                parts.setdefault(name, []).extend(_turned_parts(piece, start))
            else:
                at, of = (
                    slice(start, start + piece.elements),
                    slice(piece.first, piece.first + piece.elements),
                )
                parts.setdefault(name, []).append((piece.name, at, of))
            start += piece.elements
    yield parts


def _turned_parts(piece: Piece, start: int) -> Iterator[tuple[str, Any, Any]]:
    """Yield the parts of a piece that is a run of a transpose, and begins at element ``start`` of the module's tensor."""
    import torch

    turned = torch.arange(piece.matrix_elements).reshape(-1, piece.columns).T.reshape(-1)
    held = turned[piece.first : piece.first + piece.elements]
    begin = 0
    for run in piece.of:
        at = ((held >= begin) & (held < begin + run.elements)).nonzero().reshape(-1)
        if len(at):
            yield run.name, at + start, held[at] - begin + run.first
        begin += run.elements


def _checked(
    own: Mapping[str, torch.Tensor],
    aliases: Mapping[int, list[str]],
    files: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    parts: _TensorPieces,
) -> Placement:
    """Keep the places whose values are those of the checkpoint. Any name of a tied tensor may fill it."""
    of: dict[str, list[PlacedElements]] = {}
    lacking = []
    for names in aliases.values():
        fits = [name for name in names if _fits(own[name], files, read, parts.get(name, []))]
        for part in {(f, _key(at), _key(el)): (f, at, el) for n in fits for f, at, el in parts[n]}.values():
            of.setdefault(part[0], []).append(PlacedElements(fits[0], own[fits[0]], part[1], part[2]))
        if not fits:
            lacking.append(names[0])
    return Placement({name: tuple(of.get(name, ())) for name in dict.fromkeys([*of, *files])}, tuple(lacking))


def _key(span: Any) -> Any:
    return (span.start, span.stop) if isinstance(span, slice) else id(span)


def _fits(
    own: torch.Tensor,
    files: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    parts: list[tuple[str, Any, Any]],
) -> bool:
    """Check whether the parts have the values of the whole module tensor."""
    import torch

    if not parts or any(file not in files for file, _, _ in parts):
        return False
    if any(isinstance(of, slice) and of.stop > np.prod(files[file], dtype=np.int64) for file, _, of in parts):
        return False
    expected = torch.zeros(own.numel(), dtype=own.dtype)
    filled = torch.zeros(own.numel(), dtype=torch.bool)
    for file, at, of in parts:
        expected[at] = torch.from_numpy(np.ascontiguousarray(read(file))).reshape(-1)[of].to(own.dtype)
        filled[at] = True
    actual = own.detach().reshape(-1).cpu()
    if not bool(filled.all()):
        return False
    if torch.equal(actual, expected) or actual.is_meta:
        return True
    if not own.dtype.is_floating_point:
        return False
    distance = float(torch.linalg.vector_norm(actual.double() - expected.double()))
    return distance <= CLOSE * float(torch.linalg.vector_norm(expected.double()))


# ---- by loading numbered tensors --------------------------------------------------------------------------------------


def _by_loading(
    module: Any,
    own: Mapping[str, torch.Tensor],
    files: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    label: str,
) -> Iterator[_TensorPieces]:
    """Match by loading numbered tensors with transformers instead of the checkpoint's values."""
    import torch

    if not hasattr(type(module), "from_pretrained") or not hasattr(module, "config"):
        return
    names = list(files)

    def filled(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = {n: tensors.get(n, torch.zeros((1,) * len(files[n]))).expand(files[n]) for n in names}
        with quiet_transformers():
            try:
                loaded = type(module).from_pretrained(
                    None,
                    config=copy.deepcopy(module.config),
                    state_dict=state,
                    dtype=torch.float32,
                    trust_remote_code=False,
                )
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                raise ModelError(
                    f"{label}: transformers cannot load tensors with its names and shapes as {type(module).__name__} "
                    f"({str(error).splitlines()[0][:200] if str(error) else type(error).__name__}). Check its config.json and files."
                ) from None
        return {n: v.detach() for n, v in tensors_of(loaded).items() if n in own and v.shape == own[n].shape}

    numbers = filled({n: torch.full((1,) * len(files[n]), float(i + 1)) for i, n in enumerate(names)})
    parts: dict[str, list[tuple[str, Any, Any]]] = {}
    odd: dict[str, list[int]] = {}
    for name in list(numbers):
        values = numbers[name].reshape(-1)
        is_one = values.numel() > 0 and bool((values == values[0]).all())
        distinct = values[:1].tolist() if is_one else torch.unique(values).tolist()
        sources = [int(i) for i in distinct if 1 <= i <= len(names) and i == int(i)]
        whole = slice(0, own[name].numel())
        if len(sources) == 1 and _fits(own[name], files, read, [(names[sources[0] - 1], whole, whole)]):
            parts[name] = [(names[sources[0] - 1], whole, whole)]
        elif sources:
            odd[name] = sources
        if name not in odd:
            del numbers[name]
    if odd:
        involved = {names[i - 1] for sources in odd.values() for i in sources}
        sizes = {n: int(np.prod(files[n], dtype=np.int64)) for n in involved}
        low = filled({n: (torch.arange(sizes[n]) % PIECE).float().reshape(files[n]) for n in involved})
        low = {n: low[n] for n in odd}
        high = {}
        if max(sizes.values()) > PIECE:
            high = filled({n: (torch.arange(sizes[n]) // PIECE).float().reshape(files[n]) for n in involved})
        for name, sources in odd.items():
            element = low[name].reshape(-1).long()
            if high:
                element += high[name].reshape(-1).long() * PIECE
            number = numbers[name].reshape(-1)
            parts[name] = []
            for i in sources:
                at = (number == i).nonzero().reshape(-1)
                parts[name].append((names[i - 1], _span(at), _span(element[at])))
    yield parts


def _span(numbers: torch.Tensor) -> slice | torch.Tensor:
    """Return consecutive numbers as a slice."""
    first, count = int(numbers[0]), len(numbers)
    if bool((numbers[1:] - numbers[:-1] == 1).all()):
        return slice(first, first + count)
    return numbers
