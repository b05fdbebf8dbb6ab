"""Adapters: one library's model family, one file."""
