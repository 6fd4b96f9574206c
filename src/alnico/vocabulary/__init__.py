"""Tokenizers and vocabularies, read as data: which token has which row. Runs no tokenizer."""
