"""Texts: blocks of tokens."""
