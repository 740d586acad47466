"""Measures a run (time, FLOPs, memory, GPU counters) and writes metrics.jsonl, TensorBoard and the progress bar."""
