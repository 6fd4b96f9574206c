"""Compiles the equation of one parameter into a loop over blocks, and measures facts of tensors.

It uses scalar functions, dtypes and digests, and no files, recipes or merge methods. Only this room imports
numba, and only when a kernel is built.
"""
