"""Fills `data.folder`: text that the target writes, and the target's states of it."""
