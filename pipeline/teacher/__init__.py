"""The teacher pass."""
