"""Where the tensors of a checkpoint stand in a module: under other names, in parts, packed or in another order."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.checkpoint.layouts import closest_names, find_layout
from alnico.checkpoint.memory_model import unwrap_module
from alnico.errors import MismatchError, ModelError
from alnico.evaluation.extras import quiet_transformers
from alnico.numerics.dtypes import Shape

if TYPE_CHECKING:
    import torch


PIECE = 1 << 22
"""Elements that are numbered from 0 on before numbers begin anew: float32 holds such numbers, and those of as many pieces, exactly."""

CLOSE = 1e-2
"""How far the values of a module may lie from its checkpoint's, as a share of their norm: a module may have been loaded in a smaller dtype."""

MAY_BE_MISSING = "pooler."
"""Tensors of an encoder that no task reads, and that many checkpoints lack."""


@dataclass(frozen=True, eq=False)
class PlacedElements:
    """Elements of a checkpoint's tensor in a module: ``of`` are their numbers in the tensor, ``at`` in ``own``, as numbers of flat elements."""

    name: str
    """What the module calls it."""
    own: torch.Tensor
    at: slice | torch.Tensor
    of: slice | torch.Tensor

    @property
    def is_whole(self) -> bool:
        """Is it all of the module's tensor, in order?"""
        return self.at == slice(0, self.own.numel())

    def put(self, values: torch.Tensor) -> None:
        """Write the values of the checkpoint's tensor to where they belong."""
        part = values.reshape(-1)[self.of].to(self.own.device)
        if self.is_whole:
            self.own.data.copy_(part.reshape(self.own.shape))
            return
        flat = self.own.data.reshape(-1)
        flat[self.at] = part.to(flat.dtype)
        if not self.own.is_contiguous():
            self.own.data.copy_(flat.reshape(self.own.shape))

    def add_to(self, total: torch.Tensor, values: torch.Tensor) -> None:
        """Add values of the shape of the module's tensor (a gradient) to ``total``, flat, which has the elements of the checkpoint's tensor."""
        total[self.of] += values.reshape(-1)[self.at].to(total.device, total.dtype)


@dataclass(frozen=True, eq=False)
class Placement:
    """Where each tensor of a checkpoint stands in a module.

    ``of`` has the places by the checkpoint's names, in the module's order, none for a tensor that the module does not have. ``lacking`` are names of the
    module's parameters and saved buffers that no tensor of the checkpoint fills.
    """

    of: Mapping[str, tuple[PlacedElements, ...]]
    lacking: tuple[str, ...]

    @cached_property
    def files_of(self) -> Mapping[int, tuple[str, ...]]:
        """The checkpoint's names for what stands in a tensor of the module, by the tensor's ``id``."""
        found: dict[int, dict[str, None]] = {}
        for name, places in self.of.items():
            for one in places:
                found.setdefault(id(one.own), {})[name] = None
        return {own: tuple(names) for own, names in found.items()}


def sum_of(
    places: Sequence[PlacedElements], elements: int, values: Callable[[torch.Tensor], torch.Tensor | None]
) -> torch.Tensor | None:
    """Collect what ``values`` has for tensors of modules, flat, laid out as the checkpoint's tensor that stands there; None where there is nothing."""
    import torch

    total = None
    if len(places) == 1 and places[0].is_whole and places[0].own.numel() == elements:
        given = values(places[0].own)
        return None if given is None else given.reshape(-1)
    for one in places:
        if (given := values(one.own)) is not None:
            if total is None:
                total = torch.zeros(elements, dtype=given.dtype)
            one.add_to(total, given)
    return total


def place(
    module: Any, files: Mapping[str, Shape], read: Callable[[str], np.ndarray], label: str, kind: str = ""
) -> Placement:
    """Find where the tensors of a checkpoint stand in a module that was loaded from it.

    ``files`` are the checkpoint's names and shapes, ``read`` gives a tensor's values. Names and shapes say it by the table of layouts, or
    else transformers does: numbered tensors are loaded as the checkpoint was, and where the numbers come to lie is where the values do. Either way
    every tensor of the module must hold the checkpoint's values. ``kind`` is what the module was loaded as.
    Errors: MismatchError for a module with a parameter or a saved buffer that is in no file; ModelError.
    """
    module = unwrap_module(module)
    own = named(module)
    aliases: dict[int, list[str]] = {}
    for name, tensor in own.items():
        aliases.setdefault(id(tensor), []).append(name)
    best = Placement(dict.fromkeys(files, ()), tuple(names[0] for names in aliases.values()))
    for found in itertools.chain(
        _by_layout(own, files, False),
        _by_layout(own, files, True),
        _by_loading(module, own, files, read, label),
    ):
        placement = _checked(own, aliases, files, read, found)
        if not _needed(placement.lacking, kind):
            return placement
        if len(placement.lacking) < len(best.lacking):
            best = placement
    raise _refused(module, own, files, _needed(best.lacking, kind), label)


def _needed(lacking: Sequence[str], kind: str) -> list[str]:
    return [name for name in lacking if kind != "encoder" or not name.startswith(MAY_BE_MISSING)]


def named(module: Any) -> dict[str, torch.Tensor]:
    """The parameters and saved buffers of a module by name; one that is tied has several."""
    import torch

    held = dict(module.named_parameters(remove_duplicate=False))
    return held | {
        n: v
        for n, v in module.state_dict(keep_vars=True).items()
        if isinstance(v, torch.Tensor) and n not in held
    }


def _refused(
    module: Any, own: Mapping[str, Any], files: Mapping[str, Shape], lacking: Sequence[str], label: str
) -> MismatchError:
    first, kind = lacking[0], type(module).__name__
    if len(lacking) == len({id(tensor) for tensor in own.values()}) and first not in files:
        return MismatchError(
            f"{next(iter(files), 'the model')}: no tensor of the files of {label} is in the module ({kind}), which begins with {first}; "
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
        f"{label}: {len(lacking)} of {len(own)} tensors of the module ({kind}) are in no file under a name or with values that fit, "
        f"{first} {shape} first{'; the nearest are ' + ' and '.join(near) if near else ''}. Expected a file's tensor for each. "
        "Save the model anew with transformers, or give tasks for models of this architecture."
    )


# ---- by names and shapes ----------------------------------------------------------------------------------------------

_TensorPieces = Mapping[str, list[tuple[str, Any, Any]]]
"""Of each tensor of the module: the checkpoint's tensors in it, elements there, elements in the checkpoint's."""


def _by_layout(
    own: Mapping[str, torch.Tensor], files: Mapping[str, Shape], swapped: bool
) -> Iterator[_TensorPieces]:
    """What the table of layouts says."""
    try:
        layout = find_layout(
            files, {name: tuple(tensor.shape) for name, tensor in own.items()}, swapped=swapped
        )
    except MismatchError:  # two layouts fit
        return
    if swapped and not layout.halves:
        return
    parts: dict[str, list[tuple[str, Any, Any]]] = {}
    for name, pieces in layout.stored.items():
        start = 0
        for piece in pieces:
            at, of = slice(start, start + piece.elements), slice(piece.first, piece.first + piece.elements)
            parts.setdefault(name, []).append((piece.name, at, of))
            start += piece.elements
    yield parts


def _checked(
    own: Mapping[str, torch.Tensor],
    aliases: Mapping[int, list[str]],
    files: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    parts: _TensorPieces,
) -> Placement:
    """The places whose values are those of the checkpoint. A tied tensor is filled by what one of its names is."""
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
    """Do the parts hold what the module's tensor does, all of it?"""
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
    held = own.detach().reshape(-1).cpu()
    if not bool(filled.all()):
        return False
    if torch.equal(held, expected) or held.is_meta:
        return True
    if not own.dtype.is_floating_point:
        return False
    apart = float(torch.linalg.vector_norm(held.double() - expected.double()))
    return apart <= CLOSE * float(torch.linalg.vector_norm(expected.double()))


# ---- by loading numbered tensors --------------------------------------------------------------------------------------


def _by_loading(
    module: Any,
    own: Mapping[str, torch.Tensor],
    files: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    label: str,
) -> Iterator[_TensorPieces]:
    """What transformers makes of a checkpoint with these names, found by loading numbers in place of its values."""
    import torch

    if not hasattr(type(module), "from_pretrained") or not hasattr(module, "config"):
        return
    names = list(files)

    def filled(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given = {n: tensors.get(n, torch.zeros((1,) * len(files[n]))).expand(files[n]) for n in names}
        with quiet_transformers():
            try:
                loaded = type(module).from_pretrained(
                    None,
                    config=copy.deepcopy(module.config),
                    state_dict=given,
                    dtype=torch.float32,
                    trust_remote_code=False,
                )
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                raise ModelError(
                    f"{label}: transformers cannot load tensors with its names and shapes as {type(module).__name__} "
                    f"({str(error).splitlines()[0][:200] if str(error) else type(error).__name__}). Check its config.json and files."
                ) from None
        return {n: v.detach() for n, v in named(loaded).items() if n in own and v.shape == own[n].shape}

    numbers = filled({n: torch.full((1,) * len(files[n]), float(i + 1)) for i, n in enumerate(names)})
    parts: dict[str, list[tuple[str, Any, Any]]] = {}
    odd: dict[str, list[int]] = {}
    for name in list(numbers):
        values = numbers[name].reshape(-1)
        is_one = values.numel() > 0 and bool((values == values[0]).all())
        each = values[:1].tolist() if is_one else torch.unique(values).tolist()
        found = [int(i) for i in each if 1 <= i <= len(names) and i == int(i)]
        whole = slice(0, own[name].numel())
        if len(found) == 1 and _fits(own[name], files, read, [(names[found[0] - 1], whole, whole)]):
            parts[name] = [(names[found[0] - 1], whole, whole)]
        elif found:
            odd[name] = found
        if name not in odd:
            del numbers[name]
    if odd:
        involved = {names[i - 1] for found in odd.values() for i in found}
        sizes = {n: int(np.prod(files[n], dtype=np.int64)) for n in involved}
        low = filled({n: (torch.arange(sizes[n]) % PIECE).float().reshape(files[n]) for n in involved})
        low = {n: low[n] for n in odd}
        high = {}
        if max(sizes.values()) > PIECE:
            high = filled({n: (torch.arange(sizes[n]) // PIECE).float().reshape(files[n]) for n in involved})
        for name, found in odd.items():
            element = low[name].reshape(-1).long()
            if high:
                element += high[name].reshape(-1).long() * PIECE
            number = numbers[name].reshape(-1)
            parts[name] = []
            for i in found:
                at = (number == i).nonzero().reshape(-1)
                parts[name].append((names[i - 1], _span(at), _span(element[at])))
    yield parts


def _span(numbers: torch.Tensor) -> slice | torch.Tensor:
    """Numbers that follow one another as a slice."""
    first, count = int(numbers[0]), len(numbers)
    if bool((numbers[1:] - numbers[:-1] == 1).all()):
        return slice(first, first + count)
    return numbers
