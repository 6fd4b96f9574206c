"""Doing it: read, measure, mix, write. Sees plans and sources; no YAML, no printing."""
