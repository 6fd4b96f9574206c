"""The table of layouts finds the tensors of every family that transformers converts on loading."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import alnico
import architectures
from alnico.checkpoint.layouts import Piece, find_layout, shapes_of
from alnico.errors import MismatchError

WHY_UNMET: dict[str, tuple[str, ...]] = {
    "transformers renames or divides the tensors in a way that the table does not have": (
        "BeitForSemanticSegmentation",
        "CohereAsrForConditionalGeneration",
        "CohereAsrModel",
        "DeepseekOcr2ForConditionalGeneration",
        "DeepseekOcr2Model",
        "Emu3Model",
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Ernie4_5_VLMoeModel",
        "GradiumPhononTTSForConditionalGeneration",
        "Inkling2ForCausalLM",
        "Inkling2ForConditionalGeneration",
        "Inkling2LoopForCausalLM",
        "Inkling2LoopForConditionalGeneration",
        "Inkling2LoopModel",
        "Inkling2LoopTextModel",
        "Inkling2Model",
        "Inkling2TextModel",
        "InklingForConditionalGeneration",
        "InklingModel",
        "Kimi_K25ForConditionalGeneration",
        "Kimi_K25Model",
        "MimiModel",
        "MiniMaxM3SparseForConditionalGeneration",
        "MistralLarge4ForConditionalGeneration",
        "MistralLarge4Model",
        "MistralLarge4TextModel",
        "Molmo2ForConditionalGeneration",
        "Molmo2Model",
        "Molmo2TextModel",
        "NemotronH_Omni_Reasoning_V3",
        "PI0ForConditionalGeneration",
        "PPDocLayoutV4ForObjectDetection",
        "PPDocLayoutV4Model",
        "PixioBackbone",
        "RadioModel",
        "RfDetrForInstanceSegmentation",
        "RfDetrForObjectDetection",
        "RfDetrModel",
        "Sam3TrackerModel",
        "Sam3TrackerVideoModel",
        "Sapiens2Backbone",
        "Sapiens2Model",
        "Step3p7ForConditionalGeneration",
        "Step3p7Model",
        "Tipsv2DptForDepthEstimation",
        "Tipsv2DptForNormalEstimation",
        "Tipsv2DptForSemanticSegmentation",
        "Tipsv2Model",
        "Tipsv2TextModel",
        "Tipsv2VisionBackbone",
        "Tipsv2VisionModel",
        "UnlimitedOcrForConditionalGeneration",
        "UnlimitedOcrModel",
    ),
    "the same, of one to six tensors": (
        "Cosmos3OmniForConditionalGeneration",
        "Cosmos3OmniModel",
        "GradiumPhononTTSModel",
        "JevForDecision",
        "Lfm3VlVisionModel",
        "MaskFormerForInstanceSegmentation",
        "MaskFormerModel",
        "MiniMaxM3VLModel",
        "SwinBackbone",
    ),
}
"""Architectures whose tensors are not found, by the reason."""


def converted() -> list[str]:
    """The architectures that transformers' conversion mapping has, by class or type, and that can be made."""
    from transformers import conversion_mapping

    keys = set(conversion_mapping._build_checkpoint_conversion_mapping()) - {"legacy"}
    return [
        name
        for name, kinds in architectures.types().items()
        if name not in architectures.NOT_MADE and (name in keys or keys & set(kinds))
    ]


def values_of(piece: Piece, stored: dict[str, np.ndarray]) -> np.ndarray:
    """The values of a piece: a run of a stored tensor, or of the transpose of a matrix of such runs."""
    if not piece.of:
        return stored[piece.name].reshape(-1)[piece.first : piece.first + piece.elements]
    matrix = np.concatenate([values_of(run, stored) for run in piece.of]).reshape(-1, piece.columns)
    return matrix.T.reshape(-1)[piece.first : piece.first + piece.elements]


def differing(stored: dict[str, np.ndarray], held: dict[str, np.ndarray], spare: set[str]) -> str:
    """Say what a layout from one set of tensors to another misses; empty if nothing. ``spare`` may be missing."""
    try:
        layout = find_layout(shapes_of(stored), shapes_of(held))
    except MismatchError as error:
        return f"two layouts fit: {error}"
    if lacking := set(layout.missing) - spare:
        return f"{len(lacking)} missing, such as {min(lacking)}; unused {list(layout.unused)[:3]}"
    for name, pieces in layout.stored.items():
        made = np.concatenate([values_of(piece, stored) for piece in pieces]).reshape(held[name].shape)
        if not np.array_equal(made, held[name]):
            return f"{name} has other values"
    return ""


def unmet(name: str, folder: Path) -> str:
    """Say what is not found of a small model of an architecture, saved and in memory, in both directions."""
    module = architectures.make(name)
    module.save_pretrained(folder)
    held = {n: v.detach().float().numpy() for n, v in module.state_dict().items()}
    with alnico.open_model(folder) as file:
        stored = {n: np.asarray(file.read(n), np.float32) for n in file.tensors}
    shutil.rmtree(folder)
    tied = set(getattr(module, "all_tied_weights_keys", None) or {})
    return differing(stored, held, tied) or differing(held, stored, tied)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_every_family_that_transformers_converts_is_met_or_listed(tmp_path: Path) -> None:
    found = {name: why for name in converted() if (why := unmet(name, tmp_path / name))}
    listed = {name for names in WHY_UNMET.values() for name in names}
    assert not {name: why for name, why in found.items() if name not in listed}
    assert not listed - found.keys(), "the table knows these by now"
