"""Draws the score of a merge against the scale of its task vectors."""
