"""Small pure mathematics: dtypes, digests, noise, arcs. Knows nothing of files, models or methods."""
