"""Publishing checkpoints on the Hub, with their model cards."""
