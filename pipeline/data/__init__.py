"""Data sets on disk, and samples as tensors."""
