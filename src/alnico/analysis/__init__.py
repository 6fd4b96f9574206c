"""Analyzes models before and after a merge: task vectors, conflicts, suggestions, reports."""
