"""Samples of several modalities: one sequence of their parts."""
