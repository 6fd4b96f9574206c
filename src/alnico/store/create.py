"""Makes a stored task vector of a fine-tune and its base: measures, encodes, writes the folder at the end."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from alnico._version import __version__
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.lineage import lineage_of
from alnico.checkpoint.lora_adapter import CONFIG, WEIGHTS, Adapter
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES, indices_of, split_into_shards
from alnico.checkpoint.source import Source, Tensor
from alnico.checkpoint.task_vectors.manifest import (
    MANIFEST,
    Manifest,
    ModelIdentity,
    StoredFile,
    TensorEntry,
    format_manifest,
    is_name,
    parse_manifest,
)
from alnico.errors import ModelError, RecipeError, ResourceError
from alnico.events import Advanced, Reading
from alnico.notebook import ResultTable, never_fails, result_html, result_line
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.blas import one_blas_thread
from alnico.numerics.digest import PieceHasher, TensorDigest
from alnico.numerics.sizes import format_size
from alnico.output.disk_space import check_space
from alnico.plan.memory import BASELINE_BYTES, BLAS_BYTES, BYTES_A_TENSOR
from alnico.run_options import DEFAULT_RUN, RunOptions
from alnico.store.adapter_layout import AdapterLayout
from alnico.store.adapter_manifest import adapter_manifest
from alnico.store.choose_encoding import EncodingTask, choose, choose_exact, choose_for_size
from alnico.store.encoders.encoded import EncodedTensor, SpooledPart
from alnico.store.encoders.low_rank import decompose
from alnico.store.encoding_costs import EncodingCost, TensorCosts, costs_of, table_of, to_decompose
from alnico.store.metadata import TEMPLATE, Details, Texts, base_name, folder_name, identity_of, texts_of
from alnico.store.model_pair import ModelPair, PairedTensor, find_adapter, open_adapter_pair, open_pair
from alnico.store.spool import Spool
from alnico.store.target import Target
from alnico.store.tensor_change import BLOCK, ChangeFacts, KeptBytes, TensorChange
from alnico.store.write_artifact import METADATA, STEM, ArtifactFolder, config_text, new_artifact
from alnico.threads import Crew

READ_BYTES = 1 << 20
WORK_BYTES = 16 * 8 * BLOCK
"""Memory of a thread that measures or encodes: arrays of a block in float64."""
MOST_HELD = 512 << 20
"""Most bytes of tensors that are held at a time, where the budget allows more."""

SPARSE_SHARE = 0.9
"""From this share of equal entries on, a task vector is stored exactly unless something else is asked for."""
SMALL_BYTES = 16_000_000
"""Up to this size a task vector is stored exactly unless something else is asked for."""

SUFFIXES = {
    "sparse": {"indices": ".indices", "values": ".values"},
    "whole": {"values": ""},
    "difference": {"values": ".difference"},
    "low_rank": {"left": ".left", "right": ".right"},
    "top_k": {"indices": ".top_k.indices", "values": ".top_k.differences"},
    "sign": {"bits": ".signs", "scales": ".sign_scales"},
    "int4": {"codes": ".codes", "scales": ".scales", "minimums": ".minimums"},
}
"""What is added to a tensor's name for each stored part."""


@dataclass(frozen=True)
class MeasuredChange:
    """What was measured before anything was encoded: over the entries and matrices of the whole model.

    ``equal_share`` is the share of entries whose bits are those of the base. ``effective_rank`` and ``full_rank`` are means over
    matrices that changed: over how many directions the squares are spread, and how many there are.
    """

    elements: int
    equal_share: float
    norm: float
    effective_rank: float | None = None
    full_rank: float | None = None

    def data(self) -> dict[str, Any]:
        return vars(self)


@dataclass(frozen=True)
class Created:
    """A task vector that was made, or that a dry run would make.

    ``path`` is None after a dry run. ``options`` says what each encoding would cost and lose, ``chosen`` why this one was taken.
    """

    path: Path | None
    manifest: Manifest
    measured: MeasuredChange
    options: tuple[EncodingCost, ...]
    chosen: str
    notes: tuple[str, ...] = field(default=(), repr=False)
    version: int | None = None
    """Its version, if it was added to a store."""

    @property
    def label(self) -> str:
        """Its name, with the version in a store."""
        return self.manifest.name if self.version is None else f"{self.manifest.name}@{self.version}"

    @property
    def encodings(self) -> dict[str, int]:
        """The number of tensors of each encoding."""
        return dict(sorted(Counter(t.encoding for t in self.manifest.tensors.values()).items()))

    @property
    def byte_size(self) -> int:
        """The bytes of the stored tensors."""
        return sum(t.byte_size for t in self.manifest.tensors.values())

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return {
            "path": None if self.path is None else str(self.path),
            "name": self.manifest.name,
            "version": self.version,
            "kind": self.manifest.kind,
            "byte_size": self.byte_size,
            "file_bytes": self.manifest.byte_size,
            "error": self.manifest.error,
            "encodings": self.encodings,
            "chosen": self.chosen,
            "measured": self.measured.data(),
            "options": [one.data() for one in self.options],
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return result_line(
            f"task vector {self.manifest.name}",
            f"in {self.path}" if self.path is not None else "not written",
            format_size(self.byte_size),
            ", ".join(f"{count} {name}" for name, count in self.encodings.items()),
            f"relative error {self.manifest.error:.3g}",
        )

    @never_fails
    def _repr_html_(self) -> str:
        rows = [[one.encoding, format_size(one.byte_size), one.error] for one in self.options]
        return result_html(
            f"Task vector {self.manifest.name}",
            ResultTable(("encoding", "size", "relative error"), rows),
            *self.notes,
            facts=[
                ("path", self.path or "not written"),
                ("size", format_size(self.byte_size)),
                ("stored", ", ".join(f"{count} {name}" for name, count in self.encodings.items())),
                ("error", self.manifest.error),
                ("why", self.chosen),
            ],
        )


@ieee_arithmetic()
def create_vector(
    finetuned: Any,
    base: Any,
    folder: Path,
    *,
    name: str,
    target: Target = Target(),  # noqa: B008 - frozen
    details: Details = Details(),  # noqa: B008
    run: RunOptions = DEFAULT_RUN,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    dry_run: bool = False,
) -> Created:
    """Write the task vector ``finetuned - base`` as a finished artifact into the new ``folder``, in one step.

    Both are models of any kind; ``finetuned`` may be a task vector or a sum of them. Each model is read once, within the memory
    of ``run``. The same inputs give the same bytes. A ``dry_run`` measures and writes nothing.

    Errors: RecipeError for a name or a target; ModelError, HubError; MismatchError for models that do not fit; NonFiniteError;
    ResourceError for memory, disk and a size that cannot be reached; OutputError, RunError.
    """
    if not is_name(name):
        raise RecipeError(
            f"name is {name!r}; expected 1 to 96 letters, digits, '.', '_' and '-', without '..'. Choose such a name."
        )
    adapter = find_adapter(finetuned, run)
    if adapter is not None:
        return _create_of_adapter(adapter, base, folder, name, target, details, run, dry_run)
    with new_artifact(folder) as (artifact, publish), open_pair(finetuned, base, run) as pair:
        pair.fetch(run)
        with Spool(artifact.path) as spool:
            texts = texts_of(pair.finetuned, pair.base)
            made = _Creation(pair, target, run, spool, (name, details, texts, max_shard_bytes))
            made.read_all()
            chosen, why = made.choose()
            manifest = made.manifest(chosen)
            if not dry_run:
                manifest = made.write(artifact, manifest, chosen)
        if not dry_run:
            publish()
    return Created(
        None if dry_run else folder,
        manifest,
        made.measured(),
        made.table(),
        why,
        tuple(dict.fromkeys([*pair.notes, *made.notes])),
    )


def _create_of_adapter(
    adapter: Adapter,
    base: Any,
    folder: Path,
    name: str,
    target: Target,
    details: Details,
    run: RunOptions,
    dry_run: bool,
) -> Created:
    """Take a LoRA adapter in as it is, measured on its base, if that is given."""
    with ExitStack() as stack:
        stack.enter_context(closing(adapter))
        if not target.is_default and not target.exact:
            raise RecipeError(
                f"{adapter.files.label} is a LoRA adapter, which is taken in as it is; {target} is given. Leave it out, or name the "
                f"adapted model, BASE+{adapter.files.label}, as the fine-tune."
            )
        files = adapter.files
        if not isinstance(files, FileModel):
            raise ModelError("the adapter is in memory; expected a folder or a repository. Save it first.")
        files.fetch(files.absent(list(files.tensors), True))
        artifact, publish = stack.enter_context(new_artifact(folder))
        own = identity_of(files, {}, folder_name(files))
        entries: dict[str, TensorEntry] = {}
        measured, notes, identity, texts = (
            MeasuredChange(0, 0.0, 0.0),
            tuple(files.notes),
            None,
            Texts({}, None),
        )
        if base is not None:
            pair = stack.enter_context(open_adapter_pair(adapter, base, run))
            pair.fetch(run)
            spool = stack.enter_context(Spool(artifact.path))
            texts = texts_of(files, pair.base)
            made = _Creation(pair, Target(), run, spool, (name, details, texts, DEFAULT_MAX_SHARD_BYTES))
            made.read_all()
            found = made.manifest({n: d.options[0] for n, d in made.done.items()})
            entries, identity, measured, notes = (
                dict(found.tensors),
                found.base,
                made.measured(),
                tuple(pair.notes),
            )
        manifest = adapter_manifest(
            files.location,
            name=name,
            base=identity,
            finetuned=replace(own, files={}, root=None, dtype=None),
            description=details.description,
            tasks=details.tasks,
            languages=details.languages,
            licence=details.licence,
        )
        manifest = replace(
            manifest,
            tensors=entries,
            training=details.training,
            evaluations=details.evaluations,
            scale=details.scale,
            added_tokens=texts.added_tokens,
        )
        if not dry_run:
            for file in manifest.files:
                artifact.copy(files.location / file, file)
            if texts.chat_template is not None:
                artifact.write_text(TEMPLATE, texts.chat_template)
                manifest = replace(manifest, chat_template=TEMPLATE)
            manifest = write_manifest(artifact, replace(manifest, files=artifact.files()))
            publish()
    why = "a LoRA adapter is taken in as it is"
    return Created(None if dry_run else folder, manifest, measured, (), why, notes)


@dataclass(frozen=True)
class _Done:
    """What is kept of a tensor: its facts, hashes, options and costs."""

    pair: PairedTensor
    facts: ChangeFacts
    options: Sequence[EncodedTensor]
    costs: TensorCosts
    base_hash: str | None
    own_hash: str | None


class _Creation:
    """One run: reads the tensors in batches, encodes them in threads, and chooses at the end."""

    def __init__(
        self,
        pair: ModelPair,
        target: Target,
        run: RunOptions,
        spool: Spool,
        words: tuple[str, Details, Texts, int],
    ) -> None:
        self._pair = pair
        self._name, self._details, self._texts, self._max_shard_bytes = words
        self._target = target
        self._run = run
        self._spool = spool
        self._layout = AdapterLayout(pair.base)
        self.done: dict[str, _Done] = {}
        self._to_decompose = to_decompose({p.name: p.stack for p in pair.tensors})
        self.notes: list[str] = []
        fixed = (
            BASELINE_BYTES
            + 2 * BYTES_A_TENSOR * len(pair.tensors)
            + sum(s.held_bytes + s.reading_bytes for s in (pair.finetuned, pair.base))
        )
        free = run.memory_bytes - fixed
        self._threads = max(min(run.threads, free // (4 * WORK_BYTES)), 1)
        self._capacity = free - self._threads * WORK_BYTES
        if self._capacity < WORK_BYTES:
            least = fixed + 2 * WORK_BYTES
            raise ResourceError(
                f"create needs {format_size(least)}; the budget is {format_size(run.memory_bytes)}. Raise memory to "
                f"{-(-least // (1 << 20))}MiB."
            )

    # -- reading

    def read_all(self) -> None:
        """Read, measure and encode all tensors. Errors: those of reading; ResourceError."""
        pairs = self._pair.tensors
        total = sum(p.finetuned.byte_size + (p.base.byte_size if p.base is not None else 0) for p in pairs)
        order = {name: i for i, name in enumerate(self._pair.base.tensors)}
        with one_blas_thread(), Crew(self._threads, self._run.watch) as crew:
            crew.report(Reading(len(pairs), total))
            for batch in self._batches():
                changes = [self._change(p) for p in batch]
                hashes: dict[tuple[str, str], str] = {}
                own = [
                    (self._pair.finetuned, p.own, c.own_bytes, p.name, "own")
                    for p, c in zip(batch, changes, strict=True)
                ]
                base = [
                    (self._pair.base, p.name, c.base_bytes, p.name, "base")
                    for p, c in sorted(
                        zip(batch, changes, strict=True), key=lambda pc: order.get(pc[0].name, 0)
                    )
                    if c.base_bytes is not None
                ]
                crew.run([(self._read_side, (side, hashes, crew)) for side in (own, base)])
                crew.run([(self._work, (p, c, hashes, crew)) for p, c in zip(batch, changes, strict=True)])
        self.done = {p.name: self.done[p.name] for p in pairs}

    def _batches(self) -> Iterator[list[PairedTensor]]:
        """Divide the tensors, in the order of the fine-tune's files, into batches that fit the memory."""
        capacity = min(self._capacity, MOST_HELD)
        batch: list[PairedTensor] = []
        held = 0
        for pair in self._pair.tensors:
            needed = 0 if self._is_spooled(pair) else _bytes_of(pair)
            if self._decomposes(pair):
                needed += self._decomposing_bytes(pair)
            if batch and held + needed > capacity:
                yield batch
                batch, held = [], 0
            batch.append(pair)
            held += needed
        if batch:
            yield batch

    def _is_spooled(self, pair: PairedTensor) -> bool:
        return _bytes_of(pair) > self._capacity // 2

    def _decomposes(self, pair: PairedTensor) -> bool:
        """May the tensor be decomposed? Errors: ResourceError where it must be and does not fit."""
        if pair.stack is None:
            return False
        kept = 0 if self._is_spooled(pair) else _bytes_of(pair)
        fits = kept + self._decomposing_bytes(pair) <= self._capacity
        target = self._target
        is_asked = target.tsv is not None or (target.encoding is not None and target.forced[0] == "low_rank")
        if is_asked and not fits and pair.base is not None:
            least = self._run.memory_bytes + kept + self._decomposing_bytes(pair) - self._capacity
            raise ResourceError(
                f"{pair.name} is decomposed as a whole matrix and needs {format_size(self._decomposing_bytes(pair))} at once; the "
                f"budget is {format_size(self._run.memory_bytes)}. Raise memory to {-(-least // (1 << 20))}MiB."
            )
        may = is_asked or target.size is not None or target.error is not None or target.is_default
        return fits and (may or pair.name in self._to_decompose)

    @staticmethod
    def _decomposing_bytes(pair: PairedTensor) -> int:
        assert pair.stack is not None
        count, rows, columns = pair.stack
        side = min(rows, columns)
        return 8 * (2 * rows * columns + 6 * side**2 + 4 * count * side * (rows + columns)) + BLAS_BYTES

    def _change(self, pair: PairedTensor) -> TensorChange:
        spool = self._spool if self._is_spooled(pair) else None
        kept = (
            KeptBytes(pair.finetuned.byte_size, spool),
            KeptBytes(pair.base.byte_size, spool) if pair.base is not None else None,
        )
        return TensorChange(
            pair.name,
            pair.finetuned,
            pair.base,
            kept=kept,
            stack=pair.stack,
            has_bits=self._pair.has_bits,
        )

    @staticmethod
    def _read_side(
        reads: Sequence[tuple[Source, str, KeptBytes, str, str]],
        hashes: dict[tuple[str, str], str],
        crew: Crew,
    ) -> None:
        """Read the tensors of one model, in order, and hash them."""
        buffer = np.empty(READ_BYTES, np.uint8)
        for source, stored, kept, name, side in reads:
            tensor: Tensor = source.tensors[stored]
            hasher = PieceHasher(digest := TensorDigest(tensor.dtype, tensor.shape, tensor.byte_size), 0)
            for offset in range(0, tensor.byte_size, READ_BYTES):
                crew.check()
                part = buffer[: min(READ_BYTES, tensor.byte_size - offset)]
                source.read_into(stored, offset, memoryview(part))
                hasher.update(memoryview(part))
                kept.write(offset, part)
            hasher.finish()
            hashes[name, side] = digest.result()
            crew.report(Advanced(name, tensor.byte_size))

    def _work(
        self, pair: PairedTensor, change: TensorChange, hashes: Mapping[tuple[str, str], str], crew: Crew
    ) -> None:
        """Measure and encode one tensor."""
        crew.check()
        change.measure()
        task = EncodingTask(
            self._target,
            self._spool,
            self._layout.holds,
            lambda one: one.stack is not None and self._decomposes(pair),
            crew.check,
            self._pair.adapter is not None,
        )
        options = task.encode(change)
        crew.check()
        found = None
        if (
            pair.name in self._to_decompose
            and change.has_difference
            and change.facts.norm
            and self._decomposes(pair)
        ):
            assert pair.stack is not None
            found = decompose(change, max(min(pair.stack[1:]) // 4, 1), crew.check)
        done = _Done(
            pair,
            change.facts,
            options,
            costs_of(change, found) if self._pair.adapter is None else TensorCosts(0, {}, False),
            hashes.get((pair.name, "base")),
            hashes[pair.name, "own"] if self._pair.has_bits else None,
        )
        with crew.lock:
            self.done[pair.name] = done

    # -- choosing

    def choose(self) -> tuple[dict[str, EncodedTensor], str]:
        """Choose the encoding of each tensor; say why. Errors: ResourceError for a size that cannot be reached."""
        options = {name: done.options for name, done in self.done.items()}
        if self._target.size is not None:
            return self._choose_for_size(
                options
            ), f"the least error within {format_size(self._target.size_bytes)}"
        if not self._target.is_default:
            return choose(options), f"{self._target} was asked for"
        exact = choose_exact(options)
        size = sum(one.byte_size for one in exact.values())
        equal = self.measured().equal_share
        if not self._pair.has_bits:
            return choose(options), "a sum of task vectors: within a relative error of 0.01 in each tensor"
        if equal >= SPARSE_SHARE:
            return exact, f"exact, as {equal:.1%} of the entries are those of the base"
        if size <= SMALL_BYTES:
            return exact, f"exact, as that takes {format_size(size)}"
        chosen = choose(options)
        if sum(one.byte_size for one in chosen.values()) == size:
            return exact, "exact, as no encoding within a relative error of 0.01 is smaller"
        return (
            chosen,
            f"a relative error of at most 0.01 in each tensor; exact would take {format_size(size)}",
        )

    def _choose_for_size(self, options: Mapping[str, Sequence[EncodedTensor]]) -> dict[str, EncodedTensor]:
        """Leave room for headers, the manifest and its side files, which depend on the choice."""
        size = self._target.size_bytes
        room = size
        for _ in range(8):
            chosen = choose_for_size(options, room)
            total = self._total_bytes(chosen)
            if total <= size:
                return chosen
            room = sum(one.byte_size for one in chosen.values()) - (total - size)
        smallest = self._total_bytes({name: ways[0] for name, ways in options.items()})
        raise ResourceError(
            f"size is {format_size(size)}; the smallest encodings of these tensors take {format_size(smallest)} with headers and "
            "manifest. Give a larger size."
        )

    def _total_bytes(self, chosen: Mapping[str, EncodedTensor]) -> int:
        """The size of all files: tensors, headers, indices, config, template, and the manifest with its hashes."""
        sizes: dict[str, int] = {}
        plain, factors = self._files_of(chosen)
        for parts, single in ((plain, None), (factors, WEIGHTS[0])):
            described = [(name, part.dtype, part.shape) for name, part in parts.items()]
            shards = split_into_shards(described, self._max_shard_bytes, single, STEM, metadata=METADATA)
            sizes |= {shard.name: shard.byte_size for shard in shards if parts}
            sizes |= {name: len(text.encode()) for name, text in indices_of(shards).items()}
        manifest = self.manifest(chosen)
        if (adapter := self._layout.adapter(chosen, manifest.base.id)) is not None:
            sizes[CONFIG] = len(config_text(adapter).encode())
        if self._texts.chat_template is not None:
            sizes[TEMPLATE] = len(self._texts.chat_template.encode())
        files = {name: StoredFile(size, "0" * 64) for name, size in sizes.items()}
        template = TEMPLATE if TEMPLATE in sizes else None
        whole = replace(manifest, files=files, chat_template=template)
        return sum(sizes.values()) + len(format_manifest(whole).encode())

    def _files_of(
        self, chosen: Mapping[str, EncodedTensor]
    ) -> tuple[dict[str, SpooledPart], dict[str, SpooledPart]]:
        """The stored tensors by their names: those of alnico's files, and those of an adapter. Errors: RecipeError."""
        plain: dict[str, SpooledPart] = {}
        factors: dict[str, SpooledPart] = {}
        for name, one in chosen.items():
            for part, stored in self._names(name, one).items():
                files = factors if one.is_peft else plain
                if stored in files:
                    raise RecipeError(
                        f"{stored}: two tensors of the task vector would be stored under this name; expected one. Choose another "
                        "encoding, or rename the tensor."
                    )
                files[stored] = one.parts[part]
        return plain, factors

    def _names(self, name: str, one: EncodedTensor) -> dict[str, str]:
        """The name in the files of each part of a tensor."""
        if one.is_peft:
            left, right = self._layout.module(name, one).names
            return {"left": left, "right": right}
        return {part: name + SUFFIXES[one.encoding][part] for part in one.parts}

    # -- what it says

    def measured(self) -> MeasuredChange:
        """Return what was measured over all tensors."""
        done = list(self.done.values())
        elements = sum(d.facts.elements for d in done)
        changed = sum(d.facts.changed for d in done)
        ranks = [
            (d.facts.rank, min(d.pair.stack[1:])) for d in done if d.facts.rank is not None and d.pair.stack
        ]
        return MeasuredChange(
            elements,
            1 - changed / elements if elements else 1.0,
            math.hypot(*(d.facts.norm for d in done)),
            float(np.mean([r for r, _ in ranks])) if ranks else None,
            float(np.mean([full for _, full in ranks])) if ranks else None,
        )

    def table(self) -> tuple[EncodingCost, ...]:
        """Return what each encoding would cost and lose; nothing for an adapter, which is taken in as it is."""
        if self._pair.adapter is not None:
            return ()
        return table_of([d.costs for d in self.done.values()], [d.facts.norm**2 for d in self.done.values()])

    @functools.cached_property
    def _identities(self) -> tuple[ModelIdentity, ModelIdentity]:
        """Say which models the fine-tune and the base are, when all of them was read."""
        pair, texts = self._pair, self._texts
        name = base_name(pair.base, lineage_of(pair.finetuned), self._details.base_id)
        base = identity_of(pair.base, pair.files("base"), name, texts.base_vocabulary)
        if not pair.has_bits:
            return ModelIdentity(), base
        name = folder_name(pair.finetuned)
        return identity_of(pair.finetuned, pair.files("finetuned"), name, texts.own_vocabulary), base

    def manifest(self, chosen: Mapping[str, EncodedTensor]) -> Manifest:
        """Return the manifest, without its files."""
        pair, details = self._pair, self._details
        own, base = self._identities
        return Manifest(
            name=self._name,
            base=base,
            finetuned=own,
            tensors={n: self._entry(self.done[n], one) for n, one in chosen.items()},
            description=details.description,
            tasks=details.tasks,
            languages=details.languages,
            licence=details.licence if details.licence is not None else own.licence,
            training=details.training,
            evaluations=details.evaluations,
            scale=details.scale,
            added_tokens=self._texts.added_tokens,
            left_out=dict(pair.left_out),
            producer=f"alnico {__version__}",
        )

    def _entry(self, done: _Done, one: EncodedTensor) -> TensorEntry:
        tensor, facts = done.pair.finetuned, done.facts
        sketch = tuple(s.stored() for s in facts.sketch) if facts.sketch is not None else ()
        is_lost = facts.norm > 0 and not one.is_exact and one.encoding != "adapter"
        return TensorEntry(
            encoding=one.encoding,
            dtype=tensor.dtype if self._pair.has_bits else tensor.nominal,
            shape=tensor.shape,
            base=done.base_hash,
            finetuned=done.own_hash,
            stored=self._names(done.pair.name, one),
            digests={part: p.digest for part, p in one.parts.items()},
            scale=one.scale,
            error=one.lost / facts.norm if is_lost else 0.0,
            norm=facts.norm,
            byte_size=one.byte_size,
            sketch=sketch,
        )

    def write(
        self,
        artifact: ArtifactFolder,
        manifest: Manifest,
        chosen: Mapping[str, EncodedTensor],
    ) -> Manifest:
        """Write all files; return the manifest with them. Errors: RunError; ModelError for names that collide."""
        plain, factors = self._files_of(chosen)
        check_space(artifact.path, sum(part.size for part in (*plain.values(), *factors.values())))
        artifact.write_tensors(plain, self._spool, self._max_shard_bytes)
        adapter = self._layout.adapter(chosen, manifest.base.id)
        if adapter is not None:
            artifact.write_adapter(factors, self._spool, adapter)
        texts = self._texts
        if texts.chat_template is not None:
            artifact.write_text(TEMPLATE, texts.chat_template)
        files_of: dict[str, StoredFile] = artifact.files()
        finished = replace(
            manifest,
            files=files_of,
            chat_template=TEMPLATE if texts.chat_template is not None else None,
        )
        return write_manifest(artifact, finished)


def write_manifest(artifact: ArtifactFolder, manifest: Manifest) -> Manifest:
    """Write the manifest, checked as its reader checks it; return it as it is read. Errors: RecipeError; RunError."""
    text = format_manifest(manifest)
    read = parse_manifest(json.loads(text), str(artifact.path / MANIFEST))
    artifact.write_text(MANIFEST, text)
    return read


def _bytes_of(pair: PairedTensor) -> int:
    return pair.finetuned.byte_size + (pair.base.byte_size if pair.base is not None else 0)
