"""Continual pre-training, stage by stage: data, Stage 0, Stage I, Stage II, export."""
