"""The order of things: data, Stage 0, Stage I, Stage II, the loop of steps, checkpoints, export."""
