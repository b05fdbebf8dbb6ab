"""What a computation runs with: seeds, progress, deadlines, saved states, and memory."""
