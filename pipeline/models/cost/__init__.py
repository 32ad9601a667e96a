"""What a run takes: bytes and operations. Arithmetic only."""
