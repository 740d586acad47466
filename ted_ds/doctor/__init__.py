"""The checks of `ted-ds doctor`: the machine, the ranks together, and whether a recipe fits."""
