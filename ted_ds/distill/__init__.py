"""What is trained: the modules whose forward is one micro-batch of Stage I and Stage II, and their engine."""
