"""One file per paper: a frozen dataclass of settings with a ``_run`` method."""
