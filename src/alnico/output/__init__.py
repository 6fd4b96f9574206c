"""The files of a merge on disk: the unfinished output, its journal, the lock, the model card and the recipe."""
