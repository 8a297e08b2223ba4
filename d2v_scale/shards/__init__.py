"""Shards: tar files, their indexes and plans. No models."""
