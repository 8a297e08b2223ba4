"""What networks are made of: blocks, position biases, initial values, and all sizes."""
