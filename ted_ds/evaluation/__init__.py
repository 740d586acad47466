"""Scores of a model: perplexity over held-out tokens, and LAMBADA."""
