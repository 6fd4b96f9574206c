"""LoRA adapters: folded into their base, combined without it, extracted from fine-tunes."""
