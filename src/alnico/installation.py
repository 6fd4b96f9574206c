"""Says how to install what is missing, and where this copy of alnico came from, without a package index.

There may be no index that has alnico, so a hint names what the user has: the checkout that this copy runs from or
was installed from, or the address that pip recorded for it (``direct_url.json``, PEP 610). Otherwise it names the
packages themselves, which pip finds wherever it found the others.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alnico.errors import AlnicoError

# importlib.metadata, urllib and tomllib take 100 ms to import, and are needed only for a hint: functions import them.

PACKAGE = "alnico"

PRIVATE_ENDINGS = (".local", ".localhost", ".localdomain", ".internal", ".intranet", ".lan", ".home", ".corp", ".private", ".test")  # fmt: skip
"""Endings of host names that only a private network has."""


def import_extra(module: str, purpose: str, extra: str) -> Any:
    """Import a module of an optional extra. Errors: AlnicoError, with the command that installs it.

    >>> import_extra("json", "an example", "eval").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ValueError as error:  # caused by an environment variable, such as HF_HUB_DOWNLOAD_TIMEOUT=abc
        raise AlnicoError(
            f"{purpose} needs {module}, which cannot be imported ({error}). Check environment variables such "
            "as HF_HUB_DOWNLOAD_TIMEOUT."
        ) from None
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise AlnicoError(
            f"{purpose} needs {package}, which is not installed. {install_hint(extra)}"
        ) from None
    except (
        ImportError,
        OSError,
    ) as error:  # versions that do not fit together; a library of its own is missing
        raise AlnicoError(
            f"{purpose} needs {module}, which cannot be imported ({error}); expected versions that fit "
            f"together. {install_hint(extra)}"
        ) from None


def install_hint(extra: str) -> str:
    """Return a sentence with the command that installs an extra, and the packages that are missing."""
    missing = missing_packages(extra)
    place = _place()
    if place is not None:
        named = f" (it adds {', '.join(missing)})" if missing else ""
        return f"Run: pip install {place.format(extra=f'[{extra}]')}{named}"
    packages = missing or requirements_of(extra)
    if packages:
        return f"Run: pip install {' '.join(map(_quoted, packages))}"
    return f"In a checkout of alnico, run: pip install {_quoted(f'.[{extra}]')}"


def missing_packages(extra: str) -> tuple[str, ...]:
    """Return the requirements of an extra that no installed package meets by name, such as ``optuna>=5``."""
    return tuple(one for one in requirements_of(extra) if not _is_installed(_name_of(one)))


def requirements_of(extra: str) -> tuple[str, ...]:
    """Return the requirements of an extra; none if this copy has neither metadata nor a checkout."""
    checkout = running_checkout()
    if checkout is not None:
        stated = _project(checkout).get("optional-dependencies", {}).get(extra, [])
        return tuple(str(one).partition(";")[0].strip() for one in stated)
    from importlib import metadata

    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return ()
    mark = re.compile(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]")
    return tuple(line.partition(";")[0].strip() for line in lines if mark.search(line.partition(";")[2]))


def running_checkout() -> Path | None:
    """Return the checkout that this code runs from, without or by an editable installation; None if it is a copy."""
    root = Path(__file__).resolve().parents[2]
    return root if _is_checkout(root) else None


def public_requirement() -> str | None:
    """Return what pip takes to install this version from the public https address that it came from.

    None for anything else: a path, a private host, an address with a password or a query, an index.

    The text may be published, so it never has a path of this disk or a secret.
    """
    record = _direct_url()
    requirement = None if record is None else _requirement(record, "")
    return requirement if requirement is not None and _is_public(str(record and record["url"])) else None


def _place() -> str | None:
    """What pip takes to install alnico from where it came from, quoted, with ``{extra}``; None if unknown."""
    checkout = running_checkout()
    if checkout is not None:
        return f"-e {_with_extra(checkout)}"
    record = _direct_url()
    if record is None:
        return None
    path = _local_path(str(record["url"]))
    if path is None:
        requirement = _requirement(record, "\0")
        return None if requirement is None else _quoted(_braced(requirement))
    if _is_checkout(path):
        return _with_extra(path)
    return _quoted(_braced(f"{path}\0")) if path.is_file() else None


def _with_extra(checkout: Path) -> str:
    try:
        is_here = checkout.samefile(os.curdir)
    except OSError:
        is_here = False
    return _quoted(_braced(f"{'.' if is_here else checkout}\0"))


def _braced(text: str) -> str:
    """Make a template of a text, with ``{extra}`` in place of its zero byte."""
    return text.replace("{", "{{").replace("}", "}}").replace("\0", "{extra}")


def _requirement(record: Mapping[str, Any], extra: str) -> str | None:
    """Return ``alnico @ address`` for an address that is not local; None if the record has none."""
    from urllib.parse import urlsplit

    url, vcs = str(record["url"]), record.get("vcs_info")
    if urlsplit(url).scheme not in ("https", "http", "ssh"):
        return None
    place = f"#subdirectory={record['subdirectory']}" if isinstance(record.get("subdirectory"), str) else ""
    if isinstance(vcs, dict):
        return f"{PACKAGE}{extra} @ {vcs.get('vcs', 'git')}+{url}@{vcs.get('commit_id', '')}{place}"
    return f"{PACKAGE}{extra} @ {url}{place}" if isinstance(record.get("archive_info"), dict) else None


def _direct_url() -> Mapping[str, Any] | None:
    """Return pip's record of where the installed copy came from; None without one, or with a broken one."""
    from importlib import metadata

    try:
        text = metadata.distribution(PACKAGE).read_text("direct_url.json")
        record = json.loads(text or "null")
    except (metadata.PackageNotFoundError, OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("url"), str) else None


def _local_path(url: str) -> Path | None:
    from urllib.parse import unquote, urlsplit
    from urllib.request import url2pathname

    parts = urlsplit(url)
    return Path(url2pathname(unquote(parts.path))) if parts.scheme == "file" else None


def _is_public(url: str) -> bool:
    """Is this an https address that anyone may read: no password, no query, no private host?"""
    import ipaddress
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        is_name = "." in host and not host.endswith(PRIVATE_ENDINGS)
    else:
        is_name = False
    return parts.scheme == "https" and is_name and "@" not in parts.netloc and not parts.query


def _is_checkout(path: Path) -> bool:
    return _project(path).get("name") == PACKAGE


def _project(path: Path) -> Mapping[str, Any]:
    import tomllib

    try:
        project = tomllib.loads((path / "pyproject.toml").read_text("utf-8")).get("project", {})
    except (OSError, ValueError):
        return {}
    return project if isinstance(project, dict) else {}


def _is_installed(name: str) -> bool:
    from importlib import metadata

    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _name_of(requirement: str) -> str:
    """The name in a requirement.

    >>> _name_of("lm-eval>=0.4.13"), _name_of("alnico[eval, report]")
    ('lm-eval', 'alnico')
    """
    found = re.match(r"[\w.-]+", requirement)
    return found[0] if found else requirement


def _quoted(word: str) -> str:
    """Quote a word for the shell, always: brackets and ``>`` mean something to shells."""
    if os.name == "nt":
        return f'"{word}"'
    return shlex.quote(word) if "'" in word else f"'{word}'"
