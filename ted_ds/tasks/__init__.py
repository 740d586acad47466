"""Tasks: what pred_loss and kl_loss are, how a model is read, and Stage I's disposable heads."""
