"""Kinds of tasks: rows, losses, disposable heads, recorded outputs, FLOPs and scores; `base` is the contract."""
