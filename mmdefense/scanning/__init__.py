"""Scan the files, the weights and the behaviour of a model."""
