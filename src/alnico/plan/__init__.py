"""Plans a merge: recipe and headers to a frozen :class:`Plan`. Refuses what cannot be merged before any tensor is read."""
