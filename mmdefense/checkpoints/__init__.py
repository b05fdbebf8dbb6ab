"""Load and save models and runs, safely and atomically."""
