"""Holds small pure mathematics: dtypes, digests, noise, arcs. Uses no files, models or methods."""
