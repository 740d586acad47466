"""Readers of runs' folders: progress, grids of runs, tables and plots."""
