"""Reads quantised models as numbers: one file for each way in which codes and scales are stored."""
