"""Batches and sample sets: what every domain shares, and one module for each kind of data."""
