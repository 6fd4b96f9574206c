"""Samplers of a search, one per file: each suggests the next point from the trials before it."""
