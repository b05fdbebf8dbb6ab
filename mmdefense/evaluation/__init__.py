"""Victim x attack x defense x seed, measured and resumable."""
