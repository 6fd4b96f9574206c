"""Bytes on disk: headers, models that can be read in part, output files, and the files beside the weights.

Knows the safetensors format and the layout of model directories; knows no recipe and no merge method.
"""
