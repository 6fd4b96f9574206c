"""Runs units of work on the nodes of a Ray cluster."""
