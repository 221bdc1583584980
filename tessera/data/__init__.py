"""Corpora: where captioned pictures come from, and in which order they are read."""
