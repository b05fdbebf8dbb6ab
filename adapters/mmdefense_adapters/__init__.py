"""Adapters, one file per model family of a library."""
