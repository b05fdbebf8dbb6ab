"""From a model and its data to a result: read, scanned, purified or evaluated, and written."""
