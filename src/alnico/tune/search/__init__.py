"""Searching the coefficients of a recipe by evaluation."""
