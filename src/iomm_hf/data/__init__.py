"""Streams, image checks, collation, and the shapes world."""
