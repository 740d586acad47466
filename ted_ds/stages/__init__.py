"""A whole run, of any task, stage by stage: data, Stage 0, Stage I, Stage II, export."""
