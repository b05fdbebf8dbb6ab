"""One paper, one file: a frozen dataclass of settings and its ``_run``."""
