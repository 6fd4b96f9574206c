"""Signatures of models, as OpenSSF model-signing makes and reads them: ``model.sig`` in the model's folder, of all its other files.

model-signing (the extra ``[sign]``) hashes the files by itself, with SHA-256, and is imported when a signature is met. Keys are elliptic-curve
keys in PEM files (P-256, P-384, P-521), which need no network.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from alnico.checkpoint.files import SHELL_PIPE, files_below, open_binary
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.lora_model import AdaptedModel
from alnico.checkpoint.sidecars import SIGNATURE
from alnico.checkpoint.source import Source, unwrap
from alnico.checkpoint.statistics import StatisticsSource
from alnico.errors import AlnicoError, ModelError, OutputError, UncheckedError, VerificationError

HASHES = re.compile(r"(Hash mismatch for '[^']+'): .*")
"""What the library says of two hashes is bytes that nobody reads."""

SHOWN = 3
"""Files that a message names."""

MAX_KEY_BYTES = 1 << 16
"""A key of the largest curve takes less than 1 KB in a PEM file."""


@dataclass(frozen=True)
class SignedInputs:
    """What is asked of the inputs of a merge: each must have a signature that holds with one of the public ``keys``.

    Inputs that are named in ``unsigned`` need have none; one that they have must hold all the same.
    """

    keys: tuple[Path, ...]
    unsigned: tuple[str, ...] = ()

    def check(self, source: Source | StatisticsSource, reference: str = "") -> None:
        """Check a model, or statistics, before it is read; ``reference`` is its name in the recipe.

        Errors: VerificationError; UncheckedError for what has no signature, or cannot be checked.
        """
        if isinstance(source, StatisticsSource):
            self.check_place(source.paths()[0].parent, source.label, reference)
            return
        source = unwrap(source)
        if isinstance(source, AdaptedModel):
            self.check(source.base, reference)
            self.check(source.adapter.files, reference)
        elif source.origin is not None:
            raise UncheckedError(
                f"{source.label}: is on the hub, of which not every file is fetched; a signature is of all of them. Download the model, and "
                "give its path."
            )
        else:
            for place in {source.directory} if source.directory is not None else source.paths():
                self.check_place(place, source.label, reference)

    def check_place(self, given: Path, label: str, reference: str = "") -> None:
        """Check the signature over a folder, or over the file at a place: that of the folder itself, or of the next one around it.

        A link is followed first: what counts is where the bytes lie. Errors: as of :meth:`check`.
        """
        place, real = given, Path(os.path.realpath(given))
        if not real.is_dir():
            place, real = given.parent, real.parent
        folder = next((f for f in (real, *real.parents) if os.path.lexists(f / SIGNATURE)), None)
        if folder is not None:
            is_as_written = folder == real == Path(os.path.abspath(place))
            check_signature(place if is_as_written else folder, self.keys)
        elif not self._may_be_unsigned(given, label, reference):
            raise UncheckedError(
                f"{label}: has no {SIGNATURE}, and every input must be signed. Get the signed model; or say --allow-unsigned "
                f"{label} if you trust it without."
            )

    def _may_be_unsigned(self, place: Path, label: str, reference: str) -> bool:
        real = os.path.realpath(place)
        return any(
            name in (label, reference) or os.path.realpath(os.path.expanduser(name)) == real
            for name in self.unsigned
        )


def sign(folder: Path, key: Path) -> Path:
    """Sign all files of a model with a private key; returns the signature, which replaces an older one.

    Errors: OutputError; ModelError for a folder that holds something else than files; AlnicoError.
    """
    path = folder / SIGNATURE
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OutputError(
            f"{path}: is a link or no regular file, which is not written through. Remove it, and sign again."
        )
    if (special := _special(folder)) is not None:
        raise ModelError(
            f"{special}: is a pipe, a socket, a device or a link to nowhere; expected files alone in what is signed. Remove it."
        )
    signing, hashing = _library("signing"), _library("hashing")
    try:
        _check_size(key)
        files = hashing.Config().set_ignored_paths(paths=[SIGNATURE])
        signing.Config().set_hashing_config(files).use_elliptic_key_signer(private_key=key).sign(folder, path)
    except OSError as error:
        raise UncheckedError(
            f"{error.filename or folder}: could not be signed with ({error.strerror}). Check the path."
        ) from None
    except Exception as error:  # what the library raises for a key is not said
        raise UncheckedError(
            f"{folder}: could not be signed with {key} ({_said(error)}); expected a private key of the curve P-256, P-384 or P-521 in a PEM file, "
            "without a password. `openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes one."
        ) from None
    return path


def check_signature(folder: Path, keys: Sequence[Path]) -> Path:
    """Check a model's signature; returns the key with which it holds.

    Errors: VerificationError if it holds with none of the keys, and no file may differ, be missing or have been added; UncheckedError
    for a model without a signature, and for a key that cannot be read.
    """
    path = folder / SIGNATURE
    if not os.path.lexists(path):
        raise UncheckedError(
            f"{folder}: could not check its signature: it has no {SIGNATURE}. `alnico sign` makes one."
        )
    failures = []
    try:
        left_out = _left_out(path)
    except ModelError as error:
        raise _no_signature(folder, str(error)) from None
    for key in keys:
        verifier = _verifier(key)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the library prints its warnings
                verifier.verify(folder, path)
        except Exception as error:  # whatever it is: the signature does not hold
            failures.append(f"{key}: {_said(error)}")
        else:
            if left_out:
                raise _no_signature(folder, f"it is not over {', '.join(left_out[:SHOWN])}")
            return key
    raise _no_signature(folder, "; ".join(failures))


def check_key(key: Path) -> None:
    """Check that a public key can be used. Errors: UncheckedError; AlnicoError without model-signing."""
    _verifier(key)


def _no_signature(folder: Path, why: str) -> VerificationError:
    return VerificationError(
        f"{folder}: its {SIGNATURE} does not hold ({why}); expected the files that were signed, and the signer's public key. "
        "Do not use this model, or get it anew."
    )


def _left_out(path: Path) -> list[str]:
    """The files that a signature says it is not over, but for itself and git's, and that are there. Errors: ModelError."""
    bundle = read_json(path)
    try:
        payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        ignored = payload["predicate"]["serialization"].get("ignore_paths", ())
        names = [
            str(name)
            for name in ignored
            if str(name) != SIGNATURE and not PurePath(str(name)).name.startswith(".git")
        ]
        return [name for name in names if os.path.lexists(path.parent / name)]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return []  # no signature at all, as the library will say
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None


def _special(folder: Path) -> Path | None:
    """What is neither a file nor a folder in a folder, hidden or not; None where there is no such thing."""
    return next(
        (path for path in files_below(folder) if not path.is_file() and not path.is_dir()), None
    )  # of links, what they lead to


def _check_size(key: Path) -> None:
    """Refuse a key that is no regular file or too large to be one: the library reads all of it. Errors: OSError; ValueError."""
    if SHELL_PIPE.fullmatch(os.fsdecode(key)):  # it can be read only once
        return
    with open_binary(key) as file:
        if len(file.read(MAX_KEY_BYTES + 1)) > MAX_KEY_BYTES:
            raise ValueError(f"larger than {MAX_KEY_BYTES} bytes")


def _verifier(key: Path) -> Any:
    verifying = _library("verifying")
    try:
        _check_size(key)
        return verifying.Config().use_elliptic_key_verifier(public_key=key)
    except OSError as error:
        raise UncheckedError(
            f"{key}: the public key cannot be read ({error.strerror}). Check the path."
        ) from None
    except Exception as error:
        raise UncheckedError(
            f"{key}: is no public key ({_said(error)}); expected one of the curve P-256, P-384 or P-521 in a PEM file. Get the signer's."
        ) from None


def _said(error: Exception) -> str:
    text = " ".join(str(error).replace("\\'", "'").split()).rstrip(". ")
    text = HASHES.sub(r"\1", text)
    return f"{type(error).__name__}{': ' + text[:300] if text else ''}"


def _library(module: str) -> Any:
    """A module of model-signing. Errors: AlnicoError, saying how it is installed."""
    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError as error:
        package = (error.name or "model_signing").partition(".")[0]
        raise AlnicoError(
            f"signatures need {package}, which is not installed. Say: pip install 'alnico[sign]'"
        ) from None
