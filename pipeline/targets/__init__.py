"""Soft targets of a teacher, and the store that keeps them by sample_id."""
