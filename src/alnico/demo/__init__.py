"""Fetches two real models and measures how well models answer questions, without torch, for ``alnico demo``."""
