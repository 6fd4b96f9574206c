"""Reads GGUF files, llama.cpp's format, as Hugging Face models."""
