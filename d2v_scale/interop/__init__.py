"""Weights of other libraries to ours and back, one table of names a library."""
