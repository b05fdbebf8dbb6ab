"""Task domains, one module each: data, metric, embedded default data and default victims."""
