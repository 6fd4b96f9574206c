"""Searches the open values of a recipe by scoring candidate merges."""
