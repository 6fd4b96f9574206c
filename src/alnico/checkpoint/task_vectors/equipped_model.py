"""Reads a base with a stored task vector, ``W + w D``, by blocks, and checks that it is the right base."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.layouts import Piece, find_layout, shapes_of
from alnico.checkpoint.lora_adapter import CONFIG, Adapter, check_config
from alnico.checkpoint.lora_model import AdaptedModel
from alnico.checkpoint.quantised.dequantised_model import DequantisedModel
from alnico.checkpoint.renamed_model import RenamedModel
from alnico.checkpoint.source import Origin, Shard, Source, Tensor, TensorSpec, read_tensor
from alnico.checkpoint.task_vectors.addition import combine
from alnico.checkpoint.task_vectors.decoders import decode_difference, numbers
from alnico.checkpoint.task_vectors.differences import DifferenceView
from alnico.checkpoint.task_vectors.index_places import READ_BYTES, stream_tensor
from alnico.checkpoint.task_vectors.known_hashes import KnownHashes, known_hashes
from alnico.checkpoint.task_vectors.manifest import EXACT, TensorEntry
from alnico.checkpoint.task_vectors.stored_vector import StoredVector
from alnico.checkpoint.tied_weights import TEXT_CONFIGS, tied_copies, untied_config
from alnico.checkpoint.untied_model import UntiedModel
from alnico.checkpoint.virtual_read import CHUNK, read_computed
from alnico.errors import MismatchError, NonFiniteError, RecipeError
from alnico.numerics import dtypes
from alnico.numerics.sizes import count_of

Form = str
"""How a tensor is read: ``base`` (its bytes), ``values`` (the vector's bytes), ``patched`` (the base's bytes, with new values
at some places), ``added`` (the base plus a difference), ``mixed`` (between the base's values and the vector's)."""


class EquippedModel:
    """A base and a stored task vector as one source: ``W + weight * D``.

    What is exact (absent, sparse, whole) gives the fine-tune's bits and dtypes at weight 1, without arithmetic. Everything
    else is float32 (float64 if a part is), element by element: the part of a tensor that is read changes no bit. The base
    is read under the names of the vector (see ``layouts``). Before the first byte of a tensor is used, the base's tensor
    and the stored parts must have the hashes of the manifest; ``allows_mismatch`` lets differences pass without it.

    Errors: MismatchError for a base without a tensor that the vector changes, or with another shape or dtype, and, while
    reading, for other values; ModelError for parts that differ from their hashes.
    """

    def __init__(self, label: str, base: Source, vector: StoredVector, weight: float = 1.0) -> None:
        self.label = label
        self.vector = vector
        self.weight = weight
        self.allows_mismatch = False
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._busy: dict[str, threading.Lock] = {}
        self._good: set[str] = set()
        self._hashes: dict[tuple[Path, ...], KnownHashes] = {}
        self._scratch = threading.local()
        self._adapted: AdaptedModel | None = None
        self._how: dict[str, Form] = {}
        if vector.manifest.kind == "adapter":
            self.base = base
            config = read_json(vector.folder / CONFIG)
            check_config(config, f"{vector.label}: {CONFIG}", len(vector.files.tensors))
            self._adapted = AdaptedModel(label, base, Adapter(vector.files, config), weight)  # type: ignore[arg-type]
            self._compared: Source = self._under_names(base)
            self.tensors: Mapping[str, Tensor] = self._adapted.tensors
        else:
            self.base = self._compared = self._under_names(base)
            self.tensors = self._describe_all()
        self._add_notes()

    # What the tensors are

    def _under_names(self, base: Source) -> Source:
        """Return the base under the names of the vector, each copy of a tied tensor that the vector has as a tensor."""
        entries = self.vector.manifest.tensors
        like = {
            n: TensorSpec(e.dtype, e.shape, e.dtype)
            for n, e in entries.items()
            if e.base is not None or e.stored
        }
        mine = base.tensors.keys()
        if not (mine <= like.keys() or mine >= like.keys()):
            layout = find_layout(shapes_of(base.tensors), shapes_of(like))
            if not layout.is_identity:
                straight = RenamedModel(base, layout, like)
                if layout.halves and not self._has_hash(straight, layout.halves[0]):
                    other = find_layout(shapes_of(base.tensors), shapes_of(like), swapped=True)
                    crossed = RenamedModel(base, other, like)
                    straight = crossed if self._has_hash(crossed, layout.halves[0]) else straight
                base = straight
        copies = {
            copy: original
            for copy, original in tied_copies(base.config, base.tensors).items()
            if copy not in base.tensors and copy in entries and entries[copy].base is not None
        }
        return UntiedModel(base, copies) if copies else base

    def _has_hash(self, base: Source, name: str) -> bool:
        """Does the base's tensor have the recorded hash? The order of gate and up in packed experts shows in nothing else."""
        expected = self.vector.manifest.tensors[name].base
        base.fetch(base.absent([name], False))
        return expected is None or stream_tensor(base, name, memoryview(bytearray(READ_BYTES))) == expected

    def _describe_all(self) -> dict[str, Tensor]:
        entries = self.vector.manifest.tensors
        tensors: dict[str, Tensor] = {}
        for name in (*self.base.tensors, *(n for n in entries if n not in self.base.tensors)):
            if (entry := entries.get(name)) is None:
                tensors[name] = self.base.tensors[name]
            elif (how := self._find_how(name, entry)) is not None:
                self._how[name] = how
                tensors[name] = self._describe(name, entry, how)
        return tensors

    def _find_how(self, name: str, entry: TensorEntry) -> Form | None:
        """Return how a tensor is read; None for one that is not there. Errors: MismatchError, RecipeError."""
        before = self.base.tensors.get(name)
        if entry.encoding != "whole" or entry.base is not None:
            self._check_header(name, entry, before)
        if self.weight == 0:
            return "base" if before is not None else None
        if entry.encoding == "absent":
            return "base"
        if entry.encoding == "whole" and (self.weight == 1 or before is None):
            return "values"
        if entry.encoding == "sparse" and self.weight == 1:
            return "patched"
        if entry.encoding not in EXACT:
            self._check_factor(name, entry)
            return "added"
        assert before is not None
        if entry.dtype not in dtypes.MERGEABLE or before.dtype not in dtypes.MERGEABLE:
            return "base"
        if entry.base is None:
            raise MismatchError(
                f"{self.label}: {name}: is in {self.base.label}, and was not in the base of {self.vector.label}; expected the "
                "base that the task vector was made of. Use it, or the weight 1, which gives the fine-tune's tensor."
            )
        if entry.shape != before.shape and (
            entry.shape[1:] != before.shape[1:] or not entry.shape or entry.shape[0] < before.shape[0]
        ):
            raise MismatchError(
                f"{self.label}: {name}: is {list(before.shape)} in {self.base.label} and {list(entry.shape)} in the task vector; "
                f"expected one shape, or further rows, for the weight {self.weight:g}. Use the weight 1."
            )
        return "mixed"

    def _check_header(self, name: str, entry: TensorEntry, before: Tensor | None) -> None:
        """Refuse a base that lacks a tensor or has another dtype or shape than the entry needs. Errors: MismatchError."""
        same_dtype = entry.encoding in ("absent", "sparse")
        expected = f"{entry.dtype if same_dtype else 'floating-point values'} {list(entry.shape)}"
        fits = before is not None and (
            entry.encoding == "whole"
            or (
                before.shape == entry.shape
                and (before.dtype == entry.dtype if same_dtype else before.dtype in dtypes.MERGEABLE)
            )
        )
        if not fits:
            found = "missing" if before is None else f"{before.dtype} {list(before.shape)}"
            raise MismatchError(
                f"{self.label}: {name}: is {found} in {self.base.label}, and the task vector needs {expected}; expected the base "
                f"that it was made of{self._made_of()}. Use that base."
            )

    def _check_factor(self, name: str, entry: TensorEntry) -> None:
        """Errors: RecipeError for a factor that becomes 0 or infinity in float32."""
        limits = np.finfo(np.float32)
        factor = entry.scale * self.weight
        if factor and not float(limits.smallest_normal) <= abs(factor) <= float(limits.max):
            raise RecipeError(
                f"{self.label}: {name}: is multiplied by {self.weight:g} and by the scale {entry.scale:g} of the task vector; "
                f"expected a product of magnitude {limits.smallest_normal:.1e} to {limits.max:.1e}. Choose a "
                f"{'smaller' if abs(factor) > 1 else 'larger'} weight."
            )

    def _describe(self, name: str, entry: TensorEntry, how: Form) -> Tensor:
        before = self.base.tensors.get(name)
        if how == "base":
            assert before is not None
            return before
        nominal = before.nominal if before is not None and before.shape == entry.shape else entry.dtype
        if how in ("values", "patched"):
            return TensorSpec(entry.dtype, entry.shape, entry.dtype if how == "values" else nominal)
        assert before is not None
        kinds = [before.dtype, entry.dtype if how == "mixed" else "F32"]
        kinds += [
            self.vector.files.tensors[s].dtype
            for p, s in entry.stored.items()
            if p in ("values", "left", "right")
        ]
        return TensorSpec("F64" if "F64" in kinds else "F32", entry.shape, nominal)

    def _made_of(self) -> str:
        base = self.vector.manifest.base
        return f", {base.id}{f'@{base.revision}' if base.revision else ''}" if base.id else ""

    def _add_notes(self) -> None:
        manifest = self.vector.manifest
        inner = self._adapted if self._adapted is not None else self.base
        self.notes += [*getattr(inner, "notes", ()), *self.vector.files.notes]
        unmeasured = [n for n, e in manifest.tensors.items() if e.base is None and e.encoding != "whole"]
        if unmeasured and not manifest.files:
            self.notes.append(
                f"{self.label}: {self.vector.label} has no hashes of its base; that {self.base.label} is the right base is not "
                "checked."
            )
        elif unmeasured:
            self.notes.append(
                f"{self.label}: {self.vector.label} has no hash of the base's {unmeasured[0]} and of "
                f"{count_of(len(unmeasured) - 1, 'other tensor')}; whether {self.base.label} is the right base is checked by "
                "names and shapes alone."
            )
        kept = [
            n
            for n, how in self._how.items()
            if how == "base" and manifest.tensors[n].encoding != "absent" and self.weight != 0
        ]
        if kept:
            self.notes.append(
                f"{self.label}: {kept[0]} and {count_of(len(kept) - 1, 'other tensor')} are not floating-point and stay the "
                f"base's, since the weight is {self.weight:g}; weight 1 takes the fine-tune's."
            )
        if manifest.added_tokens or manifest.chat_template:
            what = [f"{count_of(len(manifest.added_tokens), 'token')}"] if manifest.added_tokens else []
            what += ["a chat template"] if manifest.chat_template else []
            self.notes.append(
                f"{self.label}: {self.vector.label} was made with {' and '.join(what)} that {self.base.label} may not have; the "
                "tokenizer is the base's."
            )

    def allow_base_mismatch(self) -> None:
        """Let differences be added to a base with other values, with a note. What holds new values is refused still."""
        if not self.allows_mismatch:
            self.allows_mismatch = True
            self.notes.append(
                f"{self.label}: base_mismatch: allow: the differences of {self.vector.label} are added to {self.base.label} even "
                f"where it is not the base that they were made of{self._made_of()}. Nothing is known about the result."
            )

    # Checks

    def check(self, name: str) -> None:
        """Check the base's tensor and the stored parts, where that was not done yet. Errors: MismatchError, ModelError."""
        if name in self._good:
            return
        with self._lock:
            busy = self._busy.setdefault(name, threading.Lock())
        with busy:
            if name in self._good:
                return
            entry = self.vector.manifest.tensors[name]
            is_needed = entry.encoding in EXACT or not self.allows_mismatch
            if is_needed and entry.encoding != "absent":  # what the vector does not touch may be another
                found = self._base_hash(name)
                if found != entry.base:
                    raise MismatchError(
                        self._mismatch([name], f"it has the hash {found}, expected {entry.base}")
                    )
            self.vector.check(name)
            self._good.add(name)

    def _base_hash(self, name: str) -> str | None:
        """Return the hash of the base's tensor; None where the vector has no hash to compare it with."""
        if self.vector.manifest.tensors[name].base is None:
            return None
        source = self._compared
        paths, key = _places(source, name)
        with self._lock:
            if paths not in self._hashes:
                self._hashes[paths] = known_hashes(paths)
            known = self._hashes[paths]
        tensor = source.tensors[name]
        return known.get(
            f"xxh3 {tensor.dtype} {list(tensor.shape)} {key}",
            lambda: stream_tensor(source, name, self._buffer("hash", READ_BYTES)),
            self.vector.manifest.tensors[name].base,
        )

    def differing_tensors(self) -> list[str]:
        """Hash every tensor of the base that the vector was made of; return the names of those that differ."""
        entries = self.vector.manifest.tensors
        names = [n for n in entries if entries[n].base is not None and n in self._compared.tensors]
        self._compared.fetch(self._compared.absent(names, False))
        return [name for name in names if self._base_hash(name) != entries[name].base]

    def check_base(self) -> None:
        """Check every tensor of the base at once. Errors: MismatchError, which says how many differ and names the first."""
        if names := self.differing_tensors():
            raise MismatchError(
                self._mismatch(names, "their values differ" if len(names) > 1 else "its values differ")
            )

    def _mismatch(self, names: Sequence[str], found: str) -> str:
        entries = self.vector.manifest.tensors
        can_pass = all(entries[n].encoding not in EXACT or entries[n].encoding == "absent" for n in names)
        others = f" and {count_of(len(names) - 1, 'other tensor')}" if len(names) > 1 else ""
        allow = (
            " If you want it on this base all the same: base_mismatch: allow in the recipe, --allow-base-mismatch on the "
            "command line."
            if can_pass and not self.allows_mismatch
            else ""
        )
        return (
            f"{self.label}: {self.base.label} is not the base of {self.vector.label}: {names[0]}{others}: {found}. "
            f"Use the base that it was made of{self._made_of()}.{allow}"
        )

    # Reading

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if self._adapted is not None:
            self._check_adapter(name)
            self._adapted.read_into(name, offset, buffer)
            return
        how = self._how.get(name)
        if how is None or self.weight == 0:
            self.base.read_into(name, offset, buffer)
            return
        self.check(name)
        entry = self.vector.manifest.tensors[name]
        if how == "base":
            self.base.read_into(name, offset, buffer)
        elif how == "values":
            self.vector.files.read_into(entry.stored["values"], offset, buffer)
        else:
            dtype = np.dtype(dtypes.DTYPES[self.tensors[name].dtype].storage)
            compute = self._patch if how == "patched" else self._add if how == "added" else self._mix
            read_computed(offset, buffer, dtype, partial(compute, name))

    def _check_adapter(self, name: str) -> None:
        """Check the files of an adapter by their SHA-256, and the base's tensor, where that was not done yet."""
        if name in self._good:
            return
        self.vector.check_files()
        is_renamed = self._compared is not self.base  # the adapter's names are the base's
        for entry in self.vector.manifest.tensors if is_renamed else (name,):
            if entry in self.vector.manifest.tensors and entry in self._compared.tensors:
                self.check(entry)
        self._good.add(name)

    def _patch(self, name: str, first: int, out: np.ndarray) -> None:
        """Fill ``out`` with the base's bytes, and new values at the places of the indices."""
        self.base.read_into(name, first * out.itemsize, memoryview(out.view(np.uint8)))
        parts = self.vector.parts(name)
        begin, end = parts.within(first, first + out.size)
        if begin < end:
            out[parts.read("indices", begin, end - begin) - first] = parts.read("values", begin, end - begin)

    def _add(self, name: str, first: int, out: np.ndarray) -> None:
        """Fill ``out`` with the base plus the weighted difference."""
        entry = self.vector.manifest.tensors[name]
        parts = self.vector.parts(name)
        factor = entry.scale * self.weight
        if entry.encoding == "top_k":
            self._read_base(name, first, out)
            begin, end = parts.within(first, first + out.size)
            values = numbers(parts.read("values", begin, end - begin), parts.dtype("values")).astype(
                out.dtype
            )
            with np.errstate(all="ignore"):
                out[parts.read("indices", begin, end - begin) - first] += out.dtype.type(factor) * values
            self._check_finite(name, first, out)
            return
        if entry.encoding == "difference":
            added, dtype = parts.read("values", first, out.size), parts.dtype("values")
        else:
            added = np.frombuffer(self._buffer("difference", out.nbytes), out.dtype)
            dtype = "F64" if out.dtype == np.float64 else "F32"
            decode_difference(entry, parts, factor, first, added)
            factor = 1.0
        base, base_dtype = self._base_bytes(name, first, out.size)
        if not combine(True, base, base_dtype, added.view(np.uint8), dtype, factor, out):
            self._read_base(name, first, out)
            with np.errstate(all="ignore"):
                out += out.dtype.type(factor) * numbers(added, dtype)
            self._check_finite(name, first, out)

    def _mix(self, name: str, first: int, out: np.ndarray) -> None:
        """Fill ``out`` with ``W + weight * (F - W)``; rows that the base lacks are the fine-tune's."""
        entry = self.vector.manifest.tensors[name]
        parts = self.vector.parts(name)
        weight = out.dtype.type(self.weight)
        common = min(max(self.base.tensors[name].elements - first, 0), out.size)
        if entry.encoding == "whole":
            values = parts.read("values", first, out.size)
            out[common:] = numbers(values[common:], entry.dtype)
            base, base_dtype = self._base_bytes(name, first, common)
            if combine(
                False,
                base,
                base_dtype,
                values[:common].view(np.uint8),
                entry.dtype,
                self.weight,
                out[:common],
            ):
                return
        self._read_base(name, first, out[:common])
        begin, end = (0, common) if entry.encoding == "whole" else parts.within(first, first + out.size)
        start = first if entry.encoding == "whole" else begin
        new = numbers(parts.read("values", start, end - begin), entry.dtype).astype(out.dtype)
        places = (
            slice(0, common)
            if entry.encoding == "whole"
            else parts.read("indices", begin, end - begin) - first
        )
        with np.errstate(all="ignore"):
            out[places] += weight * (new - out[places])
        self._check_finite(name, first, out)

    def _base_bytes(self, name: str, first: int, count: int) -> tuple[np.ndarray, str]:
        """Return the raw bytes of elements of the base, in this thread's buffer, and their dtype."""
        dtype = self.base.tensors[name].dtype
        width = dtypes.DTYPES[dtype].bytes
        raw = self._buffer("base", count * width)
        self.base.read_into(name, first * width, raw)
        return np.frombuffer(raw, np.uint8), dtype

    def _read_base(self, name: str, first: int, out: np.ndarray) -> None:
        """Decode elements of the base into ``out``, float32 or float64."""
        raw, dtype = self._base_bytes(name, first, out.size)
        if out.dtype == np.float32:
            dtypes.decode_into(raw, dtype, out)
        else:
            out[:] = dtypes.decode(raw, dtype)

    def _check_finite(self, name: str, first: int, out: np.ndarray) -> None:
        with np.errstate(all="ignore"):
            if np.isfinite(out.sum()):  # quicker than checking each element
                return
        wrong = np.flatnonzero(~np.isfinite(out))
        if len(wrong):
            place = np.unravel_index(first + int(wrong[0]), self.tensors[name].shape)
            index = ", ".join(str(int(i)) for i in place)
            raise NonFiniteError(
                f"{name}[{index}]: is {out[wrong[0]]} in {self.label}; expected finite numbers. Choose a smaller weight, or fix "
                "the base or the task vector that has this value."
            )

    def _buffer(self, name: str, size: int) -> memoryview:
        """Return this thread's buffer of a name, which is reused: fresh pages are slow."""
        buffers: dict[str, memoryview] = self._scratch.__dict__
        if name not in buffers or len(buffers[name]) < size:
            buffers[name] = memoryview(bytearray(size))
        return buffers[name][:size]

    def read(self, name: str) -> np.ndarray:
        return read_tensor(self, name)

    # What it is made of

    @cached_property
    def differences(self) -> DifferenceView | None:
        """What is added to the base, for the tensors that are the base's float32 values plus a stored difference or the base's
        alone; None for an adapter."""
        if self._adapted is not None or self.weight == 0:
            return None
        entries = self.vector.manifest.tensors
        changed = {
            n: entries[n] for n, how in self._how.items() if how == "added" and self.tensors[n].dtype == "F32"
        }
        unchanged = {
            n: t
            for n, t in self.tensors.items()
            if self._how.get(n, "base") == "base" and n in self.base.tensors and t.dtype in dtypes.MERGEABLE
        }

        def check(name: str) -> None:
            if name in self._how:
                self.check(name)

        return DifferenceView(self.label, self.base, self.vector, self.weight, changed, unchanged, check)

    @property
    def parts(self) -> tuple[Source, ...]:
        """The sources that it is made of: its base, and the files of the vector."""
        return (self.base, self.vector.files)

    @property
    def innermost(self) -> Source:
        """The base without any adapter or vector."""
        inner: Source = getattr(self.base, "innermost", self.base)
        return inner

    def weighted(self, name: str) -> str:
        """Write the vector with its weight as a reference does, under the given name."""
        return name if self.weight == 1 else f"{self.weight!r}*{name}"

    @property
    def unties(self) -> bool:
        """Does the vector untie a tensor that the base ties?"""
        if self._adapted is not None:
            return self._adapted.unties
        return bool(self._untied()) or bool(getattr(self.base, "unties", False))

    def _untied(self) -> list[str]:
        """The names of tensors of the vector that the base ties to others."""
        copies = tied_copies(self.base.config, self.base.tensors)
        changed = [n for n, how in self._how.items() if how != "base"]
        return [name for name in changed if name in copies]

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The base's config, corrected for what the vector changes: an untied head, and rows of the vocabulary."""
        if self._adapted is not None:
            return self._adapted.config
        config = untied_config(self.base.config) if self._untied() else self.base.config
        for name, how in self._how.items():
            before = self.base.tensors.get(name)
            shape = self.tensors[name].shape if name in self.tensors else ()
            if how != "base" and before is not None and len(shape) == 2 and before.shape[0] != shape[0]:
                config = _with_rows(config, before.shape[0], shape[0])
        return config

    @property
    def directory(self) -> Path | None:
        return self.base.directory

    @property
    def origin(self) -> Origin | None:
        """None: it is two sources, see ``parts``."""
        return None

    @property
    def shards(self) -> Sequence[Shard]:
        return [*getattr(self.base, "shards", ()), *self.vector.shards]

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        names = list(tensors)
        if self._adapted is not None:
            return self._adapted.absent(names, side_files)
        entries = self.vector.manifest.tensors
        of_base = [n for n in names if n in self.base.tensors]
        of_vector = [s for n in names if n in entries for s in entries[n].stored.values()]
        return {
            **{f"base/{file}": size for file, size in self.base.absent(of_base, side_files).items()},
            **{f"vector/{file}": size for file, size in self.vector.files.absent(of_vector, False).items()},
        }

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        names = list(files)
        if self._adapted is not None:
            self._adapted.fetch(names, report)
            return
        self.base.fetch([f.removeprefix("base/") for f in names if f.startswith("base/")], report)
        self.vector.files.fetch([f.removeprefix("vector/") for f in names if f.startswith("vector/")], report)

    def identity(self) -> list[dict[str, Any]]:
        return [*self.base.identity(), *self.vector.identity()]

    def paths(self) -> list[Path]:
        return [*self.base.paths(), *self.vector.paths()]

    @property
    def held_bytes(self) -> int:
        inner = self._adapted if self._adapted is not None else self.base
        return inner.held_bytes + self.vector.held_bytes

    @property
    def reading_bytes(self) -> int:
        """What the base and the vector need; and the buffers for hashing, for the base's bytes, and for two blocks of values."""
        inner = self._adapted if self._adapted is not None else self.base
        return inner.reading_bytes + self.vector.reading_bytes + READ_BYTES + 4 * 8 * CHUNK

    def close(self) -> None:
        self.base.close()
        self.vector.close()

    def __enter__(self) -> EquippedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        changed = sum(how != "base" for how in self._how.values())
        return (
            f"<model {self.label}: {len(self.tensors)} tensors, {changed} of them changed by a task vector>"
        )


def allow_base_mismatch(sources: Iterable[Source]) -> None:
    """Let the task vectors of all models be added to bases with other values, see :class:`EquippedModel`."""
    waiting = list(sources)
    while waiting:
        source = waiting.pop()
        if isinstance(source, EquippedModel):
            source.allow_base_mismatch()
        inner = (getattr(source, key, None) for key in ("wrapped", "source", "base"))
        waiting += [one for one in inner if one is not None]


def _places(source: Source, name: str) -> tuple[tuple[Path, ...], str]:
    """Return the files that a tensor is read from, and what names it in them."""
    if isinstance(source, UntiedModel):
        return _places(source.wrapped, source.stored_name(name))
    if isinstance(source, FileModel):
        place = source.place_of(name)
        return ((place[0],), name) if place is not None else (tuple(source.paths()), name)
    if isinstance(source, RenamedModel) and isinstance(source.wrapped, FileModel):
        pieces = source.pieces(name)
        files = dict.fromkeys(path for p in pieces for n in p.names for path in _places(source.wrapped, n)[0])
        return tuple(files), " ".join(map(_run_text, pieces))
    if isinstance(source, DequantisedModel):
        return tuple(source.paths()), f"dequantised {name}"
    return (), name


def _run_text(piece: Piece) -> str:
    """Name what a piece is read from, so that no two pieces have one text."""
    run = f"{piece.name}[{piece.first}:{piece.first + piece.elements}]"
    return f"{run} of {' '.join(map(_run_text, piece.of))} turned, {piece.columns}" if piece.of else run


def _with_rows(config: Mapping[str, Any], before: int, now: int) -> Mapping[str, Any]:
    """Return a config with another size of the vocabulary, where it has the size before."""
    changed = {k: now if k == "vocab_size" and v == before else v for k, v in config.items()}
    for key in TEXT_CONFIGS:
        if isinstance(part := changed.get(key), Mapping):
            changed[key] = dict(_with_rows(part, before, now))
    return changed
