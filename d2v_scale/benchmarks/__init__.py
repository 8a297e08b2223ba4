"""Measurements behind `tools/bench.py`: ratios against a peer, both taken in turns in one run."""
