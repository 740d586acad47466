"""What is known of a recipe before it runs: the checks of `ted-ds doctor`, and what `ted-ds bench` measures."""
