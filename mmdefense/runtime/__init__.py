"""What accompanies a computation: seeds, progress, deadlines, states kept, and memory."""
