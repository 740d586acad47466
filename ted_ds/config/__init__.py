"""Recipes: their schema, how they are read, and the DeepSpeed configurations made from them."""
