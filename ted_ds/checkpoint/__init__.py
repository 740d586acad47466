"""What is kept of a run: DeepSpeed checkpoints to go on from, and the exported student."""
