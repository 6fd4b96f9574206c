"""Merges models in memory, and computes with task vectors."""
