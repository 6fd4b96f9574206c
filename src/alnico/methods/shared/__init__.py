"""What several methods share: trimming, electing a sign, and reading docstrings."""
