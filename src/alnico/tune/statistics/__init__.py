"""Measures Fisher information, Gram matrices and BatchNorm statistics of a model on data."""
