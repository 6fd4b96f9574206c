"""Reads recipes: YAML or a mapping to a checked :class:`Recipe`. Opens no model."""
