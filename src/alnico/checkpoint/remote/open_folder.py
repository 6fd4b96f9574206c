"""Recognises and checks URLs of folders, and opens the folder at one."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

from alnico.checkpoint.remote.folder import RemoteFolder
from alnico.errors import ModelError

# Without "+", which a scheme may have, so that "base+s3://bucket/adapter" is no URL.
SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9.-]+)://")
MISSPELT = re.compile(r"(s3a?|https?|gs|gcs|az|abfss?):/?(?=[^/:])", re.IGNORECASE)
"""How a URL begins that lacks slashes, or was made a path, which drops one."""
BUCKET = re.compile(r"[a-zA-Z0-9][\w.-]{1,254}", re.ASCII)
"""Also the names that servers other than AWS's take."""
WEB = ("http", "https")
SECRET = re.compile(
    r"hf_[A-Za-z0-9]{30,}|A[KS]IA[A-Z0-9]{16}|gh[opsu]_[A-Za-z0-9]{36}|github_pat_\w{40,}|eyJ[\w-]{20,}\."
)
"""What tokens of the hub, of AWS and of GitHub look like, and signed tokens (JWT)."""
MAX_LENGTH = 2000
EXAMPLES = "s3://bucket/model or https://example.org/model"


def is_url(text: str) -> bool:
    """Does a text begin as a URL does, with a scheme and ``://``? It may still be one that alnico refuses.

    >>> [is_url(text) for text in ("s3://bucket/model", "HTTPS://host/m", "org/model", "store:sql", "base+s3://b/adapter")]
    [True, True, False, False, False]
    """
    return SCHEME.match(text) is not None


def intended_url(text: str) -> str | None:
    """Return the URL that a text without both slashes means; None for other texts.

    >>> [intended_url(text) for text in ("s3:/bucket/model", "https:host/model", "s3://bucket/model", "C:/model", "store:sql")]
    ['s3://bucket/model', 'https://host/model', None, None, None]
    """
    found = MISSPELT.match(text)
    return None if found is None else f"{found[1]}://{text[found.end() :]}"


def checked_url(text: str) -> str:
    """Return the URL of a folder or a file in one spelling: scheme and host in lower case, no slash at the end.

    URLs are written into locks and cards, so this refuses all that may be a secret: a user or a password, a query, a
    fragment, and what looks like a token. The message then shows only the scheme, and the host if it cannot be part of
    the secret. Refused too: ``file://``, fsspec's chains (``::``), and paths with empty parts or with ``.`` and ``..``.

    Errors: ModelError, with a message that does not begin with a place: callers with a recipe raise it again as a
    RecipeError, ``raise RecipeError(f"{where}: {error}")``.

    >>> checked_url("HTTPS://Example.org/models/a/"), checked_url("s3a://bucket/Model")
    ('https://example.org/models/a', 's3://bucket/Model')
    >>> checked_url("s3://key:secret@bucket/model")
    Traceback (most recent call last):
    alnico.errors.ModelError: the URL s3://... has a user or a password; expected a plain URL, such as s3://bucket/model ...
    """
    found = SCHEME.match(text)
    if found is None:
        raise ModelError(f"{text[:80]!r} is not a URL; expected one such as {EXAMPLES}. Check the scheme.")
    scheme = {"s3a": "s3", "s3n": "s3"}.get(found[1].lower(), found[1].lower())
    parts = _split(scheme, text)
    if scheme == "file":
        raise ModelError(
            f"{text[:200]!r} is a path of this machine as a URL; expected a path. Write {parts.path[:200]!r}."
        )
    if (
        "::" in (parts.path if scheme in WEB else text)
        or "\\" in text
        or not text.isprintable()
        or len(text) > MAX_LENGTH
    ):
        raise ModelError(
            f"the URL {text[:200]!r} has '::', a backslash or a control character, or is longer than {MAX_LENGTH} characters; "
            f"expected a plain URL, such as {EXAMPLES}. Correct it."
        )
    host, path = parts.netloc, parts.path.rstrip("/")
    if scheme == "s3" and not BUCKET.fullmatch(host):
        raise ModelError(
            f"the URL {text[:200]!r} has {host[:80]!r} where the bucket is expected: s3://bucket/model. Check the slashes; "
            "another server than AWS's is named by the environment variable AWS_ENDPOINT_URL."
        )
    if scheme in WEB:
        if not parts.hostname:
            raise ModelError(
                f"the URL {text[:200]!r} has no name of a server; expected https://example.org/model. Check the slashes."
            )
        host = host.lower()
    if any(part in ("", ".", "..") for part in path.split("/")[1:]):
        raise ModelError(
            f"the URL {text[:200]!r} has an empty part, '.' or '..' in its path; expected the path as the server has it. "
            "Remove that part."
        )
    return f"{scheme}://{host}{path}"


def open_remote_folder(url: str) -> RemoteFolder:
    """Open the folder at a URL; nothing is requested yet. Close it after use.

    ``s3://bucket/path`` is read and written over the S3 protocol (the endpoint, the region and the credentials are those
    of AWS's libraries: AWS_ENDPOINT_URL, AWS_PROFILE, ...), ``https://`` and ``http://`` are read by ranges, and other
    schemes go to fsspec (``gs://``, ``memory://``, ...; the packages behind them are not tested here).

    Errors: ModelError as :func:`checked_url`; HubError if a package is missing or the scheme is unknown.
    """
    address = checked_url(url)
    scheme = address.partition("://")[0]
    if scheme == "s3":
        from alnico.checkpoint.remote.s3_folder import S3Folder

        return S3Folder(address)
    if scheme in WEB:
        from alnico.checkpoint.remote.web_folder import WebFolder

        return WebFolder(address)
    from alnico.checkpoint.remote.fsspec_folder import FsspecFolder

    return FsspecFolder(address)


def _split(scheme: str, text: str) -> SplitResult:
    """Return the parts of a URL that has no secrets. Errors: ModelError."""
    try:
        parts = urlsplit(text)
        _refuse_secrets(scheme, text, parts)
        _ = parts.port  # checks it
        return parts
    except ValueError:  # its message would show a password
        raise ModelError(
            f"the URL {scheme}://... cannot be read; expected a plain URL, such as {EXAMPLES}. Check its brackets, port and slashes."
        ) from None


def _refuse_secrets(scheme: str, text: str, parts: SplitResult) -> None:
    """Refuse what may be a secret, without showing it. Errors: ModelError."""
    # A slash in a password ends the host early: s3://key:sec/ret@bucket has the host "key:sec".
    if SECRET.search(text):
        what, shown, advice = (
            "what looks like a token",
            f"{scheme}://...",
            "Credentials belong into the environment.",
        )
    elif "@" in parts.netloc or ("@" in text and (":" in parts.netloc or scheme in WEB)):
        what, shown = "a user or a password", f"{scheme}://..."
        advice = "Credentials belong into the environment or the files of the server's library; an @ in a path is written %40."
    elif "?" in text or "#" in text:
        what, shown = "a query or a fragment", f"{scheme}://{parts.hostname or ''}/..."
        advice = "A signed URL opens the file to all who see it; use the credentials themselves, or a folder that may be read without them."
    else:
        return
    raise ModelError(
        f"the URL {shown} has {what}; expected a plain URL, such as {EXAMPLES}: URLs are written into locks and cards. {advice}"
    )
