"""State, optimizer, step, loop and checkpoints."""
