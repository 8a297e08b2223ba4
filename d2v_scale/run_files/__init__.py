"""What lies in a run directory and is read before a run begins: recipe, start, lock, complete checkpoints."""
