"""Compiles the equation of one parameter into a loop over blocks, and measures facts of whole tensors.

Knows scalar functions, dtypes and digests; knows no files, recipes or merge methods. Only this room imports numba, and
only when a kernel is built.
"""
