"""Readers of the layouts in which people keep captioned images, one layout a file."""
