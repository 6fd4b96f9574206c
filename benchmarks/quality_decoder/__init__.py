"""Merges of fine-tunes of a decoder language model, measured. Its command is ``__main__``, its page docs/quality-decoder.md."""
