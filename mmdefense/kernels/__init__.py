"""Tensor code shared by all defenses, independent of batch type and architecture."""
