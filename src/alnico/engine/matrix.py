"""Makes one output tensor from whole matrices: in float64, in one thread, rounded once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from alnico.checkpoint.adapter_changes import is_transposed_linear
from alnico.checkpoint.source import Source
from alnico.devices import CPU, Device
from alnico.engine.arena import Arena
from alnico.engine.blocks import blocks
from alnico.engine.factor_cache import FactorFiles
from alnico.engine.matrix_gpu import MatrixGpu
from alnico.engine.matrix_store import KeptArrays, MatrixNote, MatrixStore
from alnico.engine.mix import NOTHING, refuse_output, refuse_tensor
from alnico.errors import NonFiniteError
from alnico.kernels.choice import kernel_for
from alnico.kernels.constants import CODES
from alnico.kernels.mix_kernel import MixKernel
from alnico.methods.base import combine
from alnico.numerics.arrays import AnyArray, like, to_numpy
from alnico.numerics.decompositions import leading_vectors
from alnico.numerics.digest import PieceHasher, TensorDigest
from alnico.numerics.dtypes import decode
from alnico.numerics.low_rank import Decomposed
from alnico.plan.job import Input, Job, Protection

ROUNDING = combine((1.0,))


def rounding_kernel() -> MixKernel:
    """Describe the kernel that rounds float64 numbers to the output dtype."""
    return MixKernel(ROUNDING.mix, 1, False, ("numbers",), "float64")


class JobMatrices:
    """The matrices of one job, read when its method requests them. With ``digests``, one per tensor, each
    tensor is hashed once. ``mix`` mixes the elements of a job that is protected into float64 numbers. ``store`` keeps what can serve later merges in memory, ``factors`` in files. ``note`` receives what the method has to say,
    ``advance`` the bytes of output that are as good as done, which add up to the tensor's. On a GPU the matrices of a method
    that runs there are torch's; they are read, rounded and written on the processor."""

    def __init__(
        self,
        job: Job,
        sources: Sequence[Source],
        digests: Sequence[TensorDigest],
        arena: Arena,
        block_elements: int,
        check: Callable[[], None],
        *,
        store: MatrixStore | None = None,
        factors: FactorFiles | None = None,
        note: Callable[[MatrixNote], None] = lambda _: None,
        advance: Callable[[int], None] = lambda _: None,
        device: Device = CPU,
        mix: Callable[[Job, np.ndarray], None] | None = None,
    ) -> None:
        self.job = job
        self._mix = mix
        self.models = len(job.inputs)
        self.is_transposed = is_transposed_linear(job.inputs[0].name, sources[job.inputs[0].model].config)
        self._note = note
        self._count, self._rows, self._columns = job.stack
        self.shape = self.whole = self._rows, self._columns
        self._matrix = 0
        self._sources = sources
        self._digests: dict[Input, list[TensorDigest]] = {}
        for tensor, digest in zip(job.read, digests, strict=False):
            self._digests.setdefault(tensor, []).append(digest)
        self._arena = arena
        self._block = block_elements
        self._check = check
        self._store = store
        self._factors = factors
        self._hashes: dict[tuple[Input, int], str] = {}
        self._notes: list[MatrixNote] | None = None
        runs_there = device.is_gpu and job.matrix is not None and job.matrix.runs_on_gpu
        self._gpu = MatrixGpu(device) if runs_there else None
        self._progress = _Progress(advance, job.byte_size, self._count, self.models)

    @property
    def is_on_gpu(self) -> bool:
        """Are its matrices on a GPU?"""
        return self._gpu is not None

    def note(self, text: str, *values: int | float) -> None:
        note = MatrixNote(text, values)
        self._note(note)
        if self._notes is not None:
            self._notes.append(note)

    def value(self, model: int) -> AnyArray:
        matrix = self._read_matrix(self.job.inputs[model])
        if self.job.base is not None:
            self._read_matrix(self.job.base, subtract_from=matrix)
            flat = matrix.reshape(-1)
            are_finite = np.isfinite if self._gpu is None else self._gpu.all_finite
            for start, stop in blocks((0, self._rows * self._columns), self._block):
                if not are_finite(flat[start:stop]).all():
                    raise NonFiniteError(
                        f"{self.job.name}: the difference of {self._sources[self.job.inputs[model].model].label} and the base "
                        "is beyond float64; expected a finite difference. Divide the tensor by a number in all models, or leave "
                        "it out with a filter."
                    )
        return matrix

    def side(self, kind: str, model: int) -> AnyArray:
        assert self.job.matrix is not None
        side = self.job.sides[self.job.matrix.sides.index(kind) * self.models + model]
        shape = self._sources[side.model].tensors[side.name].shape
        return self._read(side).reshape(shape)

    def leading(self, model: int, count: int) -> Decomposed:
        def decompose() -> tuple[AnyArray, ...]:
            found = leading_vectors(self.value(model), count)
            return found.left, found.values, found.right

        left, values, right = self.kept(("singular vectors", count), (model,), decompose)
        self._progress.decomposed(model)
        return Decomposed(left, like(left, values), right)

    def kept(
        self, name: Hashable, models: Sequence[int], make: Callable[[], tuple[AnyArray, ...]]
    ) -> tuple[AnyArray, ...]:
        if self._gpu is None:
            return self._kept(name, models, make)
        if self._store is None and self._factors is None:
            return tuple(map(self._gpu.compact, make()))
        return tuple(map(self._gpu.placed, self._kept(name, models, make)))

    def _kept(
        self, name: Hashable, models: Sequence[int], make: Callable[[], tuple[AnyArray, ...]]
    ) -> tuple[np.ndarray, ...]:
        """Return arrays out of the store or the files, or made and put there."""
        if self._store is None and self._factors is None:
            return tuple(map(_compact, make()))
        job = self.job
        read = [*(job.inputs[i] for i in models), *([job.base] if job.base is not None else [])]
        # The key holds the source itself, so that no other object gets its identity.
        key = (
            name,
            job.base is None,
            tuple((self._sources[t.model], t.name) for t in read),
            job.stack,
            self._matrix,
            self._gpu.bits_from if self._gpu is not None else "",
        )
        kept = self._store.get(key) if self._store is not None else None
        if kept is not None:
            self._say_again(kept, models)
            return kept.arrays
        if self._factors is not None:
            file_key = self._content_key(name, read)
            kept = self._factors.get(file_key, self._most_bytes())
            if kept is not None:
                self._say_again(kept, models)
            else:
                kept = self._make_kept(models, make)
                if self._content_key(name, read, again=True) == file_key:  # nobody has changed the files
                    self._factors.put(file_key, kept)
        else:
            kept = self._make_kept(models, make)
        if self._store is not None:
            self._store.put(key, kept)
        return kept.arrays

    def _say_again(self, kept: KeptArrays, models: Sequence[int]) -> None:
        """Say what was said when the arrays were computed."""
        for note in kept.notes:
            self.note(note.text, *(models[v] if isinstance(v, int) else v for v in note.values))

    def _make_kept(self, models: Sequence[int], make: Callable[[], tuple[AnyArray, ...]]) -> KeptArrays:
        """Compute arrays, with the notes that are made meanwhile."""
        before, self._notes = self._notes, []
        try:
            arrays = tuple(_compact(to_numpy(array)) for array in make())
            notes = [
                MatrixNote(n.text, tuple(models.index(v) if isinstance(v, int) else v for v in n.values))
                for n in self._notes
            ]
        finally:
            if before is not None:
                before += self._notes
            self._notes = before
        return KeptArrays(arrays, tuple(notes))

    def _content_key(self, name: Hashable, read: Sequence[Input], again: bool = False) -> str:
        """The key of what is computed from the matrices of some tensors, by their content."""
        assert self._factors is not None
        has_base = "without a base" if self.job.base is None else "with a base"
        what = f"{name!r} {has_base} {'inputs x outputs' if self.is_transposed else 'outputs x inputs'}"
        if self._gpu is not None:  # the bits of one device are never those of another
            what = f"{what} {self._gpu.bits_from}"
        return self._factors.key(
            what, [(t.dtype, self._content_hash(t, again)) for t in read], (self._rows, self._columns)
        )

    def _content_hash(self, tensor: Input, again: bool) -> str:
        """The SHA-256 of the bytes of a matrix; ``again``: as they are now."""
        place = tensor, self._matrix
        if again or place not in self._hashes:
            content = hashlib.sha256()
            first = self._matrix * self._rows * self._columns
            for start, stop in blocks((first, first + self._rows * self._columns), self._block):
                self._check()
                (raw,) = self._arena.views([(stop - start) * tensor.width])
                self._sources[tensor.model].read_into(tensor.name, start * tensor.width, memoryview(raw))
                content.update(raw)
            if again:
                return content.hexdigest()
            self._hashes[place] = content.hexdigest()
        return self._hashes[place]

    def _most_bytes(self) -> int:
        """The most bytes that the method may hold."""
        job = self.job
        assert job.matrix is not None
        return 8 * job.matrix.numbers(self._rows, self._columns, self.models, *job.matrix.arguments)

    def make(self, write: Callable[[int, memoryview], None]) -> None:
        """Compute the tensor and pass its bytes to ``write``, in order, with their offsets. Errors:
        NonFiniteError; those of the method."""
        job = self.job
        assert job.matrix is not None
        are_equal = job.matrix.fixes_equal_inputs and self._are_equal()
        for matrix in range(self._count):
            self._matrix = matrix
            self._progress.begin(matrix)
            if are_equal:
                made, base = self._read_matrix(job.inputs[0]), None
            else:
                made, base = job.matrix.make(self, *job.matrix.arguments), job.base
            if job.protection is not None:
                base = None if job.mixed is not None else base
                made, base = self._protected(made, base, job.protection), job.protection.anchor
            self._write(made, write, base)
        for tensor in list(self._digests):
            self._read(tensor, only_hash=True)

    def mixed(self) -> np.ndarray:
        """Return the matrix that a protected job mixes element by element, in float64, its base included."""
        inner = self.job.mixed
        assert inner is not None
        assert self._mix is not None
        values = np.empty((self._rows, self._columns))
        self._mix(inner, values)
        return values

    def _protected(self, made: AnyArray, base: Input | None, protection: Protection) -> np.ndarray:
        """Return what is added to the protected tensor: the difference of a merge to it, without what acts on its inputs.

        ``made`` is added to the ``base``, or is the merge itself.
        """
        from alnico.numerics import null_space  # most merges protect nothing

        changes = np.array(to_numpy(made), np.float64, order="C")
        del made
        flat = changes.reshape(-1)
        for start, stop in blocks((0, flat.size), self._block):
            self._check()
            if base is not None and base != protection.anchor:
                flat[start:stop] += self._elements(base, start, stop)
            if base != protection.anchor:
                flat[start:stop] -= self._elements(protection.anchor, start, stop)
        gram = self._read(protection.gram)
        side = math.isqrt(gram.size)
        directions = null_space.leading_directions(gram.reshape(side, side), protection.energy)
        self._check()
        null_space.remove_directions(changes, directions, is_transposed=protection.is_transposed)
        return changes

    def parts(self) -> list[np.ndarray]:
        """Return each model's part of the result, in the shape of the tensor, in float64. Errors: as :meth:`make`."""
        job = self.job
        assert job.matrix is not None
        assert job.matrix.parts is not None
        parts = [np.empty((self._count, self._rows, self._columns)) for _ in range(self.models)]
        for matrix in range(self._count):
            self._matrix = matrix
            for part, made in zip(parts, job.matrix.parts(self, *job.matrix.arguments), strict=True):
                part[matrix] = to_numpy(made)
        return [part.reshape(job.shape) for part in parts]

    def _write(self, result: AnyArray, write: Callable[[int, memoryview], None], base: Input | None) -> None:
        """Add the base, if there is one, round, and pass the bytes on."""
        job, kernel, width = self.job, kernel_for(rounding_kernel()), self.job.width
        codes, factor = np.array([CODES["F64"]], np.int64), np.ones(1)
        rows = max(self._block // max(self._columns, 1), 1)
        before = self._matrix * self._rows * self._columns
        for first in range(0, self._rows, rows):
            self._check()
            part = np.ascontiguousarray(to_numpy(result[first : first + rows]), np.float64).reshape(-1)
            start = before + first * self._columns
            if base is not None:
                own = self._elements(base, start, start + part.size)
                part = np.where(part == 0, own, own + part)
            out = np.empty(part.size * width, np.uint8)
            bad = kernel(
                (part.view(np.uint8),), codes, NOTHING, 0, out, CODES[job.dtype], start, True, factor
            )
            if bad >= 0:
                refuse_output(job, start, out)
            write(start * width, memoryview(out))
            self._progress.written((start + part.size) * width)

    def _read_matrix(self, tensor: Input, subtract_from: AnyArray = None) -> AnyArray:
        """Read one matrix of a tensor as float64, or subtract it from another. Errors: NonFiniteError."""
        size = self._rows * self._columns
        flat = self._empty(size) if subtract_from is None else subtract_from.reshape(-1)
        hasher = self._hasher(tensor) if self._count == 1 else None
        self._fill(flat, tensor, self._matrix * size, hasher, subtracts=subtract_from is not None)
        if hasher is not None:
            hasher.finish()
        return flat.reshape(self._rows, self._columns)

    def _empty(self, numbers: int) -> AnyArray:
        return np.empty(numbers) if self._gpu is None else self._gpu.empty(numbers)

    def _fill(
        self, flat: AnyArray, tensor: Input, first: int, hasher: _Hashers | None, *, subtracts: bool = False
    ) -> None:
        """Read as many elements from ``first`` on as ``flat`` has, or subtract them. Errors: NonFiniteError."""
        are_finite: AnyArray = True
        size = math.prod(flat.shape)
        for start, stop in blocks((0, size), self._block):
            self._check()
            if self._gpu is None:
                values: AnyArray = self._elements(tensor, first + start, first + stop, hasher)
            else:
                raw = self._raw(tensor, first + start, first + stop, hasher)
                values = self._gpu.decoded(raw, tensor.dtype)
                are_finite = self._gpu.all_finite(values) & are_finite
            if subtracts:
                flat[start:stop] -= values
            else:
                flat[start:stop] = values
        if not are_finite:  # read again, to say where
            for start, stop in blocks((first, first + size), self._block):
                self._elements(tensor, start, stop)

    def _elements(self, tensor: Input, start: int, stop: int, hasher: _Hashers | None = None) -> np.ndarray:
        """Read elements of a tensor in float64. Errors: NonFiniteError."""
        raw = self._raw(tensor, start, stop, hasher)
        decoded: np.ndarray = decode(raw, tensor.dtype).astype(np.float64, copy=False)
        if not np.isfinite(decoded).all():
            source = self._sources[tensor.model]
            refuse_tensor(tensor, source.label, source.tensors[tensor.name].shape, start, raw)
        return decoded

    def _raw(self, tensor: Input, start: int, stop: int, hasher: _Hashers | None = None) -> np.ndarray:
        """Read the bytes of some elements into this thread's buffer."""
        raw: np.ndarray
        (raw,) = self._arena.views([(stop - start) * tensor.width])
        self._sources[tensor.model].read_into(tensor.name, start * tensor.width, memoryview(raw))
        if hasher is not None:
            hasher.update(memoryview(raw))
        return raw

    def _hasher(self, tensor: Input) -> _Hashers | None:
        """Return what hashes a tensor that is read whole for the first time."""
        digests = self._digests.pop(tensor, [])
        return _Hashers(digests) if digests else None

    def _are_equal(self) -> bool:
        """Do all models have the same bytes? If not, most differ in the first block."""
        inputs = self.job.inputs
        if len({i.dtype for i in inputs}) > 1:
            return False
        width = inputs[0].width
        for start, stop in blocks((0, self.job.elements), self._block):
            self._check()
            size = (stop - start) * width
            first, other = self._arena.views([size, size])
            self._sources[inputs[0].model].read_into(inputs[0].name, start * width, memoryview(first))
            for tensor in inputs[1:]:
                self._sources[tensor.model].read_into(tensor.name, start * width, memoryview(other))
                if not np.array_equal(first, other):
                    return False
        return True

    def _read(self, tensor: Input, only_hash: bool = False) -> AnyArray:
        """Read a tensor as float64, flat. Errors: NonFiniteError."""
        elements = tensor.byte_size // tensor.width
        values = self._empty(0 if only_hash else elements)
        hasher = self._hasher(tensor)
        if only_hash:
            for start, stop in blocks((0, elements), self._block):
                self._check()
                self._elements(tensor, start, stop, hasher)
        else:
            self._fill(values, tensor, 0, hasher)
        if hasher is not None:
            hasher.finish()
        return values


def _compact(array: np.ndarray) -> np.ndarray:
    """Return the array without the memory of a larger one that it is part of, in one order of its elements.

    With and without a store, so that arrays out of one have the same layout, and products with them the same bits.
    """
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        return np.ascontiguousarray(array)
    is_part = isinstance(array.base, np.ndarray) and array.base.nbytes > array.nbytes
    return array.copy(order="K") if is_part else array


class _Progress:
    """Spreads the bytes of a tensor over the decompositions of its matrices, which take nearly all the time."""

    DECOMPOSED = 0.9
    """The share of a matrix that is done when all models are decomposed."""

    def __init__(self, advance: Callable[[int], None], byte_size: int, matrices: int, models: int) -> None:
        self._advance = advance
        self._size = byte_size
        self._matrices = max(matrices, 1)
        self._models = models
        self._decomposed: set[int] = set()
        self._done = self._matrix = 0

    def begin(self, matrix: int) -> None:
        self._matrix = matrix
        self._decomposed.clear()

    def decomposed(self, model: int) -> None:
        self._decomposed.add(model)
        share = self.DECOMPOSED * len(self._decomposed) / self._models
        self._reach(int(self._size * (self._matrix + share) / self._matrices))

    def written(self, byte_size: int) -> None:
        """So many bytes of the tensor are written."""
        matrix = self._size / self._matrices
        share = (byte_size - self._matrix * matrix) / matrix if matrix else 1.0
        least = self.DECOMPOSED if self._decomposed else 0.0
        share = min(max(least + (1 - least) * share, 0.0), 1.0)
        done = self._size if byte_size >= self._size else int(matrix * (self._matrix + share))
        self._reach(done)

    def _reach(self, done: int) -> None:
        if done > self._done:
            self._advance(done - self._done)
            self._done = done


class _Hashers:
    """Hashes a tensor for all of its digests at once: one tensor can be several inputs."""

    def __init__(self, digests: list[TensorDigest]) -> None:
        self._digests = digests
        self._first = PieceHasher(digests[0], 0)

    def update(self, data: memoryview) -> None:
        self._first.update(data)

    def finish(self) -> None:
        self._first.finish()
        for same in self._digests[1:]:
            same.pieces = self._digests[0].pieces
