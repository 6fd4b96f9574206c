"""The files of a merge on disk: the unfinished output, its journal, the lock, the card, the recipe."""
