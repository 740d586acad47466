"""The loop that both stages share, its schedule, its records and its checkpoints."""
