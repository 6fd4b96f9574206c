"""Signatures of models, as OpenSSF model-signing makes and reads them: ``model.sig`` in the model's folder, of all its other files.

model-signing (the extra ``[sign]``) hashes the files by itself, with SHA-256, and is imported when a signature is met. Keys are elliptic-curve
keys in PEM files (P-256, P-384, P-521), which need no network.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.checkpoint.adapted import AdaptedModel
from alnico.checkpoint.model import Source, unwrapped
from alnico.checkpoint.sidecars import SIGNATURE
from alnico.errors import AlnicoError, UncheckedError, VerificationError

HASHES = re.compile(r"(Hash mismatch for '[^']+'): .*")
"""What the library says of two hashes is bytes that nobody reads."""


@dataclass(frozen=True)
class SignedInputs:
    """What is asked of the inputs of a merge: a signature that a model has must hold with one of the public ``keys``; where it
    ``is_required``, every model must have one."""

    keys: tuple[Path, ...]
    is_required: bool = False

    def check(self, source: Source) -> None:
        """Check a model before it is read. Errors: VerificationError; UncheckedError for what cannot be checked."""
        source = unwrapped(source)
        if isinstance(source, AdaptedModel):
            self.check(source.base)
            self.check(source.adapter.files)
            return
        if source.origin is not None:
            raise UncheckedError(
                f"{source.label}: is on the hub, of which not every file is fetched; a signature is of all of them. Download the model, and "
                "give its path."
            )
        folder = source.directory
        if folder is not None and (folder / SIGNATURE).is_file():
            check_signature(folder, self.keys)
        elif self.is_required:
            raise UncheckedError(
                f"{source.label}: has no {SIGNATURE}, and every input must be signed. Get the signed model, or merge without --require-signed."
            )


def sign(folder: Path, key: Path) -> Path:
    """Sign all files of a model with a private key; returns the signature, which replaces an older one. Errors: AlnicoError."""
    signing, hashing = _library("signing"), _library("hashing")
    path = folder / SIGNATURE
    try:
        files = hashing.Config().set_ignored_paths(paths=[SIGNATURE])
        signing.Config().set_hashing_config(files).use_elliptic_key_signer(private_key=key).sign(folder, path)
    except OSError as error:
        raise AlnicoError(f"{error.filename or folder}: could not be signed with ({error.strerror}). Check the path.") from None
    except Exception as error:  # what the library raises for a key is not said
        raise AlnicoError(
            f"{folder}: could not be signed with {key} ({_said(error)}); expected a private key of the curve P-256, P-384 or P-521 in a PEM file, "
            "without a password. `openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes one."
        ) from None
    return path


def check_signature(folder: Path, keys: Sequence[Path]) -> Path:
    """Check a model's signature; returns the key with which it holds.

    Errors: VerificationError if it holds with none of the keys, and no file may differ, be missing or have been added; UncheckedError
    for a model without a signature, and for a key that cannot be read.
    """
    if not (folder / SIGNATURE).is_file():
        raise UncheckedError(f"{folder}: could not check its signature: it has no {SIGNATURE}. `alnico sign` makes one.")
    failures = []
    for key in keys:
        verifier = _verifier(key)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the library prints its warnings
                verifier.verify(folder, folder / SIGNATURE)
            return key
        except Exception as error:  # whatever it is: the signature does not hold
            failures.append(f"{key}: {_said(error)}")
    raise VerificationError(
        f"{folder}: its {SIGNATURE} does not hold ({'; '.join(failures)}); expected the files that were signed, and the signer's public key. "
        "Do not use this model, or get it anew."
    )


def _verifier(key: Path) -> Any:
    verifying = _library("verifying")
    try:
        return verifying.Config().use_elliptic_key_verifier(public_key=key)
    except OSError as error:
        raise UncheckedError(f"{key}: the public key cannot be read ({error.strerror}). Check the path.") from None
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
        raise AlnicoError(f"signatures need {package}, which is not installed. Say: pip install 'alnico[sign]'") from None
