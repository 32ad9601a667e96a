"""The training loop: process, engine, step, checkpoint."""
