"""Folders of runs as they are found: how far each is, grids of runs, tables and plots."""
