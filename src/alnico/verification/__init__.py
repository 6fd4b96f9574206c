"""Checking finished merges: against their lock, against their inputs, and by merging them again."""
