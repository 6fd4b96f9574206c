"""Compares a finished merge with the hashes in its lock, and on request with its inputs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from alnico.checkpoint.file_arguments import merge_path
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.lineage import LOCK
from alnico.checkpoint.lora_adapter import CONFIG
from alnico.checkpoint.open_adapter import open_adapter
from alnico.checkpoint.open_model import open_headers, open_model
from alnico.checkpoint.quantised.dequantised_model import DequantisedModel
from alnico.checkpoint.remote.open_folder import is_url
from alnico.checkpoint.signatures import check_signature
from alnico.devices import DEFAULT_DEVICE
from alnico.errors import AlnicoError, ModelError, UncheckedError, VerificationError
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.notebook import ResultTable, names_text, never_fails, result_html, result_line
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.numbers import finite_number, whole_number
from alnico.numerics.sizes import count_of, format_size
from alnico.output.hashes import hash_file, hash_tensors
from alnico.output.lock import UNLOCKED, Lock, describe_tensor, differing_tensors, listed_files, read_lock
from alnico.output.validate import check_folder
from alnico.run_options import DEFAULT_BUDGET_BYTES, DEFAULT_DOWNLOAD_CACHE_BYTES, RunOptions, Size
from alnico.threads import Crew
from alnico.verification.devices import on_device_of
from alnico.verification.output_at_url import output_at_url
from alnico.verification.replan import ReplanOptions
from alnico.verification.sample import Recomputed, recompute

SHOWN = 5
"""Most files or tensors that a message names."""


@dataclass(frozen=True)
class Verification:
    """The parts of a finished merge that match its lock: ``tensors`` of ``byte_size`` bytes and ``files``, by
    their hashes; ``recomputed`` from its inputs, on request. ``unchecked`` lists what could not be checked;
    ``signed_by`` is the key of a valid signature, if one was requested."""

    path: str
    tensors: int
    byte_size: int
    files: int
    unchecked: tuple[str, ...] = ()
    recomputed: Recomputed | None = None
    signed_by: str | None = None
    seconds: float = 0.0
    compile_seconds: float = field(default=0.0, compare=False)

    def __repr__(self) -> str:
        return result_line(
            f"{'not all of ' if self.unchecked else ''}{self.path} verified",
            count_of(self.tensors, "tensor"),
            format_size(self.byte_size),
            count_of(self.files, "file"),
            f"unchecked: {names_text(self.unchecked)}" if self.unchecked else "",
            f"signed by {self.signed_by}" if self.signed_by else "",
        )

    @never_fails
    def _repr_html_(self) -> str:
        return result_html(
            "Verified, except what is listed" if self.unchecked else "Verified",
            *([ResultTable(("not checked",), [[what] for what in self.unchecked])] if self.unchecked else []),
            facts=[
                ("merge", self.path),
                ("tensors", self.tensors),
                ("size", format_size(self.byte_size)),
                ("files", self.files),
                *([("signed by", self.signed_by)] if self.signed_by else []),
            ],
        )

    def data(self) -> dict[str, Any]:
        """All of it as plain data, for ``--json``."""
        return {"is_verified": not self.unchecked, **asdict(self), "unchecked": list(self.unchecked)}


@counts_compiling
@ieee_arithmetic()
def verify(
    out: str | os.PathLike[str],
    *,
    against_inputs: bool = False,
    sample: float = 1.0,
    seed: int = 0,
    inputs: Mapping[str, str | os.PathLike[str]] | None = None,
    key: str | os.PathLike[str] | None = None,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    stream: bool = False,
    download_cache: str | os.PathLike[str] | None = None,
    download_cache_size: Size = DEFAULT_DOWNLOAD_CACHE_BYTES,
    device: Any = DEFAULT_DEVICE,
    watch: Watcher | None = None,
) -> Verification:
    """Check every tensor and file of a finished merge against the hashes in its lock; return what passed.

    With ``against_inputs`` blocks are merged again from the inputs and compared bit for bit: on a device of the kind that merged
    them, if there is one. On another kind, numbers may differ by one unit in the last place, which the result says. A check
    that could not be made is an error, never a pass.

    Options:
        out: The directory of a finished merge, or its URL.
        against_inputs: Merge blocks again from the inputs, and compare them bit for bit.
        sample: With against_inputs: share of the blocks that are merged again, in (0, 1].
        seed: Seed that chooses the blocks of a sample.
        key: Public key (a PEM file) that must verify the signature of the merge.
        device: With against_inputs: where blocks are merged again: auto, cpu, cuda, cuda:1 or cuda:all. auto is the kind of
            device that merged them, or cpu if no GPU can be used here.
    Errors: VerificationError for a difference; UncheckedError, whose ``found`` is what was checked, for a
        check that could not be made; OutputError, ModelError, ResourceError, HubError.
    """
    sample = finite_number(sample, "sample", "the share of blocks that are made again, in (0, 1]")
    seed = whole_number(seed, "seed", None)
    if not 0 < sample <= 1:
        raise AlnicoError(
            f"sample is {sample!r}; it is the share of blocks that are made again, in (0, 1]. Give 0.01 for a hundredth."
        )
    path = merge_path(out, "verify")
    run = RunOptions.of(
        memory=memory,
        threads=threads,
        offline=offline,
        stream=stream,
        download_cache=download_cache,
        download_cache_size=download_cache_size,
        watch=watch,
        device=device,
    )
    replanning = ReplanOptions.of(inputs, run)
    if is_url(path):
        if key is not None:
            raise UncheckedError(
                f"{path}: could not check its signature, which covers whole files; expected a folder of this machine. Download it, or "
                "leave --key out."
            )
        with output_at_url(path, run.access) as (here, url, model):
            verification = check_output(
                here, replanning, against_inputs=against_inputs, share=sample, seed=seed, weights=model
            )
        verification = replace(
            verification,
            path=url,
            unchecked=tuple(line.replace(str(here), url) for line in verification.unchecked),
        )
        refuse_unchecked(verification)
        return verification
    folder = Path(path)
    verification = check_output(folder, replanning, against_inputs=against_inputs, share=sample, seed=seed)
    if key is not None:
        verification = add_signature(verification, lambda: check_signature(folder, [Path(key)]))
    refuse_unchecked(verification)
    return verification


def check_output(
    out: Path,
    options: ReplanOptions,
    *,
    against_inputs: bool = False,
    share: float = 1.0,
    seed: int = 0,
    weights: FileModel | None = None,
) -> Verification:
    """Check a finished merge; ``weights`` has its tensors, where its own files do not. The result lists what could not be checked.

    Errors: VerificationError for the first tensor or file that differs; UncheckedError for an output without
    a lock; OutputError for an output that is missing or unfinished; with ``against_inputs`` those of
    :func:`alnico.verification.sample.recompute`, except for missing inputs.
    """
    begin = time.perf_counter()
    lock = open_lock(out)
    with open_output(out) as model:
        check_headers(out, lock, model)
        with Crew(options.run.threads, options.run.watch, "alnico-verify") as crew:
            digests = hash_tensors(weights or model, model.tensors, crew)
        damaged = [name for name, digest in digests.items() if digest != lock.tensors[name].digest]
        if damaged and not against_inputs:
            raise _damaged(out, lock, digests, damaged)
        checked, unchecked = _check_files(out, lock, model) if not damaged else (0, [])
        recomputed = None
        if against_inputs and not lock.recipe:
            unchecked.append(no_recipe_message(out))
        elif against_inputs:
            run, is_same_kind = on_device_of(lock, options.run)
            try:
                recomputed = recompute(
                    lock,
                    weights or model,
                    replace(options, run=run),
                    share=share,
                    seed=seed,
                    first=damaged,
                    is_tolerant=not is_same_kind,
                )
            except UncheckedError as error:
                if damaged:
                    raise _damaged(out, lock, digests, damaged) from None
                unchecked.append(str(error))
            if damaged:  # the output is what its inputs give, so the lock was changed
                raise _damaged(out, lock, digests, damaged)
        total = sum(t.byte_size for t in model.tensors.values())
    return Verification(
        str(out),
        len(digests),
        total,
        checked,
        tuple(unchecked),
        recomputed,
        seconds=time.perf_counter() - begin,
    )


def open_lock(out: Path) -> Lock:
    """Read the lock of a finished output. Errors: OutputError, UncheckedError for an output without one,
    ModelError."""
    try:
        os.stat(out / LOCK)
    except PermissionError as error:
        raise UncheckedError(
            f"{out}: could not check: it cannot be read ({error.strerror}); expected the output of `alnico merge`. Check its permissions."
        ) from None
    except OSError:  # the checks below say why
        pass
    if out.is_file() and (out.parent / LOCK).is_file():
        raise UncheckedError(
            f"{out}: could not check: it is one file of a finished merge; expected its directory. Give {out.parent}."
        )
    if out.is_file():
        raise UncheckedError(
            f"{out}: could not check: it is one file, and a lock goes with a directory only. Merge into a directory to have it checked."
        )
    check_folder(out)
    if not (out / LOCK).is_file():
        raise UncheckedError(
            f"{out}: could not check: it has no {LOCK}, which lists what must be there; expected the output of `alnico merge`. Check the path."
        )
    return read_lock(out)


def no_recipe_message(out: Path) -> str:
    """Return the message why an adapter is not compared with its inputs."""
    return (
        f"{out}: could not check against its inputs: it is an adapter, which no recipe makes. Run the command that made it with another "
        "output, and compare the hashes in the locks."
    )


def refuse_unchecked(verification: Verification) -> None:
    """Raise what could not be checked, for callers that need a full pass. Errors: UncheckedError, with the
    verification."""
    if verification.unchecked:
        raise UncheckedError(*verification.unchecked, result=verification)


def add_signature(verification: Verification, check: Callable[[], Path]) -> Verification:
    """Add the key of a valid signature, or that the signature could not be checked. Errors:
    VerificationError."""
    try:
        return replace(verification, signed_by=str(check()))
    except UncheckedError as error:
        return replace(verification, unchecked=(*verification.unchecked, str(error)))


def open_output(out: Path) -> FileModel:
    """Open the output's own files. Files that are not a model any more count as damaged. Errors:
    VerificationError."""
    try:
        model = (
            open_adapter(os.fspath(out)).files
            if (out / CONFIG).is_file()
            else open_model(out, may_be_adapter=True)
        )
    except ModelError as error:
        raise VerificationError(f"{out}: is damaged: {error}") from None
    if isinstance(model, DequantisedModel):  # a requantised output is what its files hold
        model.close()
        return open_headers(out)
    assert isinstance(model, FileModel)
    return model


def check_headers(out: Path, lock: Lock, model: FileModel) -> None:
    """Compare names, dtypes and shapes of the tensors with the lock. Errors: VerificationError."""
    differing = differing_tensors(lock, model.tensors)
    if differing:
        name = differing[0]
        raise VerificationError(
            f"{out}: {name} is {describe_tensor(model.tensors.get(name))} in the weights and {describe_tensor(lock.tensors.get(name))} in {LOCK}"
            f"{_more(differing, 'tensors')}; they must be of one merge. Merge again, or get a new copy of the output."
        )


def _check_files(out: Path, lock: Lock, model: FileModel) -> tuple[int, list[str]]:
    """Hash the files next to the weights. Returns how many match the lock, and messages about files that it
    lacks. Errors: VerificationError."""
    listed = [name for name in listed_files(out) if name not in UNLOCKED]
    headers = {shard.path.relative_to(out).as_posix(): shard for shard in model.shards}
    if lock.files is None:
        others = [name for name in listed if name not in headers]
        return 0, [
            f"{out}: could not check {_some(others)}: {LOCK} is of an older alnico, which did not write hashes of files beside the "
            "weights. `alnico reproduce` makes them again."
        ] if others else []
    differing = []
    for name, entry in lock.files.items():
        if name not in listed:
            differing.append((name, "is missing"))
        elif name in headers:
            shard = headers[name]
            if (shard.size, shard.header_digest) != (entry.get("size"), entry.get("header")):
                differing.append((name, "has another header or size than the lock says"))
        elif (digest := hash_file(out / name)) != entry.get("digest"):
            differing.append((name, f"has the hash {digest}, the lock says {entry.get('digest')}"))
    if differing:
        name, what = differing[0]
        raise VerificationError(
            f"{out / name}: {what}{_more(differing, 'files')}; expected the file that the merge wrote. Merge again, or get a new copy of the output."
        )
    surplus = [name for name in listed if name not in lock.files]
    note = f"{out}: could not check {_some(surplus)}: {LOCK} does not list {'it' if len(surplus) == 1 else 'them'}. Move what is no part of the merge."
    return len(lock.files), [note] if surplus else []


def _damaged(out: Path, lock: Lock, digests: dict[str, str], damaged: Sequence[str]) -> VerificationError:
    name = damaged[0]
    return VerificationError(
        f"{out}: {name} has the hash {digests[name]}, {LOCK} says {lock.tensors[name].digest}{_more(damaged, 'tensors')}; expected the bytes "
        "that the merge wrote. Merge again, or get a new copy of the output; --against-inputs names the first element that differs."
    )


def _more(names: Sequence[object], what: str) -> str:
    return f" ({len(names)} such {what})" if len(names) > 1 else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
