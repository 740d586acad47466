"""What `ted-ds doctor` looks at: the machine, the ranks among each other, whether a recipe fits."""
