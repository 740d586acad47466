"""Models: structure, Stage 0, filters, heads."""
