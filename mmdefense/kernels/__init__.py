"""Tensor code that all defenses share; it opens no batch, names no architecture, knows no paper."""
