"""Models as values: merges in memory, and task vectors one computes with."""
