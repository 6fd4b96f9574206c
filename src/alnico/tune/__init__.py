"""Improves merges by scoring them: soups, searches, learned coefficients and statistics."""
