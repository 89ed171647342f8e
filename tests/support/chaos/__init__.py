"""The fault matrix: what goes wrong, where, and what must come of it."""
