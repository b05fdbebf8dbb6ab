"""Task domains: data, metric, embedded default and default victim, one module each."""
