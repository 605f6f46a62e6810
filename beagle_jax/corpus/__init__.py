"""Fills `data.folder` with text that the target generates, and the target's states of it."""
