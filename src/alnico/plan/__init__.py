"""Plans merges from recipes and headers; refuses what cannot be merged before any tensor is read."""
