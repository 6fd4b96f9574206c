"""LoRA files without a config: names, scales and algebra of kohya, ComfyUI, diffusers, OneTrainer, LyCORIS."""
