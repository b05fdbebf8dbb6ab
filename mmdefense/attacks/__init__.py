"""One paper, one file: a trigger and how it is planted."""
