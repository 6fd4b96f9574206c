"""Holds what several methods share: trimming, electing signs and reading docstrings."""
