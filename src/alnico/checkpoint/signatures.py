"""Signs models and checks their signatures with OpenSSF model-signing.

The signature is ``model.sig`` in the model's folder and covers all its other files. model-signing (the extra
``[sign]``) hashes the files with SHA-256 and is imported only when needed. Keys are elliptic-curve keys in
PEM files (P-256, P-384, P-521), which need no network.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.files import SHELL_PIPE, files_below, open_binary
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.lora_model import AdaptedModel
from alnico.checkpoint.near_paths import suggestion
from alnico.checkpoint.sidecars import SIGNATURE
from alnico.checkpoint.source import Source, unwrap
from alnico.checkpoint.statistics import StatisticsSource
from alnico.checkpoint.task_vectors.equipped_model import EquippedModel
from alnico.errors import ModelError, OutputError, UncheckedError, VerificationError
from alnico.installation import import_extra

HASHES = re.compile(r"(Hash mismatch for '[^']+'): .*")
"""The library's message with both hashes, which nobody can read."""

SHOWN = 3
"""Files that a message names at most."""

MAX_KEY_BYTES = 1 << 16
"""A key of the largest curve takes less than 1 KB in a PEM file."""


@dataclass(frozen=True)
class SignedInputs:
    """Signatures that the inputs of a merge must have: each must be valid for one of the public ``keys``.

    Inputs named in ``unsigned`` need no signature, but if they have one it must be valid.
    """

    keys: tuple[Path, ...]
    unsigned: tuple[str, ...] = ()

    def check(self, source: Source | StatisticsSource, reference: str = "") -> None:
        """Check a model, or statistics, before it is read; ``reference`` is its name in the recipe.

        Errors: VerificationError; UncheckedError for an input that has no signature or cannot be checked.
        """
        if isinstance(source, StatisticsSource):
            self.check_path(source.paths()[0].parent, source.label, reference)
            return
        source = unwrap(source)
        if isinstance(source, AdaptedModel):
            self.check(source.base, reference)
            self.check(source.adapter.files, reference)
        elif isinstance(source, EquippedModel):
            self.check(source.base, reference)
            self.check(source.vector.files, reference)
        elif source.origin is not None:
            raise UncheckedError(
                f"{source.label}: is on the hub; a signature covers all files, and alnico does not download "
                "all of them. Download the whole model, and give its path."
            )
        elif isinstance(source, FileModel) and source.remote is not None:
            raise UncheckedError(
                f"{source.label}: is at a URL; a signature covers all files, and alnico does not download all of them. Download "
                "the whole model, and give its path."
            )
        else:
            folder = source.directory
            places = dict.fromkeys([folder] if folder is not None else [])
            # Weights may lie beside the folder of the config, as the shards of a trainer do.
            places |= dict.fromkeys(
                p for p in source.paths() if folder is None or not p.is_relative_to(folder)
            )
            for path in places:
                self.check_path(path, source.label, reference)

    def check_path(self, path: Path, label: str, reference: str = "") -> None:
        """Check the signature of a folder or file: the one in its folder or in the nearest signed parent.

        A link is followed first: the signature must cover the place of the bytes. Errors: as :meth:`check`.
        """
        folder, real = path, Path(os.path.realpath(path))
        if not real.is_dir():
            folder, real = path.parent, real.parent
        signed = next((f for f in (real, *real.parents) if os.path.lexists(f / SIGNATURE)), None)
        if signed is not None:
            is_as_written = signed == real == Path(os.path.abspath(folder))
            check_signature(folder if is_as_written else signed, self.keys)
        elif not self._may_be_unsigned(path, label, reference):
            raise UncheckedError(
                f"{label}: has no {SIGNATURE}, and every input must be signed. Get the signed model, or use "
                f"--allow-unsigned {label} if you trust it without a signature."
            )

    def _may_be_unsigned(self, path: Path, label: str, reference: str) -> bool:
        real = os.path.realpath(path)
        return any(
            name in (label, reference) or os.path.realpath(os.path.expanduser(name)) == real
            for name in self.unsigned
        )


def sign(folder: Path, key: Path) -> Path:
    """Sign all files of a model with a private key; returns the signature's path. An older one is replaced.

    Errors: OutputError; ModelError for a folder that holds anything but files and folders; AlnicoError.
    """
    path = folder / SIGNATURE
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OutputError(
            f"{path}: is a link or not a regular file; expected a file that can be replaced. Remove it, and "
            "sign again."
        )
    if (special := _special(folder)) is not None:
        raise ModelError(
            f"{special}: is a pipe, a socket, a device or a broken link; only files can be signed. Remove it."
        )
    signing, hashing = _library("signing"), _library("hashing")
    try:
        _check_size(key)
        files = hashing.Config().set_ignored_paths(paths=[SIGNATURE])
        signing.Config().set_hashing_config(files).use_elliptic_key_signer(private_key=key).sign(folder, path)
    except OSError as error:
        raise UncheckedError(
            f"{error.filename or folder}: could not be used for signing ({error.strerror}). "
            f"{suggestion(error.filename or folder, 'Check the path.', only_misspellings=True)}"
        ) from None
    except Exception as error:  # the library does not document what it raises for a key
        raise UncheckedError(
            f"{folder}: could not be signed with {key} ({_error_text(error)}); expected a private key of the "
            "curve P-256, P-384 or P-521 in a PEM file, without a password. "
            "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes one."
        ) from None
    return path


def check_signature(folder: Path, keys: Sequence[Path]) -> Path:
    """Check a model's signature; returns the key for which it is valid.

    It is valid only if no file was changed, removed or added. Errors: VerificationError if it is valid for
    none of the keys; UncheckedError for a model without a signature, and for a key that cannot be read.
    """
    path = folder / SIGNATURE
    if not os.path.lexists(path):
        raise UncheckedError(
            f"{folder}: the signature could not be checked: there is no {SIGNATURE}. `alnico sign` makes one."
        )
    failures = []
    try:
        uncovered = _uncovered_files(path)
    except ModelError as error:
        raise _invalid_signature(folder, str(error)) from None
    for key in keys:
        verifier = _verifier(key)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the library prints its warnings
                verifier.verify(folder, path)
        except Exception as error:  # any error means that the signature is not valid
            failures.append(f"{key}: {_error_text(error)}")
        else:
            if uncovered:
                raise _invalid_signature(folder, f"it does not cover {', '.join(uncovered[:SHOWN])}")
            return key
    raise _invalid_signature(folder, "; ".join(failures))


def check_key(key: Path) -> None:
    """Check that a public key can be used.

    Errors: UncheckedError; AlnicoError if model-signing is not installed.
    """
    _verifier(key)


def _invalid_signature(folder: Path, reason: str) -> VerificationError:
    return VerificationError(
        f"{folder}: its {SIGNATURE} is not valid ({reason}); expected the files that were signed, and the "
        "signer's public key. Do not use this model, or download it again."
    )


def _uncovered_files(path: Path) -> list[str]:
    """Return existing files that a signature states it does not cover, except itself and git's.

    Errors: ModelError.
    """
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
        return []  # not a signature, which the library will report
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None


def _special(folder: Path) -> Path | None:
    """Return an entry of a folder that is neither a file nor a folder (links are followed), or None."""
    return next((path for path in files_below(folder) if not path.is_file() and not path.is_dir()), None)


def _check_size(key: Path) -> None:
    """Refuse a key that is too large or not a regular file: the library would read all of it.

    Errors: OSError; ValueError.
    """
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
            f"{key}: the public key cannot be read ({error.strerror}). "
            f"{suggestion(key, 'Check the path.', accepts=Path.is_file)}"
        ) from None
    except Exception as error:
        raise UncheckedError(
            f"{key}: is not a public key ({_error_text(error)}); expected one of the curve P-256, P-384 or "
            "P-521 in a PEM file. Get the signer's public key."
        ) from None


def _error_text(error: Exception) -> str:
    text = " ".join(str(error).replace("\\'", "'").split()).rstrip(". ")
    text = HASHES.sub(r"\1", text)
    return f"{type(error).__name__}{': ' + text[:300] if text else ''}"


def _library(module: str) -> Any:
    """Import a module of model-signing. Errors: AlnicoError, which says how to install it."""
    return import_extra(f"model_signing.{module}", "a signature", "sign")
