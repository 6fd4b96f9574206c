"""What a merge leaves on disk: the unfinished output, its journal, the lock, the model card and the recipe."""
