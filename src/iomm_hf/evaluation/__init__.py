"""Scorers. Each one judges pictures it did not make."""
