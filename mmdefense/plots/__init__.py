"""Plots as typed data: a module a kind, which a defense fills and a page or a notebook draws."""
