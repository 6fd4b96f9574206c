"""Combinations of adapters of PEFT with files of kohya, ComfyUI and diffusers: exact sums, under the names of the first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.checkpoint.open_adapter import open_adapter
from alnico.errors import MismatchError, OutputError
from lora import dialect_files as files
from lora import made_adapters
from lora.dialect_files import lora, near, random_factors

Q, FF, EXTRA = "down_blocks.0.attn1.to_q", "mid_block.ff", "up_blocks.1.conv"
SHAPES = {Q: (8, 6), FF: (12, 8), EXTRA: (8, 4, 3, 3)}
LAYER = "text_model.encoder.layers.0.mlp.fc1"


def kohya(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def of_peft(
    folder: Path, modules: dict[str, tuple[int, ...]], seed: int = 5
) -> tuple[Path, dict[str, np.ndarray]]:
    """An adapter of PEFT with the scale 3 / 2, and what it adds to each module."""
    folder.mkdir(exist_ok=True)
    tensors, added = {}, {}
    for i, (module, shape) in enumerate(modules.items()):
        factors = lora(shape, 2, seed + i, words="peft")
        tensors |= {module + ending: values for ending, values in factors.items()}
        added[module] = 1.5 * files.added(factors)
    return made_adapters.save(folder, tensors, r=2, lora_alpha=3), added


def differences(path: Path) -> dict[str, np.ndarray]:
    """What an adapter adds, by the reader, which other tests hold against PEFT and against the formulas."""
    found = {}
    with open_adapter(str(path)) as adapter:
        for update in adapter.updates.values():
            (left,), (right,) = adapter.matrices(update, np.dtype(np.float64))
            found[update.module] = update.scale * left @ right
    return found


@pytest.fixture
def peft(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    return of_peft(tmp_path / "peft", SHAPES)


def agrees(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert near(found[name], values), name


def test_after_a_file_the_output_is_a_file_with_its_names(
    tmp_path: Path, peft: tuple[Path, dict[str, np.ndarray]]
) -> None:
    adapter, added = peft
    factors = {m: lora(SHAPES[m], 3, i, alpha=2) for i, m in enumerate((Q, FF))}
    first = files.file_of(
        tmp_path / "kohya.safetensors", {kohya(m): f for m, f in factors.items()}, ss_seed="1"
    )
    combined = alnico.lora.combine(
        [first, adapter], tmp_path / "out.safetensors", weights=[0.5, -2], method="cat"
    )
    expected = {kohya(m): -2 * a for m, a in added.items()}
    for module, of_first in factors.items():
        expected[kohya(module)] = expected[kohya(module)] + 0.5 * files.added(of_first)
    agrees(differences(tmp_path / "out.safetensors"), expected)
    assert (
        f"{adapter}: its names do not say the part of the model; 2 of 3 modules are in unet of the other adapters, which they are "
        "taken for."
    ) in combined.notes
    assert alnico.inspect(tmp_path / "out.safetensors").data()["metadata"]["ss_seed"] == "1"


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_after_an_adapter_of_peft_the_output_is_one(
    tmp_path: Path, peft: tuple[Path, dict[str, np.ndarray]], dialect: str
) -> None:
    adapter, added = peft
    more = {"up_blocks.0.extra": (4, 4)} if dialect == "diffusers" else {}
    words, spell = {"kohya": ("kohya", kohya), "diffusers": ("peft", lambda m: f"unet.{m}")}[dialect]
    factors = {m: lora(s, 3, i, words=words) for i, (m, s) in enumerate({**SHAPES, **more}.items())}
    other = files.file_of(tmp_path / "other.safetensors", {spell(m): f for m, f in factors.items()})
    alnico.lora.combine([adapter, other], tmp_path / "out", weights=[1, 0.5], method="cat")
    assert (tmp_path / "out" / "adapter_config.json").exists()
    expected = {m: 0.5 * files.added(f) for m, f in factors.items()}
    agrees(differences(tmp_path / "out"), {m: e + added.get(m, 0) for m, e in expected.items()})
    with pytest.raises(OutputError, match="expected a directory"):
        alnico.lora.combine([adapter, other], tmp_path / "out.safetensors", method="cat")


def test_a_text_encoder_is_found_by_its_modules(tmp_path: Path) -> None:
    adapter, added = of_peft(tmp_path / "peft", {LAYER: (8, 6), LAYER.replace("0", "1"): (8, 6)})
    te = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    modules = {kohya(Q): lora(SHAPES[Q], 2, 1, alpha=1), te: lora((8, 6), 2, 2, alpha=1)}
    first = files.file_of(tmp_path / "kohya.safetensors", modules)
    alnico.lora.combine([first, adapter], tmp_path / "out.safetensors", method="cat")
    expected = {
        kohya(Q): files.added(modules[kohya(Q)]),
        te: files.added(modules[te]) + added[LAYER],
        te.replace("0", "1"): added[LAYER.replace("0", "1")],
    }
    agrees(differences(tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize("is_prefixed", [True, False])
def test_files_of_diffusers_keep_the_prefix_of_the_first(
    tmp_path: Path, peft: tuple[Path, dict[str, np.ndarray]], is_prefixed: bool
) -> None:
    adapter, added = peft
    prefix = "unet." if is_prefixed else ""
    factors = lora(SHAPES[Q], 3, 9, words="peft")
    first = files.file_of(tmp_path / "first.safetensors", {prefix + Q: factors})
    other = files.file_of(
        tmp_path / "other.safetensors",
        {("" if is_prefixed else "unet.") + Q: lora(SHAPES[Q], 1, 8, words="peft")},
    )
    alnico.lora.combine([first, adapter, other], tmp_path / "out.safetensors", method="cat")
    expected = {prefix + m: a for m, a in added.items()}
    expected[prefix + Q] = (
        expected[prefix + Q] + files.added(factors) + files.added(lora(SHAPES[Q], 1, 8, words="peft"))
    )
    agrees(differences(tmp_path / "out.safetensors"), expected)


def test_names_without_a_part_meet_those_with_one(tmp_path: Path) -> None:
    """A file of diffusers for one part alone, and one of LyCORIS, change modules that kohya's file names with their part."""
    first = {kohya(Q): lora(SHAPES[Q], 2, 1, alpha=1), kohya(FF): lora(SHAPES[FF], 2, 2, alpha=1)}
    bare = {Q: lora(SHAPES[Q], 3, 3, words="peft")}
    lycoris = {f"lycoris_{FF.replace('.', '_')}": lora(SHAPES[FF], 1, 4, alpha=1)}
    paths = [
        files.file_of(tmp_path / f"{i}.safetensors", modules)
        for i, modules in enumerate((first, bare, lycoris))
    ]
    alnico.lora.combine(paths, tmp_path / "out.safetensors", method="cat")
    expected = {
        kohya(Q): files.added(first[kohya(Q)]) + files.added(bare[Q]),
        kohya(FF): files.added(first[kohya(FF)]) + files.added(*lycoris.values()),
    }
    agrees(differences(tmp_path / "out.safetensors"), expected)


def test_triples_in_memory_are_combined_with_a_file() -> None:
    tensors = {kohya(Q) + ending: np.asarray(v) for ending, v in lora(SHAPES[Q], 2, 1, alpha=4).items()}
    a, b = np.ones((1, 6), np.float32), np.ones((8, 1), np.float32)
    found = alnico.lora.combine([tensors, {f"{Q}.weight": (a, b, 0.5)}], method="cat")
    ((right, left, scale),) = found.values()
    assert near(scale * left @ right, files.added(lora(SHAPES[Q], 2, 1, alpha=4)) + 0.5 * b @ a)


def message_of(adapters: list[Path], out: Path) -> str:
    with pytest.raises(MismatchError) as caught:
        alnico.lora.combine(adapters, out, method="cat")
    assert not out.exists()
    return str(caught.value).replace(f"{out.parent}/", "")


def test_what_has_no_common_names_or_no_place_is_refused_with_one_message(
    tmp_path: Path, peft: tuple[Path, dict[str, np.ndarray]]
) -> None:
    adapter, _ = peft
    out = tmp_path / "out"
    other = files.file_of(tmp_path / "other.safetensors", {"lora_unet_double_blocks_0_q": lora((8, 6), 2, 1)})
    assert message_of([other, adapter], out) == (
        "peft is an adapter of PEFT, other.safetensors a LoRA file without a config, and no module of one is in the other, such as "
        f"{Q} and lora_unet_double_blocks_0_q; expected adapters of one model, with at least one module in common, which says how their "
        "names correspond. Fold both into their base instead."
    )
    unknown = {kohya(Q): lora(SHAPES[Q], 2, 1), kohya("mid_block.other"): lora((4, 4), 2, 1)}
    kohyas = files.file_of(tmp_path / "kohya.safetensors", unknown)
    assert message_of([adapter, kohyas], out) == (
        "kohya.safetensors: 1 of its 2 modules, such as lora_unet_mid_block_other, are not in peft, and their names do not say what PEFT "
        "calls them; expected modules that it has, or names with dots of the same part. Give kohya.safetensors first: the output then has "
        "its names."
    )
    vectors = {f"unet.{Q}": lora(SHAPES[Q], 2, 1, words="peft") | random_factors({".diff_b": (8,)}, 1)}
    with_bias = files.file_of(tmp_path / "bias.safetensors", vectors)
    assert message_of([adapter, with_bias], out).startswith(
        f"bias.safetensors: unet.{Q}.diff_b is a difference of a vector, which an adapter of PEFT does not hold;"
    )
    tensors = {Q + ending: values for ending, values in lora(SHAPES[Q], 2, 1, words="peft").items()}
    (tmp_path / "saved").mkdir()
    saved = made_adapters.save(
        tmp_path / "saved",
        {**tensors, "head.weight": np.ones((2, 2), np.float32)},
        r=2,
        modules_to_save=["head"],
    )
    assert message_of([kohyas, saved], out).startswith(
        "saved: base_model.model.head.weight replaces numbers of the base, which a LoRA file without a config does not hold;"
    )
