"""Made wheels of small models, as the demo downloads them."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

from alnico.demo.models import DemoModel, Pinned

FILES: Mapping[str, bytes] = {
    "config.json": b"{}",
    "1_Pooling/config.json": b'{"a": 1}',
    "model.safetensors": bytes(range(256)) * 400,
}


def pinned(data: bytes) -> Pinned:
    return Pinned(len(data), hashlib.sha256(data).hexdigest())


def wheel(folder: Path, name: str = "made_model", more: Mapping[str, bytes] | None = None) -> Path:
    """A wheel ``NAME-1.0`` with the files of a model, what else a wheel has, and ``more``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    dashed = name.replace("_", "-")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for inner, data in FILES.items():
            archive.writestr(f"{name}/model/{inner}", data)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('code of the wheel ran')")
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {dashed}\nVersion: 1.0\nRequires-Dist: no-such-torch>=99\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: made\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
        for inner, data in (more or {}).items():
            archive.writestr(inner, data)
    return path


def model_of(path: Path, name: str = "made_model") -> DemoModel:
    """The model of a made wheel."""
    return DemoModel(
        name=f"made {name}",
        requirement=f"{name.replace('_', '-')}==1.0",
        package=name,
        folder="model",
        wheel=pinned(path.read_bytes()),
        files={inner: pinned(data) for inner, data in FILES.items()},
    )
