"""Makes small pipelines of diffusers, without diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

UNET = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.42.1"}
VAE = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.42.1"}
TEXT = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": "float32"}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def pipeline(folder: Path, seed: int, vocabulary: dict[str, int] | None = None) -> str:
    """A pipeline whose parts have one or two small tensors."""
    random = np.random.default_rng(seed)
    for part, config in (("unet", UNET), ("vae", VAE), ("text_encoder", TEXT)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        held = {"block.0.weight": random.standard_normal((6, 5)).astype(np.float32)}
        if part == "text_encoder":
            held = {"text_model.embeddings.token_embedding.weight": held["block.0.weight"]}
        save_file(held, folder / part / FILES[part])
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary or {"a": 0, "b": 1}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return str(folder)


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {
        f"{part}/{n}": v for part, file in FILES.items() for n, v in load_file(folder / part / file).items()
    }
