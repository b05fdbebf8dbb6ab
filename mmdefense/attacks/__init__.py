"""One file per paper: a trigger and how it is planted."""
