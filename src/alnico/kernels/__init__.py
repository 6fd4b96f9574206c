"""Compiles the equation of a parameter into a loop, or runs it with numpy, and measures facts of tensors.

It uses scalar functions, dtypes and digests, and no files, recipes or merge methods. Only this room imports
numba, and only when a kernel is built.
"""
