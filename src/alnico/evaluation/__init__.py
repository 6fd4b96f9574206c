"""Scoring models on tasks: classification, perplexity, lm-evaluation-harness, and functions of the user."""
