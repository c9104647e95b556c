"""The learning: torch models, losses, metrics and the training loop. Imports no Ray."""
