"""Stage I and Stage II: the collector and the modules whose forward is one micro-batch of a stage."""
