"""Stored task vectors as sources: their manifest, how their values are encoded, and how they are put on a base."""
