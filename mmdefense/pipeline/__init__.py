"""The pipelines: open a model and its data, scan, purify or evaluate it, and write results."""
