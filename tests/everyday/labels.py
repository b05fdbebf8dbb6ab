"""Labels that were renumbered or guessed, and options that a reader does not use."""

from __future__ import annotations

from everyday.rows import Refused, Row

from mmdefense_tasks.image_classification import load_data

ROWS = [
    Row(
        "a size for data that has one size alone",
        lambda _: load_data("digits", image_size=8),
        Refused("image_size=8 has no effect on digits"),
    ),
]
