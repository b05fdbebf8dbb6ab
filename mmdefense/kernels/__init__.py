"""Tensor code shared by all defenses, for any kind of batch, architecture and paper."""
