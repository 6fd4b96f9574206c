"""Compiles the equation of one parameter, and the facts, for a GPU, and holds the GPU's memory"""
