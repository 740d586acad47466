"""What a run says of itself: metrics.jsonl, TensorBoard, the progress bar, memory."""
